"""Where steps run: the protocol of an executor, and the one of local processes.

A scheduler offers steps; an executor takes those that it has room for, and tells how they ended. It never decides what is to be done.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from trtllm_thoughtx.backends.gpu import gpus
from trtllm_thoughtx.errors import counted
from trtllm_thoughtx.files import human_bytes
from trtllm_thoughtx.process.machine import available_bytes
from trtllm_thoughtx.release.step import Step
from trtllm_thoughtx.release.store import Store
from trtllm_thoughtx.release.work import PROGRAM, Outcome, Stop, run_step


class Executor(Protocol):
    @property
    def cores(self) -> int:
        """That steps share."""
        ...

    def lacks(self, step: Step) -> str:
        """Why the step can never run here, and what there is instead; "" when it can."""
        ...

    def take(self, step: Step) -> bool:
        """Begin the step, or keep it until there is room; False when it is to be offered again later."""
        ...

    def wait(self, seconds: float) -> list[Outcome]:
        """Steps that ended, as soon as there is one; none when `seconds` have passed."""
        ...

    def cancel(self) -> None:
        """End everything that was taken: no process and no half output stays."""
        ...

    def close(self) -> None: ...


class LocalExecutor:
    """Child processes of this one, as many as there are cores and memory for by the steps' own estimates."""

    def __init__(self, store: Store, *, cores: int | None = None, memory: int | None = None, program: Sequence[str] = PROGRAM) -> None:
        self.store, self.program = store, program
        self.cores = cores or len(os.sched_getaffinity(0))
        self.memory = memory or available_bytes() or 1 << 62
        self.gpus = [gpu.name for gpu in gpus()]
        self._free_cores, self._free_memory, self._is_alone = self.cores, self.memory, False
        self._running: dict[str, Step] = {}
        self._ended: queue.Queue[Outcome] = queue.Queue()
        self._stop = Stop()

    def lacks(self, step: Step) -> str:
        if step.memory > self.memory:
            return f"it needs {human_bytes(step.memory)} of memory, and this machine has {human_bytes(self.memory)} free"
        if step.gpu is not None and not any(step.gpu.lower() in name.lower() for name in self.gpus):
            return f"it needs a GPU of kind {step.gpu}, and this machine has {', '.join(self.gpus) or 'no NVIDIA GPU'}"
        return ""

    def take(self, step: Step) -> bool:
        cores = self.cores if step.alone else min(step.cores, self.cores)
        if self._is_alone or cores > self._free_cores or step.memory > self._free_memory:
            return False
        self._running[step.key] = replace(step, cores=cores)  # what it holds, not what it is told
        self._free_cores -= cores
        self._free_memory -= step.memory
        self._is_alone = step.alone
        threading.Thread(target=self._run, args=(step,), name=step.name).start()
        return True

    def _run(self, step: Step) -> None:
        self._ended.put(run_step(step, self.store, self._stop, self.program))

    def wait(self, seconds: float) -> list[Outcome]:
        found = []
        try:
            found.append(self._ended.get(timeout=max(seconds, 0.0)))
            while True:
                found.append(self._ended.get_nowait())
        except queue.Empty:
            pass
        for outcome in found:
            held = self._running.pop(outcome.key)
            self._free_cores += held.cores
            self._free_memory += held.memory
            self._is_alone = False
        return found

    def cancel(self) -> None:
        self._stop.set()
        while self._running:
            self.wait(1.0)

    def close(self) -> None:
        self.cancel()

    def __str__(self) -> str:
        return f"{counted(self.cores, 'core')}, {human_bytes(self.memory)} of memory, {', '.join(self.gpus) or 'no GPU'}"
