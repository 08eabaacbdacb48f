"""How large a model is: parameters, and the bytes that an engine reads for a token."""

from __future__ import annotations

import math

from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.families import expected_tensors
from trtllm_thoughtx.families.quantization import TABLE, quantized_shapes, stored_as


def num_parameters(config: ModelConfig, within: str = "") -> int:
    """Of the checkpoint's tensors whose names begin with `within`."""
    return sum(math.prod(shape) for name, shape in expected_tensors(config).items() if name.startswith(within))


def layer_matrices(config: ModelConfig, *, whole: bool = False) -> dict[str, tuple[int, int]]:
    """[out, in] of the matrices of one decoder layer; of experts side by side those that one token is sent to, or all if `whole`."""
    hidden, width, experts = config.hidden_size, config.mlp_width, config.experts
    if experts is not None and whole:
        width = experts.num_experts * experts.intermediate_size + experts.shared_size
    matrices = {
        "attention.qkv": (config.q_size + 2 * config.kv_size, hidden),
        "attention.dense": (hidden, config.q_size),
        "mlp.fc": (width, hidden),
        "mlp.gate": (width, hidden),
        "mlp.proj": (hidden, width),
    }
    return matrices if experts is None else matrices | {"mlp.router": (experts.num_experts + config.has_shared_expert, hidden)}


def layer_parameters(config: ModelConfig, *, whole: bool = False) -> int:
    """Parameters of `layer_matrices`."""
    return sum(map(math.prod, layer_matrices(config, whole=whole).values()))


def head_in_layers(config: ModelConfig) -> float:
    """What lm_head weighs, in layers: 2.3 for Qwen2.5-7B."""
    return config.vocab_size * config.hidden_size / layer_parameters(config)


def matrix_bytes(config: ModelConfig, first_layer: int, last_layer: int, item: int, *, head: bool) -> int:
    """Bytes of the matrices of layers first_layer .. last_layer - 1, and of lm_head, as an engine whose numbers have `item`
    bytes holds them: quantized ones with their scales, of experts those that one token is sent to."""
    of_layer = layer_matrices(config).items()
    modules = {f"transformer.layers.{i}.{name}": shape for i in range(first_layer, last_layer) for name, shape in of_layer}
    if head:
        is_table = config.quantization is not None and config.quantization.embedding and not config.has_head
        modules[TABLE if is_table else "lm_head"] = (config.vocab_size, config.hidden_size)
    widths, total = {"F32": item, "F16": 2, "I32": 4}, 0
    for module, shape in modules.items():
        quant = stored_as(config.quantization, module)
        if quant is None:
            total += math.prod(shape) * item
            continue
        total += sum(math.prod(size) * widths.get(stored, 1) for stored, size in quantized_shapes(quant, *shape).values())
    return total
