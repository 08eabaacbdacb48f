"""What the output of a step depends on beside its command: the code that runs, the packages that compute, the content of the inputs."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtllm_thoughtx import __version__
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.outputs import environment
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.files import atomic_file, read_json, sha256_of
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.report import to_json

# Folders of the package that no step of a kind runs: a change there leaves its outputs as they are. A test follows the imports.
NEVER = frozenset({"release", "serve", "distill"})
NOT_RUN = {
    "convert": NEVER | {"calibrate", "evaluate", "validate", "runtime", "bench.py", "ship", "graph"},
    "build": NEVER | {"calibrate", "evaluate", "validate", "runtime", "bench.py", "ship"},
    "part": NEVER | {"calibrate", "evaluate", "validate", "runtime", "bench.py", "ship"},
    "validate": NEVER | {"bench.py"},
    "sign": NEVER | {"calibrate", "evaluate", "validate", "runtime", "bench.py"},
    "export": NEVER | {"calibrate", "evaluate", "validate", "runtime", "bench.py"},
}


def facts_of(kind: str) -> dict[str, Any]:
    """Version, hash of the code, and versions of packages, as they are on this machine."""
    return {"version": __version__, "code": _code(NOT_RUN.get(kind, NEVER)), "environment": _environment()}


@functools.cache
def _environment() -> dict[str, str]:
    return environment()


@functools.cache
def _sources() -> tuple[tuple[str, str], ...]:
    root = Path(str(importlib.resources.files("trtllm_thoughtx")))
    paths = (path for path in sorted(root.rglob("*.py")) if not any(part.startswith((".", "__pycache__")) for part in path.parts[-3:]))
    return tuple((path.relative_to(root).as_posix(), sha256_of(path)) for path in paths)


@functools.cache
def _code(left_out: frozenset[str]) -> str:
    rows = [row for row in _sources() if row[0].partition("/")[0] not in left_out]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def digest_of_files(paths: Sequence[Path], cache: Path | None, progress: Progress = SILENT) -> str:
    """One hash of the names and contents of `paths`. `cache`: a file that remembers hashes by inode, size and time, so that a model is
    read once."""
    known = _known(cache)
    rows, fresh = list[list[str]](), dict[str, list[Any]]()
    new = [path for path in paths if known.get(str(path), [None])[0] != _stamp(path)]
    with progress.stage("hashing inputs", sum(path.stat().st_size for path in new), "bytes") if new else SILENT.stage("") as stage:
        for path in paths:
            stamp = _stamp(path)
            digest = sha256_of(path, stage) if path in new else known[str(path)][1]
            fresh[str(path)] = [stamp, digest]
            rows.append([path.name, digest])
    if cache is not None and new:
        with atomic_file(cache) as file:
            file.write(to_json({"files": fresh}).encode())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def model_files(path: Path) -> list[Path]:
    """Every file that decides what is made of a model. E101 when it is none."""
    with Checkpoint.open(path) as checkpoint:
        return checkpoint.members.inputs()


def _stamp(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _known(cache: Path | None) -> dict[str, list[Any]]:
    """What the cache says; nothing where it cannot be read, since it can be made again."""
    if cache is None or not cache.exists():
        return {}
    try:
        found = read_json(cache.parent, cache.name)["files"]
        return {name: row for name, row in found.items() if len(row) == 2 and len(row[0]) == 3 and isinstance(row[1], str)}
    except (ThoughtxError, KeyError, TypeError, AttributeError):
        return {}
