"""Thresholds of the adaptive chunk size, fitted on some questions and judged on others.

    base_size      the smallest whose chunks lose at most `max_loss` of the right answers that the largest chunk gives
    threshold_low  the largest below which a single step loses no more than that either

Whether choosing pays is asked on the questions that nothing was fitted to: against the one chunk size that needs as much memory
on average, and against the same chunk sizes dealt out at random. Right or wrong, the answer is reported.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trtllm_thoughtx.calibrate.chunks.asking import Asker
from trtllm_thoughtx.calibrate.chunks.windows import settings
from trtllm_thoughtx.config import CHUNK_STEP, BuildConfig
from trtllm_thoughtx.evaluate.questions import Question
from trtllm_thoughtx.evaluate.record import Record
from trtllm_thoughtx.evaluate.statistics import mcnemar, mean_interval
from trtllm_thoughtx.runtime import chunks
from trtllm_thoughtx.validate.golden import ChunkSpec

NUM_BASES = 60
Rights = dict[int, list[bool]]  # for each chunk size of `grid`, which questions were answered rightly with it


@dataclass(frozen=True)
class Thresholds:
    base_size: float
    threshold_low: float  # 0: no prompt is answered in a single step


@dataclass(frozen=True)
class Point:
    """Accuracy of chunks that need `mean_slots` on average: chosen by the prompt, dealt out at random, one size for all."""

    mean_slots: float
    chosen: float
    random: float
    fixed: float


@dataclass(frozen=True)
class Way:
    """One way to give chunks to the questions that are judged on, and what choosing has over it."""

    system: str
    mean_chunk_size: float
    mean_slots: float
    accuracy: float
    tokens: float
    chosen_minus_this: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True)
class Adaptive:
    """The fitted thresholds, and what they are worth on the questions that nothing was fitted to."""

    base_size: float
    threshold_low: float
    num_fitted: int
    num_judged: int
    complexity: dict[str, float]
    rank_correlation: float | None
    curve: list[Point]
    systems: list[Way]
    beats_fixed_and_random: bool


def grid(largest: int) -> list[int]:
    """Chunk sizes that are asked with: doubling from 16, and the largest."""
    return sorted({*(CHUNK_STEP << i for i in range(24) if CHUNK_STEP << i < largest), largest})


def sizes_of(entropies: Sequence[float], thresholds: Thresholds, window: ChunkSpec) -> list[int]:
    """The chunk size that an engine chooses for each prompt entropy."""
    build = BuildConfig(**settings(window, 1 << 24), base_size=thresholds.base_size, threshold_low=thresholds.threshold_low)
    return [chunks.choose(nats, build).chunk_size for nats in entropies]


def _bases(entropies: Sequence[float], window: ChunkSpec) -> list[float]:
    """From all chunks smallest to all chunks largest."""
    lowest, highest = CHUNK_STEP / max(max(entropies), 1e-3), window.chunk_size / max(min(entropies), 1e-3)
    return [float(base) for base in np.geomspace(lowest, highest, NUM_BASES)]


def _floors(sizes: Sequence[int], right: Rights) -> list[int]:
    return [max(size for size in right if size <= chosen) for chosen in sizes]


def fit_base(entropies: Sequence[float], right: Rights, window: ChunkSpec, max_loss: float) -> float:
    """Tokens per nat."""
    allowed = np.mean(right[max(right)]) - max_loss
    bases = _bases(entropies, window)
    for base in bases:
        chosen = _floors(sizes_of(entropies, Thresholds(base, 0.0), window), right)
        if np.mean([right[size][i] for i, size in enumerate(chosen)]) >= allowed:
            return base
    return bases[-1]


def fit_threshold(entropies: Sequence[float], thought: Sequence[bool], single: Sequence[bool], max_loss: float) -> float:
    """nats; 0 when no prompt may be answered in a single step. Losses count over all questions."""
    order = np.argsort(entropies, kind="stable")
    lost = np.cumsum([float(thought[i]) - float(single[i]) for i in order]) / len(order)
    good = [place for place in range(len(order)) if lost[place] <= max_loss and single[order[place]]]
    if not good:
        return 0.0
    last = good[-1]
    above = entropies[order[last + 1]] if last + 1 < len(order) else entropies[order[last]] + 1e-6
    threshold = (entropies[order[last]] + above) / 2
    # With a prompt of the same entropy on the other side the cut would not be where it was judged.
    return float(threshold) if threshold > entropies[order[last]] else 0.0


def fit_and_judge(
    asker: Asker,
    fitting: Sequence[Question],
    judging: Sequence[Question],
    window: ChunkSpec,
    max_loss: float,
    tick: Callable[[], None],
    *,
    has_tags: bool = True,
) -> Adaptive:
    """Thresholds from `fitting`, and what they do on `judging`. A model without thinking tags has no single-step answers."""
    fitted, judged = _by_size(asker, fitting, window, tick), _by_size(asker, judging, window, tick)
    entropies = asker.entropies(fitting, window)
    low = 0.0
    if has_tags:
        single = [one.correct for one in asker.ask([replace(q, thought="") for q in fitting], window)]
        low = fit_threshold(entropies, fitted[window.chunk_size], single, max_loss)
    tick()
    thresholds = Thresholds(fit_base(entropies, fitted, window, max_loss), low)
    needed = [min((size for size in fitted if fitted[size][i]), default=None) for i in range(len(fitting))]
    told = [(nats, size) for nats, size in zip(entropies, needed, strict=True) if size is not None]
    others = asker.entropies(judging, window)
    points = curve(others, judged, window)
    systems = _judge(asker, judging, others, window, thresholds, tick)
    return Adaptive(
        base_size=thresholds.base_size,
        threshold_low=thresholds.threshold_low,
        num_fitted=len(fitting),
        num_judged=len(judging),
        complexity={"mean": float(np.mean(entropies)), "min": min(entropies), "max": max(entropies)},
        rank_correlation=rank_correlation([nats for nats, _ in told], [size for _, size in told]),
        curve=points,
        systems=systems,
        beats_fixed_and_random=all(one.interval[0] > 0 for one in systems if one.system in ("fixed", "random")),
    )


def _by_size(asker: Asker, questions: Sequence[Question], window: ChunkSpec, tick: Callable[[], None]) -> Rights:
    right = {}
    for size in grid(window.chunk_size):
        right[size] = [one.correct for one in asker.ask(questions, window, [size] * len(questions))]
        tick()
    return right


def curve(entropies: Sequence[float], right: Rights, window: ChunkSpec) -> list[Point]:
    """Accuracy over memory as the base grows: chunks chosen, the same dealt out at random (its expectation), and one size for all
    that needs as much (between two sizes, as if both were used in turn). Chosen sizes count as the largest of `grid` below them."""
    sizes = sorted(right)
    fractions = {size: float(np.mean(right[size])) for size in sizes}
    points, seen = [], set[float]()
    for base in _bases(entropies, window):
        chosen = _floors(sizes_of(entropies, Thresholds(base, 0.0), window), right)
        mean = float(np.mean(chosen))
        if mean not in seen:
            seen.add(mean)
            made = float(np.mean([right[size][i] for i, size in enumerate(chosen)]))
            dealt = float(np.mean([fractions[size] for size in chosen]))
            fixed = float(np.interp(mean, sizes, [fractions[size] for size in sizes]))
            points.append(Point(window.sink + (window.left + 1) * mean, made, dealt, fixed))
    return points


def _judge(
    asker: Asker,
    judging: Sequence[Question],
    entropies: Sequence[float],
    window: ChunkSpec,
    thresholds: Thresholds,
    tick: Callable[[], None],
) -> list[Way]:
    """The engine itself with the fitted thresholds, beside fixed and random chunks of the same memory."""
    sizes = sizes_of(entropies, thresholds, window)
    equal = min(window.chunk_size, CHUNK_STEP * -(-round(float(np.mean(sizes))) // CHUNK_STEP))
    dealt = list(sizes)
    random.Random(0).shuffle(dealt)
    base = {"base_size": thresholds.base_size}
    ways: dict[str, tuple[list[int], Callable[[], list[Record]]]] = {
        "largest": ([window.chunk_size], lambda: asker.ask(judging, window)),
        "chosen": (sizes, lambda: asker.ask_auto(judging, window, base)),
        "fixed": ([equal], lambda: asker.ask(judging, window, [equal] * len(judging))),
        "random": (dealt, lambda: asker.ask(judging, window, dealt)),
    }
    if thresholds.threshold_low:
        both = {**base, "threshold_low": thresholds.threshold_low}
        ways["chosen, single steps"] = (sizes, lambda: asker.ask_auto(judging, window, both))
    asked = {}
    for name, (_, answer) in ways.items():
        asked[name] = answer()
        tick()
    rows = []
    for name, records in asked.items():
        apart = [float(b.correct) - float(a.correct) for a, b in zip(records, asked["chosen"], strict=True)]
        size = float(np.mean(ways[name][0]))
        rows.append(
            Way(
                system=name,
                mean_chunk_size=size,
                mean_slots=window.sink + (window.left + 1) * size,
                accuracy=float(np.mean([one.correct for one in records])),
                tokens=float(np.mean([one.num_tokens for one in records])),
                chosen_minus_this=float(np.mean(apart)),
                interval=mean_interval(apart),
                p=mcnemar(sum(x < 0 for x in apart), sum(x > 0 for x in apart)),
            )
        )
    return rows


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, with mean ranks for ties; None where one of the two does not vary."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    if len(first) < 3 or any(not rank.std() for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
