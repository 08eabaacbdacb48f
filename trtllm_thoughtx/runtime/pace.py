"""Whether drafts pay: `Pace` holds what cycles with and without drafts took, `Timer` measures them. Policy `auto` goes by it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

NUM_TRIED = 12  # cycles of each kind that `auto` times before it decides, and then now and again ...
NUM_AT_ONCE = 4  # ... alternating, in groups of so many
TRY_AGAIN = 400  # cycles


@dataclass
class Pace:
    """Seconds and tokens of cycles with and without drafts, for one batch size.

    Tokens are those of a row that goes on, since a cycle takes about as long however many rows have ended.
    """

    seconds: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    num_tokens: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    num_cycles: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def pays(self) -> bool:
        """Whether drafts write more tokens in a second; both are tried first."""
        if min(self.num_cycles.values()) < NUM_TRIED:
            return self.num_cycles[True] // NUM_AT_ONCE <= self.num_cycles[False] // NUM_AT_ONCE
        if sum(self.num_cycles.values()) > TRY_AGAIN:
            for counts in (self.seconds, self.num_tokens, self.num_cycles):
                counts.update({True: 0, False: 0})
            return True
        rates = {drafts: self.num_tokens[drafts] / max(self.seconds[drafts], 1e-9) for drafts in (True, False)}
        return rates[True] > rates[False]

    def note(self, drafts: bool, seconds: float, num_tokens: float) -> None:
        self.seconds[drafts] += seconds
        self.num_tokens[drafts] += num_tokens
        self.num_cycles[drafts] += 1


class Timer:
    """Times the cycles of one batch; without a `pace` every cycle drafts."""

    def __init__(self, pace: Pace | None) -> None:
        self.pace, self.drafts, self.began, self.before, self.num_rows = pace, True, 0.0, 0, 1

    def start(self, num_tokens: int, num_rows: int) -> bool:
        """A cycle of `num_rows` rows begins, with so many tokens written; whether it is to draft."""
        now = time.perf_counter()
        if self.pace is None:
            return True
        if self.began:
            self.pace.note(self.drafts, now - self.began, (num_tokens - self.before) / self.num_rows)
        self.drafts, self.began, self.before, self.num_rows = self.pace.pays(), now, num_tokens, num_rows
        return self.drafts
