"""The scheduler: offers each step to the executor when what it needs is done, tries again what may pass, and leaves out what cannot be.

Work per step does not depend on the number of steps: each is looked at when the last of its needs ends, and once for each time that it
is offered; of those that wait for room, only the first few are offered at a time.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from trtllm_thoughtx.release.executor import Executor
from trtllm_thoughtx.release.step import Step
from trtllm_thoughtx.release.store import Store
from trtllm_thoughtx.release.work import LOST, OUT_OF_MEMORY, Outcome

MAY_PASS = ("E203", OUT_OF_MEMORY, "E206", LOST)
TRIES = 3
BACK_OFF = 0.5  # seconds before the second try of a full disk or a sick file system; twice as many before the third
ASK_AGAIN = 0.2  # seconds after which a step that somebody else makes is asked for again; doubles to the most
ASK_AGAIN_MOST = 2.0
LOOKAHEAD = 16  # steps that are offered while the executor takes none
WAIT = 0.5
DONE = ("found", "made")


@dataclass
class State:
    """Of one step. `status`: waiting | running | found | made | failed | skipped | stopped."""

    status: str = "waiting"
    reason: str = ""
    code: str = ""
    error: Mapping[str, str] | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    tries: int = 0


class Watch(Protocol):
    """What is told of every change."""

    def changed(self, step: Step, state: State) -> None: ...
    def tick(self) -> None: ...


class Schedule:
    """Runs `steps` (each after those that it needs). `passed(engine)`: why the engine of a gate has not passed, "" when it has."""

    def __init__(
        self, steps: Mapping[str, Step], store: Store, executor: Executor, watch: Watch, passed: Callable[[str], str] = lambda engine: ""
    ) -> None:
        self.steps, self.store, self.executor, self.watch, self.passed = dict(steps), store, executor, watch, passed
        self.states = {key: State() for key in steps}
        self._users: dict[str, list[str]] = {key: [] for key in steps}
        self._missing: dict[str, int] = {}
        self._ready: deque[str] = deque()
        self._later: list[tuple[float, str]] = []  # a heap of (when, key)
        self._pauses: dict[str, float] = {}
        self._num_open = len(steps)
        for key, step in self.steps.items():
            needs = set(step.needs)
            self._missing[key] = len(needs)
            for need in needs:
                self._users[need].append(key)
        self._due = deque(key for key, count in self._missing.items() if not count)  # all that they need has ended

    def run(self) -> dict[str, State]:
        """Until every step has ended. An exception, Ctrl-C among them, cancels what runs."""
        try:
            while self._num_open:
                while self._due:
                    self._consider(self._due.popleft())
                self._offer()
                if self._due or not self._num_open:
                    continue
                pause = WAIT if not self._later else min(WAIT, max(0.0, self._later[0][0] - time.monotonic()))
                for outcome in self.executor.wait(pause):
                    self._end(outcome)
                self.watch.tick()
            return self.states
        except BaseException:
            self.executor.cancel()
            raise

    def _offer(self) -> None:
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            self._ready.append(heapq.heappop(self._later)[1])
        refused: list[str] = []
        while self._ready and len(refused) < LOOKAHEAD:
            key = self._ready.popleft()
            step, state = self.steps[key], self.states[key]
            if lacking := self.executor.lacks(step):
                self._settle(key, "failed" if state.tries else "skipped", lacking, state.code or "E204" if state.tries else "")
            elif self.executor.take(step):
                state.status = "running"
                self.watch.changed(step, state)
            else:
                refused.append(key)
        self._ready.extendleft(reversed(refused))

    def _consider(self, key: str) -> None:
        """All that the step needs has ended."""
        step = self.steps[key]
        bad = [need for need in step.inputs if self.states[need].status not in DONE]
        if bad:
            self._settle(key, "skipped", f"{self.steps[bad[0]].name} is not there")
        elif step.gate is not None and (why := self.passed(step.gate)):  # also where it is there: limits may have changed
            self._settle(key, "skipped", f"not passed: {why}")
        elif self.store.has(key):
            self._settle(key, "found")
        else:
            self._ready.append(key)

    def _end(self, outcome: Outcome) -> None:
        step, state = self.steps[outcome.key], self.states[outcome.key]
        if outcome.status == "busy":
            pause = self._pauses[step.key] = min(ASK_AGAIN_MOST, 2 * self._pauses.get(step.key, ASK_AGAIN / 2))
            state.status, state.reason = "waiting", "somebody else makes it"
            heapq.heappush(self._later, (time.monotonic() + pause, step.key))
            return
        state.seconds, state.peak_bytes = outcome.seconds, outcome.peak_bytes
        if outcome.status != "failed":
            self._settle(step.key, outcome.status)
            return
        state.tries += 1
        state.code, state.error = outcome.code, outcome.error
        if outcome.code not in MAY_PASS or state.tries >= TRIES:
            self._settle(step.key, "failed", outcome.error.get("what", ""), outcome.code)
            return
        if outcome.code in (OUT_OF_MEMORY, LOST):
            self.steps[step.key] = replace(step, memory=self._memory_again(step, outcome))
            self._ready.append(step.key)
        else:
            heapq.heappush(self._later, (time.monotonic() + BACK_OFF * 2 ** (state.tries - 1), step.key))
        state.status, state.reason = "waiting", f"try {state.tries + 1}: {outcome.error.get('what', '')}"
        self.watch.changed(step, state)

    def _settle(self, key: str, status: str, reason: str = "", code: str = "") -> None:
        """The step has ended; those for which it was the last that they need are due."""
        state = self.states[key]
        state.status, state.reason, state.code = status, reason, code
        self._num_open -= 1
        self.watch.changed(self.steps[key], state)
        for user in self._users[key]:
            self._missing[user] -= 1
            if not self._missing[user]:
                self._due.append(user)

    def _memory_again(self, step: Step, outcome: Outcome) -> int:
        """What to reserve for another try: the system kills for want of memory too, and then the step had more than it was given."""
        if outcome.code == OUT_OF_MEMORY or outcome.peak_bytes > step.memory:
            return 2 * max(step.memory, outcome.peak_bytes)
        return step.memory
