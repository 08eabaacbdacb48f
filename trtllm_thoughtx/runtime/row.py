"""One request on its way from a prompt to a `Completion`: what it was asked, what it wrote, and what it writes next.

The next token is the sampler's choice unless the thinking must end there (`thinking`): then the end tag is written instead, token by
token like any other, so that other rows, streams and logits see nothing special.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from trtllm_thoughtx.runtime.chunks import Choice
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.runtime.logits import Scores, log_probability, top_logprobs
from trtllm_thoughtx.runtime.lookup import Lookup
from trtllm_thoughtx.runtime.probe import ProbeAnswers
from trtllm_thoughtx.runtime.sampling import Sampler
from trtllm_thoughtx.text import thinking
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.stream import StopStream
from trtllm_thoughtx.text.thinking import Thinking

SCORED = "scored"
STREAMS_APART = 1 << 40  # the random streams of a prompt's several answers: no request has so many prompts


@dataclass(frozen=True)
class Request:
    """What one row is asked for. `index`: its number among the requests; `stream`: of its random numbers; `chunk_size`: tokens, "auto", or
    None: as the engine was built. One of higher `priority` waits less (see `scheduler`).

    With `continuations`, equally long and different in their last token at most, nothing is written: they are scored behind the prompt."""

    prompt: Sequence[int]
    params: GenerationParams
    index: int
    stream: int
    keeps_logits: bool = False
    keeps_logprobs: bool = False
    chunk_size: int | str | None = None
    priority: int = 0
    keeps_prompt_logprobs: bool = False
    continuations: tuple[tuple[int, ...], ...] = ()
    adapter: str | None = None  # by name, of those that are loaded

    @property
    def fed(self) -> list[int]:
        """What is read: the prompt, and what follows it in all continuations."""
        return [*self.prompt, *(self.continuations[0][:-1] if self.continuations else ())]


@dataclass
class Row:
    """`prompt` is what is fed before its first token (a thinking closed at once included)."""

    request: Request
    prompt: list[int]
    eos_ids: frozenset[int]
    max_seq_len: int
    choice: Choice | None = None  # the chunk size, where there is one
    exit_threshold: float | None = None
    draft_cost: float = 0.5  # of one that is looked up, in steps
    thought: Thinking | None = None
    stream: StopStream | None = None  # looks for what stops the text
    reason: str | None = None  # why it ended
    output: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # what must be written next ...
    why: str = ""  # ... and why the thinking ends by it
    probes: ProbeAnswers = field(default_factory=ProbeAnswers)
    is_settled: bool = False  # by a probe, behind the step that just ended
    began: float = 0.0  # when its prompt was begun, by the caller's clock
    num_reused: int = 0  # tokens of the prompt whose KV was copied
    offered: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # [W, V], what it may be written from next ...
    exit_probs: np.ndarray = field(
        default_factory=lambda: np.zeros((0, 2), np.float32)
    )  # ... with what an exit head says there, [W, 2] ...
    drafts: list[int] = field(default_factory=list)  # ... behind the last token fed and each of these
    num_used: int = 0  # of `offered`

    @functools.cached_property
    def sampler(self) -> Sampler:
        """Of this row alone; the prompt must be there."""
        return Sampler(self.params, 1, streams=[self.request.stream], prompts=[self.prompt], first=self.request.index)

    @functools.cached_property
    def lookup(self) -> Lookup:
        return Lookup([*self.prompt, *self.output], self.draft_cost)

    @functools.cached_property
    def scores(self) -> Scores:
        return Scores(self.request.continuations)

    @property
    def first_wanted(self) -> int:
        """The first place of what is fed whose logits are looked at."""
        return 0 if self.request.keeps_prompt_logprobs else len(self.request.prompt if self.request.continuations else self.prompt) - 1

    @property
    def params(self) -> GenerationParams:
        return self.request.params

    @property
    def chunk_size(self) -> int | None:
        return self.choice.chunk_size if self.choice else None

    @property
    def is_live(self) -> bool:
        return self.reason is None

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end it."""
        return self.params.stops | (frozenset() if self.params.ignore_eos else self.eos_ids)

    @property
    def awaits_probe(self) -> bool:
        """A step has just ended, and probe answers are asked for."""
        return self.params.exit_probe is not None and self.thought is not None and self.thought.is_step_end

    @property
    def can_probe(self) -> bool:
        """It awaits a probe whose answer could end the thinking here."""
        return self.awaits_probe and self.is_live and not self.forced and self.thought is not None and not self.thought.budget_spent

    @property
    def max_drafts(self) -> int:
        return 0 if self.awaits_probe else self.params.max_new_tokens - len(self.output) - 1

    def offer(self, drafts: list[int], logits: np.ndarray, exit_probs: np.ndarray) -> None:
        """What the next tokens may be written from, and what an exit head says there: behind the last token fed, and behind each draft."""
        self.drafts, self.offered, self.exit_probs, self.num_used = drafts, logits, exit_probs, 0

    def next_token(self, picked: int, readiness: float) -> int:
        """`picked` by the sampler, or a token that ends the thinking; `readiness`: what the exit head says of the last token."""
        thought = self.thought
        if thought is None:
            return picked
        if not self.forced and (why := self._must_end(thought, picked, readiness)):
            self.why = why
            self.forced += thought.closing()
        if not self.forced:
            thought.push(picked)
            return picked
        token = self.forced.pop(0)
        if not self.forced:
            thought.end(self.why)
        return token

    def _must_end(self, thought: Thinking, picked: int, readiness: float) -> str | None:
        if thought.is_end_tag(picked):
            return None
        why = thought.budget_spent or (None if thought.admits(picked) else thinking.DEPTH)
        if why or not thought.is_step_end:
            return why
        if self.exit_threshold is not None and readiness >= self.exit_threshold:
            return thinking.HEAD
        return thinking.PROBE if self.is_settled else None

    def look_at(self, logits: np.ndarray, following: Sequence[int]) -> None:
        """Logits [tokens, V] from `first_wanted` on, as they come, and the tokens that follow there: one less at the end."""
        if self.request.continuations:
            self.scores.add(logits)
        for values, token in zip(logits, following, strict=False) if self.request.keeps_prompt_logprobs else ():
            self.prompt_logprobs.append(log_probability(values, token))
            self.prompt_top_logprobs.append(top_logprobs(values, self.params.logprobs or 0))

    def append(self, token: int, logits: np.ndarray) -> None:
        """Write `token`, which was picked from `logits` [V]."""
        num_top = self.params.logprobs
        if self.params.prompt_lookup:
            self.lookup.push(token)
        self.output.append(token)
        self.sampler.note(0, token)
        if self.request.keeps_logits:
            self.logits.append(logits.copy())
        if self.request.keeps_logprobs or num_top is not None:
            self.logprobs.append(log_probability(logits, token))
        if num_top is not None:
            self.top_logprobs.append(top_logprobs(logits, num_top))
        if self.stream is not None:
            self.stream.push(token)
        self.reason = self._reason(token)

    def _reason(self, token: int) -> str | None:
        if token in self.stop_ids:
            return "eos" if token in self.eos_ids and not self.params.ignore_eos else "stop"
        if self.stream is not None and self.stream.is_done:
            return "stop"
        if len(self.output) >= self.params.max_new_tokens:
            return "length"
        return "capacity" if len(self.prompt) + len(self.output) >= self.max_seq_len else None

    def completion(self, num_layer_tokens: int, seconds: float) -> Completion:
        """What there is of it, which is all unless it was cancelled."""
        choice, thought, stream, num_top = self.choice, self.thought, self.stream, self.params.logprobs
        if thought is not None:
            thought.finish()
        return Completion(
            output_ids=self.output,
            stop_reason=str(self.reason),
            num_prompt_tokens=len(self.request.prompt),
            num_reused_tokens=self.num_reused,
            chunk_size=self.chunk_size,
            logits=np.stack(self.logits) if self.logits else None,
            logprobs=self.logprobs if self.request.keeps_logprobs or num_top is not None else None,
            top_logprobs=self.top_logprobs if num_top is not None else None,
            prompt_logprobs=self.prompt_logprobs if self.request.keeps_prompt_logprobs else None,
            scores=self.scores.found if self.request.continuations and self.reason == SCORED else None,
            prompt_top_logprobs=self.prompt_top_logprobs if self.request.keeps_prompt_logprobs else None,
            text_end=stream.num_chars if stream is not None and stream.is_done else None,
            stop_string=stream.found if stream is not None else None,
            prompt_entropy=choice.prompt_entropy if choice else None,
            single_step=choice is not None and choice.single_step,
            is_open=thought is not None and thought.was_open,
            num_steps=thought.num_steps if thought else 0,
            num_thinking_tokens=thought.num_tokens if thought else 0,
            thinking_stop=thought.stop if thought else None,
            num_layer_tokens=num_layer_tokens,
            seconds=seconds,
            num_probes=self.probes.num_done,
            num_probes_skipped=self.probes.num_skipped,
        )
