"""`thoughtx-run`: prompts in any form in, answers out, streamed when there is one reader and one request.

The text of a single request is written as it grows and is all that stdout gets; speed and the reason for stopping go to
stderr. Several requests are printed one after the other, each under its id, when all are done.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from trtllm_thoughtx import files, report
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.runtime.engine import Completion, Engine
from trtllm_thoughtx.runtime.sampling import DRAFTS, PENALTIES, THINKING, GenerationParams, unused_settings
from trtllm_thoughtx.text.answer import split_ids
from trtllm_thoughtx.text.prompts import Prompt, read_prompts
from trtllm_thoughtx.text.text import Text, prompt_ids

if TYPE_CHECKING:
    from collections.abc import Callable

FILTERS = ("top_k", "top_p", "min_p")
STOPS = ("stop", "stop_token_ids")
SAMPLING = (
    *("max_new_tokens", "temperature", *FILTERS, *PENALTIES, "seed", "ignore_eos", *STOPS, "num_return_sequences", "logprobs"),
    *(*THINKING, *DRAFTS),
)


def _usage(what: str, why: str, fix: str) -> ThoughtxError:
    return ThoughtxError("E001", what, where="thoughtx-run", why=why, fix=fix)


def _requests(prompt: str | None, input_ids: tuple[int, ...] | None, prompts: Path | None, progress: Progress) -> list[Prompt]:
    """The requests that the flags name; E001 unless exactly one of the three is given."""
    given = [flag for flag, value in (("--prompt", prompt), ("--input_ids", input_ids), ("--prompts", prompts)) if value is not None]
    if len(given) != 1:
        why = f"given: {', '.join(given)}" if given else "none was given"
        raise _usage("exactly one of --prompt, --input_ids and --prompts is needed", why, "thoughtx-run --help shows an example of each")
    if prompts is not None:
        return read_prompts(prompts, progress.note)
    if prompt == "":
        raise ThoughtxError("E140", "the prompt is empty", where="--prompt", why="there is nothing to answer", fix="give some text")
    return [Prompt(id="1", prompt=prompt, input_ids=input_ids)]


def _ids(request: Prompt, text: Text | None, use_template: bool) -> list[int]:
    if use_template or request.prompt is None or text is None:
        return prompt_ids(request, text)
    return text.raw(request.prompt)


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
        "complexity": done.complexity,
        "single_step": done.single_step,
        "num_steps": done.num_steps,
        "num_thinking_tokens": done.num_thinking_tokens,
        "thinking_stop": done.thinking_stop,
        "num_layer_tokens": done.num_layer_tokens,
        "num_probes": done.num_probes,
        "num_probes_skipped": done.num_probes_skipped,
    }


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
    output_logits_npy: Path | None = None,
    stream: TextIO | None = None,
    progress: Progress | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Complete the requests and return one row for each; `stream` gets the text for people. Sampling flags of None keep the
    checkpoint's settings. E001 and E140 for wrong requests, E122 for those that do not fit the engine."""
    assert set(sampling) <= set(SAMPLING), sampling
    progress = progress or Progress.silent()
    requests = _requests(prompt, input_ids, prompts, progress)
    num_answers = len(requests) * (sampling.get("num_return_sequences") or 1)
    if output_logits_npy is not None and num_answers != 1:
        raise _usage("--output_logits_npy takes one request and one answer", f"there are {num_answers}", "run the requests one by one")
    if output_logits_npy is not None:
        report.check_file_output(output_logits_npy)
    engine = Engine.load(engine_dir, backend, num_threads, exact=exact)
    try:
        unread = _template_notes(engine.text, requests, not no_chat_template, enable_thinking, chat_template_kwargs)
        rows = [_ids(request, engine.text, not no_chat_template) for request in requests]
        given = {name: value for name, value in sampling.items() if value is not None}
        params = engine.default_params(**given)
        ignored = unused_settings(engine.generation_config, given)
        ignored += tuple(f"--{name}" for name in FILTERS if name in given and params.is_greedy)
        ignored += ("--logprobs",) if "logprobs" in given and stream is not None else ()
        if unread:
            progress.note(f"not applied: {', '.join(unread)}")
        if ignored:
            progress.note(
                f"not applied: {', '.join(ignored)} (no use for it here, or the checkpoint's setting is malformed or not supported)"
            )
        requests = [request for request in requests for _ in range(params.num_return_sequences)]
        is_streamed = stream is not None and len(requests) == 1
        on_token, at_end = _streaming(engine.text, stream, params) if is_streamed and stream is not None else (None, None)
        completions = engine.generate(rows, params, on_token, return_logits=output_logits_npy is not None, chunk_size=chunk_size)
        if at_end is not None and stream is not None:
            at_end()
            stream.write("\n")
    finally:
        engine.close()
    results = [_row(request, done, engine.text) for request, done in zip(requests, completions, strict=True)]
    if output_logits_npy is not None:
        with files.atomic_file(output_logits_npy) as file:
            np.save(file, np.asarray(completions[0].logits, np.float32), allow_pickle=False)
    if stream is not None and not is_streamed:
        for row in results:
            name = row["id"] if params.num_return_sequences == 1 else f"{row['id']}, {row['index']}"
            stream.write(f"[{name}] {row['text'] if row['text'] is not None else row['output_ids']}\n")
    stats = engine.stats
    speed = stats.num_decoded / stats.decode_seconds if stats.num_decoded and stats.decode_seconds else None
    for row in results:
        if row["complexity"] is not None:
            how = "a single step" if row["single_step"] else "a chain of thought"
            progress.note(f"{row['id']}: complexity {row['complexity']:.3f} nats, chunks of {row['chunk_size']}, {how}")
        if row["thinking_stop"] is not None:
            much = f"{row['num_steps']} steps, {row['num_thinking_tokens']} tokens"
            progress.note(f"{row['id']}: {much} of thinking, ended by {row['thinking_stop']}")
    num_new = sum(row["num_output_tokens"] for row in results)
    reasons = ", ".join(dict.fromkeys(row["stop_reason"] for row in results))
    rate = f"{speed:.1f} tokens/s decoding" if speed else "no decode step"
    progress.note(f"{num_new} tokens, stopped by {reasons}; {rate}, {engine.backend}")
    return {
        "engine_dir": str(engine_dir),
        "backend": engine.backend,
        "results": results,
        "tokens_per_second": speed,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "num_read_again": stats.num_read_again,
        "num_drafted": stats.num_drafted,
        "num_accepted": stats.num_accepted,
        "not_applied": [*ignored, *unread],
        "sampling": {name: getattr(params, name) for name in SAMPLING},
    }
