"""A rule for stopping, priced on traces: what it would have answered, and what that would have cost.

`fixed sequence`: thresholds are tried from the strictest down, as far as the first that loses more than allowed, so that trying many
of them does not spend the error (Angelopoulos et al., arXiv 2110.01052, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trtllm_thoughtx.calibrate.exits.traces import Stop, Trace, is_right
from trtllm_thoughtx.checkpoint.exits import READY, ExitHead
from trtllm_thoughtx.evaluate.statistics import mcnemar

NEARLY = 0.015  # of all generated tokens
GRID = (*(1 - 10.0 ** -np.arange(4, 1, -0.25)), *np.arange(0.98, 0.29, -0.02))


@dataclass(frozen=True)
class Outcome:
    """What a rule made of one trace. Tokens are those that the model read or wrote."""

    is_right: bool
    num_generated: int
    num_tokens: int


@dataclass(frozen=True)
class Savings:
    """Accuracy and savings of a rule against the whole traces, and the exact test of equal accuracy."""

    num_items: int
    accuracy_full: float
    accuracy: float
    only_full_right: int
    only_exit_right: int
    p_accuracy: float
    saved_of_generated_tokens: float
    saved_of_all_tokens: float


def ready(head: ExitHead, stop: Stop) -> float:
    """What the engine's exit head says at a stop, in [0, 1]."""
    score = float(stop.hidden.astype(np.float64) @ head.weight[READY].astype(np.float64) + head.bias[READY])
    return 1 / (1 + float(np.exp(-min(max(score, -60.0), 60.0))))


def outcome(trace: Trace, stop: Stop | None) -> Outcome:
    """`stop` None: the whole trace."""
    if stop is None:
        generated, right = trace.num_thinking_tokens + 1 + trace.num_answer_tokens, trace.is_right
    else:
        generated = stop.num_thinking_tokens + 1 + stop.num_answer_tokens
        right = is_right(trace.question, stop.answer)
    return Outcome(right, generated, trace.num_prompt + generated)


def apply(traces: Sequence[Trace], rule: Callable[[Trace], Stop | None]) -> Savings:
    full, cut = [outcome(trace, None) for trace in traces], [outcome(trace, rule(trace)) for trace in traces]
    only_full = sum(a.is_right and not b.is_right for a, b in zip(full, cut, strict=True))
    only_cut = sum(b.is_right and not a.is_right for a, b in zip(full, cut, strict=True))
    return Savings(
        num_items=len(traces),
        accuracy_full=sum(one.is_right for one in full) / len(full),
        accuracy=sum(one.is_right for one in cut) / len(cut),
        only_full_right=only_full,
        only_exit_right=only_cut,
        p_accuracy=mcnemar(only_full, only_cut),
        saved_of_generated_tokens=1 - sum(one.num_generated for one in cut) / sum(one.num_generated for one in full),
        saved_of_all_tokens=1 - sum(one.num_tokens for one in cut) / sum(one.num_tokens for one in full),
    )


def by_head(head: ExitHead, threshold: float) -> Callable[[Trace], Stop | None]:
    return lambda trace: next((stop for stop in trace.stops if ready(head, stop) >= threshold), None)


def oracle(trace: Trace) -> Stop | None:
    """The first stop at which the answer is that of the whole trace."""
    return next((stop for stop in trace.stops if stop.answer == trace.answer), None)


def choose_threshold(head: ExitHead, traces: Sequence[Trace], max_loss: float) -> float:
    """A threshold that loses at most `max_loss`, a fraction of the items: of those that the fixed sequence allows, the strictest that saves
    nearly as much as the best of them (`NEARLY`), since the loss on other questions is not known exactly. 1 where none is allowed."""
    allowed = [(1.0, 0.0)]
    for threshold in GRID:
        found = apply(traces, by_head(head, float(threshold)))
        if found.accuracy_full - found.accuracy > max_loss:
            break
        allowed.append((float(threshold), found.saved_of_generated_tokens))
    best = max(saved for _, saved in allowed)
    return round(next(threshold for threshold, saved in allowed if saved >= best - NEARLY), 6)
