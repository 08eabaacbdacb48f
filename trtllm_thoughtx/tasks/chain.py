"""Chain arithmetic: add two-digit operands modulo one hundred, one step for each.

The operands are numbered (`x3 = 47`) and a step names the one that it adds, so that a model can find its place in the chain.
With one operand nothing needs to be added: the answer stands in the question.
"""

from __future__ import annotations

import random

from trtllm_thoughtx.tasks.item import Item

MAX_OPERANDS = 16
OPERANDS = tuple(f"x{i + 1}" for i in range(MAX_OPERANDS))


def make(rng: random.Random, size: int) -> Item:
    values = [rng.randrange(100) for _ in range(size)]
    steps, total = [], 0
    for name, value in zip(OPERANDS[:size], values, strict=True):
        before, total = total, (total + value) % 100
        steps.append(f"{name} {before:02d} + {value:02d} = {total:02d}")
    asked = " ".join(f"{name} = {value:02d}" for name, value in zip(OPERANDS[:size], values, strict=True))
    return Item("chain", f"{asked} ?", tuple(steps), f"{total:02d}", 0 if size == 1 else size, size)
