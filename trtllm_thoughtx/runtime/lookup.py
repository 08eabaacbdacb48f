"""Prompt lookup: drafts for nothing. When the last tokens of a request stand in it earlier, what followed them there may follow again.

A thought repeats its question, and an answer its thought. The drafts are checked in one call of the whole model, and what differs from
the sampler's own choice is taken back, as with drafts of an exit adapter (`drafts`); no adapter is needed. Few are drafted at first, and
twice as many each time that all of them hold.

Whether it pays is a matter of counts, so that the same request makes the same calls every time. The unit is a step: a draft that is checked
costs `cost` of one, a draft that holds saves one. A text may lose `FREE` steps, and `ALLOWED` of those that it takes, beyond what it
has saved; where that is used up nothing is drafted. So no text is slower by more than that, as far as `cost` holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.families.formats import FORMATS

LENGTHS = (5, 3)  # tokens that must agree, the longer agreement first
FEW = 2  # drafts
FREE, ALLOWED = 0.5, 0.02  # steps, and part of them
MOST_SAVED = 4.0  # steps that are remembered
COST, COST_OF_BIT = 0.06, 0.8  # of a draft: a step reads the weights once, so a token more costs the more, the fewer bits they have


def cost_of(config: ModelConfig) -> float:
    """What a token more in a call takes, in steps. On a CPU 0.06 to 0.12 was measured in float32, and 0.15 to 0.25 in 4 bits."""
    quant = config.quantization
    return COST + COST_OF_BIT / (32 if quant is None or quant.algo is None else FORMATS[quant.algo].number.bits)


class Lookup:
    """Where runs of tokens of a growing text last stood."""

    def __init__(self, prompt: Sequence[int], cost: float) -> None:
        self.tokens: list[int] = []
        self.cost, self.saved = cost, FREE  # steps
        self.width = FEW  # drafts that the next ones are at most
        self._behind: dict[tuple[int, ...], int] = {}  # run -> the place behind it
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> None:
        """The text goes on. A run is known once something stands behind it."""
        for length in LENGTHS:
            if len(self.tokens) >= length:
                self._behind[tuple(self.tokens[-length:])] = len(self.tokens)
        self.tokens.append(token)

    def drafts(self, most: int) -> list[int]:
        """At most `most` tokens that stood behind the last ones before; none where these are new."""
        most = self.room(most)
        places = (self._behind.get(tuple(self.tokens[-length:])) for length in LENGTHS if len(self.tokens) >= length)
        place = next((place for place in places if place is not None), None)
        return [] if place is None or most < 1 else self.tokens[place : place + most]

    def room(self, most: int) -> int:
        """How many drafts may be made."""
        return min(most, self.width, int(self.saved / self.cost))

    def judge(self, num_drafted: int, num_accepted: int) -> None:
        """What became of the drafts of a step: how many the next ones may be."""
        self.saved = min(MOST_SAVED, self.saved + ALLOWED + num_accepted - self.cost * num_drafted)
        if not num_drafted:
            return
        self.width = 2 * self.width if num_accepted == num_drafted else num_accepted + 1
