"""Configurations: read strictly from both formats and both spellings, and the name tables of every family."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from trtllm_thoughtx.config import ModelConfig, RopeConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families import FAMILIES, expected_tensors, tensors_of
from trtllm_thoughtx.families.hf_config import model_config_from_hf
from trtllm_thoughtx.families.trtllm_config import mapping_of, model_config_from_trtllm, trtllm_config

BASE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
QWEN3 = BASE | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
LLAMA = BASE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MISTRAL = BASE | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return model_config_from_hf(json.loads(json.dumps(raw | changes)), "config.json")


def refused(code: str, raw: dict[str, Any], **changes: Any) -> ThoughtxError:
    with pytest.raises(ThoughtxError) as caught:
        read(raw, **changes)
    assert caught.value.code == code, caught.value.render()
    return caught.value


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def test_a_published_qwen2_config() -> None:
    assert read(BASE) == ModelConfig(
        family="qwen2",
        architecture="Qwen2ForCausalLM",
        dtype="bfloat16",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        max_position=32768,
        tied=True,
        qkv_bias=True,
        o_bias=False,
        qk_norm=False,
    )


def test_families_differ_where_they_should() -> None:
    flags = {m: (c.qkv_bias, c.o_bias, c.qk_norm, c.head_dim) for m, c in (("qwen3", read(QWEN3)), ("llama", read(LLAMA)))}
    assert flags == {"qwen3": (False, False, True, 128), "llama": (False, False, False, 64)}
    for raw in (QWEN3, LLAMA):
        config = read(raw, attention_bias=True)
        assert (config.qkv_bias, config.o_bias) == (True, True)


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        (None, RopeConfig(theta=1e6)),
        ({"rope_type": "default"}, RopeConfig(theta=1e6)),
        ({"type": "linear", "factor": 2}, RopeConfig(theta=1e6, kind="linear", factor=2.0)),
        ({"rope_type": "yarn", "type": "yarn", **YARN}, RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_position=8192)),
        ({"rope_type": "yarn", "factor": 4.0}, RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_position=32768)),
        (
            {
                **{"rope_type": "yarn", **YARN, "beta_fast": 24, "beta_slow": 2, "attention_factor": 1.5, "mscale": 0.7},
                **{"mscale_all_dim": 0.9, "truncate": False},
            },
            RopeConfig(
                **{"theta": 1e6, "kind": "yarn", "factor": 4.0, "original_max_position": 8192, "beta_fast": 24.0, "beta_slow": 2.0},
                **{"attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False},
            ),
        ),
        (
            {"rope_type": "llama3", **LLAMA3},
            RopeConfig(theta=1e6, kind="llama3", factor=8.0, original_max_position=8192, low_freq_factor=1.0, high_freq_factor=4.0),
        ),
    ],
)
def test_rope_in_both_spellings(scaling: dict[str, Any] | None, rope: RopeConfig) -> None:
    four = read(LLAMA, rope_scaling=scaling)
    assert four.rope == rope
    five = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "torch_dtype")} | {"dtype": "bfloat16"}
    as_five = {"rope_type": "default", **(scaling or {}), "rope_theta": 1e6}
    as_five["rope_type"] = as_five.pop("type", as_five["rope_type"])
    assert read(five, rope_parameters=as_five) == four
    assert read(LLAMA, rope_scaling=scaling, rope_parameters=as_five, dtype="bfloat16") == four
    assert model_config_from_trtllm(trtllm_config(four, dtype="bfloat16"), "config.json") == four


def test_spellings_that_disagree_are_refused() -> None:
    assert "rope_theta" in refused("E102", BASE, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}).what
    refused("E102", BASE, rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"})
    refused("E102", BASE, rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2.0})
    refused("E102", BASE, dtype="float16")
    refused("E102", LLAMA, rope_scaling={"rope_type": "llama3", **LLAMA3}, original_max_position_embeddings=4096)


def test_missing_fields_take_the_defaults_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for raw, cls in ((BASE, "Qwen2Config"), (QWEN3, "Qwen3Config"), (LLAMA, "LlamaConfig")):
        sizes = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
        ours = model_config_from_hf({"model_type": raw["model_type"], **sizes}, "config.json")
        theirs = getattr(transformers, cls)(**sizes)
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert ours.max_position == theirs.max_position_embeddings
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        assert ours.tied == theirs.tie_word_embeddings
        assert ours.dtype == "float32"


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", **YARN}, {"rope_type": "llama3", **LLAMA3}]
)
@pytest.mark.parametrize("raw", [BASE, QWEN3, LLAMA, MISTRAL], ids=["qwen2", "qwen3", "llama", "mistral"])
def test_what_transformers_writes_is_read(raw: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, raw["architectures"][0].replace("ForCausalLM", "Config"))
    written = json.loads(cls(**copy.deepcopy(raw | {"rope_scaling": scaling})).to_json_string())
    written["architectures"] = raw["architectures"]
    assert "rope_parameters" in written
    assert read(written) == read(raw, rope_scaling=scaling)


def test_harmless_keys_are_ignored() -> None:
    extra = {"attention_chunk_size": 512, "use_cache": True, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 5}
    assert read(BASE, **extra, layer_types=["full_attention"] * 24, quantization_config=None) == read(BASE)


@pytest.mark.parametrize(
    ("code", "changes", "word"),
    [
        ("E103", {"model_type": "mixtral"}, "llama, mistral, qwen2, qwen2_moe, qwen3, qwen3_moe"),
        ("E102", {"model_type": ["qwen2"]}, "model_type"),
        ("E103", {"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForCausalLM"),
        ("E110", {"auto_map": {"AutoModel": "modeling.py"}}, "auto_map"),
        ("E103", {"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ("E103", {"hidden_act": "gelu"}, "gelu"),
        ("E103", {"mlp_bias": True}, "mlp_bias"),
        ("E102", {"use_sliding_window": True, "sliding_window": "4096", "max_window_layers": 0}, "sliding_window"),
        ("E102", {"layer_types": ["full_attention"] * 23 + ["sliding_attention"], "sliding_window": None}, "sliding_window"),
        ("E103", {"layer_types": ["full_attention"] * 23 + ["linear_attention"]}, "linear_attention"),
        ("E102", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("E102", {"layer_types": "full_attention"}, "layer_types"),
        ("E103", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "default, linear, yarn, llama3"),
        ("E103", {"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ("E103", {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "mrope"),
        ("E103", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ("E103", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("E102", {"rope_scaling": {"type": "yarn"}}, "factor"),
        ("E102", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 9}}, "beta_fast"),
        ("E102", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("E102", {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ("E102", {"rope_scaling": [1]}, "rope_scaling"),
        ("E102", {"rope_theta": 0}, "rope_theta"),
        ("E102", {"num_hidden_layers": True}, "num_hidden_layers"),
        ("E102", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("E102", {"num_hidden_layers": 1025}, "1024"),
        ("E102", {"num_hidden_layers": 24.0}, "integer"),
        ("E102", {"num_hidden_layers": None}, "missing"),
        ("E102", {"hidden_size": 65537}, "65536"),
        ("E102", {"hidden_size": "896"}, "string"),
        ("E102", {"vocab_size": (4 << 20) + 1}, "vocab_size"),
        ("E102", {"max_position_embeddings": (16 << 20) + 1}, "max_position_embeddings"),
        ("E102", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("E102", {"num_attention_heads": 13, "num_key_value_heads": 1}, "head_dim"),
        ("E102", {"head_dim": 63}, "even"),
        ("E102", {"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ("E102", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ("E102", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ("E103", {"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ("E103", {"attention_bias": False}, "attention_bias"),
    ],
)
def test_refusals(code: str, changes: dict[str, Any], word: str) -> None:
    error = refused(code, BASE, **changes)
    assert word in error.render()


HOSTILE = [
    None,
    True,
    -1,
    0,
    1,
    2**62,
    1e308,
    -0.5,
    "",
    "x",
    "yarn",
    [],
    [[]],
    [1],
    ["x"],
    {},
    {"a": 1},
    {"rope_type": "yarn", "factor": None},
]


@pytest.mark.parametrize("raw", [BASE | {"head_dim": 64}, QWEN3, LLAMA], ids=["qwen2", "qwen3", "llama"])
def test_any_value_anywhere_is_read_or_refused(raw: dict[str, Any]) -> None:
    """No field of either format, whatever stands there, leads to anything but a config or a refusal."""
    spelled = raw | {"rope_scaling": {"rope_type": "yarn", "beta_fast": 32, "mscale": 1.0, "truncate": True, **YARN}, "layer_types": None}
    trtllm = trtllm_config(read(spelled), dtype="bfloat16")
    switches = {"attention_bias": 0, "mlp_bias": 0, "dtype": 0, "auto_map": 0, "quantization_config": 0, "rope_parameters": 0}
    for parse, whole in ((model_config_from_hf, spelled | switches), (model_config_from_trtllm, trtllm)):
        good = {k: v for k, v in whole.items() if k not in switches}
        places = [(key, None) for key in whole] + [
            (key, inner) for key, table in whole.items() if isinstance(table, dict) for inner in table
        ]
        for key, inner in places:
            for value in HOSTILE:
                changed = copy.deepcopy(good)
                if inner is None:
                    changed[key] = value
                else:
                    changed[key][inner] = value
                try:
                    assert isinstance(parse(changed, "config.json"), ModelConfig)
                except ThoughtxError as error:
                    assert error.code in ("E102", "E103", "E110"), error.render()


def test_not_an_object() -> None:
    with pytest.raises(ThoughtxError, match="E102"):
        model_config_from_hf([1], "config.json")  # type: ignore[arg-type]


# --- TensorRT-LLM ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [BASE, QWEN3, LLAMA, QWEN3 | {"attention_bias": True}, LLAMA | {"attention_bias": True}])
def test_trtllm_config_is_invertible(raw: dict[str, Any]) -> None:
    config = read(raw)
    written = json.loads(json.dumps(trtllm_config(config, dtype="float16", tp_size=2, pp_size=3)))
    assert model_config_from_trtllm(written, "config.json") == dataclasses.replace(config, dtype="float16")
    assert mapping_of(written, "config.json") == (2, 3, 1)
    mapping = written["mapping"]
    assert mapping["world_size"] == 6 and mapping["moe_tp_size"] == mapping["tp_size"] == 2 and "rank" not in mapping


def test_trtllm_config_of_yarn_carries_both_type_keys() -> None:
    written = trtllm_config(read(BASE, rope_scaling={"type": "yarn", **YARN}), dtype="bfloat16")
    assert written["rotary_scaling"]["type"] == written["rotary_scaling"]["rope_type"] == "yarn"
    assert written["rotary_base"] == 1e6 and written["norm_epsilon"] == 1e-6


@pytest.mark.parametrize(
    ("code", "changes", "word"),
    [
        ("E103", {"architecture": "GPTForCausalLM"}, "LlamaForCausalLM"),
        ("E103", {"qwen_type": "qwen3"}, "qwen_type"),
        ("E102", {"rotary_base": None}, "rotary_base"),
        ("E102", {"norm_epsilon": None}, "norm_epsilon"),
        ("E103", {"hidden_act": "swiglu"}, "swiglu"),
        ("E103", {"position_embedding_type": "mrope"}, "mrope"),
        ("E103", {"quantization": {"quant_algo": "W4A8_NVFP4_FP8"}}, "NVFP4"),
        ("E103", {"quantization": {"quant_algo": "W4A16_AWQ", "has_zero_point": True}}, "has_zero_point"),
        ("E103", {"moe": {"num_experts": 8}}, "experts"),
        ("E103", {"is_pruned": True}, "is_pruned"),
        ("E103", {"rotary_embedding_dim": 32}, "rotary_embedding_dim"),
        ("E103", {"attn_bias": False}, "attn_bias"),
        ("E103", {"dtype": "int8"}, "int8"),
        ("E102", {"num_key_value_heads": 4}, "num_key_value_heads"),
    ],
)
def test_trtllm_refusals(code: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ThoughtxError) as caught:
        model_config_from_trtllm(trtllm_config(read(BASE), dtype="bfloat16") | changes, "config.json")
    assert caught.value.code == code and word in caught.value.render()


# --- name tables -----------------------------------------------------------------------------------------------------

COMMON = """
input_layernorm.weight         <- input_layernorm.weight
attention.qkv.weight           <- self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight
attention.dense.weight         <- self_attn.o_proj.weight
post_layernorm.weight          <- post_attention_layernorm.weight
mlp.fc.weight                  <- mlp.gate_proj.weight
mlp.gate.weight                <- mlp.up_proj.weight
mlp.proj.weight                <- mlp.down_proj.weight
"""
QKV_BIAS = "attention.qkv.bias <- self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias\n"
NORMS = "attention.q_layernorm.weight <- self_attn.q_norm.weight\nattention.k_layernorm.weight <- self_attn.k_norm.weight\n"
O_BIAS = "attention.dense.bias <- self_attn.o_proj.bias\n"


@pytest.mark.parametrize(
    ("raw", "golden"),
    [
        (BASE, COMMON + QKV_BIAS),
        (QWEN3, COMMON + NORMS),
        (LLAMA, COMMON),
        (LLAMA | {"attention_bias": True}, COMMON + QKV_BIAS + O_BIAS),
        (QWEN3 | {"attention_bias": True}, COMMON + QKV_BIAS + O_BIAS + NORMS),
    ],
)
def test_name_table(raw: dict[str, Any], golden: str) -> None:
    wanted = {(left := line.split(" <- "))[0].strip(): left[1].split() for line in golden.strip().splitlines()}
    table = tensors_of(read(raw, num_hidden_layers=2, tie_word_embeddings=False))
    for layer in range(2):
        prefix, hf_prefix = f"transformer.layers.{layer}.", f"model.layers.{layer}."
        rows = {t.name.removeprefix(prefix): [p.source.removeprefix(hf_prefix) for p in t.parts] for t in table if t.layer == layer}
        assert rows == wanted
    outside = {t.name: t.parts[0].source for t in table if t.layer is None}
    assert outside == {
        "transformer.vocab_embedding.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    layers = [t.layer for t in table if t.layer is not None]
    assert layers == sorted(layers) and table[0].layer is None and table[-1].name == "lm_head.weight"


def test_expected_shapes() -> None:
    shapes = expected_tensors(read(QWEN3, tie_word_embeddings=True))
    assert "lm_head.weight" not in shapes
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (14 * 128, 896)
    assert shapes["model.layers.23.self_attn.v_proj.weight"] == (2 * 128, 896)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (896, 14 * 128)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (128,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (896, 4864)


def test_what_a_real_model_has_is_what_is_expected() -> None:
    """transformers' own parameter names and shapes, for every family, without allocating weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for raw in (BASE, QWEN3, LLAMA, MISTRAL, QWEN3 | {"attention_bias": True}, LLAMA | {"attention_bias": True}):
        raw = raw | {"num_hidden_layers": 2, "tie_word_embeddings": False}
        config = getattr(transformers, raw["architectures"][0].replace("ForCausalLM", "Config"))(**copy.deepcopy(raw))
        with torch.device("meta"):
            model = getattr(transformers, raw["architectures"][0])(config)
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected_tensors(read(raw))


def test_the_registry_names_every_family_by_its_type() -> None:
    assert {name: family.architecture for name, family in FAMILIES.items()} == {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2_moe": "Qwen2MoeForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
    }
