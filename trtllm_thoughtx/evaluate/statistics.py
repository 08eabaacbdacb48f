"""Intervals and tests of what an evaluation counts: proportions, paired differences, calibration.

Items are the unit: they are drawn at random, so the intervals say what other items of the same kind would give. Differences are
paired, on the same items, which removes how hard the items are from the comparison.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
NUM_RESAMPLES = 10_000
NUM_BINS = 10


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """Interval of a proportion (Wilson, JASA 22, 1927); right even at 0 and 1. (0, 1) for no items."""
    if num == 0:
        return 0.0, 1.0
    fraction, extra = num_right / num, Z95 * Z95 / num
    middle = (fraction + extra / 2) / (1 + extra)
    half = Z95 / (1 + extra) * math.sqrt(fraction * (1 - fraction) / num + extra / (4 * num))
    low, high = middle - half, middle + half
    return (0.0 if num_right == 0 else low), (1.0 if num_right == num else high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of `values` (Efron & Tibshirani 1993, chapter 13)."""
    given = np.asarray(values, np.float64)
    if len(given) < 2 or not given.std():
        return (float(given.mean()),) * 2 if len(given) else (math.nan, math.nan)
    rng = np.random.default_rng(0)
    block = max(1, (1 << 22) // len(given))  # resamples at a time, so that memory stays bounded
    means = np.concatenate([
        given[rng.integers(0, len(given), (min(block, NUM_RESAMPLES - start), len(given)))].mean(axis=1)
        for start in range(0, NUM_RESAMPLES, block)
    ])  # fmt: skip
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(num_only_first: int, num_only_second: int) -> float:
    """Two-sided exact p that two systems are right equally often, from the items where just one of them is."""
    num, few = num_only_first + num_only_second, min(num_only_first, num_only_second)
    if num == 0:
        return 1.0
    logs = [math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) - num * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * sum(math.exp(value) for value in logs))


def calibration_error(confidences: Sequence[float], correct: Sequence[bool]) -> float:
    """Expected calibration error over bins of equal width (Guo et al., arXiv 1706.04599, section 2), in [0, 1]."""
    if not confidences:
        return math.nan
    sure, right = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
    bins = np.minimum((sure * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def word_f1(answer: Sequence[str], expected: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, counted with repeats; 1 when both are empty."""
    shared = sum((Counter(answer) & Counter(expected)).values())
    return 2 * shared / (len(answer) + len(expected)) if shared else float(not answer and not expected)
