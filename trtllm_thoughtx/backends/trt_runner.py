"""Runs plans on a GPU: `TensorRTRunner`, over `tensorrt_rtx` or `tensorrt` and cuda-python.

Written against TensorRT-RTX 1.7 and TensorRT 10.15+ and checked with a stand-in for both modules; not run on a GPU by its authors. The
same engine directory can be validated anywhere with backend onnxruntime, which runs the graph that the plans were made of.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trtllm_thoughtx import files
from trtllm_thoughtx.backends.gpu import num_gpus
from trtllm_thoughtx.backends.trt_module import load_module, logger
from trtllm_thoughtx.config import PLUGIN_LIBRARY, BuildConfig, ModelConfig, PartFiles
from trtllm_thoughtx.errors import ThoughtxError, listed, shown

ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4}  # by TensorRT's DataType
NUMPY_DTYPES = {"INT64": np.int64, "INT32": np.int32, "FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16}
PREFILL, DECODE = 0, 1  # optimization profiles, in the order of `build`
VALIDATE_ON_CPU = "use a host with a GPU that the plans were built for, or --backend onnxruntime, which runs the same graph"


class Device:
    """What is used of CUDA's runtime API, with errors raised. Addresses are ints; all copies go through one stream."""

    def __init__(self) -> None:
        try:
            self.api: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            fix = 'pip install "cuda-python>=12.6"'
            raise ThoughtxError("E201", "running a plan needs cuda-python", where="import cuda", why=shown(str(error)), fix=fix) from None
        self.stream = self.call("cudaStreamCreate")

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the runtime API; its result without the status. E204 when memory ran out, E202 for all else."""
        status, *values = getattr(self.api, name)(*args)
        if int(status) != 0:
            text = self.api.cudaGetErrorString(status)[1]
            why = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
            full = status == self.api.cudaError_t.cudaErrorMemoryAllocation
            fix = "build with smaller limits: thoughtx-build --max_batch_size and --max_seq_len" if full else VALIDATE_ON_CPU
            raise ThoughtxError("E204" if full else "E202", f"{name} failed", where="CUDA", why=why, fix=fix)
        return values[0] if values else None

    def allocate(self, num_bytes: int) -> int:
        return int(self.call("cudaMalloc", max(num_bytes, 1)))

    def free(self, address: int) -> None:
        self.call("cudaFree", address)

    def clear(self, address: int, num_bytes: int) -> None:
        self.call("cudaMemsetAsync", address, 0, num_bytes, self.stream)

    def upload(self, address: int, array: np.ndarray) -> None:
        """`array` is contiguous and must stay alive until `wait`."""
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, self.api.cudaMemcpyKind.cudaMemcpyHostToDevice, self.stream)

    def download(self, array: np.ndarray, address: int) -> None:
        self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost, self.stream)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        self.call("cudaMemcpyAsync", target, source, num_bytes, self.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice, self.stream)

    def wait(self) -> None:
        self.call("cudaStreamSynchronize", self.stream)


class Part:
    """One deserialized plan: its tensors by name and an execution context per profile."""

    def __init__(self, engine: Any, trt: Any, device: Device) -> None:
        self.engine, self.inputs, self.outputs = engine, [], []
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            (self.inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else self.outputs).append(name)
        self.dtypes = {name: engine.get_tensor_dtype(name).name for name in (*self.inputs, *self.outputs)}
        self.contexts = [engine.create_execution_context() for _ in range(engine.num_optimization_profiles)]
        for profile, context in enumerate(self.contexts):
            context.set_optimization_profile_async(profile, int(device.stream))

    inputs: list[str]
    outputs: list[str]


class TensorRTRunner:
    """`Runner` over one plan per part. Hidden states stay on the GPU between parts; past and present of a KV tensor are one buffer."""

    is_exact = True  # a plan is the graph

    def __init__(self, root: Path, parts: list[PartFiles], config: ModelConfig, build: BuildConfig, *, backend: str) -> None:
        self.config, self.build, self.backend = config, build, backend
        self.trt = load_module(backend)
        if not num_gpus():
            why = "no NVIDIA driver, or no GPU that it can see"
            raise ThoughtxError("E202", f"backend {backend} runs on an NVIDIA GPU", where=str(root), why=why, fix=VALIDATE_ON_CPU)
        self.device = Device()
        self.errors: list[str] = []
        self.runtime = self.trt.Runtime(logger(self.trt, self.errors))
        if build.plugin == "cpp":
            self._load_library(root / PLUGIN_LIBRARY)
        self.parts = [self._load(root, part.plans[backend].file) for part in parts]
        head = self.parts[-1].engine
        self.max_logit_rows = int(head.get_tensor_profile_shape("logit_indices", PREFILL)[2][1])
        self.tapped: dict[int, np.ndarray] = {}  # nothing: a plan has no outputs but its graph's
        self.cache: dict[str, int] = {}
        self.row_bytes: dict[str, int] = {}  # of each tensor of the KV cache
        self.batch_size = 0
        self.buffers: dict[str, tuple[int, int]] = {}  # name -> address and size; they only grow

    def _load_library(self, path: Path) -> None:
        """The engine directory's own copy, whose hash the manifest has: a library is a program."""
        if self.trt.get_plugin_registry().load_library(str(path)) is None:
            why = listed(self.errors) or "no message"
            fix = f"build the engine again with a library made for {self.trt.__name__} {self.trt.__version__}"
            raise ThoughtxError("E202", "the plugin library does not load", where=str(path), why=why, fix=fix)

    def _load(self, root: Path, file: str) -> Part:
        with files.open_inside(root, file) as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            why = listed(self.errors) or f"no message from {self.trt.__name__} {self.trt.__version__}"
            fix = f"build with this version and for this GPU (thoughtx-build --compute_capabilities); else {VALIDATE_ON_CPU}"
            raise ThoughtxError("E202", "the plan does not load on this GPU", where=str(root / file), why=why, fix=fix)
        return Part(engine, self.trt, self.device)

    def start(self, batch_size: int) -> None:
        """KV buffers for a batch. They are cleared once: what an earlier batch left is masked by kv_positions, and finite."""
        if batch_size == self.batch_size:
            return
        self._free_cache()
        for part in self.parts:
            for name in part.inputs:
                if name.startswith("past_"):
                    row_bytes = self.row_bytes[name[5:]] = int(np.prod(self._cache_shape(1))) * ITEM_BYTES[part.dtypes[name]]
                    address = self.cache[name[5:]] = self.device.allocate(batch_size * row_bytes)
                    self.device.clear(address, batch_size * row_bytes)
        self.batch_size = batch_size

    def exchange(self, a: int, b: int, num_slots: int) -> None:
        """Whole rows, through a buffer."""
        for name, num_bytes in self.row_bytes.items():
            kept, first, second = self._buffer("row", num_bytes), self._row(name, a), self._row(name, b)
            for target, source in ((kept, first), (first, second), (second, kept)):
                self.device.copy(target, source, num_bytes)

    def copy(self, source: int, target: int, num_slots: int) -> None:
        for name, num_bytes in self.row_bytes.items():
            self.device.copy(self._row(name, target), self._row(name, source), num_bytes)

    def run(self, feeds: Mapping[str, np.ndarray], first: int, last: int, row: int = 0) -> dict[str, np.ndarray]:
        """One call through some parts; see `backends.Runner`. Hidden states pass through the host only where the caller holds them."""
        batch, width = (feeds["positions"] if "positions" in feeds else feeds["hidden_states"]).shape[:2]
        num_rows = feeds["logit_indices"].shape[1] if "logit_indices" in feeds else 1
        profile = DECODE if width == 1 and num_rows == 1 else PREFILL
        hidden_shape = (batch, width, self.config.hidden_size)
        shapes = {
            **dict.fromkeys(("hidden_states", "hidden_states_out", "draft_states"), hidden_shape),
            "logits": (batch, num_rows, self.config.vocab_size),
            "exit": (batch, num_rows, 2),
            "draft_confidence": (batch, width),
        }
        alive: list[np.ndarray] = []
        uploaded: set[str] = set()
        hidden = 0
        for index, part in enumerate(self.parts[first:last]):
            context = part.contexts[profile]
            for name in part.inputs:
                if name.startswith("past_"):
                    context.set_input_shape(name, self._cache_shape(batch))
                    context.set_tensor_address(name, self._row(name[5:], row))
                elif name == "hidden_states" and index:
                    context.set_input_shape(name, hidden_shape)
                    context.set_tensor_address(name, hidden)
                else:
                    array = np.ascontiguousarray(feeds[name], NUMPY_DTYPES[part.dtypes[name]])
                    alive.append(array)
                    address = self._buffer(name, array.nbytes)
                    if name not in uploaded:  # later parts read what the first one was given
                        self.device.upload(address, array)
                        uploaded.add(name)
                    context.set_input_shape(name, array.shape)
                    context.set_tensor_address(name, address)
            for name in part.outputs:
                if name.startswith("present_"):
                    context.set_tensor_address(name, self._row(name[8:], row))
                    continue
                # Two buffers take turns: a part reads the hidden states of one and writes the other.
                key = f"{name}.{index % 2}" if name == "hidden_states_out" else name
                address = self._buffer(key, int(np.prod(shapes[name])) * ITEM_BYTES[part.dtypes[name]])
                context.set_tensor_address(name, address)
                if name == "hidden_states_out":
                    hidden = address
            if not context.execute_async_v3(int(self.device.stream)):
                raise ThoughtxError(
                    "E205", "the engine refused a step", where=f"part {index}", why=listed(self.errors) or "no message", fix=VALIDATE_ON_CPU
                )
        found = {}
        for name in part.outputs:
            if not name.startswith("present_"):
                found[name] = np.empty(shapes[name], NUMPY_DTYPES[part.dtypes[name]])
                self.device.download(found[name], hidden if name == "hidden_states_out" else self.buffers[name][0])
        self.device.wait()
        return found

    def close(self) -> None:
        self._free_cache()
        for address, _ in self.buffers.values():
            self.device.free(address)
        self.buffers, self.parts = {}, []

    def _cache_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        return (batch_size, self.config.num_kv_heads, self.build.kv_capacity, self.config.head_dim)

    def _row(self, name: str, row: int) -> int:
        """The address from which on a tensor of the KV cache holds this row and those behind it."""
        return self.cache[name] + row * self.row_bytes[name]

    def _free_cache(self) -> None:
        for address in self.cache.values():
            self.device.free(address)
        self.cache, self.batch_size = {}, 0

    def _buffer(self, name: str, num_bytes: int) -> int:
        address, size = self.buffers.get(name, (0, 0))
        if size < num_bytes:
            if size:
                self.device.wait()
                self.device.free(address)
            address = self.device.allocate(num_bytes)
            self.buffers[name] = (address, num_bytes)
        return address
