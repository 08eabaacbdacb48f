"""The two modules that share TensorRT's Python API: which to import, what it needs, which GPUs it can build for, what it says of a plan."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.backends.gpu import CUDA_DRIVER, num_gpus
from trtllm_thoughtx.errors import ThoughtxError, listed, shown


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


def plan_header(module: Any, header: bytes) -> tuple[str, str]:
    """What TensorRT-RTX itself says of the first bytes of a plan: a status of `report.STATUSES`, and why. The plan is not loaded."""
    said: list[str] = []
    validity, bits = module.Runtime(logger(module, said, everything=True)).get_engine_validity(header)
    wrong = [name for name, bit in module.EngineInvalidityDiagnostics.__members__.items() if int(bits) & int(bit) and name != "CUDA_ERROR"]
    no_driver = [line for line in said if "cudaError" in line]
    about_plan = [line for line in said if line not in no_driver]
    if validity.name != "INVALID":
        return "passed", "it runs here, and would be faster if it were built for this GPU" if validity.name == "SUBOPTIMAL" else ""
    if wrong or about_plan:
        return "failed", "; ".join([*wrong, *about_plan])
    return "skipped", f"the runtime needs a CUDA driver to judge: {listed(no_driver) or 'it gave no reason'}"


def header_bytes(module: Any) -> int:
    """How much of a plan `plan_header` takes."""
    return int(module.Runtime(logger(module, [])).engine_header_size)


def logger(trt: Any, messages: list[str], *, everything: bool = False) -> Any:
    """A logger of module `trt` that collects errors, or all messages."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if everything or severity.name.endswith("ERROR"):
                messages.append(shown(text))

    return Logger()


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
