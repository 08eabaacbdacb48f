"""Quantized linear layers in a checkpoint: the `quantization` section of its config.json, and the tensors of each layer.

Names and scales are TensorRT-LLM 1.2's, as ModelOpt exports them, with matrices [out, in]:

    FP8                   weight F8_E4M3, weights_scaling_factor [1], activation_scaling_factor [1]
    W8A8_SQ_PER_CHANNEL   weight I8, weights_scaling_factor [out], activation_scaling_factor [1], prequant_scaling_factor [in]
    W8A16                 weight I8, per_channel_scale [out]
    W8A16_GPTQ            weight I8, weights_scaling_factor [out, in / group_size]
    W4A16                 weight U8 [out, in / 2], weights_scaling_factor [out, in / group_size]; with zero points zero U8, of as many
    W4A16_AWQ             as W4A16 without zero points, and prequant_scaling_factor [in]
    W4A16_GPTQ            as W4A16; with zero points also zero [out, in / group_size], with activation order input_order I32 [in]
    NVFP4                 weight U8 [out, in / 2], weights_scaling_factor F8_E4M3 [out, in / 16], weights_scaling_factor_2 [1],
                          activation_scaling_factor [1]; the scale is the product of both, that of an input's block of 16 its largest
                          over 6, as an E4M3 number times activation_scaling_factor
    W4A16_NVFP4           as NVFP4, without activation_scaling_factor; not TensorRT-LLM's
    FP8_PER_CHANNEL       as FP8, but weights_scaling_factor [out]; not TensorRT-LLM's
    W8A16_FP8             weight F8_E4M3, weights_scaling_factor [out]; not TensorRT-LLM's
    W8A16_FP8_GROUPS      weight F8_E4M3, weights_scaling_factor [out, in / group_size]; not TensorRT-LLM's
    FP8_PER_CHANNEL_PER_TOKEN   weight F8_E4M3, per_channel_scale [out]; the input's scale is each token's largest input over 448
    W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN   weight I8, per_channel_scale [out]; the input's scale is each token's largest input over 127

value = stored * scale (+ zero, of its group), in W4A16 (stored - zero) * scale; an input is multiplied by the prequant factor first.
Column j of a matrix with an order belongs to input channel input_order[j]. Two 4-bit numbers share a byte, the earlier channel in the low
half. Scales are F32, or F16 where the section says `scale_dtype`. With `has_quantized_embedding` the embedding and the head are stored as
W8A16, or with an `embedding_group_size` as W8A16_GPTQ with scales in F16. Layers
that `wide_modules` names are stored in 8 bits, beside 4-bit ones: W8A16_GPTQ with F16 scales, beside NVFP4 as FP8, beside W4A16_NVFP4 as
W8A16_FP8. These keys are ours. Weight-only matrices keep
this plain order: TensorRT-LLM's own are shuffled for one GPU generation, so only unquantized and FP8 checkpoints go to `trtllm-build` as
they are. Zero points and orders are keys and tensors that it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trtllm_thoughtx.config import ModelConfig, QuantConfig
from trtllm_thoughtx.errors import shown
from trtllm_thoughtx.families.family import ALL, EMBEDDING, Part, Tensor
from trtllm_thoughtx.families.fields import Fields
from trtllm_thoughtx.families.formats import BLOCK, FORMATS, FP8, KV_ALGOS, OF_EMBEDDING

LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
TABLE = EMBEDDING.name.removesuffix(".weight")
SCALE_TYPES = {"float32": "F32", "float16": "F16"}  # scale_dtype -> safetensors type
SECOND = "weights_scaling_factor_2"  # of matrices with scales for blocks
MAX_EXCLUDED = 1 << 14


def linear_modules(config: ModelConfig) -> list[str]:
    """Every linear layer, layer-major, the head last."""
    return [*(f"transformer.layers.{i}.{name}" for i in range(config.num_layers) for name in LINEARS), "lm_head"]


def stored_as(quant: QuantConfig | None, module: str) -> QuantConfig | None:
    """How a linear layer or the embedding is stored; None: as it is. A quantized embedding has 8 bits, and so has the head, whether tied or
    not, unless the layers' format covers it: in 4 bits they lose as much as all layers together."""
    if quant is None:
        return None
    if quant.embedding and (module == TABLE or (module == "lm_head" and not quant.covers(module))):
        return embedding_of(quant)
    if module == TABLE or not quant.covers(module):
        return None
    return wide_of(quant) if quant.widens(module) else quant


def wide_of(quant: QuantConfig) -> QuantConfig:
    """How the layers of 8 bits are stored that stand beside those of fewer."""
    form = FORMATS[FORMATS[quant.algo or ""].wide or ""]
    if form.is_grouped:
        return QuantConfig(algo=form.algo, group_size=quant.group_size, scale_dtype="float16")
    return QuantConfig(algo=form.algo)


def embedding_of(quant: QuantConfig) -> QuantConfig:
    """How a quantized embedding is stored."""
    if quant.embedding_group:
        return QuantConfig(algo=OF_EMBEDDING, group_size=quant.embedding_group, scale_dtype="float16")
    return QuantConfig(algo=FORMATS[OF_EMBEDDING].of_rows)


def quantized_shapes(quant: QuantConfig, num_out: int, num_in: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """suffix -> (safetensors type, shape) of the tensors of one quantized linear layer, without its bias."""
    assert quant.algo is not None
    form = FORMATS[quant.algo]
    shape = form.scale_shape(num_out, num_in, quant.group_size)
    found = {
        "weight": (form.number.stored, (num_out, num_in // form.number.per_item)),
        form.scale_name: (FP8.stored if form.scales == "block" else SCALE_TYPES[quant.scale_dtype], shape),
    }
    if form.scales == "block":
        found[SECOND] = ("F32", (1,))
    if form.is_static:
        found["activation_scaling_factor"] = ("F32", (1,))
    if quant.zero_point:
        found["zero"] = (form.number.stored, form.number.stored_shape(shape)) if form.zeros == "points" else ("F32", shape)
    if quant.prequant:
        found["prequant_scaling_factor"] = ("F32", (num_in,))
    if quant.input_order:
        found["input_order"] = ("I32", (num_in,))
    return found


def check_groups(config: ModelConfig, fields: Fields) -> None:
    """E102 when a matrix with a scale per group cannot be cut into groups of `group_size` input channels."""
    quant = config.quantization
    if quant is not None and quant.embedding_group and config.hidden_size % quant.embedding_group:
        size, hidden = quant.embedding_group, config.hidden_size
        fields.wrong("quantization.embedding_group_size", f"is {size}, which does not cut {hidden} channels into groups")
    if quant is not None and quant.algo is not None and FORMATS[quant.algo].is_grouped:
        if FORMATS[quant.algo].scales == "block" and quant.group_size != BLOCK:
            fields.wrong("quantization.group_size", f"is {quant.group_size}; blocks of {quant.algo} have {BLOCK} inputs")
        for num_in in (config.hidden_size, config.q_size, config.intermediate_size):
            if num_in % quant.group_size or quant.group_size % 2:
                fields.wrong("quantization.group_size", f"is {quant.group_size}, which does not cut {num_in} inputs into even groups")


def with_quantization(table: Sequence[Tensor], config: ModelConfig) -> tuple[Tensor, ...]:
    """The table of an unquantized checkpoint, with each covered matrix replaced by its quantized tensors, and the cache's scales."""
    quant = config.quantization
    if quant is None:
        return tuple(table)
    result: list[Tensor] = []
    for tensor in table:
        module = tensor.name.removesuffix(".weight")
        if module == "lm_head" and config.tied and quant.embedding:
            continue  # it is the embedding's matrix
        is_matrix = tensor.suffix.removesuffix(".weight") in LINEARS or module in ("lm_head", TABLE)
        if is_matrix and (stored_quant := stored_as(quant, module)) is not None:
            for suffix, (stored, shape) in quantized_shapes(stored_quant, *tensor.shape).items():
                result.append(_own(f"{module}.{suffix}", tensor, suffix, shape, stored))
        else:
            result.append(tensor)
        if quant.kv_algo and tensor.suffix == "attention.qkv.weight":
            result.append(_own(f"{module.removesuffix('.qkv')}.kv_cache_scaling_factor", tensor, "kv_cache_scaling_factor", (1,), "F32"))
    return tuple(result)


def _own(name: str, like: Tensor, suffix: str, shape: tuple[int, ...], stored: str) -> Tensor:
    within = name if like.layer is None else name.removeprefix(f"transformer.layers.{like.layer}.")
    return Tensor(name, like.layer, within, shape, (Part(name, 0, shape, ALL),), stored)


def quantization_section(quant: QuantConfig | None) -> dict[str, Any]:
    """TensorRT-LLM's `quantization`: it refuses keys that it does not know, so ours is there only where it could not read the tensors."""
    return {
        "quant_algo": quant.algo if quant else None,
        "kv_cache_quant_algo": quant.kv_algo if quant else None,
        "group_size": quant.group_size if quant else 128,
        "smoothquant_val": 0.5,
        "clamp_val": None,
        "use_meta_recipe": False,
        "has_zero_point": quant.zero_point if quant else False,
        "pre_quant_scale": quant.prequant if quant else False,
        "exclude_modules": list(quant.exclude) if quant else None,
        **({"wide_modules": list(quant.wide)} if quant and quant.wide else {}),
        **({"has_input_order": True} if quant and quant.input_order else {}),
        **({"scale_dtype": quant.scale_dtype} if quant and quant.scale_dtype != "float32" else {}),
        **({"has_quantized_embedding": True} if quant and quant.embedding else {}),
        **({"embedding_group_size": quant.embedding_group} if quant and quant.embedding_group else {}),
    }


def quantization_of(fields: Fields) -> QuantConfig | None:
    """Inverse of `quantization_section`; None when nothing is quantized. E103 for what is not read."""
    table = fields.table("quantization")
    if table is None or not (table.get("quant_algo") or table.get("kv_cache_quant_algo")):
        return None
    algo, kv_algo = table.get("quant_algo"), table.get("kv_cache_quant_algo")
    for key, value, known in (("quant_algo", algo, list(FORMATS)), ("kv_cache_quant_algo", kv_algo, list(KV_ALGOS.values()))):
        if value is not None and value not in known:
            table.unsupported(
                f"{key} {shown(value)} is not supported",
                f"supported are {', '.join(known)}",
                "calibrate the original checkpoint with thoughtx-calibrate",
            )
    zero_point = table.boolean("has_zero_point", False)
    form = FORMATS[algo] if algo is not None else None
    if zero_point and (form is None or form.zeros is None):
        table.unsupported("quantization.has_zero_point is true", f"{shown(algo)} has no zero points")
    input_order = table.boolean("has_input_order", False)
    if input_order and (form is None or not form.has_order):
        table.unsupported("quantization.has_input_order is true", f"{shown(algo)} has no activation order")
    embedding = table.boolean("has_quantized_embedding", False)
    if embedding and form is None:
        table.unsupported("quantization.has_quantized_embedding is true", "the layers are not quantized")
    embedding_group = table.integer("embedding_group_size", 0, 1 << 16, 0)
    if embedding_group and not embedding:
        table.unsupported(f"quantization.embedding_group_size is {embedding_group}", "the embedding is not quantized")
    scale_dtype = table.get("scale_dtype", "float32")
    if scale_dtype not in SCALE_TYPES or (scale_dtype != "float32" and (form is None or form.scales != "group")):
        table.unsupported(f"quantization.scale_dtype is {shown(scale_dtype)}", "scales are float32, those of groups also float16")
    for key, off in (("clamp_val", None), ("use_meta_recipe", False)):
        if table.get(key) not in (None, off):
            table.unsupported(f"quantization.{key} is {shown(table.raw[key])}", f"only {shown(off)} is supported")
    excluded = table.get("exclude_modules")
    if excluded is None:
        excluded = ["lm_head"]  # as TensorRT-LLM takes it
    wide = table.get("wide_modules") or []
    for key, names in (("exclude_modules", excluded), ("wide_modules", wide)):
        if not isinstance(names, list) or len(names) > MAX_EXCLUDED or not all(isinstance(x, str) and len(x) < 256 for x in names):
            table.wrong(key, "is not a list of module names")
    if wide and (form is None or form.wide is None):
        table.unsupported("quantization.wide_modules is set", f"{shown(algo)} has no layers of 8 bits beside its own")
    size = table.integer("group_size", 1, 1 << 16, 128)
    return QuantConfig(
        algo=algo,
        kv_algo=kv_algo,
        group_size=size,
        prequant=table.boolean("pre_quant_scale", False),
        scale_dtype=scale_dtype,
        zero_point=zero_point,
        input_order=input_order,
        embedding=embedding,
        embedding_group=embedding_group,
        wide=tuple(wide),
        exclude=tuple(excluded),
    )
