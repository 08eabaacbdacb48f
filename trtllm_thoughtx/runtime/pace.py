"""Whether drafts pay: what steps with and without them took, and what they wrote. Policy `auto` goes by it."""

from __future__ import annotations

from dataclasses import dataclass, field

NUM_TRIED = 12  # cycles of each kind that are timed before it is decided, and then now and again ...
NUM_AT_ONCE = 4  # ... alternating, in groups of so many
TRY_AGAIN = 400  # cycles


@dataclass
class Pace:
    """Seconds and tokens of cycles with and without drafts."""

    num_tried: int = NUM_TRIED
    seconds: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    num_tokens: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    num_cycles: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def pays(self) -> bool:
        """Whether drafts write more tokens in a second; both are tried first."""
        if min(self.num_cycles.values()) < self.num_tried:
            with_drafts, without = self.num_cycles[True], self.num_cycles[False]
            return with_drafts < self.num_tried and with_drafts // NUM_AT_ONCE <= without // NUM_AT_ONCE
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
