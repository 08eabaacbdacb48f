"""Qwen2 and Qwen2.5, and what is distilled into them: biases on query, key and value, always."""

from __future__ import annotations

from trtllm_thoughtx.families.family import Family

QWEN_TRTLLM = {
    "use_logn_attn": False,
    "seq_length": 8192,
    "num_labels": 1,
    "moe_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": 0, "sparse_mixer_epsilon": 0.01, "tp_mode": 0},
}

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    o_bias=False,
    qk_norm=False,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    trtllm={**QWEN_TRTLLM, "qwen_type": "qwen2"},
)
