"""The one writer of safetensors files: what it writes, the library reads with the same names, types, values and metadata."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import numpy as np
import pytest

from trtllm_thoughtx.checkpoint import tensor_file

PACKAGE = Path(tensor_file.__file__).parents[1]


def test_the_library_reads_what_is_written(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="the library is an extra")
    rng = np.random.default_rng(0)
    tensors = {stored: (rng.standard_normal((3, 5)) * 8).astype(dtype) for stored, dtype in tensor_file.DTYPES.items()}
    tensors |= {"none": np.zeros((0, 4), np.float32), "scalar": np.ones((), np.float32)}
    digest = tensor_file.write_all(tmp_path / "a.safetensors", tensors, {"format": "pt", "more": "x"})
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    listed = safetensors.deserialize((tmp_path / "a.safetensors").read_bytes())
    assert {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in listed} == {
        name: (tensor_file.NAMES[value.dtype], value.shape, value.tobytes()) for name, value in tensors.items()
    }
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt", "more": "x"}


def test_what_is_written_is_read_back(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.float32([[0.5, -2]]).astype(tensor_file.DTYPES["F8_E4M3"])}
    tensor_file.write_all(tmp_path / "a.safetensors", tensors)
    read = tensor_file.read_all(tmp_path, "a.safetensors")
    assert {name: (value.dtype, value.tolist()) for name, value in read.items()} == {
        name: (value.dtype, value.tolist()) for name, value in tensors.items()
    }


def test_nothing_else_writes_a_header():
    """`data_offsets` is written in one place and read in one; training saves through the library."""
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(isinstance(node, ast.Constant) and node.value == "data_offsets" for node in ast.walk(ast.parse(path.read_text())))
    ]
    assert sorted(users) == ["checkpoint/header.py", "checkpoint/tensor_file.py"]
