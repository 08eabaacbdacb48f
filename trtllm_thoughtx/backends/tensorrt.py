"""The `tensorrt-rtx` and `tensorrt` backends: plans are built here, by `trt_builder` in a process of its own; `trt_runner` runs them.

Weights go to the builder through memory, never through a file made for it: they are copied, one at a time, to an anonymous memory
file. Peak memory on a host is about three times the weights of the part (the weights, the builder's copy and the serialized plan);
the plan is streamed to disk and hashed on the way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx import files
from trtllm_thoughtx.backends import trt_builder
from trtllm_thoughtx.backends.trt_module import load_module, targets
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.graph import chunked_attention
from trtllm_thoughtx.process.machine import available_bytes
from trtllm_thoughtx.progress import Progress

Initializers = Callable[[], Iterable[tuple[str, np.ndarray]]]
Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]

ALIGNMENT = 4096
AOT_MODULE = "trtllm_thoughtx.plugins.chunked_attention.trt.aot"
BUILDER_FACTOR = 2.2  # memory that the builder needs beside the weights, over the weights; measured 2.0 to 2.1
# The builder's environment: only what decides where libraries and GPUs are, and what makes its memory layout repeat. Without malloc's
# caches a freed block merges with its neighbours at once, so that a timing printed with one digit more leaves fewer traces in the heap.
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
FIXED_VARIABLES = {
    "PYTHONHASHSEED": "0",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    "LC_ALL": "C.UTF-8",
}
PYTHON_FLAGS = ("-S", "-B", "-X", "pycache_prefix=/dev/null/none")


@dataclass(frozen=True)
class PlanInfo:
    """Facts of a built plan. Times are seconds of the builder's own calls.

    `fixed_addresses`: the builder ran without address randomization. Then a small plan repeats bit for bit and a large one usually does;
    otherwise the same tensors come in another order. The builder gives no guarantee, so compare plans by what they were made from.
    """

    sha256: str
    num_bytes: int
    seconds_parse: float
    seconds_build: float
    num_layers: int
    layer_counts: dict[str, int]
    num_attention: int
    fallbacks: list[str]  # quantized products that the plan computes in the graph's type
    version: str
    num_warnings: int
    num_distinct_warnings: int
    errors: list[str]  # logged although the build succeeded; the absence of a GPU is not one
    peak_bytes: int  # of host memory, the weights included
    fixed_addresses: bool

    def messages(self, log_path: Path) -> str:
        """One line for the screen; the log has everything."""
        errors = f"{len(self.errors)} errors, " if self.errors else ""
        return f"{errors}{self.num_warnings} warnings ({self.num_distinct_warnings} distinct), see {log_path}"


class HeldWeights:
    """The weights of one graph in an anonymous memory file, ready for a builder. Close it, or use it as a context manager."""

    def __init__(self, initializers: Initializers, label: str, progress: Progress) -> None:
        """One weight at a time is also alive outside the file. E204 when they do not fit."""
        self.fd = os.memfd_create("thoughtx-weights")
        self.table: list[tuple[str, int, int]] = []  # name, offset, bytes
        try:
            with progress.stage(f"weights for {label}", None, "bytes") as stage:
                for name, value in initializers():
                    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
                    self.table.append((name, _append(self.fd, data.data), data.nbytes))
                    stage.advance(data.nbytes)
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        return sum(size for *_, size in self.table)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> HeldWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_plan(
    *,
    backend: str,
    model: bytes,
    initializers: Initializers | HeldWeights,
    plan_path: Path,
    profiles: Sequence[Shapes],
    compute_capabilities: Sequence[str],
    optimization_level: int | None,
    num_attention: int,
    products: Sequence[tuple[str, str, bool]] = (),
    float32: bool,
    log_path: Path,
    progress: Progress,
    plugin: str = "function",
    plugin_library: Path | None = None,
) -> PlanInfo:
    """Build the plan of a serialized ONNX model whose large initializers are external; `initializers()` yields their values by name,
    or they are held already (and stay so).

    `profiles`: per optimization profile, (min, opt, max) shape by input. `num_attention`: attention layers that the parser must find.
    `plugin`: the form that the attention layers must have; "cpp" needs the shared library.
    `products`: quantized Gemms as (node, type in the plan, inputs have it too), looked for among the plan's layers.
    `float32`: the graph is, so no TF32. The builder's messages are appended to `log_path`.
    Raises ThoughtxError E103, E130, E201-E206; on any failure and on KeyboardInterrupt no plan is left and the builder is gone.
    """
    module = load_module(backend)
    request = {
        "module": module.__name__,
        "module_dirs": _module_dirs(module.__name__) + (_all_dirs() if plugin == "aot" else []),
        "plugin": plugin,
        "plugin_name": chunked_attention.NAME,
        "plugin_namespace": chunked_attention.DOMAIN,
        "plugin_library": None if plugin_library is None else str(plugin_library),
        "aot_module": AOT_MODULE,
        "profiles": profiles,
        "targets": targets(module, backend, compute_capabilities),
        "optimization_level": optimization_level,
        "num_attention": num_attention,
        "products": [list(product) for product in products],
        "float32": float32,
    }
    plan_path, log_path = Path(plan_path), Path(log_path)
    with contextlib.ExitStack() as stack:
        held = initializers
        if not isinstance(held, HeldWeights):
            held = stack.enter_context(HeldWeights(held, plan_path.name, progress))
        _require_memory(held.num_bytes)
        _add_request(held, model, request)
        log = stack.enter_context(_opened(log_path, os.O_APPEND, "the builder's log"))
        os.write(log, f"--- {plan_path.name}: {module.__name__} {module.__version__}\n".encode())
        plan = stack.enter_context(_opened(plan_path, os.O_EXCL, "the plan"))
        try:
            with progress.stage(f"build {plan_path.name}", len(profiles) + 2, "steps") as stage:
                info = _run_builder(held.fd, log, plan, log_path, stage)
                stage.advance(len(profiles) + 2 - stage.done)
        except BaseException:
            plan_path.unlink(missing_ok=True)
            raise
    if info.errors or info.num_warnings:
        progress.note(f"{plan_path.name}: {info.messages(log_path)}")
    return info


def _module_dirs(name: str) -> list[str]:
    """Where the module and its companions are installed: all of this process's sys.path that the builder needs."""
    specs = [importlib.util.find_spec(name + suffix) for suffix in ("", "_bindings", "_libs")]
    return [*dict.fromkeys(os.path.dirname(os.path.dirname(os.path.abspath(spec.origin))) for spec in specs if spec and spec.origin)]


def _all_dirs() -> list[str]:
    """Where this process finds its modules: the definition of a plugin in Python needs this package, Triton and NumPy."""
    return [*dict.fromkeys([str(Path(trt_builder.__file__).parents[2]), *(path for path in sys.path if path)])]


def _add_request(held: HeldWeights, model: bytes, request: dict[str, Any]) -> None:
    """Put the graph and the request behind the weights; the builder reads the last request in the file."""
    request |= {"initializers": held.table, "model": (_append(held.fd, memoryview(model)), len(model))}
    text = json.dumps(request, sort_keys=True).encode()
    _append(held.fd, memoryview(text + trt_builder.TRAILER.pack(_end(held.fd), len(text))))


def _end(job: int) -> int:
    return -(-os.lseek(job, 0, os.SEEK_END) // ALIGNMENT) * ALIGNMENT


def _append(job: int, data: memoryview) -> int:
    offset = os.lseek(job, _end(job), os.SEEK_SET)
    try:
        while data:
            data = data[os.write(job, data) :]
    except OSError as error:
        raise _no_memory("the weights do not fit in memory", str(error)) from None
    return offset


def _no_memory(what: str, why: str) -> ThoughtxError:
    fix = "build in more stages, each needs memory only for itself (--num_stages 4), or on a host with more memory"
    return ThoughtxError("E204", what, where="host memory", why=why, fix=fix)


def _require_memory(weight_bytes: int) -> None:
    """E204 now instead of being killed by the system in a minute."""
    free = available_bytes(with_swap=True)
    needed = int(weight_bytes * BUILDER_FACTOR)
    if free is not None and needed > free:
        why = f"the builder needs about {files.human_bytes(needed)} beside the weights; {files.human_bytes(free)} are free"
        raise _no_memory("not enough memory for this build", why)


@contextlib.contextmanager
def _opened(path: Path, flag: int, what: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flag, 0o666)
    except FileExistsError:
        fix = "remove it or choose another path"
        raise ThoughtxError("E130", f"{what} cannot be written", where=str(path), why="the file exists", fix=fix) from None
    except OSError as error:
        fix = "check the path and its rights"
        raise ThoughtxError("E206", f"{what} cannot be written", where=str(path), why=str(error), fix=fix) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _run_builder(job: int, log: int, plan: int, log_path: Path, stage: Any) -> PlanInfo:
    """Start the builder, follow its events, end it if anything goes wrong here."""
    env = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ} | FIXED_VARIABLES
    # The number is padded: the length of the command line must not depend on how many files are open here.
    command = [sys.executable, *PYTHON_FLAGS, trt_builder.__file__, "first", f"{plan:6d}"]
    process = subprocess.Popen(
        command,
        stdin=job,
        stdout=subprocess.PIPE,
        stderr=log,
        pass_fds=[plan],
        env=env,
        cwd="/",
        start_new_session=True,  # Ctrl-C reaches this process alone, which ends the builder itself
    )
    assert process.stdout
    last: dict[str, Any] = {}
    try:
        for line in process.stdout:
            if line.startswith(b'{"event"'):  # a library may print, too
                last = json.loads(line)
                if last["event"] == "step" and stage.done < stage.total:
                    stage.advance(1)
        status = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
    if status == 0 and last.get("event") == "done":
        return PlanInfo(**{field.name: last[field.name] for field in fields(PlanInfo)})
    if last.get("event") == "error":
        fix = {"E203": "free some space", "E206": "check the disk"}.get(last["code"], f"the builder's messages are in {log_path}")
        raise ThoughtxError(last["code"], shown(last["what"]), where=str(log_path), why=shown(last["why"], 1000), fix=fix)
    if status == -signal.SIGKILL:
        raise _no_memory("the builder was killed", "most likely by the system, because memory ran out")
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    fix = f"its last messages are in {log_path}; please report the crash with that file"
    raise ThoughtxError("E205", "the builder crashed", where=str(log_path), why=how, fix=fix)
