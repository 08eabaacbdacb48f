"""A Hugging Face config.json, read strictly into a `ModelConfig`.

Missing optional fields take the defaults of transformers' config classes. Whatever would change the model's arithmetic
and is not implemented is refused by name; keys that mean nothing to inference are ignored.
"""

from __future__ import annotations

from typing import Any

from trtllm_thoughtx.config import DTYPES, ExpertsConfig, ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.families import family_named
from trtllm_thoughtx.families.family import Family
from trtllm_thoughtx.families.fields import BOUNDS, Fields, check_experts
from trtllm_thoughtx.families.rope import rope_from_hf

SLIDING = "sliding_attention"
IMPORT = (
    "thoughtx-convert --model_dir THIS --output_dir CKPT imports it, for thoughtx-build; to calibrate, and to compare with transformers, "
    "give the original checkpoint"
)
IMPORTABLE = ("awq", "gptq", "compressed-tensors", "modelopt")  # quantization methods that thoughtx-convert reads


def dtype_of(raw: Fields, fallback: str | None) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (4); both have to agree."""
    given = {raw.text(key).removeprefix("torch.") for key in ("dtype", "torch_dtype") if raw.get(key) is not None}
    if len(given) > 1:
        fix = "remove one of the two from config.json: the one that is not the type of the weights"
        raw.wrong("dtype", f"and torch_dtype differ: {shown(' and '.join(sorted(given)))}", fix)
    dtype = given.pop() if given else fallback
    if dtype is None:
        fix = f'add "torch_dtype" to config.json: "{DTYPES[0]}", "{DTYPES[1]}" or "{DTYPES[2]}"'
        raw.wrong("dtype", "is missing, and the weights are of several types", fix)
    if dtype == "float64":
        return "float32"  # the nearest that engines compute in
    if dtype not in DTYPES:
        raw.unsupported(f"weights of type {shown(dtype)} are not supported", f"supported types are {', '.join(DTYPES)}")
    return dtype


def _refuse(raw: Fields, family: Family) -> None:
    """Everything that is valid for transformers and not implemented here."""
    if raw.get("auto_map"):
        raise ThoughtxError(
            "E110",
            "config.json has auto_map: the model brings its own code",
            where=raw.where,
            why="code from a checkpoint is never run",
            fix="remove auto_map if the model is a plain Qwen2, Qwen3, Llama or Mistral; otherwise it cannot be used",
        )
    if raw.get("quantization_config") and (quantization := raw.table("quantization_config")):
        method = quantization.get("quant_method", "modelopt")
        raw.unsupported(
            f"the checkpoint is already quantized ({shown(method, 40)})",
            f"weights must be {', '.join(DTYPES)}",
            IMPORT
            if method in IMPORTABLE
            else "this method is not read: use the original checkpoint, and quantize it with thoughtx-calibrate",
        )
    activation = raw.text("hidden_act", "silu")
    if activation != "silu":
        raw.unsupported(f"hidden_act {shown(activation)} is not supported", "these families use silu")
    if raw.boolean("mlp_bias", False):
        raw.unsupported("mlp_bias is true", "biases in the MLP are not supported")
    if family.qkv_bias is not None and raw.boolean("attention_bias", family.qkv_bias) != family.qkv_bias:
        raw.unsupported(
            f"attention_bias is {str(not family.qkv_bias).lower()}",
            f"{family.model_type} models have biases on query, key and value" if family.qkv_bias else "biases are not supported",
        )
    if raw.boolean("qkv_bias", True) is not True:
        raw.unsupported("qkv_bias is false", f"{family.model_type} models have biases on query, key and value")
    if raw.integer("decoder_sparse_step", 1, 1 << 16, 1) != 1 or raw.get("mlp_only_layers", []):
        raw.unsupported("some layers have experts and others a dense MLP", "every layer must be of the same kind")
    kinds = raw.get("layer_types", [])
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raw.wrong("layer_types", "is not a list of strings")
    other = sorted(set(kinds) - {"full_attention", SLIDING})
    if other:
        raw.unsupported(f"layer_types has {shown(', '.join(other))}", f"every layer must be full_attention or {SLIDING}")


def _sliding_window(raw: Fields, family: Family, num_layers: int) -> int | None:
    """The positions that a sliding layer attends to; None when no layer slides.

    `use_sliding_window` alone does not say. In Qwen2 and Qwen3 the layers from `max_window_layers` on slide, unless `layer_types` says
    otherwise; in mixtures any may, in Mistral all do. A Llama config with `sliding_window` is that of a model trained so, though
    transformers ignores it.
    """
    default, kinds = family.defaults.get("sliding_window"), raw.get("layer_types", ())
    slides = raw.boolean("use_sliding_window", default is None and raw.get("sliding_window") is not None)
    slides = family.defaults.get("use_sliding_window", slides)
    if "max_window_layers" in family.defaults:
        first = raw.integer("max_window_layers", 0, 1 << 16, family.defaults["max_window_layers"])
        slides = SLIDING in kinds if kinds else slides and first < num_layers
    if not slides and SLIDING not in kinds:
        return None
    is_null = "sliding_window" in raw.raw and raw.raw["sliding_window"] is None  # transformers then lets no layer slide
    if is_null and SLIDING not in kinds:
        return None
    return raw.integer("sliding_window", 1, BOUNDS["context"], None if is_null else default)


def _experts(fields: Fields, family: Family, num_layers: int) -> ExpertsConfig | None:
    """The mixture of an expert family; transformers 5 calls the number of experts `num_local_experts`."""
    if "num_experts" not in family.defaults:
        return None
    name = "num_local_experts" if fields.get("num_experts") is None else "num_experts"
    num_experts = fields.integer(name, 1, BOUNDS["experts"], family.defaults["num_experts"])
    if fields.get("num_local_experts", num_experts) != num_experts:
        fields.wrong("num_experts", "and num_local_experts differ")
    check_experts(fields, num_experts, num_layers)
    num_active = fields.integer("num_experts_per_tok", 1, num_experts, family.defaults["num_experts_per_tok"])
    shared = family.defaults["shared_expert_intermediate_size"]
    return ExpertsConfig(
        num_experts=num_experts,
        num_active=num_active,
        intermediate_size=fields.integer("moe_intermediate_size", 1, BOUNDS["intermediate"], family.defaults["moe_intermediate_size"]),
        shared_size=fields.integer("shared_expert_intermediate_size", 1, BOUNDS["intermediate"], shared) if shared else 0,
        is_normalized=fields.boolean("norm_topk_prob", False),
    )


def model_config_from_hf(raw: dict[str, Any], where: str, *, weights_dtype: str | None = "float32") -> ModelConfig:
    """`ModelConfig` of a parsed config.json; `weights_dtype` is used when the file names none.

    E102: malformed or impossible; E103: valid but not supported; E110: wants to run code.
    """
    fields = Fields(raw, where)
    family = family_named(fields.text("model_type"), where)
    architectures = fields.get("architectures", [family.architecture])
    if architectures != [family.architecture]:
        why = f"a {family.model_type} checkpoint must be {family.architecture}"
        fix = f"use the checkpoint of the causal language model, whose config.json says {family.architecture}"
        fields.unsupported(f"architectures is {shown(architectures)}", why, fix)
    _refuse(fields, family)

    num_layers = fields.integer("num_hidden_layers", 1, BOUNDS["layers"])
    hidden_size = fields.integer("hidden_size", 1, BOUNDS["hidden"])
    num_heads = fields.integer("num_attention_heads", 1, BOUNDS["heads"])
    sliding_window = _sliding_window(fields, family, num_layers)
    kinds = fields.get("layer_types")
    if kinds is not None and len(kinds) != num_layers:
        fields.wrong("layer_types", f"has {len(kinds)} entries for {num_layers} layers")
    num_kv_default = num_heads if "num_key_value_heads" in raw else family.defaults.get("num_key_value_heads", num_heads)
    num_kv_heads = fields.integer("num_key_value_heads", 1, BOUNDS["heads"], num_kv_default)
    if num_heads % num_kv_heads:
        fields.wrong("num_key_value_heads", f"is {num_kv_heads}, which does not divide num_attention_heads, {num_heads}")
    head_dim_default = family.defaults.get("head_dim")
    if head_dim_default is None and fields.get("head_dim") is None and hidden_size % num_heads:
        fields.wrong("hidden_size", f"is {hidden_size}, which num_attention_heads, {num_heads}, does not divide, and head_dim is missing")
    head_dim = fields.integer("head_dim", 2, BOUNDS["head_dim"], head_dim_default or hidden_size // num_heads)
    if head_dim % 2:
        fields.wrong("head_dim", f"is {head_dim}, and rotary embedding needs an even number")
    max_position = fields.integer("max_position_embeddings", 1, BOUNDS["context"], family.defaults["max_position_embeddings"])
    attention_bias = fields.boolean("attention_bias", False) if family.qkv_bias is None else False
    return ModelConfig(
        family=family.model_type,
        architecture=family.architecture,
        dtype=dtype_of(fields, weights_dtype),
        vocab_size=fields.integer("vocab_size", 1, BOUNDS["vocab"]),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, BOUNDS["intermediate"], family.defaults.get("moe_intermediate_size")),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, 1e-6),
        rope=rope_from_hf(fields, max_position),
        max_position=max_position,
        tied=fields.boolean("tie_word_embeddings", False),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        qk_norm=family.qk_norm,
        experts=_experts(fields, family, num_layers),
        sliding_window=sliding_window,
    )
