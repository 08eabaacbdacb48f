"""Retained attention mass: the fraction of full attention's softmax mass that a window keeps.

    recall(query, head, layer) = sum over visible j of P[query, j],    P of the model with full attention

Named cumulative residual attention in SampleAttention (arXiv 2406.15486). Means, 5th percentiles and minima are over queries, heads,
layers and sequences: `everywhere`, and `where_hidden`, over the queries from which the window hides something (for all others
it is 1 by construction, so short sequences flatter the first). The first tokens may hold much mass that says nothing, so both are
given once more without them (`beyond_sinks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trtllm_thoughtx.calibrate.chunks.windows import NUM_SINKS
from trtllm_thoughtx.graph.chunked_attention import visible
from trtllm_thoughtx.validate.golden import ChunkSpec

NUM_BINS = 4000  # of a histogram of recalls: percentiles are exact to a bin
LEAST_MASS = 1e-6  # beyond the sinks; below it a fraction of it means nothing
BLOCK = 256  # queries at a time


def masks_of(windows: Sequence[ChunkSpec], length: int) -> np.ndarray:
    """What each window shows: bool [W, length, length]."""
    at = np.arange(length)
    return np.stack([visible(at, at, np.array(w.chunk_size), w.sink, w.left, w.anchors) for w in windows])


POPULATIONS = ("everywhere", "where_hidden")
KINDS = ("with_sinks", "beyond_sinks")


class Recall:
    """Recalls of every window and layer, as histograms: memory does not grow with the data."""

    def __init__(self, windows: Sequence[ChunkSpec], num_layers: int) -> None:
        self.windows = list(windows)
        shape = (len(POPULATIONS), len(KINDS), len(windows), num_layers)
        self.bins = np.zeros((*shape, NUM_BINS), np.int64)
        self.sums, self.lowest = np.zeros(shape), np.ones(shape)

    def add(self, layer: int, weights: np.ndarray, masks: np.ndarray) -> None:
        """`weights` float [heads, length, length], the softmax of one layer; `masks` from `masks_of`."""
        length = weights.shape[-1]
        causal = np.arange(length)[None] <= np.arange(length)[:, None]
        for start in range(0, length, BLOCK):
            rows = slice(start, min(start + BLOCK, length))
            block = weights[:, rows].astype(np.float32).swapaxes(0, 1)  # [q, heads, length]
            seen = masks[:, rows].transpose(1, 2, 0).astype(np.float32)  # [q, length, W]
            hides = (causal[None, rows] & ~masks[:, rows]).any(-1)  # [W, q]
            kept, rest = block @ seen, block[..., NUM_SINKS:] @ seen[:, NUM_SINKS:]  # [q, heads, W]
            mass = block[..., NUM_SINKS:].sum(-1)  # [q, heads]
            counts = mass > LEAST_MASS
            for w in range(len(self.windows)):
                for population, where in enumerate((np.ones_like(hides[w]), hides[w])):
                    among = where[:, None] & counts
                    self._count((population, 0, w, layer), kept[where, :, w].reshape(-1))
                    self._count((population, 1, w, layer), rest[..., w][among] / mass[among])

    def _count(self, at: tuple[int, int, int, int], recalls: np.ndarray) -> None:
        if not recalls.size:
            return
        recalls = np.clip(recalls, 0.0, 1.0)
        self.bins[at] += np.bincount(np.minimum((recalls * NUM_BINS).astype(np.int64), NUM_BINS - 1), minlength=NUM_BINS)
        self.sums[at] += recalls.sum(dtype=np.float64)
        self.lowest[at] = min(self.lowest[at], float(recalls.min()))

    def summary(self, window: int) -> dict[str, Any]:
        """{population: {kind: mean, p5, min, num, and `layers` with the same of each}}; None where there was nothing to count."""
        return {
            population: {kind: self._numbers((i, j, window)) for j, kind in enumerate(KINDS)} for i, population in enumerate(POPULATIONS)
        }

    def _numbers(self, at: tuple[int, int, int]) -> dict[str, Any]:
        layers = [_stats(*each) for each in zip(self.bins[at], self.sums[at], self.lowest[at], strict=True)]
        return {**_stats(self.bins[at].sum(0), self.sums[at].sum(), self.lowest[at].min()), "layers": layers}


def _stats(bins: np.ndarray, total: float, lowest: float) -> dict[str, Any]:
    num = int(bins.sum())
    if not num:
        return {"mean": None, "p5": None, "min": None, "num": 0}
    fifth = int(np.searchsorted(np.cumsum(bins), 0.05 * num)) / NUM_BINS
    return {"mean": float(total) / num, "p5": max(fifth, float(lowest)), "min": float(lowest), "num": num}
