"""The Triton kernels in the interpreter (conftest.py) against the operator's NumPy definition; their record for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_thoughtx.graph.chunked_attention import attention, visible

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")
op = pytest.importorskip("trtllm_thoughtx.plugins.chunked_attention.op")
from trtllm_thoughtx.plugins.chunked_attention import tiles  # noqa: E402

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff
COMPILING = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def case(rng, *, dtype, batch, heads, kv_heads, width, slots, head_dim, shuffle=True, lengths=None):
    """Ragged rows that end in the slots, empty slots behind them, in any order."""
    lengths = rng.integers(width, slots + 1, batch) if lengths is None else np.asarray(lengths)
    q_positions = np.stack([np.arange(n - width, n) for n in lengths])
    rows = [np.where(np.arange(slots) < n, np.arange(slots), -1) for n in lengths]
    kv_positions = np.stack([rng.permutation(row) if shuffle else row for row in rows])
    shapes = ((batch, heads, width, head_dim), (batch, kv_heads, slots, head_dim), (batch, kv_heads, slots, head_dim))
    q, k, v = (torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype) for shape in shapes)
    return q, k, v, q_positions.astype(np.int64), kv_positions.astype(np.int64)


def run(q, k, v, q_positions, kv_positions, chunk, sink=0, left=0, anchors=0, **more):
    positions = [torch.from_numpy(np.ascontiguousarray(x)) for x in (q_positions, kv_positions, np.asarray(chunk, np.int64))]
    return op.chunked_attention(q, k, v, *positions, q.shape[-1] ** -0.5, sink, left, anchors, **more).float().numpy()


def defined(q, k, v, q_positions, kv_positions, chunk, sink=0, left=0, anchors=0):
    mask = visible(q_positions, kv_positions, np.asarray(chunk), sink, left, anchors)
    with np.errstate(invalid="ignore"):  # a query that sees nothing
        wanted = attention(*(x.float().numpy() for x in (q, k, v)), mask, q.shape[-1] ** -0.5)
    return np.where(mask.any(-1)[:, None, :, None], np.nan_to_num(wanted), 0.0)


def assert_within_rounding(got, wanted, v, dtype, factor=1.0):
    """Weights and result are rounded once each to `dtype`: at most two units of the largest value; float32 sums a few hundred terms."""
    largest = float(v.float().abs().max())
    bound = factor * (2 if dtype != torch.float32 else 64) * UNIT[dtype] * largest
    assert np.isfinite(got).all() and float(np.abs(got - wanted).max()) <= bound


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    chunk=st.integers(1, 40),
    sink=st.integers(0, 5),
    left=st.integers(0, 3),
    anchors=st.integers(0, 3),
    width=st.sampled_from([1, 2, 17, 40]),
    slots=st.integers(40, 130),
    heads=st.sampled_from([(2, 2), (4, 2), (7, 1)]),
    head_dim=st.sampled_from([32, 48, 64]),
    splits=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_kernels_equal_the_definition(dtype, chunk, sink, left, anchors, width, slots, heads, head_dim, splits, seed):
    rng = np.random.default_rng(seed)
    given_ = case(rng, dtype=dtype, batch=2, heads=heads[0], kv_heads=heads[1], width=width, slots=slots, head_dim=head_dim)
    window = ([chunk, chunk + 3], sink, left, anchors)
    assert_within_rounding(run(*given_, *window, num_splits=splits), defined(*given_, *window), given_[2], dtype)


@pytest.mark.parametrize("chunk", [1, 16, 20])
@pytest.mark.parametrize("edge", [-1, 0, 1])
@pytest.mark.parametrize("width", [1, 8])
def test_around_the_edges_of_chunks(chunk, edge, width):
    """The last query at positions k C - 1, k C and k C + 1."""
    rng = np.random.default_rng(chunk + edge)
    shape = {"batch": 1, "heads": 4, "kv_heads": 2, "width": width, "slots": 70, "head_dim": 32}
    given_ = case(rng, dtype=torch.float32, lengths=[60 + edge + 1], **shape)
    for left, sink in ((0, 0), (1, 2)):
        assert_within_rounding(run(*given_, [chunk], sink, left), defined(*given_, [chunk], sink, left), given_[2], torch.float32)


def test_a_chunk_as_long_as_the_sequence_is_full_causal_attention_of_torch():
    rng = np.random.default_rng(0)
    q, k, v, at, slots = case(
        rng, dtype=torch.float32, batch=2, heads=4, kv_heads=2, width=33, slots=33, head_dim=32, shuffle=False, lengths=[33, 33]
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).numpy()
    assert_within_rounding(run(q, k, v, at, slots, [33, 100]), theirs, v, torch.float32)


@pytest.mark.parametrize("chunk", [1 << 31, 1 << 32, 1 << 62])
def test_a_chunk_beyond_int32_is_full_causal_attention(chunk):
    given_ = case(np.random.default_rng(1), dtype=torch.float32, batch=1, heads=2, kv_heads=1, width=5, slots=40, head_dim=32)
    assert_within_rounding(run(*given_, [chunk]), defined(*given_, [1000]), given_[2], torch.float32)


def test_padding_on_the_left_and_queries_that_see_nothing_give_zeros():
    rng = np.random.default_rng(3)
    q, k, v, at, slots = case(rng, dtype=torch.float16, batch=2, heads=2, kv_heads=1, width=6, slots=40, head_dim=32, lengths=[30, 20])
    at[1, :4] = -1  # padding
    slots[0] = -1  # an empty cache
    for splits in (1, 2):
        got = run(q, k, v, at, slots, [8, 8], 2, 1, num_splits=splits)
        assert not got[0].any() and not got[1, :, :4].any() and got[1, :, 4:].any()
        assert_within_rounding(got, defined(q, k, v, at, slots, [8, 8], 2, 1), v, torch.float16)


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("width", [1, 20])
def test_quantized_keys_and_values_equal_their_dequantized_ones(kind, width):
    rng = np.random.default_rng(5)
    q, k, v, at, slots = case(rng, dtype=torch.bfloat16, batch=2, heads=4, kv_heads=2, width=width, slots=90, head_dim=64)
    stored_type, largest = (torch.int8, 127.0) if kind == "int8" else (torch.float8_e4m3fn, 448.0)
    scales = [x.float().abs().amax((0, 2, 3)) / largest for x in (k, v)]
    stored = [x.float() / scale[None, :, None, None] for x, scale in zip((k, v), scales, strict=True)]
    stored = [(x.round() if kind == "int8" else x).to(stored_type) for x in stored]
    plain = [x.float() * scale[None, :, None, None] for x, scale in zip(stored, scales, strict=True)]
    for splits in (1, 2):
        got = run(q, *stored, at, slots, [16, 24], 3, 1, k_scale=scales[0], v_scale=scales[1], num_splits=splits)
        assert_within_rounding(got, defined(q, *plain, at, slots, [16, 24], 3, 1), plain[1], torch.bfloat16)


def test_torch_accepts_the_operator():
    rng = np.random.default_rng(0)
    q, k, v, at, slots = case(rng, dtype=torch.float32, batch=1, heads=2, kv_heads=1, width=3, slots=20, head_dim=32)
    positions = [torch.from_numpy(x) for x in (at, slots, np.array([8]))]
    torch.library.opcheck(torch.ops.thoughtx.chunked_attention.default, (q, k, v, *positions, 0.2, 1, 1, 0))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": (1, 3, 3, 32)}, "multiple of HK"),
        ({"q": (1, 2, 3, 8), "k": (1, 2, 20, 8), "v": (1, 2, 20, 8)}, "head_dim is 8"),
        ({"v": (1, 2, 21, 32)}, "k [1, 2, 20, 32]"),
        ({"sink": -1}, "sink is -1"),
        ({"left": -1}, "left is -1"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"k_scale": torch.ones(2)}, "belong together"),
        ({"chunk": torch.ones(1, dtype=torch.int32)}, "chunk_size is torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, text):
    shapes = {"q": (1, 2, 3, 32), "k": (1, 2, 20, 32), "v": (1, 2, 20, 32)}
    tensors = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    at, slots = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 20, dtype=torch.int64)
    chunk = change.get("chunk", torch.ones(1, dtype=torch.int64))
    rest = [change.get(name, default) for name, default in (("scale", 0.2), ("sink", 0), ("left", 0))]
    with pytest.raises(ValueError, match="thoughtx::chunked_attention") as caught:
        op.chunked_attention(*tensors.values(), at, slots, chunk, *rest, 0, change.get("k_scale"))
    assert text in str(caught.value)


def test_a_decode_step_is_split_until_the_gpu_is_busy():
    assert tiles.num_splits(8192, 4, 132, 64) == 32  # as long as each part has four blocks of keys
    assert tiles.num_splits(1 << 20, 4, 132, 64) == 64
    assert tiles.num_splits(8192, 1000, 132, 64) == 1
    assert tiles.num_splits(100, 1, 132, 64) == 1


# --- for GPUs that are not here ------------------------------------------------------------------------------------------


def artifacts(*words):
    command = [sys.executable, "-m", "trtllm_thoughtx.plugins.chunked_attention.artifacts", *map(str, words)]
    return subprocess.run(command, env=COMPILING, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_kernels_compile_within_their_record_and_declare_what_a_launcher_passes(tmp_path):
    record = json.loads((Path(op.__file__).parent / "resources.json").read_text())
    import triton

    if record["triton"] != triton.__version__:
        pytest.skip(f"the record is of triton {record['triton']}, this is {triton.__version__}")
    done = artifacts("--cc", "80,90,120", "--only", "bfloat16-same-d128", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 9 and json.loads((tmp_path / "manifest.json").read_text())["kernels"] == found
    for name, row in found.items():
        kept = record["kernels"][name]
        assert row["spill_bytes"] <= kept["spill_bytes"] and row["shared_bytes"] <= kept["shared_bytes"], name
        assert row["registers"] <= kept["registers"] + 8, name
        ptx = (tmp_path / f"{name}.ptx").read_text()
        entry = ptx[ptx.index(".entry") :]
        params = entry[: entry.index("\n)")].count(".param")
        assert params == row["num_params"] == {"attend": 10, "attend_split": 12, "combine": 5}[name.partition("-")[0]]
        if name.startswith("attend-sm90"):
            assert "wgmma" in ptx


def test_the_record_covers_every_generation_and_spills_next_to_nothing():
    record = json.loads((Path(op.__file__).parent / "resources.json").read_text())["kernels"]
    for cc in (80, 86, 89, 90, 100, 120):
        mine = {name: row for name, row in record.items() if f"-sm{cc}-" in name}
        assert {"float8" in name for name in mine} == ({False, True} if cc >= 89 else {False})
        assert max(row["spill_bytes"] for row in mine.values()) <= 4
        if cc != 90 and cc != 100:
            assert max(row["shared_bytes"] for row in mine.values()) <= tiles.SMALL_SHARED


STUB = r"""
#include <stdio.h>
#include <string.h>
static char name[64]; static unsigned seen[7]; static void *given[16]; static int shared = -1, loaded = 0;
int cuModuleLoadData(void **m, const void *image) { loaded = strstr(image, ".entry") != 0; *m = (void *)1; return loaded ? 0 : 218; }
int cuModuleGetFunction(void **f, void *m, const char *n) { strncpy(name, n, 63); *f = (void *)2; return 0; }
int cuFuncSetAttribute(void *f, int what, int value) { shared = what == 8 ? value : -2; return 0; }
typedef unsigned u;
int cuLaunchKernel(void *f, u a, u b, u c, u d, u e, u g, u s, void *q, void **p, void **x) {
  u all[7] = {a, b, c, d, e, g, s}; memcpy(seen, all, sizeof seen); memcpy(given, p, 10 * sizeof(void *));
  return *(int *)given[8] < 0 ? 1 : 0; }
int cuModuleUnload(void *m) { loaded = 0; return 0; }
long long at(int i) {
  if (i >= 50) return i == 100 ? shared : i == 101 ? loaded : seen[i - 50];
  return i < 6 || i == 9 ? *(long long *)given[i] : *(int *)given[i]; }
"""


def test_the_launcher_passes_what_the_kernel_declares(tmp_path):
    """Over a driver of our own that keeps what it is given."""
    import ctypes
    import shutil

    from trtllm_thoughtx.plugins.chunked_attention.artifacts import Artifact
    from trtllm_thoughtx.plugins.chunked_attention.launch import DriverError, Kernel

    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile the stand-in with")
    (tmp_path / "stub.c").write_text(STUB)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "stub.so", tmp_path / "stub.c"], check=True)
    library = str(tmp_path / "stub.so")
    tile = tiles.tile_for(90, 128, 4096)
    artifact = Artifact("attend", "attend", ".entry attend(", "", 10, tile.num_warps, 132096, 200, 0, tile)
    kernel = Kernel(artifact, library)
    kernel.launch((5, 8, 1), [101, 102, 103, 104, 105, 106], [4, 33, 4096], [1 << 40])
    at = ctypes.CDLL(library).at
    at.restype = ctypes.c_longlong
    assert [at(i) for i in range(10)] == [101, 102, 103, 104, 105, 106, 4, 33, 4096, 1 << 40]
    assert [at(50 + i) for i in range(7)] == [5, 8, 1, 32 * tile.num_warps, 1, 1, 132096] and at(100) == 132096 and at(101) == 1
    with pytest.raises(ValueError, match="takes 10 parameters, got 9"):
        kernel.launch((1, 1, 1), [0] * 6, [1, 2], [0])
    with pytest.raises(DriverError, match="cuLaunchKernel of attend: status 1"):
        kernel.launch((1, 1, 1), [0] * 6, [1, 2, -1], [0])
    kernel.close()
    assert at(101) == 0
    with pytest.raises(DriverError, match="cannot be loaded"):
        Kernel(artifact, str(tmp_path / "none.so"))
    with pytest.raises(DriverError, match="cuModuleLoadData"):
        Kernel(Artifact("x", "x", "no kernel", "", 1, 1, 0, 0, 0, tile), library)


@pytest.mark.parametrize("name", ["gpu_check", "gpu_bench"])
@pytest.mark.slow
def test_the_gpu_scripts_work_in_the_interpreter_and_claim_nothing(name):
    module = f"trtllm_thoughtx.plugins.chunked_attention.bench.{name}"
    done = subprocess.run([sys.executable, "-m", module, "--interpret", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "nothing here was measured on a GPU" in found["environment"]["note"] and found["rows"]
    if name == "gpu_bench":
        assert set(found["passed"].values()) == {None}
        assert {row["system"] for row in found["rows"]} == {"thoughtx", "SDPA dense", "SDPA virtual batches"}
    else:
        assert found["ok"]
    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, "-m", module], env=COMPILING, capture_output=True, text=True, check=False)
        assert done.returncode == 4 and "fix:" in done.stderr and not done.stdout
