"""Steps are made once, in order, whatever is killed; what fails holds up only what needs it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fake_release
import pytest
from fake_release import PROGRAM, fake_step, graph, run

from trtllm_thoughtx.release.executor import LocalExecutor
from trtllm_thoughtx.release.schedule import Schedule
from trtllm_thoughtx.release.store import Store
from trtllm_thoughtx.release.work import Outcome, Stop, run_step


def starts(note: Path) -> Counter[str]:
    """How often each step was begun."""
    return Counter(" ".join(line.split()[:2]) for line in note.read_text().splitlines())


def contents(root: Path) -> dict[str, bytes]:
    """All outputs of a store by key."""
    return {path.parts[-3] + path.name: path.read_bytes() for path in (root / "objects").glob("*/*/*/data")}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def test_a_second_run_makes_nothing(tmp_path):
    note = tmp_path / "note"
    steps = graph(note, 2, 3)
    first = run(steps, tmp_path / "store")
    again = run(steps, tmp_path / "store")
    assert {state.status for state in first.values()} == {"made"}
    assert {state.status for state in again.values()} == {"found"}
    assert set(starts(note).values()) == {1} and len(starts(note)) == 7
    assert list((tmp_path / "store" / "partial").iterdir()) == []


def test_a_step_waits_for_what_it_needs_and_for_room(tmp_path):
    """A step of one core and one that measures time never run beside each other."""
    note, store = tmp_path / "note", tmp_path / "store"
    gate = tmp_path / "gate"
    slow = fake_step(note, "build", "slow", words=["--until", str(gate)])
    alone = fake_step(note, "bench", "alone", alone=True)
    big = fake_step(note, "build", "big", memory=900 << 20)
    user = fake_step(note, "export", "user", [slow])
    steps = {step.key: step for step in (slow, alone, big, user)}
    executor = LocalExecutor(Store(_made(store)), cores=2, memory=1 << 30, program=PROGRAM)
    assert executor.take(slow) and not executor.take(alone) and executor.take(big)
    assert not executor.take(user)  # two cores
    while not any(outcome.key == big.key for outcome in executor.wait(1.0)):
        pass
    assert executor.take(user) is True  # there is room; that it needs `slow` is the scheduler's business
    gate.touch()
    executor.close()
    assert {state.status for state in run(steps, store).values()} <= {"made", "found"}


def _made(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def test_a_refusal_is_final_and_holds_up_only_what_needs_it(tmp_path):
    note = tmp_path / "note"
    bad = fake_step(note, "convert", "bad", words=["--fail", "E103"])
    user = fake_step(note, "build", "user", [bad])
    last = fake_step(note, "export", "last", [user])
    good = fake_step(note, "build", "good")
    states = run({step.key: step for step in (bad, user, last, good)}, tmp_path / "store")
    assert [states[step.key].status for step in (bad, user, last, good)] == ["failed", "skipped", "skipped", "made"]
    assert states[bad.key].code == "E103" and "convert bad" in states[user.key].reason
    assert starts(note) == {"convert bad": 1, "build good": 1}


@pytest.mark.parametrize("code", ["E203", "E204", "E206"])
def test_what_may_pass_is_tried_again(code, tmp_path):
    note = tmp_path / "note"
    step = fake_step(note, "build", "a", words=["--fail", code], memory=100 << 20)
    states = run({step.key: step}, tmp_path / "store")
    assert (states[step.key].status, states[step.key].tries) == ("made", 1)
    assert starts(note)["build a"] == 2


def test_want_of_memory_is_tried_with_more_and_ends_with_the_machine(tmp_path):
    step = fake_step(tmp_path / "note", "build", "a", memory=100)
    asked = []

    class Hungry(LocalExecutor):
        def take(self, step):
            asked.append(step.memory)
            self._ended.put(Outcome(step.key, "failed", {"code": "E204", "what": "not enough memory"}))
            self._running[step.key] = step
            return True

    states = run({step.key: step}, tmp_path / "store", Hungry(Store(_made(tmp_path / "store")), memory=350))
    assert asked == [100, 200] and states[step.key].status == "failed"
    assert "it needs 400 bytes of memory" in states[step.key].reason and states[step.key].code == "E204"


def test_a_killed_command_is_tried_again(tmp_path):
    note = tmp_path / "note"
    step = fake_step(note, "build", "a", words=["--die"])
    states = run({step.key: step}, tmp_path / "store")
    assert states[step.key].status == "made" and starts(note)["build a"] == 2


def test_a_step_that_can_never_run_is_left_out_at_once(tmp_path):
    note = tmp_path / "note"
    big, gpu = fake_step(note, "build", "big", memory=1 << 40), fake_step(note, "build", "gpu", gpu="RTX 9999")
    states = run({step.key: step for step in (big, gpu)}, tmp_path / "store")
    assert {state.status for state in states.values()} == {"skipped"} and not note.exists()
    assert "1.0 TiB" in states[big.key].reason and "RTX 9999" in states[gpu.key].reason


def test_a_gate_keeps_what_did_not_pass(tmp_path):
    note = tmp_path / "note"
    made = fake_step(note, "build", "a")
    signed = fake_step(note, "sign", "a", [made], gate="a")
    steps = {step.key: step for step in (made, signed)}
    states = run(steps, tmp_path / "store", passed=lambda engine: f"{engine} is wrong")
    assert states[signed.key].status == "skipped" and "a is wrong" in states[signed.key].reason
    assert run(steps, tmp_path / "store")[signed.key].status == "made"


def test_cancel_leaves_no_process_and_no_half_output(tmp_path):
    note, root = tmp_path / "note", _made(tmp_path / "store")
    steps = graph(note, 2, 1, ["--until", str(tmp_path / "never")])

    class Interrupted(fake_release.Silent):
        def tick(self):
            if note.exists() and len(note.read_text().splitlines()) == 2:
                raise KeyboardInterrupt

    store = Store(root)
    executor = LocalExecutor(store, cores=2, memory=1 << 30, program=PROGRAM)
    with pytest.raises(KeyboardInterrupt):
        Schedule(steps, store, executor, Interrupted()).run()
    assert not any(is_alive(int(line.split()[2])) for line in note.read_text().splitlines())
    assert list((root / "partial").iterdir()) == [] and contents(root) == {}


def driver(root: Path, note: Path, *more: object) -> subprocess.Popen[bytes]:
    root.mkdir(exist_ok=True)
    words = [sys.executable, fake_release.__file__, str(root), str(note), "2", "4", *map(str, more)]
    path = os.pathsep.join([str(Path(fake_release.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path})


def test_a_killed_driver_takes_its_children_along(tmp_path):
    note, until = tmp_path / "note", tmp_path / "go"
    running = driver(tmp_path / "store", note, until)
    while not note.exists() or len(note.read_text().splitlines()) < 2:
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    running.wait()
    pids = [int(line.split()[2]) for line in note.read_text().splitlines()]
    while any(map(is_alive, pids)):
        time.sleep(0.01)
    until.touch()
    states = run(graph(note, 2, 4, ["--until", str(until)]), tmp_path / "store")
    assert {state.status for state in states.values()} == {"made"}
    assert list((tmp_path / "store" / "partial").iterdir()) == []


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    """Of a driver, and of a command: in the end the bytes of an undisturbed run, and nothing that was finished is made again."""
    plain, root, note = tmp_path / "plain", tmp_path / "store", tmp_path / "note"
    run(graph(tmp_path / "other", 2, 4), plain)
    want = set(contents(plain).values())
    chance, done, before = random.Random(0), set[str](), Counter[str]()
    for _ in range(4):
        running, seen = driver(root, note), begun(note) + chance.randint(1, 3)
        while begun(note) < seen and running.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.05))  # somewhere in the step
        if chance.random() < 0.5:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(note.read_text().split()[-1]), signal.SIGKILL)
        running.kill()
        running.wait()
        assert all(starts(note)[f"build {label}"] == before[f"build {label}"] for label in done)
        done, before = {path.name for path in (root / "objects").glob("*/*/*") if path.is_dir()}, starts(note)
    assert {state.status for state in run(graph(note, 2, 4), root).values()} <= {"made", "found"}
    assert all(starts(note)[f"build {label}"] == before[f"build {label}"] for label in done)
    assert set(contents(root).values()) == want and list((root / "partial").iterdir()) == []


def begun(note: Path) -> int:
    return len(note.read_text().splitlines()) if note.exists() else 0


def test_two_drivers_share_the_work(tmp_path):
    note, root = tmp_path / "note", tmp_path / "store"
    both = [driver(root, note) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert set(starts(note).values()) == {1} and len(starts(note)) == 9


def test_a_step_that_somebody_makes_is_busy(tmp_path):
    store = Store(_made(tmp_path / "store"))
    step = fake_step(tmp_path / "note", "build", "a")
    with store.lock(step.key) as lock:
        assert lock is not None
        assert run_step(step, store, Stop(), PROGRAM).status == "busy"
    assert run_step(step, store, Stop(), PROGRAM).status == "made"


def test_the_work_grows_with_the_steps(tmp_path):
    """Ten times as many steps are offered ten times as often: nothing is looked at again and again."""

    class Instant:
        cores = 4

        def __init__(self):
            self.ended, self.calls = [], 0

        def lacks(self, step):
            self.calls += 1
            return ""

        def take(self, step):
            self.calls += 1
            if len(self.ended) == 4:
                return False
            self.ended.append(Outcome(step.key, "made"))
            return True

        def wait(self, seconds):
            found, self.ended = self.ended, []
            return found

        def cancel(self): ...
        def close(self): ...

    calls = []
    for width in (50, 200):
        executor = Instant()
        run(graph(tmp_path / "note", width, 10), tmp_path / f"store{width}", executor)
        calls.append(executor.calls / (10 * width + 1))
    assert calls[1] < 1.5 * calls[0]


def test_memory_of_the_starter_is_not_that_of_the_step(tmp_path):
    """A process that holds much starts a command that holds little."""
    held = bytearray(300 << 20)
    step = fake_step(tmp_path / "note", "build", "a")
    made = run_step(step, Store(_made(tmp_path / "store")), Stop(), PROGRAM)
    assert made.status == "made" and made.peak_bytes < len(held)
