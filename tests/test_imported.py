"""Quantized Hugging Face checkpoints: every number of theirs arrives, zero points too, and what cannot arrive is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
from tiny import write_tiny

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build import build
from trtllm_thoughtx.calibrate.imported import import_quantized, is_quantized, unpack_words
from trtllm_thoughtx.cli import convert
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.weights import open_weights

SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position": 256}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ROWS = [[5, 9, 2, 44, 7], list(range(40)), [90, 3]]
OPTIONS = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64}
GROUP = 32
tiny.SAFETENSORS_DTYPES["int32"] = "I32"


def names() -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS]


def packed(numbers: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """[rows, n] of 0..15 -> int32 [rows, n / 8]; place i of a word takes number `order[i]`. Written from the formats' descriptions."""
    words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
    for place, number in enumerate(order):
        words |= numbers[:, number::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def four_bits(path: Path, method: str, *, symmetric: bool = False, v2: bool = False, **sizes: Any) -> dict[str, np.ndarray]:
    """An AWQ or GPTQ checkpoint in `path`; returns what its matrices stand for, by Hugging Face name."""
    rng = np.random.default_rng(5)
    plain = write_tiny(path, **{**SIZES, **sizes})
    changed: dict[str, np.ndarray | None] = {}
    meant = {}
    for name in names():
        weight = plain[f"{name}.weight"]
        num_out, num_in = weight.shape
        numbers = rng.integers(0, 16, (num_out, num_in))
        zeros = np.full((num_out, num_in // GROUP), 8) if symmetric else rng.integers(1, 16, (num_out, num_in // GROUP))
        scales = (rng.uniform(0.5, 1.5, (num_out, num_in // GROUP)) * 0.04).astype(np.float16)
        wide = (numbers.reshape(num_out, -1, GROUP) - zeros[..., None]) * scales.astype(np.float32)[..., None]
        meant[f"{name}.weight"] = wide.reshape(num_out, num_in).astype(np.float32)
        changed[f"{name}.weight"] = None
        changed[f"{name}.scales"] = np.ascontiguousarray(scales.T)
        if method == "awq":
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            changed[f"{name}.qweight"] = packed(numbers.T, order)
            changed[f"{name}.qzeros"] = packed(zeros.T, order)
        else:
            straight = tuple(range(8))
            changed[f"{name}.qweight"] = np.ascontiguousarray(packed(numbers, straight).T)
            changed[f"{name}.qzeros"] = packed(zeros.T - (0 if v2 else 1), straight)
            changed[f"{name}.g_idx"] = (np.arange(num_in) // GROUP).astype(np.int32)
    config = {"quant_method": method, "bits": 4, "group_size": GROUP, "zero_point": not symmetric}
    config |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    write_tiny(path, **{**SIZES, **sizes}, tensors=changed, config={"quantization_config": config})
    return meant


def fp8(path: Path, *, kind: str = "compressed-tensors", per_row: bool = False, same: bool = False, **sizes: Any) -> dict[str, np.ndarray]:
    plain = write_tiny(path, **{**SIZES, **sizes})
    changed: dict[str, np.ndarray] = {}
    meant = {}
    for number, name in enumerate(names()):
        weight = plain[f"{name}.weight"]
        rows = np.abs(weight).max(1, keepdims=True) if per_row else np.abs(weight).max().reshape(1)
        scale = (np.full_like(rows, 0.02) if same else rows / 448 * (1 + 0.01 * number)).astype(np.float32)
        stored = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        changed[f"{name}.weight"], changed[f"{name}.weight_scale"] = stored, scale
        changed[f"{name}.input_scale"] = np.array([0.05], np.float32)
        meant[f"{name}.weight"] = stored.astype(np.float32) * scale
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    group = {"weights": {**inputs, "strategy": "channel" if per_row else "tensor"}, "input_activations": inputs, "targets": ["Linear"]}
    config: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    write_tiny(path, **{**SIZES, **sizes}, tensors=changed, config={} if kind == "modelopt" else {"quantization_config": config})
    if kind == "modelopt":
        quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
        (path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return meant


def logits(checkpoint: Path, out: Path) -> np.ndarray:
    build(checkpoint, out, OPTIONS)
    return np.concatenate(Engine.load(out, num_threads=1, exact=True).forward(ROWS))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(("method", "options"), [("awq", {}), ("gptq", {}), ("gptq", {"v2": True}), ("awq", {"symmetric": True})])
def test_four_bits_with_zero_points_arrive_number_for_number(tmp_path, family, method, options):
    meant = four_bits(tmp_path / "q", method, family=family, **options)
    made = import_quantized(tmp_path / "q", tmp_path / "c")
    assert (made["quant_algo"], made["has_zero_point"], made["num_quantized"]) == ("W4A16_GPTQ", not options.get("symmetric"), 10)
    write_tiny(tmp_path / "plain", family=family, tensors=meant, **SIZES)
    mine, wanted = logits(tmp_path / "c", tmp_path / "e"), logits(tmp_path / "plain", tmp_path / "p")
    np.testing.assert_allclose(mine, wanted, atol=5e-4 * float(np.abs(wanted).max()))


def test_zero_points_matter_here(tmp_path):
    """The same checkpoint with its zeros in the middle is another model: the fidelity above is not for nothing."""
    four_bits(tmp_path / "q", "awq")
    import_quantized(tmp_path / "q", tmp_path / "c")
    four_bits(tmp_path / "s", "awq", symmetric=True)
    import_quantized(tmp_path / "s", tmp_path / "d")
    assert np.abs(logits(tmp_path / "c", tmp_path / "e") - logits(tmp_path / "d", tmp_path / "f")).max() > 1


@pytest.mark.parametrize(
    ("options", "algo"),
    [
        ({}, "FP8_PER_CHANNEL"),  # q, k and v have scales of their own
        ({"per_row": True}, "FP8_PER_CHANNEL"),
        ({"same": True}, "FP8"),
        ({"kind": "modelopt", "same": True}, "FP8"),
    ],
)
def test_fp8_arrives_number_for_number(tmp_path, options, algo):
    meant = fp8(tmp_path / "q", **options)
    assert is_quantized(tmp_path / "q")
    assert import_quantized(tmp_path / "q", tmp_path / "c")["quant_algo"] == algo
    with open_weights(tmp_path / "c") as source:
        for module, parts in (("attention.qkv", LINEARS[:3]), ("mlp.proj", LINEARS[6:])):
            name = f"transformer.layers.1.{module}"
            scale = source.read(f"{name}.weights_scaling_factor").reshape(-1, 1)
            found = source.read(f"{name}.weight").astype(np.float32) * scale
            assert np.array_equal(found, np.concatenate([meant[f"model.layers.1.{part}.weight"] for part in parts]))
            assert source.read(f"{name}.activation_scaling_factor") == np.float32(0.05)
    assert np.isfinite(logits(tmp_path / "c", tmp_path / "e")).all()


@pytest.mark.rtx
@pytest.mark.parametrize("kind", ["fp8", "awq"])
def test_imported_checkpoints_build_low_precision_plans(tmp_path, kind):
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 128, "dtype": "float16"}
    fp8(tmp_path / "q", **sizes) if kind == "fp8" else four_bits(tmp_path / "q", "awq", **sizes)
    import_quantized(tmp_path / "q", tmp_path / "c")
    made = build(tmp_path / "c", tmp_path / "e", {"backend": ("tensorrt-rtx",), "max_seq_len": 64, "compute_capabilities": ("8.9",)})
    check = next(check for check in made["checks"] if check["name"].startswith("low-precision"))
    assert check["status"] == "passed" and check["evidence"]["found"] == 10, check


def test_words_unfold_as_the_formats_say():
    word = np.array([[0x76543210]], np.uint32).view(np.int32)
    assert unpack_words(word, 1).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert unpack_words(word, 0).tolist() == [[i] for i in range(8)]
    assert unpack_words(word, 1, (0, 2, 4, 6, 1, 3, 5, 7)).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
    assert unpack_words(np.array([[-1]], np.int32), 1).tolist() == [[15] * 8]


def change(path: Path, **config: Any) -> None:
    file = path / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"] |= config
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"bits": 8}, "awq with 8 bits"),
        ({"version": "gemv"}, "awq version gemv"),
        ({"quant_method": "bitsandbytes"}, "quant_method bitsandbytes"),
        ({"quant_method": "fp8"}, "quant_method fp8"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, config, word):
    four_bits(tmp_path / "q", "awq")
    change(tmp_path / "q", **config)
    with pytest.raises(ThoughtxError) as caught:
        import_quantized(tmp_path / "q", tmp_path / "c")
    assert caught.value.code == "E103" and word in caught.value.what and not (tmp_path / "c").exists()


def test_activation_order_is_refused(tmp_path):
    four_bits(tmp_path / "q", "gptq")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.g_idx"
    save_file({**tensors, name: tensors[name][::-1].copy()}, tmp_path / "q" / "model.safetensors")
    with pytest.raises(ThoughtxError, match="activation order") as caught:
        import_quantized(tmp_path / "q", tmp_path / "c")
    assert "layers.1.mlp.up_proj" in caught.value.what
    save_file({**tensors, "model.layers.1.extra": tensors[name]}, tmp_path / "q" / "model.safetensors")
    with pytest.raises(ThoughtxError, match="do not fit") as caught:
        import_quantized(tmp_path / "q", tmp_path / "c")
    assert caught.value.code == "E107" and "model.layers.1.extra" in caught.value.why and not (tmp_path / "c").exists()


def test_the_convert_command_imports_and_never_widens(tmp_path):
    from click.testing import CliRunner

    four_bits(tmp_path / "q", "awq")
    with pytest.raises(ThoughtxError, match="already quantized") as caught:
        build(tmp_path / "q", tmp_path / "e", OPTIONS)
    assert "thoughtx-convert" in caught.value.fix
    words = ["--model_dir", str(tmp_path / "q"), "--output_dir", str(tmp_path / "c"), "--json", "-q"]
    result = CliRunner().invoke(convert, words)
    assert result.exit_code == 0 and json.loads(result.stdout)["quant_algo"] == "W4A16_GPTQ"
    refused = CliRunner().invoke(convert, [*words, "--dtype", "float16", "--force"])
    assert isinstance(refused.exception, ThoughtxError) and refused.exception.code == "E001"
    assert not is_quantized(tmp_path / "c") and not is_quantized(tmp_path / "absent")
