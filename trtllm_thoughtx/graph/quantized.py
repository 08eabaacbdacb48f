"""Quantized linear layers as explicit QuantizeLinear and DequantizeLinear around one Gemm: the form that every engine takes.

onnxruntime computes it as it stands, TensorRT fuses it into a low-precision product. What the graph says is the definition: an input is
multiplied by its prequant factor, rounded to the stored grid where the format has one, and multiplied with the stored matrix times its
scale. Scales have the graph's own type (`calibrate.grid` chooses numbers that every type holds exactly).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnx import TensorProto, helper

from trtllm_thoughtx.families.quantization import STATIC_ACTIVATIONS, STORED, scale_of

if TYPE_CHECKING:
    from trtllm_thoughtx.graph.decoder import Builder

ELEM_TYPES = {"F8_E4M3": TensorProto.FLOAT8E4M3FN, "I8": TensorProto.INT8, "U8": TensorProto.INT4}
TRT_NAMES = {"F8_E4M3": "FP8", "I8": "Int8", "U8": "Int4"}  # as a plan's layer information spells them


@dataclass(frozen=True)
class Product:
    """A Gemm that a plan must compute from `weight` (a name in `TRT_NAMES`), and from inputs of that type too if `both`."""

    node: str
    weight: str
    both: bool


def linear(b: Builder, x: str, module: str, output: str, num_out: int, num_in: int, *, bias: bool) -> str:
    """A covered linear layer [N, num_in] -> [N, num_out]; `output` names its Gemm and its result."""
    quant = b.config.quantization
    assert quant is not None and quant.algo is not None
    stored = STORED[quant.algo]
    if quant.prequant:
        x = b.node("Mul", [x, b.weight(f"{module}.prequant_scaling_factor", (num_in,))], f"{output}.prequant")
    both = quant.algo in STATIC_ACTIVATIONS
    if both:
        scale = b.weight(f"{module}.activation_scaling_factor", ())
        x = b.node("QuantizeLinear", [x, scale, _zero(b, stored)], f"{output}.input.quantized")
        x = b.node("DequantizeLinear", [x, scale], f"{output}.input")
    suffix, shape = scale_of(quant.algo, num_out, num_in, quant.group_size)
    weight = b.weight(f"{module}.weight", (num_out, num_in), ELEM_TYPES[stored])
    scale = b.weight(f"{module}.{suffix}", () if shape == (1,) else shape)
    blocks: dict[str, Any] = (
        {"axis": 1, "block_size": quant.group_size} if stored == "U8" else {"axis": 0} if len(shape) and shape != (1,) else {}
    )
    matrix = b.node("DequantizeLinear", [weight, scale], f"{output}.matrix", **blocks)
    inputs = [x, matrix]
    if bias:
        inputs.append(b.weight(f"{module}.bias", (num_out,)))
    b.products.append(Product(output, TRT_NAMES[stored], both))
    if not quant.zero_point:
        return b.node("Gemm", inputs, output, transB=1)
    product = b.node("Gemm", inputs, f"{output}.product", transB=1)
    b.products[-1] = Product(f"{output}.product", TRT_NAMES[stored], both)
    return b.node("Add", [product, _zeros(b, x, module, output, num_out, num_in // quant.group_size)], output)


def cache_in(b: Builder, x: str, attention: str, output: str) -> str:
    """New keys or values as the INT8 cache holds them; one scale a layer for both."""
    return b.node("QuantizeLinear", [x, b.weight(f"{attention}.kv_cache_scaling_factor", ()), _zero(b, "I8")], f"{output}.cached")


def cache_out(b: Builder, x: str, attention: str, output: str) -> str:
    """Live slots of the INT8 cache in the graph's type."""
    return b.node("DequantizeLinear", [x, b.weight(f"{attention}.kv_cache_scaling_factor", ())], f"{output}.wide")


def _zero(b: Builder, stored: str) -> str:
    """The zero point, which also says to what type a QuantizeLinear rounds."""
    name = f"zero.{stored}"
    if all(tensor.name != name for tensor in b.inline):
        b.inline.append(helper.make_tensor(name, ELEM_TYPES[stored], [], b"\0", raw=True))
    return name


def _zeros(b: Builder, x: str, module: str, output: str, num_out: int, num_groups: int) -> str:
    """What zero points add: each group's zero times the sum of its inputs. No engine's fused product knows zero points; this is exact."""
    shape = f"{output}.groups.shape"
    b.constant(shape, [0, num_groups, -1])
    if all(tensor.name != "groups.axis" for tensor in b.inline):
        b.constant("groups.axis", [2])
    groups = b.node("Reshape", [x, shape], f"{output}.groups")
    sums = b.node("ReduceSum", [groups, "groups.axis"], f"{output}.groups.sum", keepdims=0)
    return b.node("Gemm", [sums, b.weight(f"{module}.zero", (num_out, num_groups))], f"{output}.zeros", transB=1)
