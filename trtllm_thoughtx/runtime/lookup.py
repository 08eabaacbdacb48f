"""Prompt lookup: drafts for nothing. When the last tokens of a request stand in it earlier, what followed them there may follow again.

A thought repeats its question, and an answer its thought. The drafts are checked in one call of the whole model, and what differs from
the sampler's own choice is taken back, as with drafts of an exit adapter (`drafts`); no adapter is needed. Few are drafted at first, and
twice as many each time that all of them hold.
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTHS = (5, 3)  # tokens that must agree, the longer agreement first
FEW = 2  # drafts


class Lookup:
    """Where runs of tokens of a growing text last stood."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens: list[int] = []
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
        most = min(most, self.width)
        places = (self._behind.get(tuple(self.tokens[-length:])) for length in LENGTHS if len(self.tokens) >= length)
        place = next((place for place in places if place is not None), None)
        return [] if place is None or most < 1 else self.tokens[place : place + most]

    def judge(self, num_drafted: int, num_accepted: int) -> None:
        """What became of the drafts: how many the next ones may be."""
        self.width = 2 * self.width if num_accepted == num_drafted else num_accepted + 1
