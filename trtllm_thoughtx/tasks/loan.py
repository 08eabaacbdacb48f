"""Loan approval: check an applicant against numbered rules, citing the rule at each hop, until one fails.

The thought suffices at the first rule that fails; only an approval needs all of them. Facts that no rule mentions do not
matter.
"""

from __future__ import annotations

import random

from trtllm_thoughtx.tasks.item import Item
from trtllm_thoughtx.tasks.story import NAMES

FIELDS = ("income", "debt", "age", "savings", "score", "term")
ASIDES = ("{n} has a new car .", "{n} is an old friend of the bank .", "the bank is on the long road .")
APPROVED, DENIED = "approved", "denied"
MAX_RULES = 4


def make(rng: random.Random, size: int) -> Item:
    """`size` rules are checked; when the last of them fails there may be more behind it that need no look."""
    passes = rng.random() < 0.4
    num_rules = size if passes else rng.randint(size, MAX_RULES)
    fields = rng.sample(FIELDS, rng.randint(num_rules, len(FIELDS)))
    values = {name: rng.randint(1, 98) for name in fields}
    rules, steps = [], []
    for i, name in enumerate(rng.sample(fields, num_rules)):
        holds = rng.random() < 0.5 if i >= size else passes or i < size - 1
        above = rng.random() < 0.5
        value = values[name]
        bound = rng.randint(0, value - 1) if holds == above else rng.randint(value + 1, 99)
        rules.append(f"rule {i + 1} {name} {'>' if above else '<'} {bound:02d} ;")
        if i < size:
            steps.append(f"rule {i + 1} {name} {value:02d} {'>' if above else '<'} {bound:02d} {'yes' if holds else 'no'}")
    name = rng.choice(NAMES)
    facts = " ".join(f"{field} {values[field]:02d} ," for field in fields)
    aside = rng.choice(ASIDES).format(n=name) if rng.random() < 0.6 else ""
    parts = [f"loan for {name} :", facts, aside, " ".join(rules), "approved ?"]
    answer = APPROVED if passes else f"{DENIED} rule {size}"
    return Item("loan", " ".join(part for part in parts if part), tuple(steps), answer, size, size)
