"""The store: outputs of steps by key, on a directory that all machines share.

    objects/KEY[:2]/KEY/    LABEL/ (what the command wrote), step.json (the step and its result), log.txt
    partial/KEY[:16]-*/     the same while it is made
    locks/KEY               held by whoever makes it, and by the command itself, so that it is free as soon as nobody works on it

An object appears whole, by a rename, and is never changed. Two that make the same at once do no harm: the later one is thrown away. The
locks, which some network file systems lack, only keep them from it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.files import atomic_file, read_json
from trtllm_thoughtx.report import to_json

RESULT = "step.json"
LOG = "log.txt"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Store:
    """The directory `root`, which exists."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("objects", "partial", "locks", "inputs"):
            (root / name).mkdir(exist_ok=True)

    def path(self, key: str) -> Path:
        return self.root / "objects" / key[:2] / key

    def has(self, key: str) -> bool:
        return os.path.exists(f"{self.root}/objects/{key[:2]}/{key}/{RESULT}")

    def result(self, key: str) -> dict[str, Any]:
        """What `publish` was given for the step."""
        found = read_json(self.path(key), RESULT, code="E160")
        if not isinstance(found, dict) or found.get("key") != key:
            fix = "remove the directory; the step is made again then"
            why = "it does not hold the step that its name says"
            raise ThoughtxError("E160", "an object of the store is malformed", where=str(self.path(key)), why=why, fix=fix)
        return found

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[int | None]:
        """A descriptor that holds the step's lock as long as it, or an inherited copy of it, is open; None where somebody else has it."""
        fd = os.open(self.root / "locks" / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._clear(key)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        raise
                    yield None
                    return
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def partial(self, key: str) -> Iterator[Path]:
        """A new directory in which the step is made; gone afterwards unless it was published."""
        path = self.root / "partial" / f"{key[:16]}-{uuid.uuid4().hex[:12]}"
        os.mkdir(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, key: str, partial: Path, result: dict[str, Any]) -> bool:
        """Make `partial` the object; False where another one was first, whose object stays."""
        with atomic_file(partial / RESULT) as file:
            file.write(to_json({**result, "key": key}).encode())
        target = self.path(key)
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(partial, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        _sync(target.parent)
        return True

    def _clear(self, key: str) -> None:
        """Remove what killed runs left of the step, whose lock is held."""
        for left in (self.root / "partial").glob(f"{key[:16]}-*"):
            shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
