"""What people see of a running release: a live table on a terminal, plain lines in a log, or JSON events, one a line, all on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtllm_thoughtx import report
from trtllm_thoughtx.errors import shown
from trtllm_thoughtx.progress import duration
from trtllm_thoughtx.release.document import KINDS
from trtllm_thoughtx.release.rates import Rates
from trtllm_thoughtx.release.schedule import State
from trtllm_thoughtx.release.step import Step

if TYPE_CHECKING:
    from rich.live import Live

COLUMNS = ("found", "waiting", "running", "made", "failed", "skipped")
ENDED = ("found", "made", "failed", "skipped", "stopped")
SECONDS_BETWEEN = 0.25  # of two pictures of the table
MAX_RUNNING = 12  # that the table names


class Watch:
    """Counts states; `changed` is called for every change, `tick` now and then."""

    def __init__(self, steps: Mapping[str, Step], rates: Rates, cores: int) -> None:
        self.steps, self.rates, self.cores = steps, rates, cores
        self.status = dict.fromkeys(steps, "waiting")
        self.open = dict(steps)
        self.began: dict[str, float] = {}
        self.num_ended = 0

    def changed(self, step: Step, state: State) -> None:
        self.status[step.key] = state.status
        if state.status == "running":
            self.began[step.key] = time.monotonic()
        else:
            self.began.pop(step.key, None)
        if state.status in ENDED:
            self.open.pop(step.key, None)
            self.num_ended += 1
        if state.status == "made":
            self.rates.add(step, state.seconds)
        self.show(step, state)

    def eta(self) -> str:
        seconds = self.rates.left(self.open.values(), self.cores)
        return "" if seconds is None or not self.open else f"about {duration(seconds)} left"

    def show(self, step: Step, state: State) -> None: ...

    def tick(self) -> None: ...

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None: ...


class Lines(Watch):
    """One line for a step that ended or is tried again."""

    def show(self, step: Step, state: State) -> None:
        head = f"{self.num_ended}/{len(self.steps)} {shown(step.name)}"
        if state.status == "made":
            rest = f"; {eta}" if (eta := self.eta()) else ""
            self.say(f"{head}: done in {duration(state.seconds)}{rest}")
        elif state.status in ("failed", "skipped") or (state.status == "waiting" and state.tries):
            self.say(f"{head}: {state.status}: {shown(state.reason, 400)}")

    @staticmethod
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Events(Lines):
    """The same for programs."""

    def show(self, step: Step, state: State) -> None:
        body: dict[str, Any] = {"event": "step", "kind": step.kind, "label": step.label, "key": step.key, "status": state.status}
        body |= {"ended": self.num_ended, "total": len(self.steps)}
        if state.status in ("made", "failed"):
            body |= {"seconds": round(state.seconds, 3), "peak_bytes": state.peak_bytes}
        if state.reason:
            body |= {"reason": state.reason, "code": state.code}
        self.say(json.dumps(body))


class Table(Watch):
    """Kinds of steps by state, and what runs, redrawn in place."""

    def __init__(self, steps: Mapping[str, Step], rates: Rates, cores: int) -> None:
        super().__init__(steps, rates, cores)
        self.drawn, self.live = 0.0, self._live()

    def _live(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        return Live(console=Console(stderr=True, markup=False, highlight=False), auto_refresh=False)

    def __enter__(self) -> Watch:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.update(self.picture(), refresh=True)
        self.live.stop()

    def tick(self) -> None:
        if time.monotonic() - self.drawn >= SECONDS_BETWEEN:
            self.drawn = time.monotonic()
            self.live.update(self.picture(), refresh=True)

    def picture(self) -> Any:
        from rich.console import Group

        counts = Counter((self.steps[key].kind, status) for key, status in self.status.items())
        kinds = [kind for kind in KINDS if any(step.kind == kind for step in self.steps.values())]
        rows = [[kind, *(counts[kind, status] or None for status in COLUMNS)] for kind in kinds]
        table = report.table(f"{self.num_ended} of {len(self.steps)} steps", ["step", *COLUMNS], rows)
        now, running = time.monotonic(), list(self.began.items())
        lines = [f"  {shown(self.steps[key].name)}  {duration(now - began)}" for key, began in running[:MAX_RUNNING]]
        lines += [f"  and {len(running) - MAX_RUNNING} more"] if len(running) > MAX_RUNNING else []
        return Group(table, "\n".join([*lines, self.eta()]))


def watch_for(steps: Mapping[str, Step], rates: Rates, cores: int, *, quiet: bool, as_json: bool) -> Watch:
    kind = Watch if quiet else Events if as_json else Table if sys.stderr.isatty() else Lines
    return kind(steps, rates, cores)
