"""Mixtures of experts: their checkpoints, their graph on every way through it, and what is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

hf_models = pytest.importorskip("hf_models")

from trtllm_thoughtx import Engine  # noqa: E402
from trtllm_thoughtx.build.build import build  # noqa: E402
from trtllm_thoughtx.build.engine_dir import EngineDir  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.job import calibrate  # noqa: E402
from trtllm_thoughtx.checkpoint.convert import convert  # noqa: E402
from trtllm_thoughtx.checkpoint.quantized import import_quantized  # noqa: E402
from trtllm_thoughtx.checkpoint.weights import open_weights  # noqa: E402
from trtllm_thoughtx.config import ExpertsConfig  # noqa: E402
from trtllm_thoughtx.errors import ThoughtxError  # noqa: E402
from trtllm_thoughtx.families.size import layer_parameters  # noqa: E402
from trtllm_thoughtx.graph import experts  # noqa: E402
from trtllm_thoughtx.text.params import GenerationParams  # noqa: E402
from trtllm_thoughtx.validate import quality  # noqa: E402
from trtllm_thoughtx.validate.validate import identity_of, run_reference, validate  # noqa: E402

FAMILIES = ["qwen2_moe", "qwen3_moe"]
OPTIONS: dict[str, Any] = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 96, "max_input_len": 32}
IDS = np.random.default_rng(0).integers(0, 97, 60).tolist()


def changed(path: Path, **values: Any) -> None:
    """Entries of config.json replaced."""
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, **values}))


# --- numbers -------------------------------------------------------------------------------------------------------------


def by_hand(x: np.ndarray, logits: np.ndarray, fc: np.ndarray, proj: np.ndarray, config: ExpertsConfig) -> np.ndarray:
    """Token by token, expert by expert, in float64."""
    x, logits, fc, proj = (a.astype(np.float64) for a in (x, logits, fc, proj))
    y = np.zeros_like(x)
    for n, token in enumerate(x):
        p = np.exp(logits[n] - logits[n].max())
        p /= p.sum()
        best = np.argsort(-p)[: config.num_active]
        shares = p[best] / (p[best].sum() if config.is_normalized else 1.0)
        for expert, share in zip(best, shares, strict=True):
            up, gate = np.split(fc[expert] @ token, 2)
            y[n] += share * (proj[expert] @ (up * gate / (1 + np.exp(-gate))))
    return y


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 11])  # 12 experts, 2 a token: up to two tokens are few
def test_both_ways_through_the_function_are_its_definition(is_normalized, num_tokens):
    rng = np.random.default_rng(num_tokens)
    config = ExpertsConfig(num_experts=12, num_active=2, intermediate_size=10, is_normalized=is_normalized)
    fc, proj = (rng.standard_normal(shape).astype(np.float32) for shape in ((12, 20, 16), (12, 16, 10)))
    names = ["x", "logits", "fc", "proj"]
    node = helper.make_node(experts.NAME, names, ["y"], domain=experts.DOMAIN, **experts.attributes(config))
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in (("x", 16), ("logits", 12), ("y", 16))]
    tensors = [numpy_helper.from_array(fc, "fc"), numpy_helper.from_array(proj, "proj")]
    graph = helper.make_graph([node], "g", info[:2], info[2:], tensors)
    opsets = [helper.make_opsetid("", experts.OPSET), helper.make_opsetid(experts.DOMAIN, 1)]
    made = helper.make_model(graph, functions=[experts.function_proto(config, TensorProto.FLOAT)], opset_imports=opsets, ir_version=11)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    x, logits = rng.standard_normal((num_tokens, 16)).astype(np.float32), rng.standard_normal((num_tokens, 12)).astype(np.float32)
    found = session.run(None, {"x": x, "logits": logits})[0]
    np.testing.assert_allclose(found, by_hand(x, logits, fc, proj, config), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_engines_compute_what_transformers_does(tmp_path, family, tied):
    """From either checkpoint, on onnxruntime's operator and on the graph as it stands, whole and token by token."""
    import torch

    hf = hf_models.save(tmp_path / "m", family, tie_word_embeddings=tied)
    convert(hf, tmp_path / "c")
    with torch.inference_mode():
        model = hf_models.transformers.AutoModelForCausalLM.from_pretrained(hf)
        wanted = model(torch.tensor([IDS])).logits[0].numpy()
    for name in ("m", "c"):
        build(tmp_path / name, tmp_path / f"{name}-engine", OPTIONS)
        for exact in (False, True):
            engine = Engine.load(tmp_path / f"{name}-engine", num_threads=1, exact=exact)
            np.testing.assert_allclose(engine.forward([IDS])[0], wanted, rtol=1e-3, atol=5e-5)
            np.testing.assert_allclose(engine.decode_logits([IDS], [50])[0], wanted[49:], rtol=1e-3, atol=5e-5)
            kinds = [node.op_type for node in engine_graph(tmp_path / f"{name}-engine").node]
            assert kinds.count(experts.NAME) == 3
            engine.close()


def engine_graph(path: Path) -> Any:
    import onnx

    return onnx.load(path / "rank0.onnx", load_external_data=False).graph


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_onnxruntime_runs_its_own_operator(tmp_path, dtype):
    import onnx

    from trtllm_thoughtx.backends.ort_bfloat16 import emulated_bfloat16
    from trtllm_thoughtx.backends.ort_experts import fuse_experts

    build(hf_models.save(tmp_path / "m", "qwen3_moe"), tmp_path / "e", {**OPTIONS, "dtype": dtype})
    model = onnx.load(tmp_path / "e" / "rank0.onnx", load_external_data=False)
    model = emulated_bfloat16(model) if dtype == "bfloat16" else model
    with (tmp_path / "e" / "rank0.data").open("rb") as data:
        made = fuse_experts(model, data)
    kinds = [node.op_type for node in model.graph.node]
    assert made.num_products == 3 and kinds.count("MoE") == 3 and experts.NAME not in kinds
    assert not [tensor.name for tensor in model.graph.initializer if tensor.name.endswith("mlp.fc.weight")]
    found = []
    for exact in (False, True):
        engine = Engine.load(tmp_path / "e", num_threads=1, exact=exact)
        found.append(engine.forward([IDS])[0])
        engine.close()
    room = {"float32": 2.0**-17, "float16": 2.0**-8, "bfloat16": 2.0**-5}[dtype]  # eight roundings of 16 bits
    assert np.median(np.abs(found[1] - found[0]).max(-1)) < room * found[0].std()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_validate_passes_them_and_sees_one_expert_that_is_off(tmp_path, family):
    hf = hf_models.save(tmp_path / "m", family)
    build(hf, tmp_path / "e", {**OPTIONS, "use_chunked_attention": True, "chunk_size": 16, "num_stages": 2})
    assert validate(tmp_path / "e", reference=hf).ok
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.mlp.experts.4.down_proj.weight"
    tensors[name] = tensors[name] * np.float32(1.01)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    build(hf, tmp_path / "off", OPTIONS)
    original = hf_models.save(tmp_path / "again", family)
    result = validate(tmp_path / "off", reference=original)
    assert not result.ok and result.count["failed"]


def with_fault(path: Path, fault: str) -> None:
    """A model that is wrong everywhere a little: shares not normalized, another rotary base, gates and ups exchanged."""
    raw = json.loads((path / "config.json").read_text())
    if fault == "shares":
        changed(path, norm_topk_prob=not raw["norm_topk_prob"])
    elif fault == "theta":
        changed(path, rope_parameters={**raw["rope_parameters"], "rope_theta": 2 * raw["rope_parameters"]["rope_theta"]})
    else:
        tensors = load_file(path / "model.safetensors")
        other = {"up_proj": "gate_proj", "gate_proj": "up_proj"}
        turned = {re.sub("up_proj|gate_proj", lambda found: other[found[0]], name): tensors[name] for name in tensors}
        save_file(turned, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_half_precision_is_judged_by_answers(tmp_path, family, dtype):
    """Rounding moves tokens between experts, which no band on single numbers survives; what is wrong everywhere is still seen."""
    options = {**OPTIONS, "dtype": dtype}
    for seed in (0, 1):  # rounding bands refuse the second in float16
        hf = hf_models.save(tmp_path / f"m{seed}", family, seed=seed, num_hidden_layers=6)
        build(hf, tmp_path / f"e{seed}", options)
        assert validate(tmp_path / f"e{seed}", reference=hf).ok
    for fault in ("shares", "theta", "turned"):
        wrong = hf_models.save(tmp_path / fault, family, seed=0, num_hidden_layers=6)
        with_fault(wrong, fault)
        build(wrong, tmp_path / f"e-{fault}", options)
        directory = EngineDir.open(tmp_path / f"e-{fault}")
        expected = run_reference(tmp_path / "m0", directory.config, directory.build, identity_of(directory))
        engine = Engine.load(tmp_path / f"e-{fault}", num_threads=1)
        name, found, _ = next(iter(quality.checks(engine, "onnxruntime", expected, quality.limits_of(directory, expected))))
        assert name.endswith("answers within the limits") and "KL" in found, fault


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_engines_stay_close(tmp_path, dtype):
    """Most tokens: where two experts are nearly as likely, rounding may send a token to the other one."""
    hf = hf_models.save(tmp_path / "m", "qwen2_moe")
    found = []
    for kind in ("float32", dtype):
        build(hf, tmp_path / kind, {**OPTIONS, "dtype": kind})
        engine = Engine.load(tmp_path / kind, num_threads=1)
        found.append(engine.forward([IDS])[0])
        engine.close()
    apart = np.abs(found[1] - found[0]).max(-1)
    assert np.median(apart) < 0.1 * found[0].std() and apart.max() > 0


def test_a_small_batch_and_a_large_one_generate_the_same(tmp_path):
    build(hf_models.save(tmp_path / "m", "qwen3_moe"), tmp_path / "e", {**OPTIONS, "max_batch_size": 4})
    engine = Engine.load(tmp_path / "e", num_threads=1)
    prompts = [IDS[:5], IDS[5:30], IDS[30:33], IDS[33:50]]
    params = GenerationParams(max_new_tokens=12, ignore_eos=True)
    together = [one.output_ids for one in engine.generate(prompts, params)]
    assert together == [engine.generate([prompt], params)[0].output_ids for prompt in prompts]


@pytest.mark.rtx
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_plans_are_built_and_hold_the_experts_once(tmp_path, family):
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 1}
    hf = hf_models.save(tmp_path / "m", family, dtype="float16", **sizes)
    options = {"backend": ("tensorrt-rtx",), "max_seq_len": 64, "compute_capabilities": ("8.9",)}
    made = build(hf, tmp_path / "e", options)
    assert all(check["status"] == "passed" for check in made["checks"])
    num_bytes = 2 * 16 * 3 * 512 * 256
    assert num_bytes < (tmp_path / "e" / "rank0.engine").stat().st_size < 1.8 * num_bytes


# --- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_is_tensorrt_llms(tmp_path, family):
    """Experts stacked, up before gate, the router in float32, and the shares' normalization as the model has it."""
    hf = hf_models.save(tmp_path / "m", family, dtype="bfloat16")
    convert(hf, tmp_path / "c")
    raw = json.loads((tmp_path / "c" / "config.json").read_text())
    sizes = hf_models.EXPERTS[family]
    assert raw["hidden_act"] == "swiglu" and raw["qwen_type"] == family
    assert raw["moe"]["num_experts"] == sizes["num_experts"] and raw["moe"]["top_k"] == sizes["num_experts_per_tok"]
    assert raw["moe"]["normalization_mode"] == int(family == "qwen3_moe")
    assert raw["moe_intermediate_size"] == sizes["moe_intermediate_size"]
    with open_weights(hf) as source, open_weights(tmp_path / "c") as made:
        assert made.config == source.config and made.names() == source.names()
        for name in made.names():
            assert np.array_equal(made.read(name), source.read(name)), name
        router = made.read("transformer.layers.2.mlp.router.weight")
        assert router.dtype == np.float32 and router.shape == (sizes["num_experts"], 32)
        import torch
        from safetensors.torch import load_file as load_torch

        stored = {name: value.to(torch.float32).numpy() for name, value in load_torch(hf / "model.safetensors").items()}
        fc = made.read("transformer.layers.1.mlp.fc.weight", "float32")
        for expert in range(sizes["num_experts"]):
            prefix = f"model.layers.1.mlp.experts.{expert}"
            up, gate = stored[f"{prefix}.up_proj.weight"], stored[f"{prefix}.gate_proj.weight"]
            assert np.array_equal(fc[expert], np.concatenate([up, gate]))
        assert np.array_equal(router, stored["model.layers.2.mlp.gate.weight"])
    has_shared = "transformer.layers.0.mlp.shared_expert_gate.weight" in load_torch(tmp_path / "c" / "rank0.safetensors")
    assert has_shared == (family == "qwen2_moe")


def test_ranks_hold_slices_of_every_expert(tmp_path):
    hf = hf_models.save(tmp_path / "m", "qwen2_moe")
    convert(hf, tmp_path / "c")
    convert(hf, tmp_path / "c2", tp_size=2)
    whole = load_file(tmp_path / "c" / "rank0.safetensors")
    ranks = [load_file(tmp_path / "c2" / f"rank{rank}.safetensors") for rank in range(2)]
    name = "transformer.layers.0.mlp"
    num, inner = 7, 24
    up, gate = whole[f"{name}.fc.weight"].reshape(num, 2, inner, 32).transpose(1, 0, 2, 3)
    for rank, held in enumerate(ranks):
        part = slice(rank * inner // 2, (rank + 1) * inner // 2)
        assert np.array_equal(held[f"{name}.fc.weight"], np.concatenate([up[:, part], gate[:, part]], axis=1))
        assert np.array_equal(held[f"{name}.proj.weight"], whole[f"{name}.proj.weight"][:, :, part])
        assert np.array_equal(held[f"{name}.router.weight"], whole[f"{name}.router.weight"])
    with pytest.raises(ThoughtxError, match="cannot be split") as caught:
        convert(hf_models.save(tmp_path / "odd", "qwen2_moe", moe_intermediate_size=25), tmp_path / "x", tp_size=2)
    assert "width 25" in caught.value.why


def test_transformers_5_names_the_number_of_experts_anew(tmp_path):
    hf = hf_models.save(tmp_path / "m", "qwen3_moe")
    raw = json.loads((hf / "config.json").read_text())
    assert "num_local_experts" in raw and "num_experts" not in raw
    with open_weights(hf) as source:
        wanted = source.config
    (hf / "config.json").write_text(json.dumps({**raw, "num_experts": raw.pop("num_local_experts")}))
    with open_weights(hf) as source:
        assert source.config == wanted and wanted.experts is not None and wanted.experts.num_experts == 6


@pytest.mark.parametrize(
    ("values", "code", "word"),
    [
        ({"mlp_only_layers": [0]}, "E103", "others a dense MLP"),
        ({"decoder_sparse_step": 2}, "E103", "others a dense MLP"),
        ({"num_experts_per_tok": 9}, "E102", "num_experts_per_tok"),
        ({"num_experts": 5}, "E102", "num_local_experts differ"),
        ({"num_local_experts": 7}, "E107", "tensors do not fit"),
        ({"moe_intermediate_size": 21}, "E107", "tensors do not fit"),
        ({"norm_topk_prob": "yes"}, "E102", "norm_topk_prob"),
        ({"num_local_experts": 1 << 30}, "E102", "num_local_experts"),
        ({"num_local_experts": 4096, "num_hidden_layers": 1000}, "E102", "too many for 1000 layers"),
    ],
)
def test_mixtures_that_cannot_be_read_are_refused(tmp_path, values, code, word):
    hf = hf_models.save(tmp_path / "m", "qwen3_moe")
    changed(hf, **values)
    with pytest.raises(ThoughtxError, match=word) as caught:
        convert(hf, tmp_path / "c")
    assert caught.value.code == code and not (tmp_path / "c").exists()


def test_a_missing_expert_is_named(tmp_path):
    hf = hf_models.save(tmp_path / "m", "qwen2_moe")
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ThoughtxError) as caught:
        open_weights(hf)
    assert caught.value.code == "E107" and "layers.2.mlp.experts.5.up_proj.weight: missing" in caught.value.why


@pytest.mark.parametrize(
    ("values", "code", "word"),
    [
        ({"moe": {"num_experts": 6, "top_k": 2, "normalization_mode": 2}}, "E103", "normalization_mode"),
        ({"moe": {"num_experts": 0}}, "E103", "num_experts is 0"),
        ({"moe": {"num_experts": 6, "top_k": 7, "normalization_mode": 1}}, "E102", "top_k"),
        ({"hidden_act": "silu"}, "E103", "hidden_act"),
        ({"decoder_sparse_step": 2}, "E103", "others a dense MLP"),
    ],
)
def test_checkpoints_that_cannot_be_read_are_refused(tmp_path, values, code, word):
    convert(hf_models.save(tmp_path / "m", "qwen3_moe"), tmp_path / "c")
    changed(tmp_path / "c", **values)
    with pytest.raises(ThoughtxError, match=word) as caught:
        open_weights(tmp_path / "c")
    assert caught.value.code == code


def test_a_dense_model_with_experts_in_its_config_is_refused(tmp_path):
    convert(hf_models.save(tmp_path / "m", "qwen3"), tmp_path / "c")
    changed(tmp_path / "c", moe={"num_experts": 6, "top_k": 2, "normalization_mode": 1})
    with pytest.raises(ThoughtxError, match="num_experts is 6") as caught:
        open_weights(tmp_path / "c")
    assert caught.value.code == "E103"


def test_experts_are_not_quantized(tmp_path):
    with pytest.raises(ThoughtxError, match="cannot be quantized yet") as caught:
        calibrate(hf_models.save(tmp_path / "m", "qwen2_moe"), tmp_path / "c", qformat="fp8")
    assert caught.value.code == "E103" and [path.name for path in tmp_path.iterdir()] == ["m"]


def test_quantized_mixtures_are_not_imported(tmp_path):
    hf = hf_models.save(tmp_path / "m", "qwen3_moe")
    changed(hf, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(ThoughtxError, match="a quantized mixture of experts is not read") as caught:
        import_quantized(hf, tmp_path / "c")
    assert caught.value.code == "E103" and not (tmp_path / "c").exists()


# --- what they weigh -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_weigh_all_experts_and_a_token_reads_its_own(tmp_path, family):
    hf = hf_models.save(tmp_path / "m", family)
    with open_weights(hf) as source:
        config = source.config
        names = [name for name in source.names() if ".layers.0." in name and "norm" not in name and not name.endswith("bias")]
        assert layer_parameters(config, whole=True) == sum(int(np.prod(source.shape(name))) for name in names)
    sizes = hf_models.EXPERTS[family]
    idle = (sizes["num_experts"] - sizes["num_experts_per_tok"]) * 3 * sizes["moe_intermediate_size"] * 32
    assert layer_parameters(config) == layer_parameters(config, whole=True) - idle
    build(hf, tmp_path / "e", OPTIONS)
    engine = Engine.load(tmp_path / "e", num_threads=1)
    engine.generate([[1, 2, 3]], GenerationParams(max_new_tokens=4, ignore_eos=True))
    work = engine.stats.work
    assert work.weight_bytes == 4 * work.num_calls * (3 * layer_parameters(config) + 97 * 32)
