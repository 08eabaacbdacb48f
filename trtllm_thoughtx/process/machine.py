"""What this machine has left: memory that can be had without another process being killed; and giving back what this one has freed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def available_bytes(*, with_swap: bool = False) -> int | None:
    """Free memory, and caches that would be given back; None where the system does not say (not Linux)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as table:
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in table}
        return sizes["MemAvailable"] + (sizes.get("SwapFree", 0) if with_swap else 0)
    except (OSError, KeyError, ValueError, IndexError):
        return None


def release_freed() -> bool:
    """Give pages that were freed back to the system, which glibc keeps otherwise; False where the C library has no such call."""
    return bool((trim := _trim()) and trim(0))


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
