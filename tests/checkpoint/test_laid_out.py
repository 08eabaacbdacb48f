"""Checkpoints that compressed-tensors and ModelOpt themselves wrote (laid_out/lay_out.py): every matrix is what the library makes of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.quantize import grid
from trtllm_thoughtx.checkpoint import tensor_file
from trtllm_thoughtx.checkpoint.directory import read_tensors
from trtllm_thoughtx.checkpoint.quantized import import_quantized
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families import tensors_of

LAID_OUT = Path(__file__).parent / "laid_out"
ALGOS = {
    "ct-nvfp4": "NVFP4",
    "ct-nvfp4a16": "W4A16_NVFP4",
    "ct-fp8-block": "W8A16_FP8_GROUPS",
    "hf-fp8": "W8A16_FP8_GROUPS",
    "ct-w4a16": "W4A16_GPTQ",
    "ct-w4a16-asym": "W4A16_GPTQ",
    "ct-w4a16-channel": "W4A16_GPTQ",
    "ct-w8a16": "W8A16_GPTQ",
    "ct-w8a16-channel": "W8A16",
    "ct-w8a8": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    "ct-w8a8-static": "W8A8_SQ_PER_CHANNEL",
    "modelopt-nvfp4": "NVFP4",
    "modelopt-nvfp4a16": "W4A16_NVFP4",
}
BASE = "model.layers.0.mlp.up_proj"


def stored_in(path: Path) -> dict[str, np.ndarray]:
    """The file's tensors, less the shapes, which are int64."""
    data, found = (path / "model.safetensors").read_bytes(), {}
    for name, info in read_tensors(path, ["model.safetensors"]).items():
        if info.dtype in tensor_file.DTYPES:
            raw = np.frombuffer(data[info.offset : info.offset + info.num_bytes], tensor_file.DTYPES[info.dtype])
            found[name] = raw.reshape(info.shape)
    return found


def matrices(path: Path, *, first_scale_alone: bool) -> dict[str, np.ndarray]:
    """What the imported checkpoint's matrices stand for, by the names of their parts."""
    found = {}
    with open_weights(path) as source:
        algo = source.config.quantization.algo
        for tensor in tensors_of(source.config):
            module = tensor.name.removesuffix(".weight")
            held = {name: source.read(name) for name in source.names() if name.startswith(f"{module}.")}
            scale = grid.stored_scale(held, module, algo) if f"{module}.weight" in held and len(held) > 1 else None
            if scale is None:
                continue
            if first_scale_alone:
                scale = held[f"{module}.weights_scaling_factor"].astype(np.float32)
            whole = grid.unpack(held[f"{module}.weight"], scale, algo=algo)
            if f"{module}.zero" in held:
                whole = (whole.reshape(*scale.shape, -1) + held[f"{module}.zero"][..., None]).reshape(whole.shape)
            for part, rows in zip(tensor.parts, np.split(whole, np.cumsum([p.shape[0] for p in tensor.parts])[:-1]), strict=True):
                found[part.source] = rows
    return found


@pytest.mark.parametrize("name", ALGOS)
def test_matrices_are_what_the_library_makes_of_them(tmp_path, name):
    made = import_quantized(LAID_OUT / name, tmp_path / "c")
    assert (made["quant_algo"], made["num_quantized"]) == (ALGOS[name], 5)
    meant, is_nvfp4 = json.loads((LAID_OUT / name / "meant.json").read_text()), "nvfp4" in name
    found = matrices(tmp_path / "c", first_scale_alone=name.startswith("ct-nvfp4"))
    assert set(found) == set(meant) and len(meant) == 7
    for matrix, rows in found.items():
        rounded = (rows if is_nvfp4 else rows.astype(ml_dtypes.bfloat16)).astype(np.float32) + np.float32(0)
        assert hashlib.sha256(rounded.tobytes()).hexdigest() == meant[matrix], matrix


@pytest.mark.parametrize("name", ["ct-nvfp4", "modelopt-nvfp4"])
def test_second_scales_and_those_of_inputs_arrive(tmp_path, name):
    """compressed-tensors stores what values are divided by: its reciprocal, in float32."""
    import_quantized(LAID_OUT / name, tmp_path / "c")
    stored = stored_in(LAID_OUT / name)
    with open_weights(tmp_path / "c") as source:
        for ours, theirs in (
            ("weights_scaling_factor_2", ("weight_global_scale", "weight_scale_2")),
            ("activation_scaling_factor", ("input_global_scale", "input_scale")),
        ):
            wanted = stored[f"{BASE}.{theirs[name.startswith('modelopt')]}"].reshape(1)
            wanted = np.float32(1) / wanted if name.startswith("ct") else wanted
            np.testing.assert_array_equal(source.read(f"transformer.layers.0.mlp.gate.{ours}"), wanted)


@pytest.mark.parametrize("name", ["ct-nvfp4", "ct-fp8-block", "ct-w8a8", "ct-w8a8-static", "ct-w8a16-channel"])
def test_engines_compute_with_them(tmp_path, name):
    """Beside an engine of matrices that are widened: as close as rounded inputs are."""
    import_quantized(LAID_OUT / name, tmp_path / "c")
    meant = matrices(tmp_path / "c", first_scale_alone=False)
    shutil.copytree(LAID_OUT / name, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    stored = {n: value for n, value in stored_in(LAID_OUT / name).items() if not any(n.startswith(m.removesuffix("weight")) for m in meant)}
    tensor_file.write_all(tmp_path / "plain" / "model.safetensors", stored | meant)
    logits = []
    for checkpoint in ("c", "plain"):
        build(tmp_path / checkpoint, tmp_path / f"{checkpoint}-e", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 32})
        for exact in (True, False):
            logits.append(Engine.load(tmp_path / f"{checkpoint}-e", num_threads=1, exact=exact).forward([list(range(24))])[0])
    mine, fused, wanted, _ = logits
    room = {"ct-nvfp4": 0.2, "ct-w8a8": 0.02, "ct-w8a8-static": 0.1}.get(name, 1e-3) * float(wanted.std())
    for one in (mine, fused):
        assert float(np.sqrt(np.mean((one - wanted) ** 2))) < room
    rounds = name in ("ct-nvfp4", "ct-w8a8", "ct-w8a8-static")
    assert (float(np.abs(mine - wanted).max()) > 1e-4 * float(wanted.std())) == rounds


def refused(path: Path, out: Path) -> ThoughtxError:
    with pytest.raises(ThoughtxError) as caught:
        import_quantized(path, out)
    assert caught.value.exit == 3 and not out.exists()
    return caught.value


@pytest.mark.parametrize(
    ("name", "tensor", "change", "code"),
    [
        ("ct-nvfp4", "weight_scale", lambda x: x[:, :1].copy(), "E107"),
        ("ct-nvfp4", "weight_scale", lambda x: x * 0, "E108"),
        ("ct-nvfp4", "weight_scale", lambda x: np.full_like(x, np.nan), "E108"),
        ("ct-nvfp4", "weight_global_scale", lambda x: x * 0, "E108"),
        ("ct-nvfp4", "weight_global_scale", lambda x: None, "E107"),
        ("ct-nvfp4", "input_global_scale", lambda x: x - np.inf, "E108"),
        ("modelopt-nvfp4", "weight_scale_2", lambda x: x * 2, "E103"),
        ("modelopt-nvfp4", "weight", lambda x: x[:, :8].copy(), "E107"),
        ("ct-fp8-block", "weight_scale", lambda x: x[:1].copy(), "E107"),
        ("ct-fp8-block", "weight_scale", lambda x: -x, "E108"),
        ("hf-fp8", "weight_scale_inv", lambda x: x[:, :0].copy(), "E107"),
        ("ct-w4a16", "weight_scale", lambda x: x[:, :1].copy(), "E107"),
        ("ct-w4a16", "weight_packed", lambda x: x[:, :-1].copy(), "E107"),
        ("ct-w4a16-asym", "weight_zero_point", lambda x: None, "E107"),
        ("ct-w8a16", "weight_scale", lambda x: x * 0, "E108"),
        ("ct-w8a8-static", "input_scale", lambda x: None, "E103"),
    ],
)
def test_damaged_tensors_are_refused_by_name(tmp_path, name, tensor, change: Callable, code):
    shutil.copytree(LAID_OUT / name, tmp_path / "q")
    part = f"{BASE}.{tensor}" if code != "E103" or tensor != "weight_scale_2" else f"model.layers.0.self_attn.k_proj.{tensor}"
    stored = stored_in(tmp_path / "q")
    stored[part] = change(stored[part])
    tensor_file.write_all(tmp_path / "q" / "model.safetensors", {n: value for n, value in stored.items() if value is not None})
    error = refused(tmp_path / "q", tmp_path / "c")
    assert error.code == code and (part in error.what or "attention.qkv" in error.what)


@pytest.mark.parametrize(
    ("name", "group", "words"),
    [
        ("ct-nvfp4", {"weights": {"group_size": 32}}, "group_size 32"),
        ("ct-nvfp4", {"input_activations": {"dynamic": False}}, "dynamic False"),
        ("ct-nvfp4", {"weights": {"num_bits": 8}}, "weights of 8 bits"),
        ("ct-w4a16", {"weights": {"num_bits": 3}}, "3 bits"),
        ("ct-w4a16", {"weights": {"actorder": "group"}}, "actorder group"),
        ("ct-w4a16", {"weights": {"group_size": 24}}, "E107"),
        ("ct-w8a16", {"weights": {"symmetric": False}}, "symmetric False"),
        ("ct-fp8-block", {"weights": {"block_structure": [16, 24]}}, "16 by 24"),
        ("ct-fp8-block", {"weights": {"block_structure": "16x16"}}, "16x16"),
        ("ct-w8a8", {"input_activations": {"strategy": "group"}}, "strategy group"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, name, group, words):
    shutil.copytree(LAID_OUT / name, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    for side, values in group.items():
        config["quantization_config"]["config_groups"]["group_0"][side] |= values
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    error = refused(tmp_path / "q", tmp_path / "c")
    assert words in f"{error.code} {error.what}"


def test_mixed_formats_and_unknown_algorithms_are_refused_by_name(tmp_path):
    shutil.copytree(LAID_OUT / "ct-w8a8", tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_1"] = config["quantization_config"]["config_groups"]["group_0"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert "2 config_groups" in refused(tmp_path / "q", tmp_path / "c").what
    shutil.copytree(LAID_OUT / "modelopt-nvfp4", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for algo in ("MIXED_PRECISION", "NVFP4_AWQ", "W4A8_MXFP4_FP8", 7):
        config["quantization_config"]["quant_algo"] = algo
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        assert str(algo) in refused(tmp_path / "m", tmp_path / "c").what


@pytest.mark.rtx
@pytest.mark.parametrize(("name", "kind"), [("ct-w8a8", "Int8"), ("modelopt-nvfp4", "FP4E2M1")])
def test_plans_compute_in_low_precision(tmp_path, name, kind):
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    import_quantized(LAID_OUT / name, tmp_path / "c")
    options = {"backend": ("tensorrt-rtx",), "max_seq_len": 32, "dtype": "float16", "compute_capabilities": ("12.0",)}
    check = next(one for one in build(tmp_path / "c", tmp_path / "e", options)["checks"] if one["name"].startswith("low-precision"))
    assert check["evidence"] == {"expected": 5, "found": 5, "types": [kind]}


def test_plans_of_fp8_in_blocks_are_said_to_hold_16_bits(tmp_path):
    import_quantized(LAID_OUT / "hf-fp8", tmp_path / "c")
    options = {"backend": ("tensorrt-rtx",), "max_seq_len": 32, "dtype": "float16"}
    notes = build(tmp_path / "c", tmp_path / "e", options, dry_run=True)["notes"]
    assert any("widens FP8 in blocks" in note and "to fp8" in note for note in notes)
