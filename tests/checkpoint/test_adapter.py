"""LoRA adapters in PEFT directories: merged as peft merges them, in every command that reads a model, or refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import model, save
from safetensors.numpy import load_file, save_file

from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.weights import WeightSource, open_weights
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families import tensors_of

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 2, 3, 4, 90, 0, 2]])
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 7, r"layers\.0\..*up_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
# name -> (settings of peft, is the base tied, stays it tied)
CASES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "plain": ({"target_modules": ["q_proj", "down_proj"], "lora_alpha": 16}, False, False),
    "patterns": ({"target_modules": ALL, "use_rslora": True, **PATTERNS}, False, False),
    "dora": ({"target_modules": "all-linear", "use_dora": True, **PATTERNS}, False, False),
    "biases": ({"target_modules": ["q_proj"], "bias": "all"}, False, False),
    "products with biases": ({"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, False, False),
    "whole modules": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}, False, False),
    "embedding and head": ({"target_modules": ["embed_tokens", "lm_head"]}, False, False),
    "tied, embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, True, False),
    "tied, head": ({"target_modules": ["lm_head", "q_proj"]}, True, False),
    "tied for both": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True, True),
    "tied, untouched": ({"target_modules": ["o_proj"]}, True, True),
    "tied, whole": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True, True),
    "tied, tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [90, 1]}, True, True),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[tuple[bool, str], Path]:
    root = tmp_path_factory.mktemp("bases")
    kinds = [(tied, dtype) for tied in (False, True) for dtype in ("float32", "bfloat16")]
    return {(tied, dtype): save(root / f"{tied}-{dtype}", dtype=dtype, tie_word_embeddings=tied) for tied, dtype in kinds}


def adapted(base: Any, path: Path, **settings: Any) -> Any:
    """`base` with a random adapter, which is saved to `path`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings}))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        made.save_pretrained(path)
    return made.eval()


def opened(base: Path, lora: Path) -> WeightSource:
    return open_weights(Checkpoint.open(base, lora_dir=lora))


def weights(source: WeightSource, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Every tensor under Hugging Face's names."""
    found = {}
    for tensor in tensors_of(source.config):
        rows, begin = source.read(tensor.name, dtype), 0
        for part in tensor.parts:
            found[part.source] = rows[begin : begin + part.shape[0]]
            begin += part.shape[0]
    return found


def logits(source: WeightSource) -> np.ndarray:
    """What transformers computes with the merged weights."""
    bare = model("qwen2", tie_word_embeddings=source.config.tied)
    bare.load_state_dict({name: torch.from_numpy(value) for name, value in weights(source).items()}, strict=not source.config.tied)
    with torch.no_grad():
        return bare(input_ids=IDS).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_the_merged_model_computes_what_peft_computes_with_the_adapter_beside_the_base(name, bases, tmp_path):
    settings, tied, stays = CASES[name]
    beside = adapted(model("qwen2", tie_word_embeddings=tied), tmp_path / "lora", **settings)
    with opened(bases[tied, "float32"], tmp_path / "lora") as source, torch.no_grad():
        assert source.config.tied is stays
        wanted = beside(input_ids=IDS).logits.numpy()
        np.testing.assert_allclose(logits(source), wanted, rtol=0, atol=3e-5)
    with open_weights(bases[tied, "float32"]) as bare:
        assert np.abs(logits(bare) - wanted).max() > 0.1  # the adapter matters


@pytest.mark.parametrize("name", CASES)
def test_the_reference_has_the_same_weights_to_the_bit(name, bases, tmp_path):
    """peft merges them, in float64; both round to the stored type, so that an engine is judged by the weights that it has."""
    from trtllm_thoughtx.validate.reference import load_model

    settings, tied, _ = CASES[name]
    adapted(model("qwen2", tie_word_embeddings=tied).bfloat16(), tmp_path / "lora", **settings)
    checkpoint = Checkpoint.open(bases[tied, "bfloat16"], lora_dir=tmp_path / "lora")
    with open_weights(checkpoint.again()) as source:
        theirs, ours = load_model(checkpoint, torch.float64).state_dict(), weights(source)
    for tensor, value in ours.items():
        assert np.array_equal(theirs[tensor].numpy(), value), tensor


def test_a_fused_adapter_is_that_of_its_parts(bases, tmp_path):
    """qkv_proj and gate_up_proj share one A; DoRA's magnitudes and B are rows of the parts in order."""
    adapted(model("qwen2"), tmp_path / "parts", target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], use_dora=True)
    tensors, fused = load_file(tmp_path / "parts/adapter_model.safetensors"), {}
    for layer in range(3):
        for own, parts in {"self_attn.qkv_proj": ["q", "k", "v"], "mlp.gate_up_proj": ["gate", "up"]}.items():
            prefix = f"base_model.model.model.layers.{layer}."
            names = [f"{prefix}{own.partition('.')[0]}.{part}_proj" for part in parts]
            for name in names:
                tensors[f"{name}.lora_A.weight"] = tensors[f"{names[0]}.lora_A.weight"]
            fused[f"{prefix}{own}.lora_A.weight"] = tensors[f"{names[0]}.lora_A.weight"]
            for key in ("lora_B.weight", "lora_magnitude_vector"):
                fused[f"{prefix}{own}.{key}"] = np.concatenate([tensors[f"{name}.{key}"] for name in names])
    shutil.copytree(tmp_path / "parts", tmp_path / "fused")
    save_file(tensors, tmp_path / "parts/adapter_model.safetensors")
    save_file(fused, tmp_path / "fused/adapter_model.safetensors")
    base = bases[False, "float32"]
    with opened(base, tmp_path / "parts") as one, opened(base, tmp_path / "fused") as other:
        mine, theirs = weights(one), weights(other)
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    from trtllm_thoughtx.validate.reference import load_model

    found = load_model(Checkpoint.open(base, lora_dir=tmp_path / "fused"), torch.float32).state_dict()
    assert all(np.array_equal(found[name].numpy(), mine[name]) for name in mine)


def test_an_adapter_on_a_converted_checkpoint_is_the_converted_merge(bases, tmp_path):
    adapted(model("qwen2"), tmp_path / "lora", target_modules="all-linear", use_dora=True)
    base = bases[False, "float32"]
    convert(base, tmp_path / "plain")
    convert(base, tmp_path / "merged", lora_dir=tmp_path / "lora")
    convert(tmp_path / "plain", tmp_path / "after", lora_dir=tmp_path / "lora")
    one, other = (load_file(tmp_path / name / "rank0.safetensors") for name in ("merged", "after"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    manifest = json.loads((tmp_path / "merged/manifest.json").read_text())
    assert "--lora_dir lora" in manifest["command"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {row["name"] for row in manifest["inputs"]}
    assert convert(base, tmp_path / "merged", lora_dir=tmp_path / "lora")["up_to_date"]
    assert not convert(base, tmp_path / "merged", force=True)["up_to_date"]


def test_experts_and_routers_take_adapters_under_their_own_names(tmp_path):
    base, generator = save(tmp_path / "base", "qwen2_moe"), np.random.default_rng(0)
    with open_weights(base) as source:
        before = {part.source: source.read(t.name) for t in tensors_of(source.config) for part in t.parts[:1]}
        shape = before["model.layers.1.mlp.gate.weight"].shape
    down, up = generator.normal(size=(2, shape[1])).astype(np.float32), generator.normal(size=(shape[0], 2)).astype(np.float32)
    name = "base_model.model.model.layers.1.mlp.gate"
    write(tmp_path / "lora", {"r": 2, "lora_alpha": 1}, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    with opened(base, tmp_path / "lora") as source:
        found = source.read("transformer.layers.1.mlp.router.weight")
    np.testing.assert_allclose(found, before["model.layers.1.mlp.gate.weight"] + 0.5 * up @ down, rtol=1e-5, atol=1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD = {f"{Q}.lora_A.weight": np.ones((4, 32), np.float32), f"{Q}.lora_B.weight": np.ones((32, 4), np.float32)}


def write(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "another method": ("E103", {"peft_type": "LOHA"}, {}, "LOHA"),
    "pissa": ("E103", {"init_lora_weights": "pissa_niter_4"}, {}, "pissa_niter_4"),
    "activated": ("E103", {"alora_invocation_tokens": [1]}, {}, "alora_invocation_tokens"),
    "megatron": ("E103", {"megatron_config": {"a": 1}, "megatron_core": "os"}, {}, "megatron_config"),
    "unknown": ("E103", {"next_years_idea": True}, {}, "next_years_idea"),
    "parameters": ("E103", {"target_parameters": ["mlp.experts.gate_up_proj"]}, {}, "target_parameters"),
    "a rank of nothing": ("E102", {"r": 0}, {}, "r is 0"),
    "a rank that is text": ("E102", {"r": "4"}, {}, "a string"),
    "a slow pattern": ("E102", {"rank_pattern": {"(a+)+$": 4}}, {}, "rank_pattern"),
    "a broken pattern": ("E102", {"alpha_pattern": {"(q_proj": 4}}, {}, "alpha_pattern"),
    "a rank that the tensors have not": ("E107", {"r": 8}, {}, "wanted [8, 32]"),
    "half a product": ("E107", {}, {f"{Q}.lora_B.weight": None}, "lora_A and lora_B"),
    "no magnitudes": ("E107", {"use_dora": True}, {}, "lora_magnitude_vector is not there"),
    "magnitudes": ("E107", {}, {f"{Q}.lora_magnitude_vector": np.ones(32, np.float32)}, "use_dora is false"),
    "another width": ("E107", {}, {f"{Q}.lora_A.weight": np.ones((4, 33), np.float32)}, "wanted [4, 32]"),
    "another model": ("E107", {}, {Q.replace("layers.0", "layers.9") + ".lora_A.weight": np.ones((4, 32), np.float32)}, "not a module"),
    "another prefix": ("E107", {}, {"q_proj.lora_A.weight": np.ones((4, 32), np.float32)}, "base_model.model."),
    "integers": ("E107", {}, {f"{Q}.lora_A.weight": np.ones((4, 32), np.int8)}, "has type I8"),
    "a bias that is not there": ("E107", {"lora_bias": True}, {}, "lora_B.bias is not there"),
    "a module that is not there": ("E107", {"modules_to_save": ["lm_head"]}, {}, "lm_head: named in modules_to_save"),
    "tokens beyond the vocabulary": (
        "E107",
        {"trainable_token_indices": [97]},
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((1, 32), np.float32)},
        "beyond the vocabulary",
    ),
    "a number that is none": ("E108", {}, {f"{Q}.lora_A.weight": np.full((4, 32), np.nan, np.float32)}, "NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_adapter_that_cannot_be_merged_is_refused_by_name(name, bases, tmp_path):
    code, config, tensors, said = BAD[name]
    lora = write(tmp_path / "lora", config, {key: value for key, value in {**GOOD, **tensors}.items() if value is not None})
    with pytest.raises(ThoughtxError) as error:
        convert(bases[False, "float32"], tmp_path / "out", lora_dir=lora)
    assert error.value.code == code
    assert said in f"{error.value.what} {error.value.why}", error.value.render()
    assert not (tmp_path / "out").exists()


def test_a_pickle_a_missing_file_and_a_whole_model_are_no_adapters(bases, tmp_path):
    lora = write(tmp_path / "lora", {}, GOOD)
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    for path, code in ((lora, "E109"), (bases[False, "float32"], "E101"), (tmp_path / "absent", "E101")):
        with pytest.raises(ThoughtxError) as error:
            convert(bases[False, "float32"], tmp_path / "out", lora_dir=path)
        assert error.value.code == code
    with pytest.raises(ThoughtxError) as error:
        convert(lora, tmp_path / "out")
    assert "--lora_dir" in error.value.fix
