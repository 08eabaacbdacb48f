"""Ask a system all the questions, judge what it writes, and keep a `Record` of each."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, counted, shown
from trtllm_thoughtx.evaluate.matching import MATCHES, boxed, judge
from trtllm_thoughtx.evaluate.questions import Question
from trtllm_thoughtx.evaluate.record import Record, Result, wrong
from trtllm_thoughtx.evaluate.systems import TRUNCATED, System, Written
from trtllm_thoughtx.jsonl import Bad
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.runtime.answers import Answers, Stamp, stamp
from trtllm_thoughtx.runtime.jobs import STOP, error_row, settings_of, together
from trtllm_thoughtx.tasks import item
from trtllm_thoughtx.text.answer import split_ids
from trtllm_thoughtx.text.opening import INSIDE, opened, state_of
from trtllm_thoughtx.text.params import PENALTIES, GenerationParams
from trtllm_thoughtx.text.text import Text, prompt_ids

OFTEN_OFF = ("min_p", *PENALTIES, "stop", "stop_token_ids")


def evaluate(
    system: System,
    questions: Sequence[Question],
    params: GenerationParams,
    progress: Progress = SILENT,
    *,
    answers: Answers | None = None,
    bad: Sequence[Bad] = (),
    on_error: str = STOP,
) -> Result:
    """Answers; records in the order of the questions, each written to `answers` when it is there. All that can be refused is refused
    before anything runs; with `on_error` row the errors of questions, and those of lines that are none (`bad`), stand in the conditions,
    and the others are asked."""
    load = os.getloadavg()[0]
    each = [replace(params, **asked.settings_for(system.text)) for asked in questions]
    streams = [0 if "seed" in asked.settings else place for place, asked in enumerate(questions)]
    prompts, refused = _checked(system, questions, params, each)
    if refused and (on_error == STOP or not prompts):
        raise together(list(refused.values()))
    stamps = _stamps(system, questions, prompts, each, streams) if answers is not None else {}
    records = _kept(answers, stamps, questions)
    errors = [error_row(one.line.id, one.error) for one in bad] + [error_row(questions[i].id, error) for i, error in refused.items()]
    order = list(prompts)
    if system.is_grouped:  # questions of like length together; as they would be undisturbed, for the same rounding
        order = sorted(prompts, key=lambda i: (-len(prompts[i]), i)) if system.batch_size > 1 else order
        batches = [order[start : start + system.batch_size] for start in range(0, len(order), system.batch_size)]
        order = [i for batch in batches if any(i not in records for i in batch) for i in batch]
    else:
        order = [i for i in order if i not in records]
    if records:
        progress.note(f"{counted(len(records), 'answer')} found, the rest follows")
    writing = contextlib.nullcontext() if answers is None else answers.writing(progress, records)
    with writing, progress.stage(f"asking {system.description['name']}", len(order)) as stage:
        if answers is not None:
            answers.write(errors)
        for place, one in system.write([prompts[i] for i in order], [each[i] for i in order], [streams[i] for i in order]):
            i = order[place]
            if isinstance(one, ThoughtxError):
                if on_error == STOP:
                    raise one
                errors.append(row := error_row(questions[i].id, one))
            else:
                made = judged(questions[i], prompts[i], one, system.text)
                said = {"output_ids": one.ids, "text": system.text.decode(one.ids)[: one.text_end]}
                records.setdefault(i, made)
                row = {**vars(made), "index": 0, **said, **(stamps[made.id]._asdict() if stamps else {})}
            if answers is not None:
                answers.write([row])
            stage.advance(1)
    if not records:
        raise ThoughtxError(**errors[0]["error"])
    conditions: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        **{name: value for name in OFTEN_OFF if (value := getattr(params, name)) != getattr(GenerationParams(), name)},
        "seed": params.seed,
        **params.engine_flags,
        "batch_size": system.batch_size,
        "match": {match: num for match in MATCHES if (num := sum(made.match == match for made in records.values()))},
        **({"errors": errors} if errors else {}),
        "machine": {"cpu": platform.processor() or platform.machine(), "num_cpus": os.cpu_count(), "load": load},
    }
    return Result(system=dict(system.description), conditions=conditions, records=tuple(records[i] for i in sorted(records)))


def _checked(
    system: System, questions: Sequence[Question], params: GenerationParams, each: Sequence[GenerationParams]
) -> tuple[dict[int, list[int]], dict[int, ThoughtxError]]:
    """Of each question by its place: its ids, or why it cannot be asked."""
    system.check(params)
    prompts, refused = dict[int, list[int]](), dict[int, ThoughtxError]()
    for i, asked in enumerate(questions):
        try:
            prompts[i] = prompt_of(asked, system.text)
            if asked.settings:
                system.check(each[i])
        except ThoughtxError as error:
            if not asked.where:
                raise
            refused[i] = error.at(asked.where)
    needs = {i: len(prompt) + each[i].max_new_tokens for i, prompt in prompts.items()}
    long = {i: need for i, need in needs.items() if need > system.max_length and i not in refused}
    most = max(needs.values(), default=0)
    fix = f"lower --max_new_tokens or --lengths, or build an engine with more room: thoughtx-build --max_seq_len {most}"
    for i, need in long.items():
        what = f"a question needs {need} tokens, the system takes {system.max_length}"
        why = f"it has {counted(len(prompts[i]), 'token')}, and --max_new_tokens is {each[i].max_new_tokens}"
        where = questions[i].where or f"{system.description['path']}, question {questions[i].id}"
        refused[i] = ThoughtxError("E122", what, where=where, why=why, fix=fix)
    return {i: prompt for i, prompt in prompts.items() if i not in refused}, dict(sorted(refused.items()))


def _stamps(
    system: System,
    questions: Sequence[Question],
    prompts: Mapping[int, Sequence[int]],
    each: Sequence[GenerationParams],
    streams: Sequence[int],
) -> dict[str, Stamp]:
    """What the record of each question depends on."""
    digest, stamps = system.sha256(), {}
    for i, ids in prompts.items():
        asked = questions[i]
        judging = {"task": asked.task, "match": asked.match, "expected": " | ".join(asked.accepted)}
        settings = {**settings_of(each[i], streams[i]), "batch_size": system.batch_size, **judging}
        stamps[asked.id] = stamp(digest, ids, settings)
    return stamps


def _kept(answers: Answers | None, stamps: Mapping[str, Stamp], questions: Sequence[Question]) -> dict[int, Record]:
    """The records that the file of answers holds, by the place of their questions; E160 for what is none of ours."""
    if answers is None:
        return {}
    answers.check(stamps)
    places, records = {asked.id: i for i, asked in enumerate(questions)}, {}
    for (name, _), row in answers.done.items():
        kept: dict[str, Any] = {one.name: row.get(one.name) for one in fields(Record)}
        if why := wrong(kept):
            fix = "choose another path for --answers"
            raise ThoughtxError("E160", "this is no answer to a question", where=f"{answers.path}, id {shown(name, 60)}", why=why, fix=fix)
        records[places[name]] = Record(**kept)
    return dict(sorted(records.items()))


def prompt_of(asked: Question, text: Text) -> list[int]:
    """Ids of the chat; of a cut question with the thought behind it, closed."""
    ids = text.chat(asked.prompt) if asked.request is None else prompt_ids(asked.request, text)
    if asked.thought is None:
        return ids
    if text.think_ids is None:
        why = "its tokenizer and chat template have no thinking tags"
        raise ThoughtxError("E112", "a thought cannot be handed over", where="--cut_share", why=why, fix="leave --cut_share out")
    thought = text.encode(asked.thought, add_special=False) if asked.thought else ()
    return [*opened(text, ids), *thought, *text.think_ids[1]]


def judged(asked: Question, prompt: Sequence[int], written: Written, text: Text) -> Record:
    is_open = state_of(text, prompt) == INSIDE if written.is_open is None else written.is_open
    reply = split_ids(text, written.ids, is_open=is_open, text_end=written.text_end)
    steps = item.steps_of(reply.reasoning or "")
    answer = confidence = None
    correct, f1 = False, 0.0
    if reply.answer is not None and reply.answer_ids is not None:
        correct, f1 = judge(asked.match, reply.answer, asked.accepted, asked.prompt)
        answer = " ".join((boxed(reply.answer) or reply.answer).split())
        at = len(written.ids) - len(reply.answer_ids)
        said = [p for i, p in zip(written.ids[at:], written.logprobs[at:], strict=True) if i not in text.eos_ids]
        confidence = min(1.0, math.exp(sum(said))) if said else None
    return Record(
        id=asked.id,
        task=asked.task,
        size=asked.size,
        mode=asked.mode,
        expected=" | ".join(asked.accepted),
        answer=answer,
        correct=correct,
        f1=f1,
        match=asked.match,
        num_prompt_tokens=len(prompt),
        num_tokens=len(written.ids),
        num_steps=len(steps),
        num_redundant=item.num_redundant(steps),
        truncated=written.stop_reason in TRUNCATED,
        seconds=written.seconds,
        confidence=confidence,
        coherence=None if asked.item is None or asked.thought is not None else item.coherence(asked.item, steps),
        thinking_stop=written.thinking_stop,
        num_layer_tokens=written.num_layer_tokens,
        traits=asked.traits,
    )
