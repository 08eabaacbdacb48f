"""What this machine has left: memory that can be had without another process being killed."""

from __future__ import annotations


def available_bytes(*, with_swap: bool = False) -> int | None:
    """Free memory, and caches that would be given back; None where the system does not say (not Linux)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as table:
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in table}
        return sizes["MemAvailable"] + (sizes.get("SwapFree", 0) if with_swap else 0)
    except (OSError, KeyError, ValueError, IndexError):
        return None
