"""What a family of models is, and the one table that maps Hugging Face tensors to TensorRT-LLM tensors.

The table is the whole mapping: names, shapes, how parts are fused and how a tensor is split over tensor-parallel ranks.
Reading, checking, sharding and writing all walk it, so they cannot disagree. A row of a layer is kept when `when` is None
or names a true flag of the `ModelConfig`. Dimensions are symbols: H hidden, Q query heads x head size, K key-value heads x head
size, D head size, I intermediate, V vocabulary; of a mixture E experts, X intermediate of an expert, S of the shared one, O one row.

The matrices of all experts of a layer are one tensor [E, rows, columns], whose parts are those of expert 0, then of expert 1, ...

Note the inversion that TensorRT-LLM's names carry: `mlp.fc` is the activated `gate_proj`, `mlp.gate` is `up_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtllm_thoughtx.config import ModelConfig

# How a part is dealt out to tensor-parallel ranks.
ALL, ROWS, KV_ROWS, COLS, VOCAB_ROWS = "all", "rows", "kv_rows", "cols", "vocab_rows"


@dataclass(frozen=True)
class Row:
    """One TensorRT-LLM tensor: its name, and (Hugging Face name, dimensions, split) of each part, stacked on dimension 0."""

    name: str
    parts: tuple[tuple[str, str, str], ...]
    when: str | None = None
    of_experts: bool = False  # the parts of each expert, whose number stands for {expert}
    dtype: str | None = None  # in a TensorRT-LLM checkpoint, whatever the other tensors' type is


ATTENTION: tuple[Row, ...] = (
    Row("input_layernorm.weight", (("input_layernorm.weight", "H", ALL),)),
    Row(
        "attention.qkv.weight",
        (
            ("self_attn.q_proj.weight", "QH", ROWS),
            ("self_attn.k_proj.weight", "KH", KV_ROWS),
            ("self_attn.v_proj.weight", "KH", KV_ROWS),
        ),
    ),
    Row(
        "attention.qkv.bias",
        (
            ("self_attn.q_proj.bias", "Q", ROWS),
            ("self_attn.k_proj.bias", "K", KV_ROWS),
            ("self_attn.v_proj.bias", "K", KV_ROWS),
        ),
        when="qkv_bias",
    ),
    Row("attention.q_layernorm.weight", (("self_attn.q_norm.weight", "D", ALL),), when="qk_norm"),
    Row("attention.k_layernorm.weight", (("self_attn.k_norm.weight", "D", ALL),), when="qk_norm"),
    Row("attention.dense.weight", (("self_attn.o_proj.weight", "HQ", COLS),)),
    Row("attention.dense.bias", (("self_attn.o_proj.bias", "H", ALL),), when="o_bias"),
    Row("post_layernorm.weight", (("post_attention_layernorm.weight", "H", ALL),)),
)
LAYER: tuple[Row, ...] = (
    *ATTENTION,
    Row("mlp.fc.weight", (("mlp.gate_proj.weight", "IH", ROWS),)),
    Row("mlp.gate.weight", (("mlp.up_proj.weight", "IH", ROWS),)),
    Row("mlp.proj.weight", (("mlp.down_proj.weight", "HI", COLS),)),
)
EXPERTS: tuple[Row, ...] = (
    *ATTENTION,
    Row("mlp.router.weight", (("mlp.gate.weight", "EH", ALL),), dtype="float32"),
    Row(
        "mlp.fc.weight",
        (("mlp.experts.{expert}.up_proj.weight", "XH", ROWS), ("mlp.experts.{expert}.gate_proj.weight", "XH", ROWS)),
        of_experts=True,
    ),
    Row("mlp.proj.weight", (("mlp.experts.{expert}.down_proj.weight", "HX", COLS),), of_experts=True),
    Row(
        "mlp.shared_expert.fc.weight",
        (("mlp.shared_expert.up_proj.weight", "SH", ROWS), ("mlp.shared_expert.gate_proj.weight", "SH", ROWS)),
        when="has_shared_expert",
    ),
    Row("mlp.shared_expert.proj.weight", (("mlp.shared_expert.down_proj.weight", "HS", COLS),), when="has_shared_expert"),
    Row("mlp.shared_expert_gate.weight", (("mlp.shared_expert_gate.weight", "OH", ALL),), when="has_shared_expert"),
)
EMBEDDING = Row("transformer.vocab_embedding.weight", (("model.embed_tokens.weight", "VH", ALL),))
FINAL_NORM = Row("transformer.ln_f.weight", (("model.norm.weight", "H", ALL),))
HEAD = Row("lm_head.weight", (("lm_head.weight", "VH", VOCAB_ROWS),))


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between model families; everything else is shared."""

    model_type: str  # Hugging Face `model_type`
    architecture: str  # Hugging Face class, TensorRT-LLM `architecture`
    qkv_bias: bool | None  # None: `attention_bias` of config.json decides
    o_bias: bool | None
    qk_norm: bool
    defaults: Mapping[str, Any]  # what transformers' config class assumes for a missing key
    layer: tuple[Row, ...] = LAYER
    trtllm: Mapping[str, Any] = field(default_factory=dict)  # fields that only this family's TensorRT-LLM config has


@dataclass(frozen=True)
class Part:
    """`shape[0]` rows of the stored tensor `source`, starting at `first_row`."""

    source: str
    first_row: int
    shape: tuple[int, ...]
    split: str


@dataclass(frozen=True)
class Tensor:
    """One global TensorRT-LLM tensor. `layer` is None outside the decoder layers; `suffix` is the name within a layer.

    `stored` is the safetensors type of a tensor that is never cast; `dtype` the type of one that a TensorRT-LLM checkpoint always
    holds in that; None: the checkpoint's type. The rows of all parts, in order, are those of the tensor with all but its last
    dimensions flattened.
    """

    name: str
    layer: int | None
    suffix: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    stored: str | None = None
    dtype: str | None = None


def _tensor(row: Row, layer: int | None, sizes: Mapping[str, int]) -> Tensor:
    parts = []
    num_experts = sizes["E"] if row.of_experts else 1
    for expert in range(num_experts):
        for hf_name, dims, split in row.parts:
            source = hf_name if layer is None else f"model.layers.{layer}.{hf_name.format(expert=expert)}"
            parts.append(Part(source, 0, tuple(sizes[d] for d in dims), split))
    shape = stacked([part.shape for part in parts], num_experts if row.of_experts else None)
    name = row.name if layer is None else f"transformer.layers.{layer}.{row.name}"
    return Tensor(name, layer, row.name, shape, tuple(parts), dtype=row.dtype)


def stacked(shapes: Sequence[tuple[int, ...]], num_experts: int | None) -> tuple[int, ...]:
    """Shape of parts on top of each other; `num_experts` equal groups of them get a dimension of their own."""
    num_rows = sum(shape[0] for shape in shapes)
    if num_experts is None:
        return (num_rows, *shapes[0][1:])
    return (num_experts, num_rows // num_experts, *shapes[0][1:])


def tensor_table(config: ModelConfig, family: Family) -> tuple[Tensor, ...]:
    """Every TensorRT-LLM tensor of the model, layer-major, with parts named as Hugging Face names them.

    The last entry is `lm_head.weight`; a tied model's head reads the embedding.
    """
    sizes = {
        "H": config.hidden_size,
        "Q": config.q_size,
        "K": config.kv_size,
        "D": config.head_dim,
        "I": config.intermediate_size,
        "V": config.vocab_size,
        "O": 1,
    }
    if config.experts is not None:
        sizes |= {"E": config.experts.num_experts, "X": config.experts.intermediate_size, "S": config.experts.shared_size}
    rows = [row for row in family.layer if row.when is None or getattr(config, row.when)]
    head = HEAD if not config.tied else Row(HEAD.name, ((EMBEDDING.parts[0][0], *HEAD.parts[0][1:]),))
    table = [_tensor(EMBEDDING, None, sizes)]
    table += [_tensor(row, layer, sizes) for layer in range(config.num_layers) for row in rows]
    return (*table, _tensor(FINAL_NORM, None, sizes), _tensor(head, None, sizes))


def in_trtllm_terms(table: tuple[Tensor, ...], *, tied: bool) -> tuple[Tensor, ...]:
    """The same table for a checkpoint that is already stored under TensorRT-LLM's names, with parts fused."""
    result = []
    for tensor in table:
        stored = EMBEDDING.name if tied and tensor.name == HEAD.name else tensor.name
        parts, first = [], 0
        for part in tensor.parts:
            parts.append(Part(stored, first, part.shape, part.split))
            first += part.shape[0]
        result.append(Tensor(tensor.name, tensor.layer, tensor.suffix, tensor.shape, tuple(parts), dtype=tensor.dtype))
    return tuple(result)
