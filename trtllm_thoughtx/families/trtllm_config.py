"""The config.json of a TensorRT-LLM 1.2 checkpoint, written from a `ModelConfig` and read back.

TensorRT-LLM itself accepts any key and guesses missing ones (a missing `rotary_base` becomes 10000, a missing `norm_epsilon`
1e-5), so reading asks for every field that decides the arithmetic.
"""

from __future__ import annotations

import copy
from typing import Any

from trtllm_thoughtx.config import DTYPES, ExpertsConfig, ModelConfig
from trtllm_thoughtx.errors import shown
from trtllm_thoughtx.families import FAMILIES, Family
from trtllm_thoughtx.families.fields import BOUNDS, Fields, check_experts
from trtllm_thoughtx.families.quantization import check_groups, quantization_of, quantization_section
from trtllm_thoughtx.families.rope import rope_from_trtllm, rope_to_trtllm

RENORMALIZE = 1  # of TensorRT-LLM's normalization modes: a token's routing weights sum to 1
# Fields that switch on arithmetic which is not implemented, with the value that leaves it off.
_OFF = {
    "mlp_bias": False,
    "use_logn_attn": False,
    "residual_mlp": False,
    "is_pruned": False,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "output_multiplier_scale": 1.0,
}


def trtllm_config(config: ModelConfig, *, dtype: str, tp_size: int = 1, pp_size: int = 1) -> dict[str, Any]:
    """Every field that TensorRT-LLM 1.2's own converter writes for the family, in a fixed order."""
    return {
        "architecture": config.architecture,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu" if config.experts is None else "swiglu",
        "norm_epsilon": config.norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config.max_position,
        "rotary_embedding_dim": config.head_dim,
        "rotary_base": config.rope.theta,
        "rotary_scaling": rope_to_trtllm(config.rope),
        "attn_bias": config.qkv_bias,
        "mlp_bias": False,
        "qk_layernorm": False,  # TensorRT-LLM goes by `qwen_type`
        "tie_word_embeddings": config.tied,
        "disable_weight_only_quant_plugin": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        **copy.deepcopy(dict(FAMILIES[config.family].trtllm)),
        **_experts_section(config.experts),
        **({} if config.sliding_window is None else {"sliding_window": config.sliding_window}),
        "mapping": {
            "world_size": tp_size * pp_size,
            "gpus_per_node": 8,
            "cp_size": 1,
            "tp_size": tp_size,
            "pp_size": pp_size,
            "moe_tp_size": tp_size,
            "moe_cluster_size": 1,
            "moe_ep_size": 1,
            "attn_tp_size": tp_size,
            "attn_cp_size": 1,
        },
        "quantization": quantization_section(config.quantization),
    }


def _experts_section(experts: ExpertsConfig | None) -> dict[str, Any]:
    """TensorRT-LLM's own converter writes normalization_mode 0 for every model, which is wrong where the weights sum to 1."""
    if experts is None:
        return {}
    mode = RENORMALIZE if experts.is_normalized else 0
    return {
        "moe_intermediate_size": experts.intermediate_size,
        "moe_shared_expert_intermediate_size": experts.shared_size,
        "moe": {
            **{"num_experts": experts.num_experts, "top_k": experts.num_active, "normalization_mode": mode},
            **{"sparse_mixer_epsilon": 0.01, "tp_mode": 0},
        },
    }


def _experts_of(fields: Fields, family: Family) -> ExpertsConfig | None:
    """Inverse of `_experts_section`; a family has experts or it has none."""
    moe = fields.table("moe")
    num_experts = moe.integer("num_experts", 0, BOUNDS["experts"], 0) if moe is not None else 0
    if (num_experts > 0) != ("num_experts" in family.defaults):
        fields.unsupported(f"moe.num_experts is {num_experts}", f"a {family.model_type} model has {'none' if num_experts else 'experts'}")
    if moe is None or not num_experts:
        return None
    if fields.integer("decoder_sparse_step", 1, 1 << 16, 1) != 1 or fields.get("mlp_only_layers", []):
        fields.unsupported("some layers have experts and others a dense MLP", "every layer must be of the same kind")
    check_experts(moe, num_experts, fields.integer("num_hidden_layers", 1, BOUNDS["layers"]))
    mode = moe.integer("normalization_mode", 0, 16)
    if mode not in (0, RENORMALIZE):
        moe.unsupported(f"moe.normalization_mode is {mode}", f"0 and {RENORMALIZE} are supported")
    shared = family.defaults["shared_expert_intermediate_size"]
    return ExpertsConfig(
        num_experts=num_experts,
        num_active=moe.integer("top_k", 1, num_experts),
        intermediate_size=fields.integer("moe_intermediate_size", 1, BOUNDS["intermediate"]),
        shared_size=fields.integer("moe_shared_expert_intermediate_size", 1, BOUNDS["intermediate"]) if shared else 0,
        is_normalized=mode == RENORMALIZE,
    )


def _refuse(fields: Fields, activation: str) -> None:
    for key, off in _OFF.items():
        if fields.get(key, off) != off:
            fields.unsupported(f"{key} is {shown(fields.raw[key])}", f"only {off} is supported")
    for key, wanted in (("hidden_act", activation), ("position_embedding_type", "rope_gpt_neox")):
        if fields.text(key) != wanted:
            fields.unsupported(f"{key} is {shown(fields.raw[key])}", f"only {wanted} is supported")


def mapping_of(raw: dict[str, Any], where: str) -> tuple[int, int, int]:
    """(tp_size, pp_size, cp_size) of a TensorRT-LLM config."""
    mapping = Fields(raw, where).table("mapping")
    if mapping is None:
        return 1, 1, 1
    tp, pp, cp = (mapping.integer(key, 1, 1 << 16, 1) for key in ("tp_size", "pp_size", "cp_size"))
    return tp, pp, cp


def model_config_from_trtllm(raw: dict[str, Any], where: str) -> ModelConfig:
    """Inverse of `trtllm_config`. E102: malformed or a deciding field is missing; E103: valid but not supported."""
    fields = Fields(raw, where)
    architecture = fields.text("architecture")
    known = {family.architecture: family for family in FAMILIES.values()}
    family = known.get(architecture)
    if family is None:
        fields.unsupported(f"architecture {shown(architecture)} is not supported", f"supported are {', '.join(sorted(known))}")
    qwen_type = family.trtllm.get("qwen_type")
    if qwen_type is not None and fields.text("qwen_type") != qwen_type:
        fields.unsupported(f"qwen_type is {shown(fields.raw['qwen_type'])}", f"a {architecture} checkpoint must say {qwen_type}")
    experts = _experts_of(fields, family)
    _refuse(fields, "silu" if experts is None else "swiglu")
    dtype = fields.text("dtype")
    if dtype not in DTYPES:
        fields.unsupported(f"weights of type {shown(dtype)} are not supported", f"supported types are {', '.join(DTYPES)}")

    hidden_size = fields.integer("hidden_size", 1, BOUNDS["hidden"])
    num_heads = fields.integer("num_attention_heads", 1, BOUNDS["heads"])
    num_kv_heads = fields.integer("num_key_value_heads", 1, BOUNDS["heads"], num_heads)
    if num_heads % num_kv_heads:
        fields.wrong("num_key_value_heads", f"is {num_kv_heads}, which does not divide num_attention_heads, {num_heads}")
    head_dim = fields.integer("head_size", 2, BOUNDS["head_dim"], hidden_size // num_heads)
    if head_dim % 2:
        fields.wrong("head_size", f"is {head_dim}, and rotary embedding needs an even number")
    if fields.integer("rotary_embedding_dim", 0, BOUNDS["head_dim"], head_dim) != head_dim:
        fields.unsupported("rotary_embedding_dim is not head_size", "rotary embedding over the whole head is supported")
    max_position = fields.integer("max_position_embeddings", 1, BOUNDS["context"])
    bias = fields.boolean("attn_bias", None)
    if family.qkv_bias not in (None, bias):
        fields.unsupported(f"attn_bias is {str(bias).lower()}", f"{family.model_type} models have it {str(family.qkv_bias).lower()}")
    config = ModelConfig(
        family=family.model_type,
        architecture=architecture,
        dtype=dtype,
        vocab_size=fields.integer("vocab_size", 1, BOUNDS["vocab"]),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, BOUNDS["intermediate"]),
        num_layers=fields.integer("num_hidden_layers", 1, BOUNDS["layers"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("norm_epsilon", 0.0, 1.0),
        rope=rope_from_trtllm(fields.number("rotary_base", 1.0 + 1e-9, 1e18), fields.table("rotary_scaling"), max_position),
        max_position=max_position,
        tied=fields.boolean("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias if family.o_bias is None else family.o_bias,
        qk_norm=family.qk_norm,
        quantization=quantization_of(fields),
        experts=experts,
        sliding_window=None if fields.get("sliding_window") is None else fields.integer("sliding_window", 1, BOUNDS["context"]),
    )
    if experts is not None and config.quantization is not None:
        fields.unsupported("the experts are quantized", "mixtures of experts are read in float32, float16 or bfloat16")
    check_groups(config, fields)
    return config
