"""What all tests share."""

from __future__ import annotations

import os
import signal

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton reads this when it is imported, which other packages may do


def pytest_configure() -> None:
    """Take Ctrl-C even where the suite runs with SIGINT ignored (in the background): children inherit that, and tests interrupt them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
