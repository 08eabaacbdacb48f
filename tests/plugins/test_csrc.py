"""The C++ plugin: its kernels' arithmetic on a CPU, and what TensorRT asks of the library on the host, asked without TensorRT.

The second needs nvcc and NVIDIA's public headers: TRT_INCLUDE=/path/to/TensorRT/include (several, joined by colons). The library it builds
here is for one GPU generation; `make plugin` builds for all. Nothing here runs on a GPU.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess

import numpy as np
import pytest
from places import ROOT

from trtllm_thoughtx.graph.chunked_attention import attention, visible

SOURCES = ROOT / "plugins" / "chunked_attention" / "csrc"
HEADERS = [path for path in os.environ.get("TRT_INCLUDE", "").split(":") if path]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile with")
    program = tmp_path_factory.mktemp("csrc") / "cpu_test"
    subprocess.run(["g++", "-std=c++20", "-O1", "-Wall", "-Werror", "-pthread", SOURCES / "cpu_test.cpp", "-o", program], check=True)
    return program


CASES = [
    # batch, KV heads, groups, queries, slots, head_dim, sink, left, anchors, splits, chunks
    (1, 1, 1, 1, 40, 32, 0, 0, 0, 1, [16]),
    (2, 2, 7, 1, 150, 64, 4, 1, 0, 3, [16, 37]),
    (2, 1, 3, 5, 90, 32, 3, 0, 2, 1, [8, 100]),
    (1, 2, 2, 9, 70, 64, 0, 2, 1, 2, [5]),
    (1, 1, 2, 4, 33, 32, 1, 0, 0, 1, [1]),
    (2, 1, 1, 3, 50, 32, 0, 0, 0, 2, [1 << 32, 1 << 62]),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_the_arithmetic_of_the_kernels_is_the_definition(on_cpu, case):
    batch, kv_heads, groups, width, slots, head_dim, sink, left, anchors, splits, chunks = case
    rng = np.random.default_rng(slots)
    lengths = rng.integers(max(width, slots // 2), slots + 1, batch)
    at = np.stack([np.arange(n - width, n) for n in lengths]).astype(np.int64)
    held = np.stack([rng.permutation(np.where(np.arange(slots) < n, np.arange(slots), -1)) for n in lengths]).astype(np.int64)
    if batch == 2:
        at[1, 0], held[0] = -1, np.where(held[0] < lengths[0] // 2, held[0], -1)  # padding, and an emptier cache
    shapes = ((batch, kv_heads * groups, width, head_dim), (batch, kv_heads, slots, head_dim), (batch, kv_heads, slots, head_dim))
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
    chunk = np.array(chunks, np.int64)
    head = struct.pack("<10if", batch, kv_heads, groups, width, slots, head_dim, sink, left, anchors, splits, head_dim**-0.5)
    done = subprocess.run([on_cpu], input=head + b"".join(x.tobytes() for x in (q, k, v, at, held, chunk)), capture_output=True, check=True)
    got = np.frombuffer(done.stdout, np.float32).reshape(q.shape)
    mask = visible(at, held, chunk, sink, left, anchors)
    with np.errstate(invalid="ignore"):  # a query that sees nothing
        wanted = np.where(mask.any(-1)[:, None, :, None], np.nan_to_num(attention(q, k, v, mask, head_dim**-0.5)), 0.0)
    np.testing.assert_allclose(got, wanted, atol=2e-6 * np.abs(v).max())


@pytest.mark.parametrize("include", HEADERS or [None])
def test_the_library_answers_as_tensorrt_asks(include, tmp_path):
    nvcc = shutil.which("nvcc")
    if include is None:
        pytest.skip("TRT_INCLUDE is not set: the public headers of TensorRT are not on this machine")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    command = ["make", "-s", "-C", SOURCES, f"TRT_INCLUDE={include}", f"OUT={tmp_path}", "CAPABILITIES=90"]
    subprocess.run(command, check=True, capture_output=True)
    (library,) = tmp_path.glob("trt*/libthoughtx_chunked_attention.so")
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "nvinfer" not in needed and "cudart" not in needed
    host = tmp_path / "host_test"
    subprocess.run([nvcc, "-std=c++17", "-isystem", include, SOURCES / "host_test.cpp", "-ldl", "-o", host], check=True)
    done = subprocess.run([host, library], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "host test passed" in done.stdout, done.stdout


def test_make_says_what_is_missing(tmp_path):
    done = subprocess.run(
        ["make", "-C", SOURCES, f"TRT_INCLUDE={tmp_path}", f"OUT={tmp_path / 'out'}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "give the include folder of TensorRT" in done.stderr and not (tmp_path / "out").exists()
