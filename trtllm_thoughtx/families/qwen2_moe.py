"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, and in place of each MLP a mixture with an expert that all tokens share."""

from __future__ import annotations

from trtllm_thoughtx.families.family import EXPERTS, Family
from trtllm_thoughtx.families.qwen2 import QWEN_TRTLLM

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    qkv_bias=True,
    o_bias=False,
    qk_norm=False,
    defaults={
        **{"num_key_value_heads": 16, "max_position_embeddings": 32768, "sliding_window": 4096},
        **{"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    },
    layer=EXPERTS,
    trtllm={**QWEN_TRTLLM, "qwen_type": "qwen2_moe"},
)
