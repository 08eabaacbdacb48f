"""Adapters as inputs of the graph: a linear layer plus a product of low rank, whose two matrices each row of the batch has of its own.

    lora_down_{layer}_{NAME} [B, in, R]     lora_up_{layer}_{NAME} [B, R, out]     y = W x + (x @ down) @ up

Rows of zeros add zero: they are the base model. Rows of the inputs are rows of the KV cache, so a runtime holds them beside it, and a call
takes the same part of both. The three parts of `qkv` have R columns each, one after the other. An engine without `max_lora_rank` is the
graph that it ever was.
"""

from __future__ import annotations

from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.graph.builder import Builder
from trtllm_thoughtx.graph.quantized import linear

PREFIX = "lora_"
# module within a layer -> its name in an input, and the number of stacked parts that have products of their own
MODULES = {
    "attention.qkv": ("qkv", 3),
    "attention.dense": ("dense", 1),
    "mlp.fc": ("fc", 1),
    "mlp.gate": ("gate", 1),
    "mlp.proj": ("proj", 1),
}


def inputs_of(module: str, layer: int) -> tuple[str, str]:
    """Names of the inputs of a module."""
    name = MODULES[module][0]
    return f"{PREFIX}down_{layer}_{name}", f"{PREFIX}up_{layer}_{name}"


def shapes_of(config: ModelConfig, rank: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """The matrices of a row, by module: [in, R] and [R, out]."""
    hidden, width = config.hidden_size, config.intermediate_size
    sizes = {
        "attention.qkv": (hidden, config.q_size + 2 * config.kv_size),
        "attention.dense": (config.q_size, hidden),
        "mlp.fc": (hidden, width),
        "mlp.gate": (hidden, width),
        "mlp.proj": (width, hidden),
    }
    ranks = {module: rank * MODULES[module][1] for module in sizes}
    return {module: ((num_in, ranks[module]), (ranks[module], num_out)) for module, (num_in, num_out) in sizes.items()}


def adapted(b: Builder, x: str, layer: int, module: str, output: str, num_out: int, num_in: int, *, bias: bool = False) -> str:
    """`linear` of a layer's module, with the product that its row brings where the engine takes any."""
    weights = f"transformer.layers.{layer}.{module}"
    if not b.build.max_lora_rank:
        return linear(b, x, weights, output, num_out, num_in, bias=bias)
    y = linear(b, x, weights, f"{output}.base", num_out, num_in, bias=bias)
    (_, rank), _ = shapes_of(b.config, b.build.max_lora_rank)[module]
    names = inputs_of(module, layer)
    down = b.input(names[0], b.elem_type, ["B", num_in, rank])
    up = b.input(names[1], b.elem_type, ["B", rank, num_out])
    rows = b.node("Reshape", [x, _shape(b, num_in)], f"{output}.lora.rows")
    low = b.node("MatMul", [rows, down], f"{output}.lora.down")
    high = b.node("MatMul", [low, up], f"{output}.lora.up")
    flat = f"shape.lora.flat.{num_out}"
    if all(tensor.name != flat for tensor in b.inline):
        b.constant(flat, [-1, num_out])
    added = b.node("Reshape", [high, flat], f"{output}.lora")
    return b.node("Add", [y, added], output)


def _shape(b: Builder, width: int) -> str:
    """[B, S, width], once for all layers."""
    name = f"shape.lora.{width}"
    if all(node.output[0] != name for node in b.nodes):
        b.node("Concat", ["shape.tokens", b.constant(f"{name}.tail", [width])], name, axis=0)
    return name
