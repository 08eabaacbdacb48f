"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

import trtllm_thoughtx  # noqa: F401  # before any test imports onnxruntime: it turns the telemetry off

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton reads this when it is imported, which other packages may do

HANGS_AFTER = 1800  # seconds; far above what any test takes on a busy machine, so that only a test that waits for ever meets it


def pytest_configure() -> None:
    """Take Ctrl-C even where the suite runs with SIGINT ignored (in the background): children inherit that, and tests interrupt them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """A read that blocks, or a child that never ends, becomes a failure and not a stuck run."""

    def stop(*_: object) -> None:
        raise AssertionError("the test hangs")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_AFTER)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
