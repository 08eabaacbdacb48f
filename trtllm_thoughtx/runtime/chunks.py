"""How large a request's chunks are: as it asks, or from how unsure the model is of the prompt.

    complexity = mean over the prompt of H(next token), in nats
    complexity < threshold_low      the answer is given in a single step, without a chain of thought
    otherwise                       chunk_size = base_size * complexity, rounded to a multiple of 16, from 16 to max_chunk_size

Complexity comes from the prefill itself. The largest chunk that the engine takes is read first, at most; as far as the chosen
chunk reaches, these tokens saw what it shows them, so only those behind it are fed once more. At most `NUM_ROWS` positions of a
call are projected to logits, evenly spaced, and each call counts by its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trtllm_thoughtx.config import AUTO, CHUNK_STEP, BuildConfig

__all__ = ["AUTO", "Choice", "choose", "entropy", "spread"]

NUM_ROWS = 32


@dataclass(frozen=True)
class Choice:
    """What was chosen for one request. `complexity` in nats; None when the chunk size was given."""

    chunk_size: int
    complexity: float | None = None
    single_step: bool = False


def entropy(logits: np.ndarray) -> np.ndarray:
    """Shannon entropy in nats of the softmax over the last axis, float64 [...]."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    weights = np.exp(z)
    total = weights.sum(-1)
    return np.log(total) - (weights * z).sum(-1) / total


def choose(complexity: float, build: BuildConfig) -> Choice:
    """The rule at the top of this file, with the engine's thresholds."""
    size = CHUNK_STEP * round(build.base_size * complexity / CHUNK_STEP)
    return Choice(min(max(CHUNK_STEP, size), build.max_chunk_size), complexity, complexity < build.threshold_low)


def spread(num_tokens: int, num_rows: int) -> list[int]:
    """`num_rows` of the places 0 .. num_tokens - 1, evenly spaced, the last one among them; with repeats where there are fewer."""
    return [max(0, (i + 1) * num_tokens // num_rows - 1) for i in range(num_rows)]
