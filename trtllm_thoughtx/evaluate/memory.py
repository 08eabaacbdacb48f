"""Most memory that a system needs for one context, measured in a process of its own.

    python -m trtllm_thoughtx.evaluate.memory PATH LENGTH BACKEND [exact]    prints {"loaded_bytes", "peak_bytes", "length"}

Resident memory counts: weights, runtime and libraries with it. On a GPU it says nothing about the device's memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.opened import open_system
from trtllm_thoughtx.text.params import GenerationParams

NUM_NEW = 8
TIMEOUT_SECONDS = 3600


def resident(field: str = "VmRSS") -> int:
    """Bytes that the kernel counts for this process; `VmHWM` is the most so far."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(found[1]) << 10 if found else 0


def measure(path: Path, length: int, backend: str | None = None, *, exact: bool = False) -> dict[str, Any]:
    """Memory of loading the system of `path` and answering one prompt, `length` tokens of context in all.

    {"skipped": why} where it cannot be measured: the system takes fewer tokens, or the machine does not say.
    """
    if not Path("/proc/self/status").is_file():
        return {"length": length, "skipped": "this machine does not say what a process holds"}
    command = [
        sys.executable,
        "-m",
        "trtllm_thoughtx.evaluate.memory",
        str(path),
        str(length),
        backend or "",
        *(["exact"] if exact else []),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"length": length, "skipped": f"no answer within {TIMEOUT_SECONDS} s"}
    try:
        measured: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"length": length, "skipped": f"the measuring process ended with status {done.returncode}: {done.stderr[-200:]}"}
    return measured


def main(path: Path, length: int, backend: str | None, exact: bool) -> dict[str, Any]:
    system = open_system(path, backend=backend, batch_size=1, exact=exact)
    if system.max_length < length:
        return {"length": length, "skipped": f"the system takes {system.max_length} tokens"}
    loaded = resident()
    ids = np.random.default_rng(0).integers(0, 16, length - NUM_NEW).tolist()
    list(system.write([ids], [GenerationParams(max_new_tokens=NUM_NEW, ignore_eos=True)], [0]))
    return {"length": length, "loaded_bytes": loaded, "peak_bytes": resident("VmHWM")}


if __name__ == "__main__":
    try:
        print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] or None, "exact" in sys.argv[4:])))
    except ThoughtxError as error:
        print(json.dumps({"length": int(sys.argv[2]), "skipped": error.what}))
