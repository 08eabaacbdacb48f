"""Where things are, whatever the working directory: the repository, its samples, the folder of the tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
TINY = ROOT / "trtllm_thoughtx" / "samples" / "thoughtx-tiny"
LONGCOT = ROOT / "trtllm_thoughtx" / "samples" / "longcot-tiny"


def script(path: str) -> ModuleType:
    """A script of the repository, such as bench/claims.py, as a module."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
