"""Other people's tools, in a virtual environment of their own, so that our files are judged where this package is not installed.

`make oracles` makes `.oracles`; THOUGHTX_ORACLES names another place. Tests that need a module which is not there are skipped and say so.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

PLACE = Path(os.environ.get("THOUGHTX_ORACLES", ROOT / ".oracles"))


def need(module: str) -> None:
    """Skip the test unless `module` can be imported there."""
    if not _has(module):
        pytest.skip(f"{module} is not in {PLACE.name}: make oracles")


def run(*words: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command of that environment: its name, and its arguments."""
    name, *rest = map(str, words)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clean["PATH"] = f"{PLACE / 'bin'}{os.pathsep}{clean['PATH']}"
    return subprocess.run([str(PLACE / "bin" / name), *rest], cwd=cwd, env=clean | (env or {}), capture_output=True, text=True, check=False)


@cache
def _has(module: str) -> bool:
    python = PLACE / "bin" / "python"
    return python.exists() and run("python", "-c", f"import {module}").returncode == 0
