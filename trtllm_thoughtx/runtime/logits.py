"""Logits to log-probabilities, and what is computed from them: entropy, KL divergence, the likeliest tokens. All in float64, in nats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trtllm_thoughtx.errors import ThoughtxError

Score = tuple[float, bool]  # sum of log-probabilities in nats, and whether greedy decoding would write it


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [..., vocab]."""
    wide = _centred(logits)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def entropy(logits: np.ndarray) -> np.ndarray:
    """Shannon entropy of the softmax over the last axis, float64 [...]."""
    wide = _centred(logits)
    weights = np.exp(wide)
    total = weights.sum(-1)
    return np.log(total) - (weights * wide).sum(-1) / total


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of log-probabilities [..., vocab], float64 [...], at least 0."""
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def log_probability(logits: np.ndarray, token: int) -> float:
    """Of `token`, under float [vocab]."""
    return float(log_softmax(logits)[token])


def top_logprobs(logits: np.ndarray, num: int) -> list[tuple[int, float]]:
    """The `num` likeliest tokens of float [vocab] and their log-probabilities, falling; of equal ones the lowest ids."""
    num = min(num, len(logits))
    if not num:
        return []
    ids = np.flatnonzero(logits >= np.partition(logits, len(logits) - num)[len(logits) - num])
    ids = ids[np.argsort(-logits[ids], kind="stable")][:num]
    values = log_softmax(logits)
    return [(int(i), float(values[i])) for i in ids]


class Scores:
    """Of continuations that are equally long and differ in their last token at most, from the logits that they are written from."""

    def __init__(self, continuations: Sequence[Sequence[int]]) -> None:
        self.continuations, self.num_seen = continuations, 0
        self._found: list[Score] = [(0.0, True)] * len(continuations)

    def add(self, logits: np.ndarray) -> None:
        """The next rows of them, float [rows, vocab]. E123 when one is not finite."""
        if not np.isfinite(logits).all():
            why = "the numbers left the range of the engine's type, or the weights are damaged"
            fix = "build the engine with more range (thoughtx-build --dtype float32) and compare it with its checkpoint (thoughtx-validate)"
            raise ThoughtxError("E123", "logits are not finite", where="a text to be scored", why=why, fix=fix)
        for values, best in zip(log_softmax(logits), logits.argmax(-1), strict=True):
            self._found = [
                (total + float(values[ids[self.num_seen]]), is_greedy and int(best) == ids[self.num_seen])
                for (total, is_greedy), ids in zip(self._found, self.continuations, strict=True)
            ]
            self.num_seen += 1

    @property
    def found(self) -> list[Score]:
        """Of each of them, once all logits are there."""
        assert all(len(ids) == self.num_seen for ids in self.continuations)
        return self._found


def _centred(logits: np.ndarray) -> np.ndarray:
    """float64, the largest of the last axis 0."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide
