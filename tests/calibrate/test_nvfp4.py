"""NVFP4: E2M1 numbers in blocks of 16 with E4M3 scales, as the calibration rounds to them, and as engines compute with them."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from quantized_models import SIZES, damaged
from tiny import write_tiny

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from trtllm_thoughtx import Engine  # noqa: E402
from trtllm_thoughtx.backends.ort_fp4 import BODY, ROUND  # noqa: E402
from trtllm_thoughtx.build.build import build  # noqa: E402
from trtllm_thoughtx.calibrate.quantize import gptq, grid  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.job import calibrate  # noqa: E402
from trtllm_thoughtx.checkpoint.weights import open_weights  # noqa: E402
from trtllm_thoughtx.config import QuantConfig  # noqa: E402
from trtllm_thoughtx.errors import ThoughtxError  # noqa: E402
from trtllm_thoughtx.families.formats import FP4  # noqa: E402
from trtllm_thoughtx.families.quantization import stored_as  # noqa: E402
from trtllm_thoughtx.validate.divergence import Divergence  # noqa: E402

OPTIONS = {"backend": ("onnxruntime",), "max_seq_len": 64}
QUANT = QuantConfig(algo="W4A16_NVFP4", group_size=16)


@pytest.fixture(scope="module", params=["nvfp4", "nvfp4_wo"])
def calibrated(request, tmp_path_factory):
    """(checkpoint, calibration, engine of the model as it was)."""
    root = tmp_path_factory.mktemp(request.param)
    write_tiny(root / "m", **SIZES)
    found = calibrate(root / "m", root / "c", qformat=request.param, calib_size=8, calib_seq_len=32)
    build(root / "m", root / "o", {**OPTIONS, "dtype": "float32"})
    return root / "c", found, Engine.load(root / "o", num_threads=1)


def test_numbers_are_rounded_as_e2m1_is():
    values = np.concatenate([np.linspace(-7, 7, 5601, dtype=np.float32), np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 1e-30, -5])])
    found = grid.to_grid(torch.from_numpy(values), FP4).numpy()
    wanted = np.clip(values, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(found, wanted)


def test_a_matrix_is_stored_and_read_without_a_loss():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 24)[:, None]
    weight[3, 16:32] = 0  # a block of zeros has the smallest scale
    made = gptq.nearest(weight, QUANT, torch.rand(64, generator=torch.Generator().manual_seed(1)))
    scales, second = grid.two_scales(made.scale.numpy())
    assert scales.dtype == ml_dtypes.float8_e4m3fn and (scales.astype(np.float32) > 0).all()
    assert np.frexp(second)[0] == 0.5
    np.testing.assert_array_equal(scales.astype(np.float32) * second, made.scale.numpy())
    again = grid.unpack(grid.pack(made.matrix, made.scale, "W4A16_NVFP4"), made.scale.numpy(), algo="W4A16_NVFP4")
    np.testing.assert_array_equal(again, made.matrix.numpy())
    plain = gptq.nearest(weight, QUANT)
    assert float((made.matrix - weight).square().sum()) < 0.9 * float((plain.matrix - weight).square().sum())


@pytest.mark.parametrize("second", [2.0**-8, 0.003])
def test_onnxruntime_rounds_inputs_as_the_calibration_does(second):
    x = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32) * np.float32([[1e-6], [0.01], [1], [30], [1e4], [0]])
    x[2, :16] = [6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, -0.75, -1.25, -2.5, -3.5, -5, 0, 0.1]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", ["N", 64]), ("second", []))]
    graph = helper.make_graph(
        [helper.make_node(ROUND, ["x", "second"], ["y"], domain="thoughtx")],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64])],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("thoughtx", 1)]
    model = helper.make_model(graph, functions=[onnx.parser.parse_function(BODY)], opset_imports=opsets, ir_version=11)
    found = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x, "second": np.array(second, np.float32)})[0]
    np.testing.assert_array_equal(found, grid.input_on_grid(torch.from_numpy(x), torch.tensor([second]), "NVFP4").numpy())
    blocks = x.reshape(-1, 16).astype(np.float64)  # the definition, by ml_dtypes
    scale = np.minimum(np.abs(blocks).max(1, keepdims=True) / (6 * np.float32(second)), 448).astype(np.float32)
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(second)
    ratio = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0).astype(np.float32)
    wanted = np.clip(ratio, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    np.testing.assert_array_equal(found, wanted.reshape(x.shape))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_engine_loses_what_the_calibration_states(calibrated, tmp_path, dtype):
    """Stated and measured KL are those of the same numbers: float32 engines agree to the last digits, on both ways to run."""
    checkpoint, found, original = calibrated
    build(checkpoint, tmp_path / "e", {**OPTIONS, "dtype": dtype})
    for exact, way in ((True, "exact"), (False, "onnxruntime")):
        engine, seen = Engine.load(tmp_path / "e", num_threads=1, exact=exact), Divergence()
        for row in found["validation"]:
            seen.add(original.forward([row])[0], engine.forward([row])[0], [*row[1:], -1])
        stated = found["backends"][way if dtype == "float32" else "exact"]["end_to_end"]["kl"]
        assert seen.summary().kl == pytest.approx(stated, rel=1e-3 if dtype == "float32" else 0.15)
        assert stated > 1e-3


def test_weights_take_four_bits_and_half_a_bit_of_scale(calibrated):
    checkpoint, found, _ = calibrated
    assert found["size"]["mean_bits"] == 4.5
    with open_weights(checkpoint) as source:
        name = "transformer.layers.0.mlp.fc"
        assert source.read(f"{name}.weight").shape == (128, 32)
        assert source.read(f"{name}.weights_scaling_factor").dtype == ml_dtypes.float8_e4m3fn
        assert source.read(f"{name}.weights_scaling_factor_2").shape == (1,)
        for suffix in ("activation_scaling_factor", "prequant_scaling_factor"):
            assert (f"{name}.{suffix}" in source.names()) == (found["qformat"] == "nvfp4")


@pytest.mark.rtx
def test_a_plan_has_fp4_products(calibrated, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    options = {"backend": ("tensorrt-rtx",), "max_seq_len": 64, "dtype": "bfloat16"}
    checkpoint, _, _ = calibrated
    made = build(checkpoint, tmp_path / "e", options)
    assert made["build"]["compute_capabilities"] == ["12.0"]
    check = next(check for check in made["checks"] if check["name"].startswith("low-precision"))
    assert "FP4E2M1" in check["evidence"]["types"]
    assert check["reason"] in ("", "computed in the graph's type: head.logits")  # the INT8 head of a tied model


def test_older_gpus_are_refused_before_any_work(calibrated, tmp_path):
    checkpoint, _, _ = calibrated
    with pytest.raises(ThoughtxError, match=r"compute_capabilities 8\.9 ") as caught:
        build(checkpoint, tmp_path / "e", {**OPTIONS, "backend": ("tensorrt-rtx",), "compute_capabilities": ("8.9", "12.0")})
    assert caught.value.exit == 2 and "FP4" in caught.value.why and "12.0 or later" in caught.value.fix
    assert not (tmp_path / "e").exists()


def test_damaged_checkpoints_are_refused(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="nvfp4_wo", calib_size=4, calib_seq_len=16)
    name = "transformer.layers.1.mlp.proj.weights_scaling_factor"
    config = json.loads((tmp_path / "c" / "config.json").read_text())

    def refused(code: str, words: str) -> None:
        with pytest.raises(ThoughtxError) as caught:
            build(tmp_path / "c", tmp_path / "e", {**OPTIONS, "dtype": "float32"})
        assert words in f"{caught.value.what} {caught.value.why}" and (caught.value.code, caught.value.exit) == (code, 3)
        assert not (tmp_path / "e").exists()

    damaged(tmp_path / "c", name, lambda scale: scale * 0)
    refused("E108", name)
    damaged(tmp_path / "c", name, lambda scale: scale[:, :4] + scale[:, :4].dtype.type(1))
    refused("E107", name)
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"quantization": config["quantization"] | {"group_size": 32}}))
    refused("E102", "group_size")


@pytest.mark.parametrize(("qformat", "eight"), [("nvfp4", "FP8"), ("nvfp4_wo", "W8A16_FP8")])
def test_a_budget_mixes_formats(tmp_path, qformat, eight):
    """The most sensitive layers get 8 bits, and 16 only where 8 are not enough; the engine keeps the promise."""
    write_tiny(tmp_path / "m", **SIZES)
    size: dict[str, Any] = {"qformat": qformat, "calib_size": 8, "calib_seq_len": 32}
    free = calibrate(tmp_path / "m", tmp_path / "free", **size)["end_to_end"]["kl"]
    found = calibrate(tmp_path / "m", tmp_path / "c", **size, accuracy_budget=free / 3)
    wide = {name for name, facts in found["modules"].items() if facts.get("widened")}
    assert wide and not [name for name, facts in found["modules"].items() if facts.get("kept")]
    assert found["end_to_end"]["kl"] <= free / 3 and 4.5 < found["size"]["mean_bits"] < 8
    with open_weights(tmp_path / "c") as source:
        quant = source.config.quantization
        assert set(quant.wide) == wide
        for name in wide:
            assert stored_as(quant, name).algo == eight
            assert source.read(f"{name}.weight").dtype == ml_dtypes.float8_e4m3fn
    seen = Divergence()
    engines = [
        build(tmp_path / of, tmp_path / f"{of}-e", {**OPTIONS, "dtype": "float32"}) and Engine.load(tmp_path / f"{of}-e") for of in "mc"
    ]
    for row in found["validation"]:
        seen.add(engines[0].forward([row])[0], engines[1].forward([row])[0], [*row[1:], -1])
    assert seen.summary().kl == pytest.approx(found["backends"]["onnxruntime"]["end_to_end"]["kl"], rel=1e-2)
    least = calibrate(tmp_path / "m", tmp_path / "k", **size, accuracy_budget=free / 100)
    assert [name for name, facts in least["modules"].items() if facts.get("kept")] and least["end_to_end"]["kl"] <= free / 100
