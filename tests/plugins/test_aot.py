"""The ahead-of-time plugin in NVIDIA's own Python package of several TensorRT versions, over a native half of our own: no GPU, no TensorRT.

Each version runs in a process of its own, without Triton's interpreter, since kernels are compiled. What this shows: the definition is
accepted, types, shapes, combinations and tactics are what TensorRT will be told, the kernel compiles and the launch fits it. It does not
show that TensorRT runs it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from places import ROOT

WHEELS = ROOT / ".venv" / "trt-bindings"
VERSIONS = [line.split("==")[1].strip() for line in (Path(__file__).parent / "trt_bindings.txt").read_text().splitlines() if "==" in line]
SHAPES = [{"B": 2, "S": 1000, "T": 4096}, {"B": 64, "S": 1, "T": 8192}, {"B": 1, "S": 17, "T": 33}]
HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
ATTRIBUTES = {"scale": 0.0625, "sink": 4, "left": 1, "anchors": 2, "head_dim": HEAD_DIM, "groups": HEADS // KV_HEADS}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def drive(root: str, version: str) -> None:
    """Runs in the other process: everything that TensorRT asks of the plugin, printed as JSON."""
    import re

    import fake_tensorrt
    import numpy as np

    if tuple(int(x) for x in version.split(".")[:2]) < (11, 2):
        # These bindings read int64 attributes in a way that NumPy 2.4 no longer allows; aot.register refuses the pair. To run their code
        # nevertheless, attributes come as NumPy's scalars here.
        np.__version__ = "2.3.0"
    trt = fake_tensorrt.install(Path(root), version)
    from trtllm_thoughtx.plugins.chunked_attention.trt import aot

    aot.register(cc=90)
    creator = trt.get_plugin_registry().get_creator("ChunkedAttention", "1", "thoughtx")
    types = {"scale": (np.float64, trt.PluginFieldType.FLOAT64)}
    fields = []
    for name, value in ATTRIBUTES.items():
        kind, stated = types.get(name, (np.int64, trt.PluginFieldType.INT64))
        data = np.array([value], kind)
        fields.append(trt.PluginField(name, data if version >= "11.2" else data[0].reshape(()), stated))
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin("ChunkedAttention", "thoughtx", fields, trt.TensorRTPhase.BUILD, request).clone()
    found: dict = {"fields": sorted(field.name for field in creator.field_names)}
    half, long = trt.bfloat16, trt.int64
    found["output"] = [kind.name for kind in plugin.get_output_data_types([half] * 3 + [long] * 3, [4, 4, 4, 2, 2, 1])]
    builder = trt.IExprBuilder()

    def shape(*dims):
        return trt.DimsExprs([builder.symbol(d) if isinstance(d, str) else builder.constant(d) for d in dims])

    q, kv = ("B", HEADS, "S", HEAD_DIM), ("B", KV_HEADS, "T", HEAD_DIM)
    inputs = [shape(*dims) for dims in (q, kv, kv, ("B", "S"), ("B", "T"), ("B",))]
    output = plugin.get_output_shapes(inputs, [], builder)[0]
    found["shapes"] = [[dim.value(values) for dim in output] for values in SHAPES]

    def described(kind, dims):
        desc = trt.PluginTensorDesc()
        desc.dims = desc.shape = tuple(SHAPES[0].get(d, d) for d in dims)
        desc.type, desc.format = kind, trt.TensorFormat.LINEAR
        return trt.DynamicPluginTensorDesc(desc, desc.dims)

    kinds, sizes = [half] * 3 + [long] * 3 + [half], [q, kv, kv, ("B", "S"), ("B", "T"), ("B",), q]
    io = [described(kind, dims) for kind, dims in zip(kinds, sizes, strict=True)]
    combinations = plugin.get_supported_format_combinations(io, 6)
    found["combinations"] = [" ".join(one.type.name for one in combinations[i : i + 7]) for i in range(0, len(combinations), 7)]
    found["layouts"] = sorted({one.format.name for one in combinations})
    plugin.configure_plugin(io[:6], io[6:])
    found["tactics"] = {}
    for tactic in plugin.get_valid_tactics():
        plugin.set_tactic(tactic)
        launch, numbers = fake_tensorrt.types.SimpleNamespace(), fake_tensorrt.Numbers()
        plugin.get_launch_params(inputs, io, 6, launch, numbers, builder)
        entry, ptx = plugin.get_kernel([one.desc for one in io[:6]], [one.desc for one in io[6:]])
        ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
        head = ptx[ptx.index(".entry") :]
        params = re.findall(r"\.param \.(\w+)", head[: head.index("\n)")])

        def at(expression, values):
            return getattr(expression, "expr", expression).value(values)

        found["tactics"][tactic] = {
            "entry": entry,
            "params": params,
            "block": at(launch.block_x, {}),
            "shared": at(launch.shared_mem, {}),
            "grids": [[at(getattr(launch, f"grid_{x}"), values) for x in "xyz"] for values in SHAPES],
            "numbers": [[at(numbers[i], values) for i in range(numbers.nbSymExprs)] for values in SHAPES],
        }
    print(json.dumps(found))


@pytest.fixture(scope="module", params=VERSIONS)
def told(request, tmp_path_factory):
    wheels = list(WHEELS.glob(f"tensorrt_cu13_bindings-{request.param}-*.whl"))
    if not wheels:
        pytest.skip(f"the bindings of TensorRT {request.param} are not in {WHEELS.relative_to(ROOT)}: make setup could not download them")
    out = tmp_path_factory.mktemp("bindings")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(out, [name for name in archive.namelist() if name.startswith("tensorrt_bindings/plugin/")])
    paths = [str(Path(__file__).parent), *sys.path]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_aot; test_aot.drive({str(out)!r}, {request.param!r})"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.slow
def test_the_definition_is_what_the_graph_states(told):
    from trtllm_thoughtx.graph.chunked_attention import plugin_attributes

    control = {"plugin_namespace", "plugin_version", "aot"}
    assert set(told["fields"]) == {"scale", "sink", "left"} | (set(plugin_attributes("aot", 1, 1, 0)) - control)
    assert told["output"] == ["BF16"]
    assert told["shapes"] == [[s["B"], HEADS, s["S"], HEAD_DIM] for s in SHAPES]
    assert sorted(told["combinations"]) == [f"{k} {k} {k} INT64 INT64 INT64 {k}" for k in ("BF16", "HALF")]
    assert told["layouts"] == ["LINEAR"]


@needs_triton
@pytest.mark.slow
def test_every_tactic_launches_a_kernel_that_fits_it(told):
    from trtllm_thoughtx.plugins.chunked_attention.tiles import SMALL_SHARED
    from trtllm_thoughtx.plugins.chunked_attention.trt import aot

    tiles = aot.tactics(90, HEAD_DIM)
    assert {int(name) for name in told["tactics"]} == set(tiles) == {1, 2, 3}
    assert told["tactics"]["2"]["shared"] <= SMALL_SHARED and told["tactics"]["3"]["shared"] <= SMALL_SHARED
    for name, row in told["tactics"].items():
        tile = tiles[int(name)]
        assert row["entry"] == "attend" and row["block"] == 32 * tile.num_warps
        assert row["params"] == ["u64"] * 6 + ["u32"] * 3 + ["u64"], "inputs, int32 numbers, output"
        for values, grid, numbers in zip(SHAPES, row["grids"], row["numbers"], strict=True):
            rows = values["S"] * HEADS // KV_HEADS
            assert grid == [-(-rows // tile.block_m), values["B"] * KV_HEADS, 1]
            assert numbers == [KV_HEADS, values["S"], values["T"]]


def test_a_numpy_that_old_bindings_cannot_work_with_is_refused():
    pytest.importorskip("triton", reason="triton is not installed")
    from trtllm_thoughtx.plugins.chunked_attention.trt import aot

    with pytest.raises(aot.Refused, match=r"numpy<2\.4"):
        aot.refuse_old_numpy("11.1.0.106", "2.4.6")
    for tensorrt, numpy in (("11.2.1.2", "2.4.6"), ("10.15.1.29", "2.3.5"), ("11.4.0.106", "2.5.0")):
        aot.refuse_old_numpy(tensorrt, numpy)


def test_without_a_driver_the_gpu_cannot_be_named(monkeypatch):
    from trtllm_thoughtx.plugins.chunked_attention.trt import aot

    monkeypatch.setattr(aot, "CUDA_DRIVER", "libcuda-absent.so.9")
    with pytest.raises(aot.Refused, match="no NVIDIA driver"):
        aot.compute_capability()
