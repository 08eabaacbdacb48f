"""Qwen3-MoE (30B-A3B and its kin): Qwen3's attention, and in place of each MLP a mixture without a shared expert."""

from __future__ import annotations

from trtllm_thoughtx.families.family import EXPERTS, Family
from trtllm_thoughtx.families.qwen2 import QWEN_TRTLLM

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    qkv_bias=None,
    o_bias=None,
    qk_norm=True,
    defaults={
        **{"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "shared_expert_intermediate_size": 0},
    },
    layer=EXPERTS,
    trtllm={**QWEN_TRTLLM, "qwen_type": "qwen3_moe"},
)
