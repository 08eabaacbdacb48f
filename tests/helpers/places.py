"""Where things are, whatever the working directory: the repository, its samples, the folder of the tests."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
TINY = ROOT / "trtllm_thoughtx" / "samples" / "thoughtx-tiny"
LONGCOT = ROOT / "trtllm_thoughtx" / "samples" / "longcot-tiny"
