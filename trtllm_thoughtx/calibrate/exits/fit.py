"""Fits the exit head and the exit adapters: convex problems, solved to convergence with NumPy.

- logistic regression with a ridge, by Newton's method (Hastie, Tibshirani & Friedman 2009, section 4.4.1);
- reduced-rank regression for an adapter's map (Izenman 1975): the least squares map from the normed stage output to what the other
  layers add, cut to its best rank in the outputs' own metric.
"""

from __future__ import annotations

import numpy as np

MAX_STEPS = 50
TOLERANCE = 1e-6


def logistic(x: np.ndarray, y: np.ndarray, ridge: float = 1e-2) -> tuple[np.ndarray, float]:
    """Weights float32 [H] and bias of P(y = 1 | x) = sigmoid(x w + b); x float [N, H], y bool [N].

    `ridge` is per example. Where all y are equal the bias alone says so.
    """
    num, size = x.shape
    fraction = float(y.mean())
    if fraction in (0.0, 1.0):
        return np.zeros(size, np.float32), 10.0 if fraction else -10.0
    middle, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64) + 1e-6
    z = np.hstack([(x - middle) / scale, np.ones((num, 1))])
    penalty = np.full(size + 1, ridge)
    penalty[-1] = 0.0
    w = np.zeros(size + 1)
    w[-1] = np.log(fraction / (1 - fraction))
    for _ in range(MAX_STEPS):
        probability = _sigmoid(z @ w)
        slope = z.T @ (probability - y) / num + penalty * w
        if np.abs(slope).max() < TOLERANCE:
            break
        curve = (z * (probability * (1 - probability))[:, None]).T @ z / num + np.diag(penalty + 1e-9)
        w -= _damped(w, np.linalg.solve(curve, slope), z, y, penalty)
    weight = w[:-1] / scale
    return weight.astype(np.float32), float(w[-1] - middle @ weight)


def _damped(w: np.ndarray, step: np.ndarray, z: np.ndarray, y: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """The step, halved until the loss does not rise."""

    def loss(at: np.ndarray) -> float:
        score = z @ at
        return float(np.mean(np.logaddexp(0, score) - y * score) + (penalty * at * at).sum() / 2)

    now = loss(w)
    for _ in range(30):
        if loss(w - step) <= now:
            break
        step = step / 2
    return step


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))


def low_rank(x: np.ndarray, y: np.ndarray, rank: int, ridge: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    """`down` float32 [rank, H] and `up` float32 [H, rank] with y close to up (down x); x, y float [N, H]."""
    z = x.astype(np.float64)
    gram = z.T @ z
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram)
    full = np.linalg.solve(gram, z.T @ y)  # [H, H]: y ~ x full
    fitted = z @ full
    _, axes = np.linalg.eigh(fitted.T @ fitted)
    best = axes[:, ::-1][:, :rank]
    return np.ascontiguousarray((full @ best).T, np.float32), np.ascontiguousarray(best, np.float32)
