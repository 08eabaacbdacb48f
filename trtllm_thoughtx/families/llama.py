"""Llama 2 and 3, and what is distilled into them: no biases unless `attention_bias` asks for all four."""

from __future__ import annotations

from trtllm_thoughtx.families.family import Family

LLAMA_TRTLLM = {
    "residual_mlp": False,
    "remove_duplicated_kv_heads": False,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "output_multiplier_scale": 1.0,
    "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": 1, "sparse_mixer_epsilon": 0.01, "tp_mode": 0},
}

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    qkv_bias=None,
    o_bias=None,
    qk_norm=False,
    defaults={"max_position_embeddings": 2048},
    trtllm=LLAMA_TRTLLM,
)
