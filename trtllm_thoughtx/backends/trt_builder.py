"""The builder process: one ONNX graph in, one TensorRT plan out. `backends.tensorrt` runs this file as a script.

Why a process of its own:
- A builder that crashes, or that the system kills for memory, becomes an error message instead of the end of the command; Ctrl-C
  takes effect at once although the build is one long call into C++; memory goes back to the system after each plan.
- The builder numbers tensors in an order that follows addresses of C++ objects and the timing of its short-lived threads. A process
  that always starts alike, with address randomization off and its threads taking turns on one processor (the builder keeps one
  busy at a time), gives the same bytes for small plans and, for large ones, most of the time: otherwise some tens of bytes
  differ, all of them such numbers. Hence the fixed environment, the bytecode cache turned off and the script's independence
  from the rest of the package.

stdin is a memory file: the bytes of the weights and of the graph, then the request in JSON, then its offset and size. stdout takes
events, one JSON object a line. stderr is the log. argv: a word for the restart, the descriptor that the plan is written to.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib
import json
import mmap
import os
import queue
import re
import resource
import signal
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from typing import Any

TRAILER = struct.Struct("<QQ")  # offset and size of the request
MAX_ERRORS, MAX_ERROR_CHARS = 20, 500  # carried in an event; the log has them all
NAME = re.compile(r"[^\s'\"(),;:\[\]]*[\d_./][^\s'\"(),;:\[\]]*")  # numbers and names: what makes two alike messages differ
NO_GPU = re.compile(r"CUDA driver version is insufficient|CUDA initialization failure|no CUDA-capable device|[Cc]uda ?[Ee]rror 35\b")
PHASE = "Determining refit engines"  # where TensorRT-RTX spends its time, once per profile and target
ADDR_NO_RANDOMIZE, QUERY = 0x0040000, 0xFFFFFFFF
STACK_BYTES = 8 << 20
PR_SET_PDEATHSIG = 1
LAYER_LINE = re.compile(
    r"^Name: [^,]*?_myl(?P<part>\d+)_\d+, LayerType: .*?, Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: .*, Metadata: (?P<origin>.*)$",
    re.MULTILINE,
)
ATTENTION_KINDS = ("ATTENTION_INPUT", "ATTENTION")  # one layer each; ATTENTION_OUTPUT closes the first kind
PLUGIN_KINDS = ("PLUGIN_V3", "PLUGIN_V2", "PLUGIN")


class BuildError(Exception):
    """A failure with a code of `trtllm_thoughtx.errors`."""

    def __init__(self, code: str, what: str, why: str) -> None:
        super().__init__(what)
        self.code, self.what, self.why = code, what, why


class Messages:
    """Writes every message to the log; counts warnings, keeps the first errors. `distinct` ignores numbers and names."""

    def __init__(self, log_fd: int) -> None:
        self.log_fd, self.num_warnings = log_fd, 0
        self.patterns: set[str] = set()
        self.errors: dict[str, str] = {}
        self.noise: list[str] = []
        self.layers: list[tuple[str, str, str, str]] = []  # of the plan: profile, types of inputs and constants, nodes it came from

    def add(self, severity: str, text: str) -> None:
        os.write(self.log_fd, f"{severity}: {text}\n".encode(errors="replace"))
        if severity == "VERBOSE":
            self.layers += [(m["part"], m["inputs"], m["constants"], m["origin"]) for m in LAYER_LINE.finditer(text)]
        if severity == "WARNING":
            self.num_warnings += 1
            self.patterns.add(NAME.sub("*", text))
        elif severity.endswith("ERROR"):
            if NO_GPU.search(text):
                self.noise.append(text[:MAX_ERROR_CHARS])
            elif len(self.errors) < MAX_ERRORS:
                self.errors.setdefault(NAME.sub("*", text), text[:MAX_ERROR_CHARS])

    def reason(self) -> str:
        return "; ".join([*self.errors.values()][:3]) or "; ".join(self.noise[:1]) or "no message"


class PlanFile:
    """Writes and hashes a plan in a thread of its own, at most two blocks behind the builder."""

    def __init__(self, fd: int) -> None:
        self.fd, self.num_bytes, self.error = fd, 0, None
        self.digest = hashlib.sha256()
        self.blocks: queue.Queue[bytes | None] = queue.Queue(2)
        self.thread = threading.Thread(target=self._run)

    error: OSError | None

    def write(self, block: bytes) -> int:
        if not self.thread.ident:
            self.thread.start()
        self.blocks.put(block)
        return 0 if self.error else len(block)

    def _run(self) -> None:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # of this thread: the others stay on theirs
        while (block := self.blocks.get()) is not None:
            if self.error:
                continue
            try:
                rest = memoryview(block)
                while rest:
                    rest = rest[os.write(self.fd, rest) :]
                self.digest.update(block)
                self.num_bytes += len(block)
            except OSError as error:
                self.error = error

    def finish(self) -> None:
        if self.thread.ident:
            self.blocks.put(None)
            self.thread.join()
        if self.error:
            raise self.error
        os.fsync(self.fd)


def emit(event: str, **values: object) -> None:
    os.write(1, (json.dumps({"event": event, **values}) + "\n").encode())


def same_addresses() -> bool:
    """True when this process has the same memory layout on every start; restarts itself once to get there.

    False where the system does not let a process turn randomization off (some container profiles).
    """
    libc = ctypes.CDLL(None)
    if libc.personality(ctypes.c_ulong(QUERY)) & ADDR_NO_RANDOMIZE:
        return True
    if sys.argv[1] == "first" and libc.personality(ctypes.c_ulong(ADDR_NO_RANDOMIZE)) >= 0:
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        if hard == resource.RLIM_INFINITY or hard >= STACK_BYTES:
            resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, hard))  # maps lie below the stack's limit
        words = ["again" if word == "first" else word for word in sys.orig_argv]
        os.execve(sys.executable, words, os.environ)
    return False


def take_turns() -> None:
    """Keep this thread, and those that it starts, on one processor; a thread that wakes waits until the running one has to wait."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[os.getpid() % len(cpus)]})
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def build(request: dict[str, Any], job: mmap.mmap, messages: Messages, plan: PlanFile) -> dict[str, Any]:
    """Parse and build what `job` holds; returns the facts of the plan."""
    base = ctypes.addressof(ctypes.c_char.from_buffer(job))
    sys.path[:1] = request["module_dirs"]  # in place of this file's own directory, whose `tensorrt` is ours
    trt: Any = __import__(request["module"])
    logger, monitor, writer = _callbacks(trt, messages, plan)
    builder = trt.Builder(logger)
    if builder is None:
        raise BuildError("E205", "the builder did not start", messages.reason())
    flags = _provide_plugin(trt, request, messages)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = builder.create_network(flags if flag is None else flags | 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    began = time.monotonic()
    offset, size = request["model"]
    parsed = parser.load_model_proto(job[offset : offset + size])
    for name, offset, size in request["initializers"] if parsed else ():
        if not parser.load_initializer(name, base + offset, size):
            raise BuildError("E205", f"the parser refused weight {name}", _parser_errors(parser, messages))
    if not parsed or not parser.parse_model_proto():
        raise BuildError("E205", "the graph does not parse", _parser_errors(parser, messages))
    counts = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    num_attention = _count_attention(counts, request)
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    _allow_decomposition(trt, network)
    if request["float32"]:
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    if request["products"]:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # then the plan's layers are written to the log
    _configure(trt, builder, config, request)
    seconds_parse = time.monotonic() - began
    emit("step", what="parsed")
    began = time.monotonic()
    try:
        done = builder.build_serialized_network_to_stream(network, config, writer)
    finally:
        plan.finish()  # a full disk is the reason to report, whatever the builder makes of it
    if not done or not plan.num_bytes:
        raise BuildError("E205", "the build failed", messages.reason())
    return {
        "sha256": plan.digest.hexdigest(),
        "num_bytes": plan.num_bytes,
        "seconds_parse": seconds_parse,
        "seconds_build": time.monotonic() - began,
        "num_layers": network.num_layers,
        "layer_counts": dict(sorted(counts.items())),
        "num_attention": num_attention,
        "fallbacks": fallbacks(request["products"], messages.layers),
        "version": trt.__version__,
    }


def _provide_plugin(trt: Any, request: dict[str, Any], messages: Messages) -> int:
    """Make the asked form of the plugin known to the parser; flags of the network that it needs."""
    form = request["plugin"]
    if form == "aot":
        aot = importlib.import_module(request["aot_module"])
        try:
            aot.register()
        except aot.Refused as error:
            raise BuildError("E201", "the ahead-of-time plugin cannot be used here", str(error)) from None
        return 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    if form == "cpp":
        registry = trt.get_plugin_registry()
        handle = registry.load_library(request["plugin_library"])
        if handle is None or registry.get_creator(request["plugin_name"], "1", request["plugin_namespace"]) is None:
            raise BuildError("E205", "the plugin library brings no ChunkedAttention", messages.reason())
    return 0


def _count_attention(counts: Counter[str], request: dict[str, Any]) -> int:
    """Layers of the asked form. What the parser made is counted, never assumed."""
    wanted, form = request["num_attention"], request["plugin"]
    found = {"attention": sum(counts[kind] for kind in ATTENTION_KINDS), "plugin": sum(counts[kind] for kind in PLUGIN_KINDS)}
    kind, other = ("attention", "plugin") if form == "function" else ("plugin", "attention")
    if found[kind] != wanted or found[other]:
        what = f"the parser made {found[kind]} {kind} layers of a graph that has {wanted}"
        why = f"asked for: {form}; {found[other]} {other} layers took their place, or other operators: the engine would be slow, or wrong"
        raise BuildError("E205", what, why)
    return found[kind]


def fallbacks(products: list[list[Any]], layers: list[tuple[str, str, str, str]]) -> list[str]:
    """Gemm nodes that some profile of the plan does not compute from weights (and inputs, if so marked) of the wanted type.

    A product is a node's name, the type, and whether inputs have it too. A fused layer names all nodes that it came from, so a layer
    counts for a node when it has that origin and constants of that type.
    """
    missing = []
    for node, kind, both in products:
        origin, wanted = f"[ONNX Layer: {node}]", f"Datatype: {kind}"
        mine = [layer for layer in layers if origin in layer[3]]
        good = {part for part, inputs, constants, _ in mine if wanted in constants and (wanted in inputs or not both)}
        if not mine or {layer[0] for layer in mine} - good:
            missing.append(node)
    return missing


def _callbacks(trt: Any, messages: Messages, plan: PlanFile) -> tuple[Any, Any, Any]:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.add(severity.name, text)

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            pass

        def step_complete(self, name: str, step: int) -> bool:
            return plan.error is None

        def phase_finish(self, name: str) -> None:
            if name == PHASE:
                emit("step", what="compiled")

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, block: bytes) -> int:
            return plan.write(block)

    return Logger(), Monitor(), Writer()


def _parser_errors(parser: Any, messages: Messages) -> str:
    errors = [str(parser.get_error(i).desc()) for i in range(min(parser.num_errors, 3))]
    return "; ".join(errors)[:MAX_ERROR_CHARS] or messages.reason()


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Without it a build fails where no fused kernel fits (float32, two heads, a tiny head_dim); where one fits, the plan is the same."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer  # the network hands out plain ILayer objects
            layer.attention.decomposable = True


def _configure(trt: Any, builder: Any, config: Any, request: dict[str, Any]) -> None:
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError("E205", "the builder refused a range of shapes", json.dumps(shapes)[:MAX_ERROR_CHARS])
    if request["targets"]:
        config.num_compute_capabilities = len(request["targets"])
        for i, name in enumerate(request["targets"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]


def _peak_bytes() -> int:
    """Of this process alone: getrusage would count what the parent had when it forked."""
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM")), 0)


def main() -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no builder outlives the command that started it
    fixed = same_addresses()
    take_turns()
    messages, plan = Messages(2), PlanFile(int(sys.argv[2]))
    job = mmap.mmap(0, 0, access=mmap.ACCESS_COPY)
    offset, size = TRAILER.unpack(job[-TRAILER.size :])
    request = json.loads(job[offset : offset + size])
    try:
        facts = build(request, job, messages, plan)
    except BuildError as error:
        emit("error", code=error.code, what=error.what, why=error.why)
        return 1
    except OSError as error:
        code = "E203" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "E206"
        emit("error", code=code, what="the plan could not be written", why=str(error))
        return 1
    except Exception as error:  # anything that the bindings raise
        os.write(2, traceback.format_exc().encode(errors="replace"))
        emit("error", code="E205", what="the build failed", why=f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS])
        return 1
    counts = {"num_warnings": messages.num_warnings, "num_distinct_warnings": len(messages.patterns)}
    emit("done", **facts, **counts, errors=[*messages.errors.values()], peak_bytes=_peak_bytes(), fixed_addresses=fixed)
    return 0


if __name__ == "__main__":
    status = main()
    os._exit(status)  # tearing down gigabytes of C++ objects takes seconds and cannot change the plan
