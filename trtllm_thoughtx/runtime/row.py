"""One row of a batch on its way from a prompt to a `Completion`: what it was asked, what it wrote, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trtllm_thoughtx.runtime.chunks import Choice
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.runtime.probe import Trials
from trtllm_thoughtx.runtime.sampling import GenerationParams
from trtllm_thoughtx.text.stream import StopStream
from trtllm_thoughtx.text.thinking import Thinking


@dataclass
class Row:
    """`index` is its place in the batch, `prompt` what is fed before its first token (a thinking closed at once included)."""

    index: int
    params: GenerationParams
    prompt: list[int]
    num_prompt: int  # of the request alone
    choice: Choice | None = None  # the chunk size, where there is one
    thought: Thinking | None = None
    reason: str | None = None  # why it ended
    output: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    stream: StopStream | None = None  # looks for what stops the text
    forced: list[int] = field(default_factory=list)  # what must be written next ...
    why: str = ""  # ... and why the thinking ends by it
    exit_threshold: float | None = None
    trials: Trials = field(default_factory=Trials)
    is_settled: bool = False  # by a trial, behind the step that just ended
    is_held: bool = False  # a trial comes before the next token
    drafts: list[int] = field(default_factory=list)
    num_used: int = 0  # of the logits that the last call gave

    @property
    def is_live(self) -> bool:
        return self.reason is None

    @property
    def awaits_trial(self) -> bool:
        """A step has just ended, and trial answers are asked for."""
        return self.params.exit_probe is not None and self.thought is not None and self.thought.is_step_end

    def completion(self, *, has_logprobs: bool, num_layer_tokens: int) -> Completion:
        choice, thought = self.choice, self.thought
        size, complexity, single = (None, None, False) if choice is None else (choice.chunk_size, choice.complexity, choice.single_step)
        if thought is not None:
            thought.finish()
        return Completion(
            output_ids=self.output,
            stop_reason=str(self.reason),
            num_prompt_tokens=self.num_prompt,
            chunk_size=size,
            logits=np.stack(self.logits) if self.logits else None,
            logprobs=self.logprobs if has_logprobs or self.params.logprobs is not None else None,
            top_logprobs=self.top_logprobs if self.params.logprobs is not None else None,
            text_end=self.stream.num_chars if self.stream is not None and self.stream.is_done else None,
            stop_string=self.stream.found if self.stream is not None else None,
            complexity=complexity,
            single_step=single,
            is_open=thought is not None and thought.was_open,
            num_steps=thought.num_steps if thought else 0,
            num_thinking_tokens=thought.num_tokens if thought else 0,
            thinking_stop=thought.stop if thought else None,
            num_layer_tokens=num_layer_tokens,
            num_probes=self.trials.num_done,
            num_probes_skipped=self.trials.num_skipped,
        )
