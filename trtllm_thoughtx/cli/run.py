"""`thoughtx-run`: prompts in any form in, answers out, streamed when there is one reader and one request.

The text of a single request is written as it grows and is all that stdout gets; speed and the reason for stopping go to
stderr. Several requests are a job (`jobs`): each answer is printed under its id, or appended to a file, when it is done.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from trtllm_thoughtx import files, report
from trtllm_thoughtx.checkpoint.generation_config import read_generation_config
from trtllm_thoughtx.cli.framework import one_of
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.jsonl import Bad
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.runtime.answers import Answers
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.jobs import STOP, Job, Todo, summary
from trtllm_thoughtx.runtime.trtllm import Executor, is_trtllm
from trtllm_thoughtx.text.answer import split_ids
from trtllm_thoughtx.text.opening import INSIDE, state_of
from trtllm_thoughtx.text.params import DRAFTS, PENALTIES, THINKING, GenerationParams, unused_settings
from trtllm_thoughtx.text.prompts import Prompt, prompt_rows
from trtllm_thoughtx.text.text import Text, prompt_ids, prompt_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FILTERS = ("top_k", "top_p", "min_p")
STOPS = ("stop", "stop_token_ids")
SAMPLING = (
    *("max_new_tokens", "temperature", *FILTERS, *PENALTIES, "seed", "ignore_eos", *STOPS, "num_return_sequences", "logprobs"),
    *(*THINKING, *DRAFTS),
)


def _usage(what: str, why: str, fix: str) -> ThoughtxError:
    return ThoughtxError("E001", what, where="thoughtx-run", why=why, fix=fix)


def _requests(
    prompt: str | None, input_ids: tuple[int, ...] | None, prompts: Path | None, on_error: str, progress: Progress
) -> tuple[list[Prompt], list[Bad]]:
    """The requests that the flags name, and the lines that are none; E001 unless exactly one of the three is given."""
    one_of({"prompt": prompt, "input_ids": input_ids, "prompts": prompts}, "thoughtx-run")
    if prompts is not None:
        rows = prompt_rows(prompts)
        if on_error == STOP:
            rows.all()
        if rows.note:
            progress.note(rows.note)
        return rows.good, rows.bad
    if prompt == "":
        raise ThoughtxError("E140", "the prompt is empty", where="--prompt", why="there is nothing to answer", fix="give some text")
    return [Prompt(id="1", prompt=prompt, input_ids=input_ids)], []


def _template_notes(text: Text | None, requests: list[Prompt], use_template: bool, switch: str | None, kwargs: str | None) -> list[str]:
    """Set the chat template's variables; what of them, or of the template, is not applied."""
    if text is None:
        given = (("enable_thinking", switch), ("chat_template_kwargs", kwargs))
        return [f"--{name} (there is no tokenizer)" for name, value in given if value is not None]
    unread = text.set_template(switch, kwargs)
    if use_template and not text.has_template and any(request.prompt is not None for request in requests):
        unread.append("chat template (the checkpoint has none: the prompt went in as it is)")
    return unread


def _streaming(text: Text | None, stream: TextIO, params: GenerationParams) -> tuple[Callable[[int, int], None], Callable[[], None]]:
    """What to call with each token of the one answer, and at its end. Without a tokenizer, ids are written."""
    if text is None:

        def ids_on_token(row: int, token: int) -> None:
            stream.write(f"{token} ")
            stream.flush()

        return ids_on_token, lambda: None
    growing = text.stop_stream(params)

    def on_token(row: int, token: int) -> None:
        stream.write(growing.push(token))
        stream.flush()

    def at_end() -> None:
        stream.write(growing.end())

    return on_token, at_end


def _logprobs(done: Completion, text: Text | None) -> list[dict[str, Any]] | None:
    """Of each token that was written: its natural log-probability, and those of the likeliest ones, before penalties and temperature."""
    if done.top_logprobs is None or done.logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": text.decode([token], skip_special=False) if text else None, "logprob": logprob}

    written = zip(done.output_ids, done.logprobs, done.top_logprobs, strict=True)
    return [{**entry(token, logprob), "top_logprobs": [entry(*one) for one in likeliest]} for token, logprob, likeliest in written]


def _row(request: Prompt, done: Completion, text: Text | None) -> dict[str, Any]:
    reply = split_ids(text, done.output_ids, is_open=done.is_open, text_end=done.text_end)
    return {
        "id": request.id,
        "index": done.index,
        "num_prompt_tokens": done.num_prompt_tokens,
        "num_output_tokens": len(done.output_ids),
        "output_ids": done.output_ids,
        "text": text.decode(done.output_ids)[: done.text_end] if text else None,
        "reasoning": reply.reasoning,
        "answer": reply.answer,
        "stop_reason": done.stop_reason,
        "stop_string": done.stop_string,
        "logprobs": _logprobs(done, text),
        "chunk_size": done.chunk_size,
        "complexity": done.prompt_entropy,
        "single_step": done.single_step,
        "num_steps": done.num_steps,
        "num_thinking_tokens": done.num_thinking_tokens,
        "thinking_stop": done.thinking_stop,
        "num_layer_tokens": done.num_layer_tokens,
        "num_reused_tokens": done.num_reused_tokens,
        "num_probes": done.num_probes,
        "num_probes_skipped": done.num_probes_skipped,
    }


def _rows_of_trtllm(
    executor: Executor, requests: list[Prompt], given: dict[str, Any], stream: TextIO | None, *, use_template: bool
) -> list[dict[str, Any]]:
    """The answers of an engine of TensorRT-LLM's own kind, all requests at once."""
    text = executor.text
    config = text.generation_config if text else read_generation_config(executor.root)
    prompts = [prompt_ids(request, text, use_template=use_template) for request in requests]
    default = text.default_params if text else functools.partial(GenerationParams.from_generation_config, config)
    own = [prompt_settings(request, text) for request in requests]
    if any("chunk_size" in settings for settings in own):
        raise _usage("chunk_size cannot be used with an engine of TensorRT-LLM", "it has no chunk mask", "leave it out of the line")
    params = [default(**{**given, **settings}) for settings in own]
    rows = []
    for request, ids, answer in zip(requests, prompts, executor.complete(prompts, params), strict=True):
        said = text.decode(answer.output_ids) if text else None
        reply = split_ids(text, answer.output_ids, is_open=text is not None and state_of(text, ids) == INSIDE)
        row = {
            "id": request.id,
            "num_prompt_tokens": len(ids),
            "num_output_tokens": len(answer.output_ids),
            "output_ids": answer.output_ids,
        }
        rows.append({**row, "text": said, "reasoning": reply.reasoning, "answer": reply.answer, "stop_reason": answer.stop_reason})
        if stream is not None:
            print(f"[{request.id}] {said if said is not None else answer.output_ids}", file=stream, flush=True)
    return rows


def run_requests(
    *,
    engine_dir: Path,
    prompt: str | None = None,
    input_ids: tuple[int, ...] | None = None,
    prompts: Path | None = None,
    no_chat_template: bool = False,
    enable_thinking: str | None = None,
    chat_template_kwargs: str | None = None,
    backend: str | None = None,
    chunk_size: int | str | None = None,
    num_threads: int | None = None,
    exact: bool = False,
    verify_key: Path | None = None,
    lora_dir: Path | None = None,
    output: Path | None = None,
    resume: bool = False,
    on_error: str = STOP,
    output_logits_npy: Path | None = None,
    stream: TextIO | None = None,
    progress: Progress = SILENT,
    **sampling: Any,
) -> dict[str, Any]:
    """Complete the requests and return one row for each; `stream` gets the text for people. Sampling flags of None keep the
    checkpoint's settings. E001 and E140 for wrong requests, E122 for those that do not fit the engine: all before the first one runs."""
    assert set(sampling) <= set(SAMPLING), sampling
    if resume and output is None:
        raise _usage("--resume needs --output", "there is nothing to go on with", "name the file that the stopped run wrote")
    requests, bad = _requests(prompt, input_ids, prompts, on_error, progress)
    num_answers = len(requests) * (sampling.get("num_return_sequences") or 1)
    if output_logits_npy is not None and num_answers != 1:
        raise _usage("--output_logits_npy takes one request and one answer", f"there are {num_answers}", "run the requests one by one")
    if output_logits_npy is not None:
        report.check_file_output(output_logits_npy)
    if is_trtllm(engine_dir):
        others = {"backend": backend, "chunk_size": chunk_size, "num_threads": num_threads, "exact": exact, "verify_key": verify_key}
        others |= {"output": output, "output_logits_npy": output_logits_npy, "on_error": on_error if bad else None}
        for name, value in others.items():
            if value:
                what = f"--{name} cannot be used with an engine of TensorRT-LLM"
                raise _usage(what, "it is run by that package's own executor", "leave it out, or build for another --backend")
        given = {name: value for name, value in sampling.items() if value is not None}
        executor = Executor(engine_dir)
        try:
            unread = _template_notes(executor.text, requests, not no_chat_template, enable_thinking, chat_template_kwargs)
            if unread:
                progress.note(f"not applied: {', '.join(unread)}")
            rows = _rows_of_trtllm(executor, requests, given, stream, use_template=not no_chat_template)
        finally:
            executor.close()
        return {"engine_dir": str(engine_dir), "backend": "tensorrt-llm", "results": rows, "num_errors": 0, "not_applied": unread}
    answers = None if output is None else Answers(output, resume=resume)
    engine = Engine.load(engine_dir, backend, num_threads, exact=exact, verify_key=verify_key)
    try:
        if backend is None and engine.overlooked:
            progress.note(f"note: {engine.overlooked}")
        adapter = None if lora_dir is None else engine.load_adapter(lora_dir)
        unread = _template_notes(engine.text, requests, not no_chat_template, enable_thinking, chat_template_kwargs)
        given = {name: value for name, value in sampling.items() if value is not None}
        params = engine.default_params(**given)
        ignored = unused_settings(engine.generation_config, given)
        ignored += tuple(f"--{name}" for name in FILTERS if name in given and params.is_greedy)
        ignored += ("--logprobs",) if "logprobs" in given and stream is not None and output is None else ()
        if unread:
            progress.note(f"not applied: {', '.join(unread)}")
        if ignored:
            progress.note(
                f"not applied: {', '.join(ignored)} (no use for it here, or the checkpoint's setting is malformed or not supported)"
            )

        def todo(request: Prompt) -> Todo:
            own = prompt_settings(request, engine.text)
            size = own.pop("chunk_size", chunk_size)
            settings = engine.default_params(**{**given, **own})
            ids = prompt_ids(request, engine.text, use_template=not no_chat_template)
            return Todo(request, ids, settings, size, 0 if "seed" in own else request.place)

        is_streamed = stream is not None and output is None and len(requests) == 1 and not bad and params.num_return_sequences == 1
        on_token, at_end = _streaming(engine.text, stream, params) if is_streamed and stream is not None else (None, None)

        def done(one: Todo, completions: Sequence[Completion]) -> list[dict[str, Any]]:
            rows = [_row(one.request, completion, engine.text) for completion in completions]
            for row in rows if stream is not None and not is_streamed and output is None else ():
                name = row["id"] if len(rows) == 1 else f"{row['id']}, {row['index']}"
                print(f"[{name}] {row['text'] if row['text'] is not None else row['output_ids']}", file=stream, flush=True)
            return rows

        job = Job(engine, answers, on_error, progress, is_file=prompts is not None, adapter=adapter)
        results = job.run(requests, bad, todo, done, on_token, return_logits=output_logits_npy is not None)
        if at_end is not None and stream is not None:
            at_end()
            stream.write("\n")
    finally:
        engine.close()
    if output_logits_npy is not None:
        with files.atomic_file(output_logits_npy) as file:
            np.save(file, np.asarray(job.last[0].logits, np.float32), allow_pickle=False)
    stats = job.stats
    speed = stats["num_decoded"] / stats["decode_seconds"] if stats["num_decoded"] and stats["decode_seconds"] else None
    for line in summary(results):
        progress.note(line)
    progress.note(f"{f'{speed:.1f} tokens/s decoding' if speed else 'no decode step'}, {engine.backend}")
    return {
        "engine_dir": str(engine_dir),
        "backend": engine.backend,
        "results": results,
        "num_errors": sum("error" in row for row in results),
        "num_kept": job.num_kept,
        "output": None if output is None else str(output),
        "tokens_per_second": speed,
        **{
            name: stats[name]
            for name in ("prefill_seconds", "decode_seconds", "num_reused", "num_read_again", "num_drafted", "num_accepted")
        },
        "not_applied": [*ignored, *unread],
        "sampling": {name: getattr(params, name) for name in SAMPLING},
    }
