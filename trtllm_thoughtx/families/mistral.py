"""Mistral: Llama without biases, in which every layer slides unless config.json says null; a missing `sliding_window` is 4096."""

from __future__ import annotations

from trtllm_thoughtx.families.family import Family
from trtllm_thoughtx.families.llama import LLAMA_TRTLLM

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    qkv_bias=False,
    o_bias=False,
    qk_norm=False,
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, "use_sliding_window": True},
    trtllm=LLAMA_TRTLLM,
)
