"""Graphs of fake steps, and a driver of them that a test may kill: `python fake_release.py STORE NOTE WIDTH DEPTH [UNTIL]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trtllm_thoughtx.release.executor import LocalExecutor
from trtllm_thoughtx.release.schedule import Schedule, State
from trtllm_thoughtx.release.step import HERE, Step, Word, make_step
from trtllm_thoughtx.release.store import Store

PROGRAM = (sys.executable, "-S", str(Path(__file__).with_name("fake_command.py")))


class Silent:
    def changed(self, step: Step, state: State) -> None: ...
    def tick(self) -> None: ...


def fake_step(note: Path, kind: str, label: str, inputs: Iterable[Step] = (), words: Iterable[str] = (), **more: Any) -> Step:
    given: list[Word] = [kind, "--output_dir", f"{HERE}/{label}", "--note", str(note), *words]
    for step in inputs:
        given += ["--input", step]
    return make_step(kind, label, given, facts={}, **more)


def graph(note: Path, width: int, depth: int, words: Iterable[str] = ()) -> dict[str, Step]:
    """Chains side by side, and a last step that needs all of them."""
    steps, ends = dict[str, Step](), []
    for row in range(width):
        before: list[Step] = []
        for column in range(depth):
            step = fake_step(note, "build", f"s{row}.{column}", before, words)
            steps[step.key], before = step, [step]
        ends += before
    last = fake_step(note, "export", "last", ends)
    return steps | {last.key: last}


def run(steps: dict[str, Step], root: Path, executor: Any = None, **more: Any) -> dict[str, State]:
    root.mkdir(exist_ok=True)
    store = Store(root)
    executor = executor or LocalExecutor(store, cores=2, memory=1 << 30, program=PROGRAM)
    try:
        return Schedule(steps, store, executor, Silent(), **more).run()
    finally:
        executor.close()


if __name__ == "__main__":
    root, note = Path(sys.argv[1]), Path(sys.argv[2])
    until = ["--until", sys.argv[5]] if len(sys.argv) > 5 else []
    run(graph(note, int(sys.argv[3]), int(sys.argv[4]), until), root)
