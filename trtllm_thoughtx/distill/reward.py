"""The score of a path: nothing unless it ends in the right answer, then coherence and brevity on top.

    correct * (w_answer + w_thought * coherence + w_efficiency * (1 - length / budget))

With the default weights 0.4, 0.3 and 0.3 a right answer is worth 0.4 to 1. Length and budget are tokens. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trtllm_thoughtx.distill.traces import Trace
from trtllm_thoughtx.tasks import item
from trtllm_thoughtx.tasks.item import Item
from trtllm_thoughtx.text.answer import Reply


@dataclass(frozen=True)
class Score:
    reward: float
    correct: bool
    coherence: float
    num_steps: int


def coherence_of(asked: Item | Trace, steps: list[str]) -> float:
    """Share of sound steps. Of a trace: of steps that stand in one of its chains, in any order, blanks aside."""
    if isinstance(asked, Item):
        return item.coherence(asked, steps)
    known = {" ".join(step.split()) for chain in (asked.steps, *asked.others) for step in chain}
    return sum(step in known for step in steps) / len(steps) if steps else 0.0


def score(asked: Item | Trace, reply: Reply, length: int, budget: int, weights: Sequence[float]) -> Score:
    """Judge a path of `length` tokens. One that is longer than its budget earns no brevity, and loses none."""
    steps = item.steps_of(reply.reasoning or "")
    coherence = coherence_of(asked, steps)
    correct = reply.answer is not None and reply.answer.split() == asked.answer.split()
    brevity = min(1.0, max(0.0, 1 - length / budget))
    reward = weights[0] + weights[1] * coherence + weights[2] * brevity if correct else 0.0
    return Score(reward, correct, coherence, len(steps))


def budget_of(asked: Item | Trace, count: Callable[[str], int]) -> int:
    """Tokens of the whole chain said twice, as a trace with every step rechecked has them, and the answer."""
    return 2 * sum(count(f"{step}{item.BOUNDARY}") for step in asked.steps) + count(asked.answer) + 2
