"""Make one step, in whatever process: what a local thread and a Ray task have in common.

The command runs as a child in a session of its own and in a directory beside the store's objects. It dies with its starter; a step that
is stopped leaves no process and no output. Nothing is raised: an `Outcome` says how it ended.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import read_inside, require_space
from trtllm_thoughtx.release import child
from trtllm_thoughtx.release.facts import facts_of
from trtllm_thoughtx.release.step import HERE, OTHER, Step, digest_of
from trtllm_thoughtx.release.store import LOG, Store
from trtllm_thoughtx.strictjson import parse_json

PROGRAM = (sys.executable, "-m", "trtllm_thoughtx")
STDOUT = "stdout.json"
LIMIT_STDOUT = 64 << 20
LIMIT_LOG = 2000  # characters at its end that tell of a command without a message
ANSWERS = {"validate": (0, 1), "evaluate": (0, 1)}  # exit statuses that are results; of other kinds 0 alone
LOST, OUT_OF_MEMORY = "lost", "E204"


@dataclass(frozen=True)
class Outcome:
    """How a step ended: made | found (it was there) | busy (somebody makes it) | failed | stopped."""

    key: str
    status: str
    error: dict[str, str] = field(default_factory=dict)  # the four parts and the code, of a failed one
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def code(self) -> str:
        return self.error.get("code", "")


class Stop:
    """Ends the children of the steps that were given it."""

    def __init__(self) -> None:
        self._lock, self._pids, self.is_set = threading.Lock(), set[int](), False

    def set(self) -> None:
        with self._lock:
            self.is_set = True
            for pid in self._pids:
                _kill(pid)

    def add(self, pid: int) -> None:
        with self._lock:
            self._pids.add(pid)
            if self.is_set:
                _kill(pid)

    def reap(self, pid: int) -> tuple[int, int]:
        """Wait status and peak memory of a child, when it has ended. Its id is its own as long as it is not reaped. The kernel counts
        what the starter held as the child's own: a peak within that is not known, and 0."""
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._pids.discard(pid)
            _, status, usage = os.wait4(pid, 0)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return status, usage.ru_maxrss << 10 if usage.ru_maxrss > own else 0


def run_step(step: Step, store: Store, stop: Stop, program: Sequence[str] = PROGRAM) -> Outcome:
    """Make the step, unless it is there."""
    try:
        if store.has(step.key):
            return Outcome(step.key, "found")
        with store.lock(step.key) as lock:
            if lock is None:
                return Outcome(step.key, "busy")
            if store.has(step.key):  # made between the question and the lock
                return Outcome(step.key, "found")
            _check_facts(step)
            require_space(store.root, step.disk)
            with store.partial(step.key) as here:
                return _make(step, store, here, lock, stop, program)
    except ThoughtxError as error:
        return Outcome(step.key, "failed", error.as_dict())
    except OSError as error:
        code = "E203" if error.errno in (28, 122) else "E206"
        what = f"the file system refused an operation: {os.strerror(error.errno or 0)}"
        return Outcome(step.key, "failed", _error(code, what, shown(str(error.filename or store.root)), "see what", "look at the disk"))


def _check_facts(step: Step) -> None:
    """E201 on a machine with another version of the code or of the packages than the one that planned the release."""
    if step.facts and digest_of(facts_of(step.kind)) != step.facts:
        raise ThoughtxError(
            "E201",
            "this machine has other versions than the one that planned the release",
            where=step.name,
            why="the package, Python, or a package that computes differs; the output would not be what its key says",
            fix="install the same versions everywhere; constraints.txt has them",
        )


def _make(step: Step, store: Store, here: Path, lock: int, stop: Stop, program: Sequence[str]) -> Outcome:
    if step.copies is not None:
        source = Path(_word(step.copies, store, here))
        shutil.copytree(source, here / step.label, copy_function=_link)
    words = [_word(word, store, here) for word in step.words]
    began = time.monotonic()
    with (here / STDOUT).open("xb") as out, (here / LOG).open("xb") as log:
        command = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), *program, *words, "--json", "--quiet"]
        process = subprocess.Popen(
            command,
            cwd=here,
            env=_environment(step),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock,),
        )
        stop.add(process.pid)
        status, peak = stop.reap(process.pid)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    if stop.is_set:
        return Outcome(step.key, "stopped", seconds=seconds, peak_bytes=peak)
    document = _document(here, step)
    if process.returncode not in ANSWERS.get(step.kind, (0,)) or document is None or "error" in document:
        return Outcome(step.key, "failed", _failure(step, process.returncode, document, here), seconds, peak)
    os.unlink(here / STDOUT)
    result = {
        "kind": step.kind,
        "label": step.label,
        "words": list(step.words),
        "ok": process.returncode == 0,
        "result": document,
        "seconds": round(seconds, 3),
        "peak_bytes": peak,
        "bytes": _num_bytes(here / step.label),
        "size": step.size,
    }
    is_mine = store.publish(step.key, here, result)
    return Outcome(step.key, "made" if is_mine else "found", seconds=seconds, peak_bytes=peak)


def _document(here: Path, step: Step) -> dict[str, Any] | None:
    """The command's result; None where it wrote none."""
    try:
        found = parse_json(read_inside(here, STDOUT, LIMIT_STDOUT), step.name, "E205")
    except ThoughtxError:
        return None
    return found if isinstance(found, dict) else None


def _word(word: str, store: Store, here: Path) -> str:
    """A word with the real path of what it stands for."""
    if word.startswith(HERE):
        return f"{here}{word[len(HERE) :]}"
    match = OTHER.fullmatch(word)
    return word if match is None else f"{store.path(match[1])}{match[2] or ''}"


def _environment(step: Step) -> dict[str, str]:
    more = {"OMP_NUM_THREADS": str(step.cores)}
    if step.date is not None:
        more["SOURCE_DATE_EPOCH"] = str(step.date)
    return {**os.environ, **more}


def _failure(step: Step, status: int, document: Mapping[str, Any] | None, here: Path) -> dict[str, str]:
    """The four parts of what went wrong, from the command's own document where it wrote one."""
    error = (document or {}).get("error")
    if isinstance(error, dict) and all(isinstance(error.get(part), str) for part in ("code", "what", "where", "why", "fix")):
        return {part: error[part].replace(str(here), "OUTPUT") for part in ("code", "what", "where", "why", "fix")}
    log = read_inside(here, LOG, LIMIT_STDOUT).decode(errors="replace")[-LIMIT_LOG:]
    if status == -signal.SIGKILL:
        why = "somebody, or the system for want of memory, ended its process"
        return _error(LOST, f"{step.kind} was killed", step.name, why, "it is tried again")
    what = f"{step.kind} ended by signal {-status}" if status < 0 else f"{step.kind} ended with status {status}"
    return _error("E205", what, step.name, shown(log, LIMIT_LOG) or "it said nothing", "run the command by hand")


def _error(code: str, what: str, where: str, why: str, fix: str) -> dict[str, str]:
    return {"code": code, "what": what, "where": where, "why": why, "fix": fix}


def _link(source: str, target: str) -> None:
    """Objects never change, and commands replace files: a second name will do where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _num_bytes(path: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file()) if path.is_dir() else 0


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
