"""safetensors files written front to back: the one writer of the package, and the reader of files that it wrote itself.

What others wrote is read by `header` and `checkpoint`, which trust nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from trtllm_thoughtx import files
from trtllm_thoughtx.checkpoint import directory as checkpoint
from trtllm_thoughtx.families.formats import E2M1

# safetensors type -> NumPy's. Two 4-bit numbers share a U8; an I32 is an order of channels.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PYTORCH = {"format": "pt"}  # metadata that transformers asks for
Entry = tuple[str, str, tuple[int, ...]]  # name, safetensors type, shape


def num_bytes(entries: Iterable[Entry]) -> int:
    return sum(math.prod(shape) * DTYPES[stored].itemsize for _, stored, shape in entries)


def header(entries: Sequence[Entry], metadata: Mapping[str, str] | None = PYTORCH) -> bytes:
    """The file up to its first tensor."""
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        name, stored, shape = entry
        end = offset + num_bytes([entry])
        table[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_to(out: BinaryIO, entries: Sequence[Entry], values: Iterable[np.ndarray], metadata: Mapping[str, str] | None = PYTORCH) -> str:
    """Write the tensors in order, one in memory at a time; returns the sha256 of the file."""
    head = header(entries, metadata)
    digest = hashlib.sha256(head)
    out.write(head)
    for (name, stored, shape), value in zip(entries, values, strict=True):
        assert NAMES[value.dtype] == stored and value.shape == shape, (name, value.dtype, value.shape, stored, shape)
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        out.write(data)
        digest.update(data)
    return digest.hexdigest()


def write(path: Path, entries: Sequence[Entry], values: Iterable[np.ndarray]) -> str:
    with path.open("wb") as out:
        return write_to(out, entries, values)


def entries_of(tensors: Mapping[str, np.ndarray]) -> list[Entry]:
    return [(name, NAMES[value.dtype], value.shape) for name, value in tensors.items()]


def write_all(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = PYTORCH) -> str:
    with path.open("wb") as out:
        return write_to(out, entries_of(tensors), tensors.values(), metadata)


def read_all(root: Path, name: str) -> dict[str, np.ndarray]:
    """Every tensor of a file that `write_all` wrote."""
    found = {}
    with files.open_inside(root, name) as file:
        for tensor, info in checkpoint.read_tensors(root, [name]).items():
            file.seek(info.offset)
            found[tensor] = np.frombuffer(exactly(file, info.num_bytes), DTYPES[info.dtype]).reshape(info.shape)
    return found


def pack_four(numbers: np.ndarray) -> np.ndarray:
    """4-bit numbers, int8 [out, in], two to a byte: uint8 [out, in / 2], the earlier in the low half."""
    halves = numbers.view(np.uint8) & 15
    return np.ascontiguousarray(halves[:, 0::2] | (halves[:, 1::2] << 4))


def unpack_four(packed: np.ndarray) -> np.ndarray:
    """Inverse of `pack_four`; the last axis doubles."""
    halves = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    return (halves.astype(np.int8) ^ 8) - 8


def unpack_e2m1(packed: np.ndarray) -> np.ndarray:
    """Two E2M1 numbers of each byte, float32, the earlier from the low half; the last axis doubles."""
    values = np.array([*E2M1, *(-value for value in E2M1)], np.float32)
    return np.stack([values[packed & 15], values[packed >> 4]], -1).reshape(*packed.shape[:-1], -1)


def doubled(packed: np.ndarray) -> np.ndarray:
    """Twice the E2M1 numbers, which are integers: int8."""
    return (2 * unpack_e2m1(packed)).astype(np.int8)


def exactly(file: BinaryIO, num_bytes: int) -> bytes:
    """So many bytes from where the file stands; its header was checked against its size."""
    parts = []
    while num_bytes:
        parts.append(file.read(num_bytes))
        num_bytes -= len(parts[-1])
        assert parts[-1], "the file was checked to be whole"
    return b"".join(parts)
