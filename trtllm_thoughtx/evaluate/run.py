"""Ask a system all the questions, judge what it writes, and keep a `Record` of each."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, listed
from trtllm_thoughtx.evaluate.matching import MATCHES, boxed, judge
from trtllm_thoughtx.evaluate.questions import Question
from trtllm_thoughtx.evaluate.record import Record, Result
from trtllm_thoughtx.evaluate.systems import TRUNCATED, System, Written
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.runtime.sampling import PENALTIES, GenerationParams
from trtllm_thoughtx.tasks import item
from trtllm_thoughtx.text.answer import split_ids
from trtllm_thoughtx.text.opening import INSIDE, opened, state_of
from trtllm_thoughtx.text.text import Text

OFTEN_OFF = ("min_p", *PENALTIES, "stop", "stop_token_ids")


def evaluate(system: System, questions: Sequence[Question], params: GenerationParams, progress: Progress | None = None) -> Result:
    """Answers in batches of questions of like length; records in the order of the questions. E122 before anything runs when one
    does not fit."""
    progress, load = progress or Progress.silent(), os.getloadavg()[0]
    prompts = [prompt_of(asked, system.text) for asked in questions]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    room = system.max_length - params.max_new_tokens
    if len(prompts[longest]) > room:
        need = len(prompts[longest]) + params.max_new_tokens
        long = [i for i, prompt in enumerate(prompts) if len(prompt) > room]
        named = listed([f"{questions[i].where or f'question {questions[i].id}'} has {len(prompts[i])} tokens" for i in long])
        why = f"--max_new_tokens is {params.max_new_tokens}, and {named}"
        fix = f"lower --max_new_tokens or --lengths, or build an engine with more room: thoughtx-build --max_seq_len {need}"
        what = f"a question needs {need} tokens, the system takes {system.max_length}"
        raise ThoughtxError("E122", what, where=system.description["path"], why=why, fix=fix)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)) if system.batch_size > 1 else list(range(len(prompts)))
    records: dict[int, Record] = {}
    with progress.stage(f"asking {system.description['name']}", len(questions)) as stage:
        for start in range(0, len(order), system.batch_size):
            batch = order[start : start + system.batch_size]
            written = system.write([prompts[i] for i in batch], params, batch)
            for i, one in zip(batch, written, strict=True):
                records[i] = judged(questions[i], prompts[i], one, system.text)
            stage.advance(len(batch))
    conditions: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        **{name: value for name in OFTEN_OFF if (value := getattr(params, name)) != getattr(GenerationParams(), name)},
        "seed": params.seed,
        **params.engine_flags,
        "batch_size": system.batch_size,
        "match": {match: num for match in MATCHES if (num := sum(asked.match == match for asked in questions))},
        "machine": {"cpu": platform.processor() or platform.machine(), "num_cpus": os.cpu_count(), "load": load},
    }
    return Result(system=dict(system.description), conditions=conditions, records=tuple(records[i] for i in range(len(questions))))


def prompt_of(asked: Question, text: Text) -> list[int]:
    """Ids of the chat; of a cut question with the thought behind it, closed."""
    ids = text.chat(asked.prompt)
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
