"""What a model does when it is stopped at each of its steps: the traces that exits are fitted to and judged by.

A trace is a whole greedy answer. Behind each of its steps the end tag is forced and the answer read, which says from where on the
answer is known; the hidden states of its tokens are what a head may know of that. Costs come from counting tokens, so that any
rule for stopping can be priced from its traces without running the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.matching import BOXED, boxed, judge
from trtllm_thoughtx.evaluate.questions import Question
from trtllm_thoughtx.evaluate.run import prompt_of
from trtllm_thoughtx.evaluate.systems import need_text
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.row import Request
from trtllm_thoughtx.text.answer import split_ids
from trtllm_thoughtx.text.opening import INSIDE
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.text import Text
from trtllm_thoughtx.text.thinking import Thinking


@dataclass
class Stop:
    """The end of a step: `place` is that of its last token among the answer's tokens, -1 before the first step; `answer` is what is
    said when the thinking ends there."""

    place: int
    num_thinking_tokens: int
    answer: str
    num_answer_tokens: int
    hidden: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # normed, [H]


@dataclass
class Trace:
    """`ids` is prompt and answer. `answer` is None where the thinking did not end."""

    question: Question
    ids: list[int]
    num_prompt: int
    num_thinking_tokens: int
    answer: str | None
    num_answer_tokens: int
    stops: list[Stop]

    @property
    def is_right(self) -> bool:
        return self.answer is not None and is_right(self.question, self.answer)


def is_right(question: Question, answer: str) -> bool:
    """Of an answer that `plain` has been through."""
    return judge(question.match, rf"\boxed{{{answer}}}" if question.match == BOXED else answer, question.accepted, question.prompt)[0]


def plain(text: str) -> str:
    """An answer in one line; of a boxed one what is in the box."""
    return " ".join((boxed(text) or text).split())


def text_for(text: Text | None, path: Path, *, needs_tags: bool) -> Text:
    """E112 for a model whose answers cannot be traced, or that has no thinking tags where they are needed."""
    text = need_text(text, path)
    if needs_tags and text.think_ids is None:
        why = "without the tags around its thinking there is nothing to stop"
        fix = "use a reasoning model; --exit_layers alone needs no tags"
        raise ThoughtxError("E112", "an exit head needs thinking tags", where=str(path), why=why, fix=fix)
    return text


def collect(
    engine: Engine, questions: Sequence[Question], max_new_tokens: int, progress: Progress, *, with_stops: bool = True
) -> list[Trace]:
    """The traces of `questions`, without hidden states. E112 for a model without a tokenizer; `with_stops`, without thinking tags."""
    text = text_for(engine.text, engine.directory.root, needs_tags=with_stops)
    params = GenerationParams(max_new_tokens=max_new_tokens, stop_ids=text.eos_ids)
    prompts = [prompt_of(asked, text) for asked in questions]
    traces: list[Trace] = []
    with progress.stage("tracing", len(questions)) as stage:
        done = _completed(engine, prompts, params, lambda: stage.advance(1))
    for asked, prompt, one in sorted(zip(questions, prompts, done, strict=True), key=lambda found: (len(found[0].prompt), found[0].id)):
        traces.append(
            _trace(text, asked, prompt, one) if with_stops else Trace(asked, [*prompt, *one.output_ids], len(prompt), 0, None, 0, [])
        )
    if with_stops:
        num_stops = sum(len(trace.stops) for trace in traces)
        with progress.stage("stopping at each step", num_stops) as stage:
            _force(engine, text, traces, GenerationParams(max_new_tokens=64, stop_ids=text.eos_ids), lambda: stage.advance(1))
    return traces


def _completed(engine: Engine, prompts: Sequence[Sequence[int]], params: GenerationParams, advance: Callable[[], None]) -> list[Completion]:
    """Of each prompt. E123 of the first one whose logits are not finite."""
    found = dict[int, Completion]()
    for index, one in engine.complete([Request(prompt, params, i, i) for i, prompt in enumerate(prompts)]):
        if isinstance(one, ThoughtxError):
            raise one
        found[index] = one
        advance()
    return [found[i] for i in range(len(prompts))]


def _trace(text: Text, asked: Question, prompt: list[int], one: Completion) -> Trace:
    thought = Thinking(text, prompt, GenerationParams())
    place, num_thinking = 0, 0
    stops = [Stop(-1, 0, "", 0)] if thought.is_step_end else []
    for place, token in enumerate(one.output_ids):
        was_inside = thought.state == INSIDE
        thought.push(token)
        if thought.is_step_end:
            stops.append(Stop(place, thought.num_tokens, "", 0))
        if was_inside and thought.state != INSIDE:
            break
    num_thinking = thought.num_tokens
    reply = split_ids(text, one.output_ids, is_open=one.is_open)
    answer = None if reply.answer is None else plain(reply.answer)
    return Trace(asked, [*prompt, *one.output_ids], len(prompt), num_thinking, answer, len(reply.answer_ids or ()), stops)


def _force(engine: Engine, text: Text, traces: Sequence[Trace], params: GenerationParams, advance: Callable[[], None]) -> None:
    """Fill in what each trace says when it is stopped at each of its steps."""
    assert text.think_ids is not None
    stops = [(trace, stop) for trace in traces for stop in trace.stops]
    rows = [[*trace.ids[: trace.num_prompt + stop.place + 1], *text.think_ids[1]] for trace, stop in stops]
    longest = engine.build.max_seq_len
    for (_, stop), one in zip(stops, _completed(engine, [row[:longest] for row in rows], params, advance), strict=True):
        stop.answer, stop.num_answer_tokens = plain(text.decode(one.output_ids)), len(one.output_ids)


def hidden_states(engine: Engine, traces: Sequence[Trace], gain: np.ndarray, epsilon: float, layers: Sequence[int]) -> list[np.ndarray]:
    """Per trace float32 [len(layers) + 1, tokens, H]: residual streams after `layers` layers, and the final norm's input.

    Sets `Stop.hidden`. The engine must have been loaded with `tap_layers`.
    """
    found = []
    for trace in traces:
        _, tapped = engine.forward_layers([trace.ids])
        kept = np.stack([tapped[layer][0] for layer in (*layers, engine.config.num_layers)])
        for stop in trace.stops:
            stop.hidden = normed(kept[-1, trace.num_prompt + stop.place], gain, epsilon)
        found.append(kept)
    return found


def normed(x: np.ndarray, gain: np.ndarray, epsilon: float) -> np.ndarray:
    """RMSNorm over the last axis, float32."""
    return (x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + epsilon) * gain).astype(np.float32)
