"""The registry of model families. To add one: write its `Family` in a file of its own and list it here."""

from __future__ import annotations

from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.families import llama, mistral, qwen2, qwen2_moe, qwen3, qwen3_moe
from trtllm_thoughtx.families.family import Family, Part, Tensor, in_trtllm_terms, tensor_table

__all__ = ["FAMILIES", "Family", "Part", "Tensor", "expected_tensors", "family_named", "in_trtllm_terms", "tensors_of"]

FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in (qwen2, qwen3, llama, mistral, qwen2_moe, qwen3_moe)}


def family_named(model_type: object, where: str) -> Family:
    """The family of a `model_type`. E103 lists what is supported."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ThoughtxError(
            "E103",
            f"model type {shown(model_type)} is not supported",
            where=where,
            why=f"supported types are {', '.join(sorted(FAMILIES))}",
            fix="use a checkpoint of a supported type, or describe the family in trtllm_thoughtx/families",
        )
    return family


def tensors_of(config: ModelConfig) -> tuple[Tensor, ...]:
    """Every TensorRT-LLM tensor of a model, layer-major, `lm_head.weight` last (of a tied model too)."""
    return tensor_table(config, FAMILIES[config.family])


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor that the checkpoint must hold."""
    return {part.source: part.shape for tensor in tensors_of(config) for part in tensor.parts}
