"""One generated question: what is asked, the chain that answers it, and the point at which the chain suffices.

Text is words parted by blanks, for a word-level tokenizer; numbers have two digits. A chain of thought is a list of steps;
every step ends with a blank line, the boundary that runtimes look for. After the sound steps may come redundant ones: an
earlier step once more behind the word `ok`. A hash of the item decides its split, not the seed that made it: see `Item.split`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

BOUNDARY = "\n\n"
RECHECK = "ok"
UNKNOWN = "?"  # the right answer when the thought was cut before it sufficed
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Item:
    """`steps` are the sound chain; after `num_sufficient` of them the answer is known (0: it can be read off the question)."""

    task: str
    prompt: str
    steps: tuple[str, ...]
    answer: str
    num_sufficient: int
    size: int  # what makes an item of this task harder: operands, hops, operations, rules
    traits: dict[str, int] = field(default_factory=dict)  # e.g. distance and length in words
    template: str = ""  # what the split holds out; empty: the prompt itself

    @property
    def split(self) -> str:
        """80 % of all templates train, 10 % validate, 10 % test."""
        bucket = hashlib.sha256((self.template or self.prompt).encode()).digest()[0] % 10
        return "test" if bucket == 0 else "validation" if bucket == 1 else "train"

    def answer_after(self, num_steps: int) -> str:
        """What is right to answer when the thought ends after `num_steps` sound steps."""
        return self.answer if num_steps >= self.num_sufficient else UNKNOWN

    def rechecks(self, num: int) -> tuple[str, ...]:
        """`num` redundant steps: the last ones of the chain once more, in order."""
        return tuple(f"{RECHECK} {step}" for step in self.steps[len(self.steps) - num :])


def thought(steps: tuple[str, ...] | list[str]) -> str:
    return " ".join(f"{step} {BOUNDARY}" for step in steps)


def steps_of(text: str) -> list[str]:
    """The steps of a thought that a model wrote; text behind the last boundary counts as a step too."""
    return [" ".join(part.split()) for part in text.split(BOUNDARY) if part.strip()]


def num_redundant(steps: list[str]) -> int:
    """Steps that say once more what an earlier one said, with or without `ok` before it."""
    plain = [step.removeprefix(f"{RECHECK} ") for step in steps]
    return len(plain) - len(set(plain))


def judge(item: Item, steps: list[str]) -> list[bool]:
    """Which steps are sound: the next one of the item's chain, or a recheck of one already made."""
    verdicts, made = [], 0
    for step in steps:
        if made < len(item.steps) and step == item.steps[made]:
            made += 1
            verdicts.append(True)
        else:
            verdicts.append(step.startswith(f"{RECHECK} ") and step[len(RECHECK) + 1 :] in item.steps[:made])
    return verdicts


def coherence(item: Item, steps: list[str]) -> float:
    """Share of sound steps in [0, 1]; an empty thought is coherent only where none is needed."""
    if not steps:
        return float(item.num_sufficient == 0)
    return sum(judge(item, steps)) / len(steps)
