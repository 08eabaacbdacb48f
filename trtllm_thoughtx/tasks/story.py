"""Word problems from templates: things found and lost, told with clauses that do not matter.

A step names the verb that it accounts for, each of which occurs once in a story. The split holds out templates, the
sequence of sentence forms without names, things and amounts, so that a test story is told in a way not met in training.
"""

from __future__ import annotations

import random

from trtllm_thoughtx.tasks.item import Item

NAMES = ("Ann", "Bob", "Cy", "Dee", "Eve", "Finn", "Gus", "Hal", "Ivy", "Jo", "Kim", "Leo", "Mia", "Ned", "Ola", "Pam")
THINGS = ("apples", "pens", "books", "coins", "cards", "shells", "stamps", "nuts", "keys", "cups", "hats", "eggs")
STARTS = ("{n} has {k} {t} .", "there are {k} {t} in the box of {n} .", "at first {n} has {k} {t} .")
GAINS = {
    "finds": "{n} finds {k} more .",
    "buys": "{n} buys {k} at the shop .",
    "gets": "{n} gets {k} from {f} .",
    "makes": "then {n} makes {k} .",
    "wins": "{n} wins {k} in a game .",
}
LOSSES = {
    "loses": "{n} loses {k} .",
    "sells": "{n} sells {k} to {f} .",
    "breaks": "then {n} breaks {k} .",
    "gives": "{n} gives {k} to {f} .",
    "drops": "{n} drops {k} on the road .",
}
ASIDES = ("{f} has {k} {o} .", "{n} is {k} years old .", "the shop is {k} steps from the road .", "{f} sees {k} {o} in a box .")
QUESTIONS = ("how many {t} does {n} have ?", "how many {t} are left ?")
MAX_OPERATIONS = 4


def make(rng: random.Random, size: int) -> Item:
    name, friend = rng.sample(NAMES, 2)
    thing, other = rng.sample(THINGS, 2)
    total = rng.randint(5, 60)
    told = [(rng.choice(STARTS), total)]
    steps: list[str] = []
    verbs: list[str] = []
    for _ in range(size):
        gain = rng.random() < 0.5 if 5 <= total <= 80 else total < 5
        verb = rng.choice([verb for verb in (GAINS if gain else LOSSES) if verb not in verbs])
        amount = rng.randint(1, 99 - total) if gain else rng.randint(1, total)
        before, total = total, total + amount if gain else total - amount
        steps.append(f"{verb} {before:02d} {'+' if gain else '-'} {amount:02d} = {total:02d}")
        verbs.append(verb)
        told.append(((GAINS if gain else LOSSES)[verb], amount))
    for _ in range(rng.choice((0, 1, 1, 2))):
        told.insert(rng.randint(0, len(told)), (rng.choice(ASIDES), rng.randint(2, 99)))
    words = {"n": name, "f": friend, "t": thing, "o": other}
    told.append((rng.choice(QUESTIONS), 0))
    prompt = " ".join(form.format(k=f"{amount:02d}", **words) for form, amount in told)
    template = " ".join(form for form, _ in told)
    return Item("story", prompt, tuple(steps), f"{total:02d}", size, size, template=template)
