"""How long steps take: seconds a byte of weights by kind, measured on the steps that were made, and what is left of a release by them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.files import atomic_file, read_json
from trtllm_thoughtx.release.step import Step
from trtllm_thoughtx.report import to_json

FILE = "rates.json"


@dataclass
class Rates:
    """Sums over measured steps by kind: their number, seconds, bytes."""

    sums: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Rates:
        """Of a store; none where it has none that can be read."""
        try:
            found = read_json(root, FILE, code="E160")
            good = {kind: [float(x) for x in row] for kind, row in found.items() if len(row) == 3 and row[0] > 0}
        except (ThoughtxError, AttributeError, TypeError, ValueError):
            good = {}
        return cls(good)

    def write(self, root: Path) -> None:
        with atomic_file(root / FILE) as file:
            file.write(to_json(self.sums).encode())

    def add(self, step: Step, seconds: float) -> None:
        row = self.sums.setdefault(step.kind, [0.0, 0.0, 0.0])
        for index, value in enumerate((1.0, seconds, float(step.size))):
            row[index] += value

    def seconds(self, step: Step) -> float | None:
        """A start costs something whatever the size: half of the mean duration is taken as such. None for a kind that never ran."""
        if step.kind not in self.sums:
            return None
        count, seconds, size = self.sums[step.kind]
        mean = seconds / count
        return mean if not size or not step.size else mean / 2 + mean / 2 * step.size / (size / count)

    def left(self, steps: Iterable[Step], cores: int) -> float | None:
        """Seconds until all of `steps` are done on `cores`, if they kept them busy; None when nothing is known of one of them."""
        total = 0.0
        for step in steps:
            seconds = self.seconds(step)
            if seconds is None:
                return None
            total += seconds * (cores if step.alone else min(step.cores, cores))
        return total / cores
