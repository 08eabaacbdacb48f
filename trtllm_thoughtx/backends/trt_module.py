"""The two modules that share TensorRT's Python API: which to import, what it needs, which GPUs it can build for."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.errors import ThoughtxError, shown

CUDA_DRIVER = "libcuda.so.1"


def load_module(backend: str) -> Any:
    """Import the backend's module. E201: not installed, broken or too old; E202: `tensorrt` without a GPU, which it needs even to build."""
    record = BACKENDS[backend]
    name, extra, oldest = record.module, record.extra, record.oldest
    wanted = f"{name} {'.'.join(map(str, oldest))} or later"
    fix = f'pip install "trtllm-thoughtx[{extra}]"'
    try:
        module: ModuleType = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: the wheel's loader did not find its libraries
        raise ThoughtxError("E201", f"backend {backend} needs {wanted}", where=f"import {name}", why=shown(str(error)), fix=fix) from None
    version = str(getattr(module, "__version__", "0"))
    if tuple(int(x) for x in version.split(".")[:2] if x.isdigit()) < oldest:
        why = f"{name} {shown(version)} is installed; its parser lacks operators that the graph uses"
        raise ThoughtxError("E201", f"backend {backend} needs {wanted}", where=f"import {name}", why=why, fix=f"{fix} --upgrade")
    if not record.has_targets and not num_gpus():
        raise ThoughtxError(
            "E202",
            "backend tensorrt needs a GPU, also to build: it measures kernels on the GPU that will run the engine",
            where=CUDA_DRIVER,
            why="no NVIDIA driver, or no GPU that it can see",
            fix="build there, or use --backend tensorrt-rtx, which builds on any CPU",
        )
    return module


def num_gpus() -> int:
    """GPUs that the CUDA driver sees; 0 without a driver. Asks the driver itself, so that no CUDA package is needed."""
    try:
        driver = ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def targets(module: Any, backend: str, compute_capabilities: Sequence[str]) -> tuple[str, ...]:
    """("8.9",) -> ("SM89",), the members of `module.ComputeCapability`. E103 for one that this module cannot build for.

    Plain TensorRT has no such choice: an engine is for the GPU that built it, and the list is not used.
    """
    if not BACKENDS[backend].has_targets or not hasattr(module, "ComputeCapability"):
        return ()
    known = [name for name in module.ComputeCapability.__members__ if name.startswith("SM")]
    found = {f"{name[2:-1]}.{name[-1]}": name for name in known}
    wrong = [shown(wanted) for wanted in compute_capabilities if wanted not in found]
    if wrong or not compute_capabilities:
        raise ThoughtxError(
            "E103",
            f"{module.__name__} cannot build for compute capability {', '.join(wrong) or '(none given)'}",
            where="--compute_capabilities",
            why=f"version {module.__version__} builds for {', '.join(sorted(found, key=lambda x: tuple(map(int, x.split('.')))))}",
            fix="choose among those; for other GPUs (H100, H200, B200) use --backend tensorrt on that GPU",
        )
    return tuple(dict.fromkeys(found[wanted] for wanted in compute_capabilities))
