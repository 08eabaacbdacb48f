"""Logits to log-probabilities, and what is computed from them: entropy, KL divergence, the likeliest tokens. All in float64, in nats."""

from __future__ import annotations

import numpy as np


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


def _centred(logits: np.ndarray) -> np.ndarray:
    """float64, the largest of the last axis 0."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide
