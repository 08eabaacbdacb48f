"""How far one distribution over the vocabulary is from another, position by position: KL, top-1 agreement, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trtllm_thoughtx.runtime.logits import kl_divergence, log_softmax

MAX_VALUES, MIN_POSITIONS = 2 << 20, 48


@dataclass(frozen=True)
class Loss:
    """Means over positions: KL in nats, fraction of equal top tokens, perplexities and their ratio (1.0 without targets)."""

    kl: float
    worst_kl: float
    top1_agreement: float
    perplexity_reference: float
    perplexity: float
    perplexity_ratio: float
    num_positions: int


@dataclass
class Divergence:
    """Sums over positions. `add` takes float [n, vocab] logits of both, and the tokens that came next (-1: none known)."""

    num: int = 0
    kl: float = 0.0
    num_same: int = 0
    num_targets: int = 0
    nll: float = 0.0
    nll_other: float = 0.0
    worst_kl: float = 0.0

    def add(self, reference: np.ndarray, other: np.ndarray, targets: Sequence[int] | None = None) -> None:
        p, q = log_softmax(reference), log_softmax(other)
        each = kl_divergence(p, q)
        self.num += len(p)
        self.kl += float(each.sum())
        self.worst_kl = max(self.worst_kl, float(each.max(initial=0.0)))
        self.num_same += int((p.argmax(-1) == q.argmax(-1)).sum())
        rows = [(i, t) for i, t in enumerate(targets or ()) if t >= 0]
        if rows:
            at, tokens = map(list, zip(*rows, strict=True))
            self.num_targets += len(rows)
            self.nll -= float(p[at, tokens].sum())
            self.nll_other -= float(q[at, tokens].sum())

    def summary(self) -> Loss:
        num, targets = max(self.num, 1), max(self.num_targets, 1)
        ppl, other = (math.exp(min(x / targets, 700)) for x in (self.nll, self.nll_other))
        return Loss(self.kl / num, self.worst_kl, self.num_same / num, ppl, other, other / ppl, self.num)


def spread(length: int, vocab_size: int) -> list[int]:
    """Positions of a row at which logits are kept: all, or as many, evenly spread, as a large vocabulary leaves room for."""
    count = min(length, max(MIN_POSITIONS, MAX_VALUES // vocab_size))
    return np.unique(np.linspace(0, length - 1, count).round().astype(int)).tolist()
