"""safetensors files with tensors of several types, written front to back, and the layers that a calibration has finished."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trtllm_thoughtx import checkpoint, files
from trtllm_thoughtx.weights import FIXED_DTYPES, NUMPY_DTYPES, STORED_DTYPES

Entry = tuple[str, str, tuple[int, ...]]  # name, safetensors type, shape
_NAMES = {dtype: name for name, dtype in FIXED_DTYPES.items()} | {NUMPY_DTYPES[name]: stored for stored, name in STORED_DTYPES.items()}
_SIZES = {name: dtype.itemsize for dtype, name in _NAMES.items()}


def write(path: Path, entries: Sequence[Entry], values: Iterable[np.ndarray]) -> str:
    """Write the tensors in order, one in memory at a time; returns the sha256 of the file."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, stored, shape in entries:
        end = offset + math.prod(shape) * _SIZES[stored]
        table[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for piece in (len(text).to_bytes(8, "little"), text):
            out.write(piece)
            digest.update(piece)
        for (name, stored, shape), value in zip(entries, values, strict=True):
            assert _NAMES[value.dtype] == stored and value.shape == shape, (name, value.dtype, value.shape, stored, shape)
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
            out.write(data)
            digest.update(data)
    return digest.hexdigest()


def write_all(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    write(path, [(name, _NAMES[value.dtype], value.shape) for name, value in tensors.items()], tensors.values())


def read_all(root: Path, name: str) -> dict[str, np.ndarray]:
    """Every tensor of a file that `write_all` wrote."""
    found = {}
    with files.open_inside(root, name) as file:
        for tensor, info in checkpoint.read_tensors(root, [name]).items():
            file.seek(info.offset)
            num_bytes = math.prod(info.shape) * _SIZES[info.dtype]
            found[tensor] = np.frombuffer(exactly(file, num_bytes), FIXED_DTYPES[info.dtype]).reshape(info.shape)
    return found


def exactly(file: BinaryIO, num_bytes: int) -> bytes:
    """So many bytes from where the file stands; its header was checked against its size."""
    parts = []
    while num_bytes:
        parts.append(file.read(num_bytes))
        num_bytes -= len(parts[-1])
        assert parts[-1], "the file was checked to be whole"
    return b"".join(parts)
