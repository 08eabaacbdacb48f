"""The onnxruntime backend: the graph itself is the engine. Runs on any CPU, and on CUDA where that provider is installed.

The KV cache is one buffer per tensor, of which the rows of a call are bound as past and as present, so that TensorScatter writes in place.
A bfloat16 graph runs as
its emulation in float32 (`backends.ort_bfloat16`), since onnxruntime has no bfloat16 kernels on CPU.
"""

from __future__ import annotations

import functools
import io
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from trtllm_thoughtx import files
from trtllm_thoughtx.backends.ort_bfloat16 import emulated_bfloat16, is_bfloat16
from trtllm_thoughtx.backends.ort_experts import fuse_experts
from trtllm_thoughtx.backends.ort_fp4 import has_blocks, without_fp4
from trtllm_thoughtx.backends.ort_fused import Fused, fuse
from trtllm_thoughtx.config import BuildConfig, ModelConfig, PartFiles
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families.formats import FORMATS
from trtllm_thoughtx.graph import lora
from trtllm_thoughtx.graph.decoder import layer_output

MAX_GRAPH_BYTES = 256 << 20  # a graph without its weights takes kilobytes per layer
OUTPUTS = ("logits", "exit", "hidden_states_out", "draft_states", "draft_confidence")
QUIET = 3  # errors only: warnings here are about folded constants


def available_device() -> str:
    """ "cuda" when onnxruntime has the CUDA provider (which still needs a GPU to run), else "cpu"."""
    return "cuda" if "CUDAExecutionProvider" in ort.get_available_providers() else "cpu"


def _zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Memory that is not resident until it is written, page by page: NumPy asks for huge pages, of which one holds a whole slot."""
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


class OnnxRuntimeRunner:
    """`Runner` over one session per part."""

    max_logit_rows = 1 << 30

    def __init__(
        self,
        root: Path,
        parts: list[PartFiles],
        config: ModelConfig,
        build: BuildConfig,
        *,
        num_threads: int | None = None,
        tap_layers: bool = False,
        exact: bool = False,
    ) -> None:
        """`exact`: quantized products and experts run as the graph has them."""
        self.config, self.build, self.parts, self.exact = config, build, parts, exact
        self.device = available_device()
        self.kv_dtype: type = np.float16 if build.cache_dtype == "float16" else np.float32
        if config.quantization is not None and config.quantization.kv_algo == "INT8":
            self.kv_dtype = np.int8
        self.tapped: dict[int, np.ndarray] = {}
        self.cache: dict[str, ort.OrtValue] = {}
        self._lora_dtype: type = np.float16 if build.dtype == "float16" else np.float32
        self.adapters: dict[str, ort.OrtValue] = {}  # of each row, by input
        self._held: list[Mapping[str, np.ndarray]] = []  # whose matrices each row has
        self.is_exact = True
        self.sessions = [self._session(root, part, num_threads, tap_layers) for part in parts]
        self.bindings = [session.io_binding() for session in self.sessions]

    def _session(self, root: Path, part: PartFiles, num_threads: int | None, tap_layers: bool) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = QUIET
        options.enable_mem_pattern = False  # the live cache grows each step: no two steps have the same shapes
        options.intra_op_num_threads = num_threads or len(os.sched_getaffinity(0))
        providers = ["CPUExecutionProvider"] if self.device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(root))
        graph = files.read_inside(root, part.onnx, MAX_GRAPH_BYTES, code="E121")
        try:
            model = onnx.ModelProto.FromString(graph)
            is_emulated, found = is_bfloat16(model), list[Fused]()
            with files.open_inside(root, part.data) if part.data else io.BytesIO() as data:
                for rewrite in self._rewriters(model) if part.data else ():
                    found.append(rewrite(model, data))
                if is_emulated:
                    model = emulated_bfloat16(model)
                if self.config.experts is not None and part.data and not self.exact and self.device == "cpu":
                    found.append(fuse_experts(model, data))
            arrays = {name: array for one in found for name, array in one.arrays.items()}
            if arrays:
                self.is_exact = self.is_exact and not any(one.num_rounding for one in found)
                values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
                options.add_external_initializers(list(arrays), values)
            if tap_layers:
                self._tap(model, part)
            return ort.InferenceSession(model.SerializeToString(), options, providers=providers)
        except Exception as error:  # onnxruntime raises its own types, all of them derived from Exception alone
            raise ThoughtxError(
                "E121",
                "onnxruntime cannot load the graph",
                where=str(root / part.onnx),
                why=str(error).strip()[:500],
                fix=f"build the engine again; onnxruntime here is {ort.__version__}, 1.24 or later is needed",
            ) from None

    def _rewriters(self, model: onnx.ModelProto) -> list[Callable[[onnx.ModelProto, BinaryIO], Fused]]:
        """What replaces quantized products by this runtime's own operators, and types that it does not know."""
        quant = self.config.quantization
        fused = quant is not None and self.build.dtype == "float32" and not self.exact and self.device == "cpu"
        few_bits = quant is not None and quant.algo is not None and FORMATS[quant.algo].number.bits < 8
        return [
            *([functools.partial(fuse, rounds_inputs=few_bits)] if fused else []),
            *([without_fp4] if has_blocks(model) else []),
        ]

    def _tap(self, model: onnx.ModelProto, part: PartFiles) -> None:
        layers = [*([-1] if part.embeds else []), *range(part.first_layer, part.last_layer)]
        elem_type = onnx.TensorProto.FLOAT16 if self.build.dtype == "float16" else onnx.TensorProto.FLOAT
        for layer in layers:
            model.graph.output.append(helper.make_tensor_value_info(layer_output(layer), elem_type, ["N", self.config.hidden_size]))

    def start(self, batch_size: int) -> None:
        shape = (batch_size, self.config.num_kv_heads, self.build.kv_capacity, self.config.head_dim)
        self._start_adapters(batch_size)
        names = [f"{kind}_{layer}" for layer in range(self.config.num_layers) for kind in ("key", "value")]
        if names and names[0] in self.cache and tuple(self.cache[names[0]].shape()) == shape:
            return  # stale positions are masked by kv_positions; what they hold is finite
        self.cache = {name: ort.OrtValue.ortvalue_from_numpy(_zeros(shape, self.kv_dtype), self.device, 0) for name in names}

    def _start_adapters(self, batch_size: int) -> None:
        """Every row is the base model."""
        if len(self._held) == batch_size:
            for row in range(batch_size):
                self.set_adapter(row, {})
            return
        shapes = lora.shapes_of(self.config, self.build.max_lora_rank) if self.build.max_lora_rank else {}
        self.adapters, self._held = {}, [{} for _ in range(batch_size)]
        for layer in range(self.config.num_layers):
            for module, both in shapes.items():
                for name, shape in zip(lora.inputs_of(module, layer), both, strict=True):
                    zeros = _zeros((batch_size, *shape), self._lora_dtype)
                    self.adapters[name] = ort.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)

    def set_adapter(self, row: int, matrices: Mapping[str, np.ndarray]) -> None:
        held = self._held[row]
        if held is matrices:
            return
        for name in held.keys() | matrices.keys():
            array = self.adapters[name].numpy()
            array[row] = matrices.get(name, 0)
            if self.device != "cpu":
                self.adapters[name].update_inplace(array)
        self._held[row] = matrices

    def exchange(self, a: int, b: int, num_slots: int) -> None:
        one, other = self._held[a], self._held[b]
        self.set_adapter(a, other)
        self.set_adapter(b, one)
        for array in self._arrays():
            kept = array[a, :, :num_slots].copy()
            array[a, :, :num_slots] = array[b, :, :num_slots]
            array[b, :, :num_slots] = kept

    def copy(self, source: int, target: int, num_slots: int) -> None:
        for array in self._arrays():
            array[target, :, :num_slots] = array[source, :, :num_slots]

    def _arrays(self) -> Iterator[np.ndarray]:
        """Each tensor of the KV cache, to be changed: on a CPU it is memory of ours, from a GPU it comes and goes."""
        for value in self.cache.values():
            array = value.numpy()
            yield array
            if self.device != "cpu":
                value.update_inplace(array)

    def run(self, feeds: Mapping[str, np.ndarray], first: int, last: int, row: int = 0) -> dict[str, np.ndarray]:
        num_rows = len(next(iter(feeds.values())))
        hidden: ort.OrtValue | None = None
        self.tapped = {}
        results: dict[str, ort.OrtValue] = {}
        for part, session, binding in list(zip(self.parts, self.sessions, self.bindings, strict=True))[first:last]:
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()
            for value in session.get_inputs():
                if value.name.startswith("past_"):
                    binding.bind_input(value.name, *self._rows(self.cache[value.name[5:]], self.kv_dtype, row, num_rows))
                elif value.name in self.adapters:
                    binding.bind_input(value.name, *self._rows(self.adapters[value.name], self._lora_dtype, row, num_rows))
                elif value.name == "hidden_states" and hidden is not None:
                    binding.bind_ortvalue_input(value.name, hidden)
                else:
                    binding.bind_cpu_input(value.name, feeds[value.name])
            names = [value.name for value in session.get_outputs()]
            for name in names:
                if name.startswith("present_"):
                    binding.bind_output(name, *self._rows(self.cache[name[8:]], self.kv_dtype, row, num_rows))
                else:
                    binding.bind_output(name, self.device if name == "hidden_states_out" else "cpu")
            session.run_with_iobinding(binding)
            results = dict(zip(names, binding.get_outputs(), strict=True))
            hidden = results.get("hidden_states_out")
            for layer in range(-1, part.last_layer):
                if layer_output(layer) in results:
                    self.tapped[layer] = results[layer_output(layer)].numpy()
        found = {name: results[name].numpy() for name in OUTPUTS if name in results}
        return found

    def _rows(self, value: ort.OrtValue, dtype: type, row: int, num_rows: int) -> tuple[str, int, type, list[int], int]:
        """Rows of a tensor of the KV cache, or of the adapters, as a binding takes them."""
        shape = value.shape()[1:]
        offset = row * math.prod(shape) * np.dtype(dtype).itemsize
        return self.device, 0, dtype, [num_rows, *shape], value.data_ptr() + offset

    def close(self) -> None:
        self.sessions, self.bindings, self.cache = [], [], {}
