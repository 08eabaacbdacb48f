"""Progress of long steps on stderr: a bar on a terminal, a few plain lines in a log, nothing when quiet.

A step reports itself with `with progress.stage("weights", total, "bytes") as stage: stage.advance(n)`. On a terminal that is
a rich bar with speed and time left. Elsewhere (CI logs, pipes) it is one line when the stage starts, at most one more every
ten seconds, and one when it ends; results never pass through here, they belong to stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

Unit = Literal["bytes", "steps"]
SECONDS_BETWEEN_LINES = 10.0
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def _amount(count: float, unit: Unit) -> str:
    if unit == "steps":
        return f"{count:.0f}"
    power = 0
    while count >= 1024 and power < len(_BYTE_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} B" if power == 0 else f"{count:.1f} {_BYTE_UNITS[power]}"


def duration(seconds: float) -> str:
    """For people: 40 s, 7 min, 2.5 h."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


class Stage:
    """One running step. `advance(n)` adds n bytes or steps; `done` is the sum so far."""

    def __init__(self, label: str, total: int | None, unit: Unit) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0

    def advance(self, count: int = 1) -> None:
        self.done += count


class _LogStage(Stage):
    """Plain lines for a stream that is not a terminal."""

    def __init__(self, label: str, total: int | None, unit: Unit, stream: TextIO) -> None:
        super().__init__(label, total, unit)
        self.stream, self.started = stream, time.monotonic()
        self.printed = self.started
        self._line(f"{label} ..." if total is None else f"{label} ({_amount(total, unit)}{' steps' if unit == 'steps' else ''}) ...")

    def _line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def advance(self, count: int = 1) -> None:
        super().advance(count)
        now = time.monotonic()
        if now - self.printed < SECONDS_BETWEEN_LINES:
            return
        self.printed, elapsed = now, now - self.started
        text = f"{self.label}: {_amount(self.done, self.unit)}"
        if self.total:
            left = elapsed * max(self.total - self.done, 0) / max(self.done, 1)
            text += f" of {_amount(self.total, self.unit)}, eta {_clock(left)}"
        self._line(text)

    def close(self) -> None:
        self._line(f"{self.label}: done in {time.monotonic() - self.started:.1f} s")


class _BarStage(Stage):
    """A rich bar on a terminal."""

    def __init__(self, label: str, total: int | None, unit: Unit, bar: Bar) -> None:
        super().__init__(label, total, unit)
        self.bar = bar
        self.task = bar.add_task(label, total=total)

    def advance(self, count: int = 1) -> None:
        super().advance(count)
        self.bar.update(self.task, completed=self.done)


class Progress:
    """Where steps report. `Progress()` writes to stderr; `SILENT` writes nothing."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None, silent: bool = False) -> None:
        self.quiet, self.is_silent, self.stream = quiet or silent, silent, sys.stderr if stream is None else stream

    def note(self, text: str) -> None:
        """One line that a person should see: a warning, a choice that was made."""
        if not self.quiet:
            print(text, file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """One line that a person must see, even one who asked for no progress."""
        if not self.is_silent:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def stage(self, label: str, total: int | None = None, unit: Unit = "steps") -> Iterator[Stage]:
        """Run one step. `total` is in `unit`; None when it is not known."""
        if self.quiet:
            yield Stage(label, total, unit)
        elif self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            counts = (DownloadColumn(binary_units=True), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn())
            with Bar(*columns, console=Console(file=self.stream)) as bar:
                yield _BarStage(label, total, unit, bar)
        else:
            stage = _LogStage(label, total, unit, self.stream)
            yield stage
            stage.close()  # not reached when the step fails: "done" would be a lie


SILENT = Progress(silent=True)
