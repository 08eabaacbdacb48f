"""What `Engine.generate` returns, and what it cost: `Completion` of one prompt, `Stats` of one call."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trtllm_thoughtx.runtime.logits import Score


@dataclass(frozen=True)
class Completion:
    """One answer. `stop_reason` is eos | stop | length (max_new_tokens) | capacity (the engine's max_seq_len) | cancelled | scored;
    `logits` float32 [new tokens, vocab], those that each token was picked from, and `logprobs` (natural, temperature 1), when asked for.
    `top_logprobs` are the likeliest tokens at each place, as `GenerationParams.logprobs` asks for them. `text_end`: only so many characters
    of the decoded ids are the text, because `stop_string`, or a stop token, follows; None: all of them. `index`: which of the prompt's
    `num_return_sequences` this is.
    `prompt_entropy` (nats) and `single_step` where the engine chose the chunk size: see `chunks`.

    `is_open`: the thinking was open where `output_ids` begin (see `answer`).
    `num_steps` and `num_thinking_tokens` count what was written between the thinking tags; `thinking_stop` says why it ended (see
    `thinking`), None where nothing was thought. `num_layer_tokens` is this row's part of `Work`, probes and rejected drafts included."""

    output_ids: list[int]
    stop_reason: str
    num_prompt_tokens: int
    chunk_size: int | None
    logits: np.ndarray | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    prompt_logprobs: list[float] | None = None  # of all prompt tokens but the first, where the request keeps them
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None
    scores: list[Score] | None = None  # of the request's continuations
    text_end: int | None = None
    stop_string: str | None = None
    index: int = 0
    prompt_entropy: float | None = None
    single_step: bool = False
    is_open: bool = False
    num_steps: int = 0
    num_thinking_tokens: int = 0
    thinking_stop: str | None = None
    num_layer_tokens: int = 0
    num_reused_tokens: int = 0  # of the prompt, whose KV was copied from another sequence
    num_probes: int = 0
    num_probes_skipped: int = 0  # they could not have been taken back from a bounded cache
    seconds: float = field(default=0.0, compare=False)  # from when its prompt began to be read

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for `stop_reason`."""
        return "length" if self.stop_reason in ("length", "capacity") else "stop"


@dataclass
class Work:
    """Work that was done, whatever it was good for: tokens times layers, rows of logits, and bytes of weights read.

    A call reads the weights of the parts that it runs once, whatever its batch; embeddings are looked up and not counted. Padding is
    not counted as tokens.
    """

    num_layer_tokens: int = 0
    num_head_rows: int = 0
    num_calls: int = 0
    weight_bytes: int = 0

    def add(self, num_layers: int, num_tokens: int, num_head_rows: int, weight_bytes: int) -> None:
        self.num_layer_tokens += num_layers * num_tokens
        self.num_head_rows += num_head_rows
        self.num_calls += 1
        self.weight_bytes += weight_bytes


@dataclass
class Stats:
    """Wall-clock and counts of the last `generate`, and all work since it began, forward passes included."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_prefilled: int = 0
    num_reused: int = 0  # of them, those whose KV was copied from another sequence
    num_read_again: int = 0  # prompt tokens that were fed twice because the engine chose the chunk size
    num_decoded: int = 0  # tokens that came from decode steps: all but each answer's first
    num_cycles: int = 0  # of drafts and their verification
    num_drafted: int = 0
    num_accepted: int = 0  # drafts
    work: Work = field(default_factory=Work)
