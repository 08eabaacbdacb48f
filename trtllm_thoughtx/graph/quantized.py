"""Quantized linear layers as explicit QuantizeLinear and DequantizeLinear around one Gemm: the form that every engine takes.

onnxruntime computes it as it stands, TensorRT fuses it into a low-precision product. What the graph says is the definition: an input is
multiplied by its prequant factor and put in the order of its groups where the format has them, rounded to the stored grid where it has
one, and multiplied with the stored matrix times its scale. Scales have the graph's own type (`calibrate.grid` chooses numbers that every
type holds exactly).

An FP8 product has one scale on either side, whatever the format: only then does TensorRT put the scales into the product. It would
multiply by a scale per row behind it, and until then sums of raw FP8 numbers (up to 448 times 448 each) leave float16. So scales per row
stand behind the product in the graph, over `ROW_STEP`; and a token with a range of its own is divided by it before, and multiplied behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnx import TensorProto, helper

from trtllm_thoughtx.families.quantization import STATIC_ACTIVATIONS, STORED, TOKEN_ACTIVATIONS, scale_of

if TYPE_CHECKING:
    from trtllm_thoughtx.graph.decoder import Builder

ELEM_TYPES = {"F8_E4M3": TensorProto.FLOAT8E4M3FN, "I8": TensorProto.INT8, "U8": TensorProto.INT4}
TRT_NAMES = {"F8_E4M3": "FP8", "I8": "Int8", "U8": "Int4"}  # as a plan's layer information spells them
# Scales of an FP8 product whose true ones are applied around it. Powers of two are the same numbers in every type, and these leave the
# product about as large as the layer's output: inputs that their token's range has divided, and rows of common matrices (0.2 / 448).
TOKEN_STEP, ROW_STEP = 2.0**-8, 2.0**-11
TOKEN_SPAN = 448 * TOKEN_STEP  # what the largest of a token's inputs becomes
SMALLEST_RANGE = 2.0**-14  # smallest normal float16: a token of zeros is divided by it


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
    if quant.input_order:
        x = b.node("Gather", [x, b.weight(f"{module}.input_order", (num_in,), TensorProto.INT32)], f"{output}.ordered", axis=1)
    both = quant.algo in STATIC_ACTIVATIONS
    if both:
        scale = b.weight(f"{module}.activation_scaling_factor", ())
        x = b.node("QuantizeLinear", [x, scale, _zero(b, stored)], f"{output}.input.quantized")
        x = b.node("DequantizeLinear", [x, scale], f"{output}.input")
    if quant.algo in ("FP8_PER_CHANNEL", TOKEN_ACTIVATIONS):
        return _by_row(b, x, module, output, num_out, num_in, bias=bias)
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


def _by_row(b: Builder, x: str, module: str, output: str, num_out: int, num_in: int, *, bias: bool) -> str:
    """FP8 by FP8 with a scale per row of the matrix, and per token where inputs have no static one: s * (x @ W^T) * r + bias."""
    assert b.config.quantization is not None and b.config.quantization.algo is not None
    span = ""
    if b.config.quantization.algo == TOKEN_ACTIVATIONS:
        x, span = _rounded_by_token(b, x)
    weight = b.weight(f"{module}.weight", (num_out, num_in), ELEM_TYPES["F8_E4M3"])
    matrix = b.node("DequantizeLinear", [weight, _number(b, "row.step", ROW_STEP)], f"{output}.matrix")
    y = b.node("Gemm", [x, matrix], f"{output}.product", transB=1)
    b.products.append(Product(y, TRT_NAMES["F8_E4M3"], True))
    suffix, _ = scale_of(b.config.quantization.algo, num_out, num_in, b.config.quantization.group_size)
    wide = [b.weight(f"{module}.{suffix}", (num_out,), factor=1 / ROW_STEP), *([span] if span else [])]
    for factor, name in zip(wide, ("rows", "tokens"), strict=False):
        last = factor == wide[-1] and not bias
        y = b.node("Mul", [y, factor], output if last else f"{output}.{name}")
    return b.node("Add", [y, b.weight(f"{module}.bias", (num_out,))], output) if bias else y


def _rounded_by_token(b: Builder, x: str) -> tuple[str, str]:
    """(inputs on the E4M3 grid of their token, divided by its range; the ranges [N, 1]): the largest input over `TOKEN_SPAN`."""
    span, rounded = f"{x}.range", f"{x}.rounded"
    if all(node.output[0] != span for node in b.nodes):  # layers that read the same inputs round them once
        largest = b.node("ReduceMax", [b.node("Abs", [x], f"{x}.sizes"), _axis(b, 1)], f"{x}.largest", keepdims=1)
        over = b.node("Div", [largest, _number(b, "token.span", TOKEN_SPAN)], f"{x}.span")
        b.node("Max", [over, _number(b, "token.smallest", SMALLEST_RANGE)], span)
        step = _number(b, "token.step", TOKEN_STEP)
        b.node("QuantizeLinear", [b.node("Div", [x, span], f"{x}.scaled"), step, _zero(b, "F8_E4M3")], f"{x}.quantized")
        b.node("DequantizeLinear", [f"{x}.quantized", step], rounded)
    return rounded, span


def _number(b: Builder, name: str, value: float) -> str:
    """A scalar of the graph's type."""
    if all(tensor.name != name for tensor in b.inline):
        b.inline.append(helper.make_tensor(name, b.elem_type, [], [value]))
    return name


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


def _axis(b: Builder, axis: int) -> str:
    name = "groups.axis" if axis == 2 else "token.axis"
    if all(tensor.name != name for tensor in b.inline):
        b.constant(name, [axis])
    return name


def _zeros(b: Builder, x: str, module: str, output: str, num_out: int, num_groups: int) -> str:
    """What zero points add: each group's zero times the sum of its inputs. No engine's fused product knows zero points; this is exact."""
    shape = f"{output}.groups.shape"
    b.constant(shape, [0, num_groups, -1])
    groups = b.node("Reshape", [x, shape], f"{output}.groups")
    sums = b.node("ReduceSum", [groups, _axis(b, 2)], f"{output}.groups.sum", keepdims=0)
    return b.node("Gemm", [sums, b.weight(f"{module}.zero", (num_out, num_groups))], f"{output}.zeros", transB=1)
