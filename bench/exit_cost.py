"""What early exits cost and save on another shape: computed from a config and from counts that were measured, not measured themselves.

The unit is a decoder layer: at batch 1 a token reads each layer's weights once, and a row of logits reads lm_head, which is
2.3 layers of Qwen2.5-7B. Attention over the cache is left out; it grows with the text and would add to what is saved.
"""

from __future__ import annotations

from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.families.size import head_in_layers, layer_parameters


def generation_in_layers(config: ModelConfig, num_generated: float, num_probe_tokens: float = 0.0, *, has_head: bool = False) -> float:
    """Layers that are read to generate so many tokens, each with a row of logits; `num_probe_tokens` went into answer probes."""
    per_token = config.num_layers + head_in_layers(config) + (2 * config.hidden_size / layer_parameters(config) if has_head else 0.0)
    return (num_generated + num_probe_tokens) * per_token


def draft_cycle_in_layers(config: ModelConfig, layer: int, rank: int, num_drafted: float) -> float:
    """Layers that one cycle reads at batch 1: a pass of the first `layer` layers and of the adapter for the token and each draft, a row of
    logits for each draft, then the other layers and lm_head once."""
    adapter = (2 * rank + 2) * config.hidden_size / layer_parameters(config)
    head = head_in_layers(config)
    return (1 + num_drafted) * (layer + adapter) + num_drafted * head + (config.num_layers - layer) + head


def drafts_saved(config: ModelConfig, layer: int, rank: int, num_drafted: float, num_accepted: float) -> float:
    """Share of weight bytes that drafts save at batch 1, with so many drafted and accepted in a cycle; negative where they cost more."""
    plain = (1 + num_accepted) * (config.num_layers + head_in_layers(config))
    return 1 - draft_cycle_in_layers(config, layer, rank, num_drafted) / plain


def break_even(config: ModelConfig, layer: int, rank: int, num_drafted: float) -> float:
    """Drafts of a cycle, of `num_drafted`, that must be accepted for weight bytes to be saved at batch 1."""
    return draft_cycle_in_layers(config, layer, rank, num_drafted) / (config.num_layers + head_in_layers(config)) - 1
