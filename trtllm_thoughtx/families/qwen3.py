"""Qwen3 (dense): a norm per head on query and key, head size independent of the hidden size, biases only on request."""

from __future__ import annotations

from trtllm_thoughtx.families.family import Family
from trtllm_thoughtx.families.qwen2 import QWEN_TRTLLM

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    qkv_bias=None,
    o_bias=None,
    qk_norm=True,
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    trtllm={**QWEN_TRTLLM, "qwen_type": "qwen3"},
)
