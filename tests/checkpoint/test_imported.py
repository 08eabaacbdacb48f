"""Quantized Hugging Face checkpoints: every number of theirs arrives, zero points too, and what cannot arrive is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_models import GROUP, LINEARS, SIZES, four_bits, fp8, groups_of, names, packed
from tiny import tiny_values, write_tiny

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.checkpoint.layouts import unpack_words
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.quantized import import_quantized
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.cli.commands import convert
from trtllm_thoughtx.errors import ThoughtxError

ROWS = [[5, 9, 2, 44, 7], list(range(40)), [90, 3]]
OPTIONS = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64}


def logits(checkpoint: Path, out: Path) -> np.ndarray:
    build(checkpoint, out, OPTIONS)
    return np.concatenate(Engine.load(out, num_threads=1, exact=True).forward(ROWS))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {}),
        ("gptq", {}),
        ("gptq", {"v2": True}),
        ("awq", {"symmetric": True}),
        ("gptq", {"act_order": True}),
        ("gptq", {"act_order": True, "symmetric": True}),
    ],
)
@pytest.mark.slow
def test_four_bits_with_zero_points_arrive_number_for_number(tmp_path, family, method, options):
    meant = four_bits(tmp_path / "q", method, family=family, **options)
    made = import_quantized(tmp_path / "q", tmp_path / "c")
    assert (made["quant_algo"], made["has_zero_point"], made["num_quantized"]) == ("W4A16_GPTQ", not options.get("symmetric"), 10)
    assert made["has_input_order"] == bool(options.get("act_order"))
    write_tiny(tmp_path / "plain", family=family, tensors=meant, **SIZES)
    mine, wanted = logits(tmp_path / "c", tmp_path / "e"), logits(tmp_path / "plain", tmp_path / "p")
    np.testing.assert_allclose(mine, wanted, atol=5e-4 * float(np.abs(wanted).max()))


@pytest.mark.parametrize(
    ("method", "options", "algo"),
    [
        ("awq", {"whole_rows": True}, "W4A16_GPTQ"),
        ("gptq", {"whole_rows": True, "act_order": True}, "W4A16_GPTQ"),
        ("gptq", {"bits": 8, "symmetric": True}, "W8A16_GPTQ"),
        ("gptq", {"bits": 8, "symmetric": True, "whole_rows": True, "v2": True}, "W8A16"),
    ],
)
def test_whole_rows_and_eight_bits_arrive_number_for_number(tmp_path, method, options, algo):
    meant = four_bits(tmp_path / "q", method, **options)
    assert import_quantized(tmp_path / "q", tmp_path / "c")["quant_algo"] == algo
    write_tiny(tmp_path / "plain", tensors=meant, **SIZES)
    mine, wanted = logits(tmp_path / "c", tmp_path / "e"), logits(tmp_path / "plain", tmp_path / "p")
    np.testing.assert_allclose(mine, wanted, atol=5e-4 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("options", [{}, {"symmetric": True, "act_order": True}])
def test_eight_bits_with_zero_points_or_an_order_are_refused_by_name(tmp_path, options):
    four_bits(tmp_path / "q", "gptq", bits=8, **options)
    with pytest.raises(ThoughtxError, match="8 bits and zero points, or an activation order") as caught:
        import_quantized(tmp_path / "q", tmp_path / "c")
    assert caught.value.exit == 3 and not (tmp_path / "c").exists()


@pytest.mark.parametrize(("tied", "head"), [(True, False), (False, True)])
def test_activation_order_with_either_head(tmp_path, tied, head):
    """A head that is the embedding, and one that is quantized itself; fused operators compute the same products."""
    sizes = {"tied": tied, "vocab_size": 104}
    meant = four_bits(tmp_path / "q", "gptq", act_order=True, head=head, **sizes)
    assert import_quantized(tmp_path / "q", tmp_path / "c")["num_quantized"] == 10 + head
    write_tiny(tmp_path / "plain", tensors=meant, **SIZES, **sizes)
    mine, wanted = logits(tmp_path / "c", tmp_path / "e"), logits(tmp_path / "plain", tmp_path / "p")
    np.testing.assert_allclose(mine, wanted, atol=5e-4 * float(np.abs(wanted).max()))
    fused = np.concatenate(Engine.load(tmp_path / "e", num_threads=1).forward(ROWS))
    assert 0 < np.sqrt(np.mean((fused - wanted) ** 2)) < 3e-2 * wanted.std()


def test_an_order_is_kept_only_where_there_is_one(tmp_path):
    """Rising groups give the same bytes whatever the config says of activation order; the order of the others sorts their groups."""
    four_bits(tmp_path / "q", "gptq")
    import_quantized(tmp_path / "q", tmp_path / "c")
    change(tmp_path / "q", desc_act=True)
    assert import_quantized(tmp_path / "q", tmp_path / "d")["has_input_order"] is False
    assert (tmp_path / "c" / "rank0.safetensors").read_bytes() == (tmp_path / "d" / "rank0.safetensors").read_bytes()
    assert "has_input_order" not in json.loads((tmp_path / "d" / "config.json").read_text())["quantization"]
    four_bits(tmp_path / "a", "gptq", act_order=True)
    import_quantized(tmp_path / "a", tmp_path / "o")
    with open_weights(tmp_path / "o") as source:
        order = source.read("transformer.layers.1.mlp.proj.input_order")
        assert source.config.quantization.input_order and order.dtype == np.int32
    groups = groups_of("model.layers.1.mlp.down_proj", 128, True)
    assert np.array_equal(groups[order], np.arange(128) // GROUP) and not np.array_equal(order, np.arange(128))


def reordered(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The same model with the channels of the residual stream and of each MLP in another order: a GPTQ checkpoint with another g_idx."""
    hidden = rng.permutation(SIZES["hidden_size"])
    inner = [rng.permutation(SIZES["intermediate_size"]) for _ in range(2)]
    found = {}
    for name, value in tensors.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        into = inner[layer] if "down_proj" in name else None if "o_proj" in name else hidden  # order of the matrix's inputs
        out = inner[layer] if "gate_proj" in name or "up_proj" in name else hidden if "down_proj" in name or "o_proj" in name else None
        if name.endswith(("norm.weight", "g_idx")):
            value = value if into is None else value[into]
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value = value[:, hidden]
        elif name.endswith("qweight"):
            numbers = unpack_words(value, 0)
            numbers = numbers if into is None else numbers[into]
            numbers = numbers if out is None else numbers[:, out]
            value = np.ascontiguousarray(packed(numbers.T, tuple(range(8))).T)
        elif name.endswith("qzeros"):
            value = packed(unpack_words(value, 1)[:, out], tuple(range(8))) if out is not None else value
        elif name.endswith("scales"):
            value = value[:, out] if out is not None else value
        found[name] = np.ascontiguousarray(value)
    return found


@pytest.mark.parametrize("act_order", [False, True])
def test_a_model_whose_channels_change_places_says_the_same(tmp_path, act_order):
    """Another order of the same channels is the same model, whatever order its groups had before."""
    from safetensors.numpy import load_file, save_file

    four_bits(tmp_path / "q", "gptq", act_order=act_order)
    import_quantized(tmp_path / "q", tmp_path / "c")
    file = tmp_path / "q" / "model.safetensors"
    save_file(reordered(load_file(file), np.random.default_rng(3)), file, {"format": "pt"})
    assert import_quantized(tmp_path / "q", tmp_path / "d")["has_input_order"]
    mine, wanted = logits(tmp_path / "d", tmp_path / "f"), logits(tmp_path / "c", tmp_path / "e")
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
    assert Checkpoint.open(tmp_path / "q").is_quantized()
    assert import_quantized(tmp_path / "q", tmp_path / "c")["quant_algo"] == algo
    with open_weights(tmp_path / "c") as source:
        for module, parts in (("attention.qkv", LINEARS[:3]), ("mlp.proj", LINEARS[6:])):
            name = f"transformer.layers.1.{module}"
            scale = source.read(f"{name}.weights_scaling_factor").reshape(-1, 1)
            found = source.read(f"{name}.weight").astype(np.float32) * scale
            assert np.array_equal(found, np.concatenate([meant[f"model.layers.1.{part}.weight"] for part in parts]))
            assert source.read(f"{name}.activation_scaling_factor") == np.float32(0.05)
    assert np.isfinite(logits(tmp_path / "c", tmp_path / "e")).all()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_fp8_whose_inputs_are_not_rounded(tmp_path, family):
    meant = fp8(tmp_path / "q", weight_only=True, per_row=True, family=family)
    assert import_quantized(tmp_path / "q", tmp_path / "c")["quant_algo"] == "W8A16_FP8"
    write_tiny(tmp_path / "plain", tensors=meant, family=family, **SIZES)
    mine, wanted = logits(tmp_path / "c", tmp_path / "e"), logits(tmp_path / "plain", tmp_path / "p")
    np.testing.assert_allclose(mine, wanted, atol=5e-4 * float(np.abs(wanted).max()))


def rounded_by_token(plain: Path) -> np.ndarray:
    """Logits of transformers in float32, each covered layer's inputs rounded to E4M3 with the scale of their token: max / 448."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference needs transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()

    def rounds(_: Any, inputs: tuple[Any, ...]) -> Any:
        scale = (inputs[0].abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
        return ((inputs[0] / scale).to(torch.float8_e4m3fn).float() * scale,)

    for name, module in model.named_modules():
        if name in names():
            module.register_forward_pre_hook(rounds)
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([row])).logits[0].numpy() for row in ROWS])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("options", [{"per_row": True}, {"kind": "modelopt", "per_row": True, "tied": True}, {}])
def test_fp8_with_inputs_rounded_by_token_computes_what_the_format_says(tmp_path, family, options):
    sizes = {"family": family, "tied": options.get("tied", False)}
    meant = fp8(tmp_path / "q", per_token=True, **{**options, **sizes})
    assert import_quantized(tmp_path / "q", tmp_path / "c")["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    write_tiny(tmp_path / "plain", tensors=meant, **SIZES, **sizes)
    wanted = rounded_by_token(tmp_path / "plain")
    found = (logits(tmp_path / "c", tmp_path / "e"), logits(tmp_path / "plain", tmp_path / "p"))
    mine, unrounded = (np.sqrt(np.mean((x - wanted) ** 2, axis=1)) / wanted.std() for x in found)
    # A last bit now and then moves an input to the next of the grid's numbers, and from that token on the sequence differs by that.
    assert np.quantile(mine, 0.25) < 1e-5 and mine.mean() < unrounded.mean() / 3, mine
    assert unrounded.min() > 1e-2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tokens_of_zeros_and_half_precision(tmp_path, dtype):
    """A token whose inputs are all zero has no range; halves stay close, also where rows have large and small inputs."""
    table = tiny_values("model.embed_tokens.weight", (97, 64), "float32", 0)
    table[3], table[90], table[5] = 0, table[90] * 3000, table[5] / 3000
    fp8(tmp_path / "q", per_token=True, per_row=True, more={"model.embed_tokens.weight": table})
    import_quantized(tmp_path / "q", tmp_path / "c")
    wide = logits(tmp_path / "c", tmp_path / "e")
    build(tmp_path / "c", tmp_path / "h", {**OPTIONS, "dtype": dtype})
    half = np.concatenate(Engine.load(tmp_path / "h", num_threads=1).forward(ROWS))
    assert np.isfinite(wide).all() and np.isfinite(half).all()
    assert np.sqrt(np.mean((wide - half) ** 2)) < 0.05 * wide.std()


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("capability", "method", "options"),
    [
        ("8.9", "fp8", {}),
        ("8.9", "fp8", {"per_row": True, "per_token": True}),
        ("12.0", "fp8", {"per_row": True, "per_token": True}),
        ("8.9", "fp8", {"per_row": True, "weight_only": True}),
        ("12.0", "fp8", {"per_row": True, "weight_only": True}),
        ("8.9", "awq", {}),
        ("8.9", "gptq", {"act_order": True}),
        ("12.0", "gptq", {"act_order": True}),
        ("8.9", "gptq", {"act_order": True, "symmetric": True}),
    ],
)
@pytest.mark.slow
def test_imported_checkpoints_build_low_precision_plans(tmp_path, capability, method, options):
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 128, "dtype": "float16", **options}
    fp8(tmp_path / "q", **sizes) if method == "fp8" else four_bits(tmp_path / "q", method, **sizes)
    import_quantized(tmp_path / "q", tmp_path / "c")
    made = build(tmp_path / "c", tmp_path / "e", {"backend": ("tensorrt-rtx",), "max_seq_len": 64, "compute_capabilities": (capability,)})
    check = next(check for check in made["checks"] if check["name"].startswith("low-precision"))
    assert check["status"] == "passed" and check["evidence"]["found"] == 10, check
    if method == "fp8" and "weight_only" not in options:
        # The plan multiplies by both sides' scales, one float32, inside the product: sums of raw numbers would leave float16.
        factor = np.float32(2.0**-8 if "per_token" in options else np.float16(0.05)) * np.float32(2.0**-11)
        assert factor.tobytes() in (tmp_path / "e" / "rank0.engine").read_bytes()


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}, "strategy tensor"),
        ({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": False}, "strategy token"),
        ({"num_bits": 8, "type": "float", "strategy": "tensor_group", "dynamic": "local"}, "dynamic local"),
        ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}, "inputs of another type"),
    ],
)
def test_other_scales_of_inputs_are_refused_by_name(tmp_path, inputs, word):
    fp8(tmp_path / "q")
    group = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    change(tmp_path / "q", config_groups={"group_0": {**group, "input_activations": inputs}})
    with pytest.raises(ThoughtxError) as caught:
        import_quantized(tmp_path / "q", tmp_path / "c")
    assert caught.value.code == "E103" and word in caught.value.what and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "value", "code", "word"),
    [
        ("weight_scale", np.ones((4, 2), np.float32), "E103", "FP8 with blocks"),
        ("weight", np.ones((128, 64), np.float16), "E107", "mlp.up_proj.weight does not fit"),
        ("input_scale", np.ones(2, np.float32), "E107", "input_scale does not fit"),
    ],
)
def test_fp8_tensors_that_do_not_fit_are_refused_by_name(tmp_path, name, value, code, word):
    fp8(tmp_path / "q", more={f"model.layers.1.mlp.up_proj.{name}": value})
    with pytest.raises(ThoughtxError, match=word) as caught:
        import_quantized(tmp_path / "q", tmp_path / "c")
    assert caught.value.code == code and not (tmp_path / "c").exists()


def test_fp8_plans_of_every_kind_are_for_gpus_that_have_it(tmp_path):
    fp8(tmp_path / "q", per_token=True)
    import_quantized(tmp_path / "q", tmp_path / "c")
    assert build(tmp_path / "c", tmp_path / "e", OPTIONS, dry_run=True)["build"]["compute_capabilities"] == ["8.9", "12.0"]


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
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        ({"version": "gemv"}, "awq version gemv"),
        ({"quant_method": "bitsandbytes"}, "quant_method bitsandbytes"),
        ({"quant_method": "fp8"}, "FP8 in blocks of None"),
        ({"quant_method": "gptq", "bits": 3}, "gptq with 3 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "blocks of 32"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, config, word):
    four_bits(tmp_path / "q", "awq")
    change(tmp_path / "q", **config)
    with pytest.raises(ThoughtxError) as caught:
        import_quantized(tmp_path / "q", tmp_path / "c")
    assert caught.value.code == "E103" and word in caught.value.what and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "change", "code", "word"),
    [
        ("self_attn.k_proj.g_idx", lambda x: x[::-1].copy(), "E103", "order of its own"),
        ("mlp.up_proj.g_idx", lambda x: np.minimum(x, 0), "E103", "groups that do not have 32 channels"),
        ("mlp.up_proj.g_idx", lambda x: x + 1, "E107", "g_idx does not fit"),
        ("mlp.up_proj.g_idx", lambda x: x - 1, "E107", "g_idx does not fit"),
        ("mlp.up_proj.g_idx", lambda x: x[1:].copy(), "E107", "g_idx does not fit"),
        ("mlp.up_proj.g_idx", lambda x: x.astype(np.float32), "E107", "g_idx does not fit"),
        ("mlp.up_proj.g_idx", None, "E107", "g_idx does not fit"),
        ("mlp.up_proj.bias", lambda x: np.ones(128, np.float16), "E107", "do not fit"),
        ("extra", lambda x: np.ones(4, np.float32), "E107", "do not fit"),
    ],
)
def test_orders_and_tensors_that_do_not_fit_are_refused_by_name(tmp_path, name, change, code, word):
    from safetensors.numpy import load_file, save_file

    four_bits(tmp_path / "q", "gptq", act_order=True)
    file, name = tmp_path / "q" / "model.safetensors", f"model.layers.1.{name}"
    tensors = load_file(file)
    found = tensors.pop(name, None)
    save_file(tensors | ({name: change(found)} if change else {}), file, {"format": "pt"})
    with pytest.raises(ThoughtxError, match=word) as caught:
        import_quantized(tmp_path / "q", tmp_path / "c")
    assert caught.value.code == code and name in caught.value.what + caught.value.why and not (tmp_path / "c").exists()


def test_biases_of_zeros_add_nothing(tmp_path):
    """GPTQ writers give each layer a bias, whether the model has one or not."""
    from safetensors.numpy import load_file, save_file

    four_bits(tmp_path / "q", "gptq")
    import_quantized(tmp_path / "q", tmp_path / "c")
    file = tmp_path / "q" / "model.safetensors"
    biases = {f"{name}.bias": np.zeros(128 if "up" in name else 64, np.float16) for name in names() if "up_" in name or "o_" in name}
    save_file(load_file(file) | biases, file, {"format": "pt"})
    import_quantized(tmp_path / "q", tmp_path / "d")
    assert (tmp_path / "c" / "rank0.safetensors").read_bytes() == (tmp_path / "d" / "rank0.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        (lambda x: np.minimum(x, 5), "E108", "input_order is not an order"),
        (lambda x: x + 1, "E108", "input_order is not an order"),
        (lambda x: x.astype(np.float32), "E107", "has type F32, wanted I32"),
        (lambda x: x[1:].copy(), "E107", "has shape"),
        (None, "E107", "input_order: missing"),
    ],
)
def test_a_damaged_order_is_refused_by_name(tmp_path, change, code, word):
    from trtllm_thoughtx.checkpoint import tensor_file

    four_bits(tmp_path / "q", "gptq", act_order=True)
    import_quantized(tmp_path / "q", tmp_path / "c")
    tensors = tensor_file.read_all(tmp_path / "c", "rank0.safetensors")
    found = tensors.pop("transformer.layers.1.mlp.gate.input_order")
    tensor_file.write_all(
        tmp_path / "c" / "rank0.safetensors", tensors | ({"transformer.layers.1.mlp.gate.input_order": change(found)} if change else {})
    )
    with pytest.raises(ThoughtxError) as caught:
        build(tmp_path / "c", tmp_path / "e", OPTIONS)
    assert caught.value.code == code and word in caught.value.what + caught.value.why
    assert "layers.1.mlp.gate.input_order" in caught.value.what + caught.value.why and not (tmp_path / "e").exists()


def test_only_four_bits_have_an_order(tmp_path):
    fp8(tmp_path / "q")
    import_quantized(tmp_path / "q", tmp_path / "c")
    file = tmp_path / "c" / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization"]["has_input_order"] = True
    file.write_text(json.dumps(raw))
    with pytest.raises(ThoughtxError, match="has_input_order") as caught:
        open_weights(tmp_path / "c")
    assert caught.value.code == "E103"


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
    assert not Checkpoint.open(tmp_path / "c").is_quantized()
