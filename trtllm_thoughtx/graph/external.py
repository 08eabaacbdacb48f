"""A graph's large initializers: where each lies in the external data file, and the bytes that belong there.

`bind` appends the initializers to the graph as external tensors; `arrays` yields their values in that order, cast to the graph's
type, a few read ahead; `write_data` streams them to disk. A builder that takes weights from memory uses `bind` and `arrays` and
no file at all. The layout depends on the config alone, so the same checkpoint gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from trtllm_thoughtx.checkpoint.tensor_file import DTYPES
from trtllm_thoughtx.checkpoint.weights import NUMPY_DTYPES, WeightSource
from trtllm_thoughtx.families.formats import NUMBERS
from trtllm_thoughtx.graph.builder import ELEM_TYPE, Graph, Initializer
from trtllm_thoughtx.graph.quantized import elem_type
from trtllm_thoughtx.progress import Progress

NUM_READERS = 2  # reading and casting a tensor keeps one core busy
ALIGNMENT = 4096  # a page, so that a runtime can map each tensor
# Types of quantized tensors, as they lie in memory; INT32 is an order of channels, FLOAT16 and FLOAT are scales.
QUANTIZED = {elem_type(number): number for number in NUMBERS.values()}
FIXED = {kind: DTYPES[number.stored] for kind, number in QUANTIZED.items()}
FIXED |= {TensorProto.INT32: DTYPES["I32"], TensorProto.FLOAT16: DTYPES["F16"], TensorProto.FLOAT: DTYPES["F32"]}


@dataclass(frozen=True)
class Bound:
    """A graph with its external tensors declared: `model` serialized, the data file's name and size."""

    graph: Graph
    dtype: str
    model: bytes
    location: str
    offsets: dict[str, int]
    num_bytes: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.model).hexdigest()


def bind(graph: Graph, dtype: str, location: str) -> Bound:
    """Declare every large initializer as external data in the file `location` beside the graph."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    offsets, end = {}, 0
    for entry in graph.initializers:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        num_bytes = int(np.prod(stored_shape(entry), dtype=np.int64)) * numpy_type(entry, dtype).itemsize
        tensor = model.graph.initializer.add(name=entry.name, data_type=entry.elem_type or ELEM_TYPE[dtype], dims=entry.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(start)), ("length", str(num_bytes))):
            tensor.external_data.add(key=key, value=value)
        offsets[entry.name], end = start, start + num_bytes
    return Bound(graph, dtype, model.SerializeToString(deterministic=True), location, offsets, end)


def numpy_type(entry: Initializer, dtype: str) -> np.dtype:
    """How the entry lies in memory, in a graph of type `dtype`."""
    return NUMPY_DTYPES[dtype] if entry.elem_type is None else FIXED[entry.elem_type]


def stored_shape(entry: Initializer) -> tuple[int, ...]:
    """Shape in elements of `numpy_type`."""
    number = QUANTIZED.get(entry.elem_type or 0)
    return entry.shape if number is None else number.stored_shape(entry.shape)


def arrays(graph: Graph, dtype: str, source: WeightSource) -> Iterator[tuple[Initializer, np.ndarray]]:
    """The initializers' values in the graph's type, C-contiguous, in layout order; read ahead by NUM_READERS tensors."""

    def value(entry: Initializer) -> np.ndarray:
        if entry.array is not None:
            return entry.array.astype(NUMPY_DTYPES[dtype])
        found = source.read(entry.weight, dtype)
        wanted = stored_shape(entry)
        assert found.shape == wanted or (found.shape, wanted) == ((1,), ()), (entry.weight, found.shape, wanted)
        found = found if entry.factor == 1 else found * found.dtype.type(entry.factor)
        return found.reshape(wanted).astype(numpy_type(entry, dtype), copy=False)

    with ThreadPoolExecutor(NUM_READERS, "read-weights") as pool:
        ahead: deque[tuple[Initializer, Future[np.ndarray]]] = deque()
        for entry in graph.initializers:
            ahead.append((entry, pool.submit(value, entry)))
            if len(ahead) > NUM_READERS:
                entry, future = ahead.popleft()
                yield entry, future.result()
        while ahead:
            entry, future = ahead.popleft()
            yield entry, future.result()


def write_data(bound: Bound, source: WeightSource, path: Path, progress: Progress) -> str:
    """Write the external data file and return its sha256."""
    digest = hashlib.sha256()
    with path.open("xb") as out, progress.stage(f"weights of {bound.graph.part.name}", bound.num_bytes, "bytes") as stage:
        end = 0
        for entry, value in arrays(bound.graph, bound.dtype, source):
            padding = bytes(bound.offsets[entry.name] - end)
            data = value.reshape(-1).view(np.uint8).data
            for piece in (padding, data):
                out.write(piece)
                digest.update(piece)
            end = bound.offsets[entry.name] + data.nbytes
            stage.advance(len(padding) + data.nbytes)
    return digest.hexdigest()


def read_data(bound: Bound, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The same tensors back from a data file that `write_data` made, as read-only maps."""
    for entry in bound.graph.initializers:
        mapped = np.memmap(path, numpy_type(entry, bound.dtype), "r", bound.offsets[entry.name], stored_shape(entry))
        yield entry.name, mapped
