"""Tiny random Hugging Face checkpoints, made and saved by transformers itself.

The weights are drawn so that every part of the model matters: attention is far from uniform, norms and biases are far from
their neutral values. A checkpoint whose attention is nearly flat would pass with a wrong mask.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}
FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True, "head_dim": 16},
}
ROPES: dict[str, dict[str, Any]] = {
    "none": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}


def model(family: str, *, rope: str = "none", seed: int = 0, **sizes: Any) -> Any:
    """A float32 `...ForCausalLM` with random weights."""
    config_class = getattr(transformers, f"{FAMILIES[family]}Config")
    config = config_class(**{**SIZES, "rope_parameters": dict(ROPES[rope]), **EXPERTS.get(family, {}), **sizes})
    made = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * draw(weight.shape))
            elif name.endswith("bias"):
                weight.copy_(0.5 * draw(weight.shape))
            elif "embed_tokens" in name:
                weight.copy_(draw(weight.shape))
            else:
                weight.copy_(1.5 * draw(weight.shape) / weight.shape[-1] ** 0.5)
    return made


def save(
    path: Path, family: str = "qwen2", *, dtype: str = "float32", old_style: bool = False, max_shard_size: str = "1GB", **kwargs: Any
) -> Path:
    """Write a checkpoint to `path`. `old_style` rewrites its config.json the way that transformers 4 wrote it."""
    model(family, **kwargs).to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    if old_style:
        file = path / "config.json"
        config = json.loads(file.read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        config["torch_dtype"] = config.pop("dtype")
        config["transformers_version"] = "4.44.0"
        file.write_text(json.dumps(config, indent=2))
    return path
