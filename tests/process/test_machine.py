"""Memory that was freed goes back to the system, and an engine that is loaded has given it back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trtllm_thoughtx.process import machine


def resident() -> int:
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))


@pytest.mark.skipif(not sys.platform.startswith("linux") or machine._trim() is None, reason="the C library cannot give memory back")
def test_freed_memory_goes_back() -> None:
    blocks = [bytes(48 << 10) for _ in range(2000)]  # below the size that is mapped by itself
    kept = blocks[::20]  # so that the heap's end is in use
    full = resident()
    del blocks
    assert machine.release_freed()
    assert full - resident() > 60 << 20
    assert len(kept) == 100


def test_a_c_library_without_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_trim", lambda: None)
    assert not machine.release_freed()
