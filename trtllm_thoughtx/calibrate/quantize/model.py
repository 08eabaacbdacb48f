"""One decoder layer at a time, in float32: what the calibration runs, with every linear layer passed through the caller.

A layer's weights are read when it is needed and given back afterwards, so memory holds one layer and the rows at hand. A row is a whole
sequence without padding, computed alone: what shares a batch with it cannot change a bit of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from trtllm_thoughtx.checkpoint.weights import WeightSource
from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.graph import rope

Linear = Callable[[str, torch.Tensor], torch.Tensor]  # (name within the layer, inputs [tokens, in]) -> [tokens, out]
UNITS = (("attention.qkv",), ("attention.dense",), ("mlp.fc", "mlp.gate"), ("mlp.proj",))  # layers that read the same inputs


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read(source: WeightSource, name: str) -> torch.Tensor:
    """A tensor of the checkpoint in float32."""
    return torch.from_numpy(source.read(name, "float32")).to(device())


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Rotary:
    """cos and sin [length, head_dim / 2] of the graph's own tables."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        self.cos, self.sin = (
            torch.from_numpy(x).to(device()) for x in rope.tables(config.rope, config.head_dim, config.max_position, length)
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[heads, tokens, head_dim], the two halves rotated against each other."""
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Layer:
    """Decoder layer `index` with its weights, by their names within the layer."""

    def __init__(self, source: WeightSource, index: int) -> None:
        self.config, self.index, self.name = source.config, index, f"transformer.layers.{index}"
        prefix = f"{self.name}."
        self.weights = {t.suffix: read(source, t.name) for t in source.tensors() if t.name.startswith(prefix)}

    def plain(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """The linear layer as the checkpoint has it."""
        return F.linear(x, self.weights[f"{module}.weight"], self.weights.get(f"{module}.bias"))

    def forward(
        self, x: torch.Tensor, rotary: Rotary, linear: Linear | None = None, cache: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Residual stream [tokens, hidden] of one sequence, through the layer. `cache` sees keys and values as the KV cache gets them,
        [heads, tokens, head_dim], and returns those that attention reads."""
        linear, config, weights = linear or self.plain, self.config, self.weights
        h = norm(x, weights["input_layernorm.weight"], config.norm_eps)
        qkv = linear("attention.qkv", h).split([config.q_size, config.kv_size, config.kv_size], -1)
        q, k, v = (part.reshape(len(x), -1, config.head_dim) for part in qkv)
        if config.qk_norm:
            q = norm(q, weights["attention.q_layernorm.weight"], config.norm_eps)
            k = norm(k, weights["attention.k_layernorm.weight"], config.norm_eps)
        q, k, v = rotary(q.transpose(0, 1)), rotary(k.transpose(0, 1)), v.transpose(0, 1)
        if cache is not None:
            k, v = cache(k), cache(v)
        groups = config.num_heads // config.num_kv_heads
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        heads = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        x = x + linear("attention.dense", heads.transpose(0, 1).reshape(len(x), -1))
        h = norm(x, weights["post_layernorm.weight"], config.norm_eps)
        return x + linear("mlp.proj", F.silu(linear("mlp.fc", h)) * linear("mlp.gate", h))


class Head:
    """The final norm and lm_head, applied to a few rows at a time: logits of a long row would not fit."""

    ROWS = 64

    def __init__(self, source: WeightSource) -> None:
        self.config, self.name = source.config, "lm_head"
        self.norm_weight = read(source, "transformer.ln_f.weight")
        self.weight = read(source, "transformer.vocab_embedding.weight" if source.config.tied else "lm_head.weight")

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return norm(x, self.norm_weight, self.config.norm_eps)
