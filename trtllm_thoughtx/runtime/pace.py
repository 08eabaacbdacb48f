"""Whether drafts pay: what steps with and without them took, and what they wrote. Policy `auto` and prompt lookup go by it."""

from __future__ import annotations

from dataclasses import dataclass, field

NUM_TRIED = 12  # cycles of each kind that `auto` times before it decides, and then now and again ...
NUM_AT_ONCE = 4  # ... alternating, in groups of so many
TRY_AGAIN = 400  # cycles


@dataclass
class Pace:
    """Seconds and tokens of cycles with and without drafts."""

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
