"""Logits must not depend on how a prompt is run: alone, in a batch of other lengths, a token at a time, or prefilled in segments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.validate.golden import Prompt

SEGMENTS = (1, 7, 16)


Run = list[tuple[Prompt, int, np.ndarray]]  # of each prompt the logits [positions, vocab] from a position on


def prefilled(engine: Engine, prompts: Sequence[Prompt], segment: int | None = None) -> Run:
    """In one batch; in segments of so many tokens."""
    found = engine.forward([p.ids for p in prompts], chunk_size=prompts[0].chunk_size, segment=segment)
    return [(prompt, 0, logits) for prompt, logits in zip(prompts, found, strict=True)]


def decoded(engine: Engine, prompts: Sequence[Prompt], num_prompt: Sequence[int]) -> Run:
    """In one batch, teacher-forced from `num_prompt[b]` tokens on."""
    found = engine.decode_logits([p.ids for p in prompts], num_prompt, chunk_size=prompts[0].chunk_size)
    return [(prompt, num - 1, logits) for prompt, num, logits in zip(prompts, num_prompt, found, strict=True)]


def longest(engine: Engine, prompts: Sequence[Prompt]) -> tuple[Prompt, list[int]]:
    """The longest prompt, and those of `SEGMENTS` that cut it and that the engine takes."""
    prompt = max(prompts, key=lambda p: len(p.ids))
    return prompt, [size for size in SEGMENTS if size <= engine.build.max_input_len and size < len(prompt.ids)]
