"""Linear layers: one Gemm, and quantized ones as explicit QuantizeLinear and DequantizeLinear around it: the form that every engine takes.

onnxruntime computes it as it stands, TensorRT fuses it into a low-precision product. What the graph says is the definition: an input is
multiplied by its prequant factor and put in the order of its groups where the format has them, rounded to the stored grid where it has
one, and multiplied with the stored matrix times its scale. Scales have the graph's own type (`calibrate.grid` chooses numbers that every
type holds exactly).

A product of two quantized sides has one scale on each, whatever the format: only then does TensorRT put the scales into the product. It
would multiply by a scale per row behind it, and until then sums of raw numbers (up to 448 times 448 each) leave float16. So scales per
row stand behind the product in the graph, over the number's `row_step`; and a token with a range of its own is divided by it before, and
multiplied behind.
"""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, helper

from trtllm_thoughtx.config import QuantConfig
from trtllm_thoughtx.families.formats import FORMATS, INT8, Number
from trtllm_thoughtx.families.quantization import TABLE, stored_as
from trtllm_thoughtx.graph import blocks
from trtllm_thoughtx.graph.builder import Builder, Product

TOKEN_STEP = 2.0**-8  # the scale of inputs that their token's range has divided
SMALLEST_RANGE = 2.0**-14  # smallest normal float16: a token of zeros is divided by it


def linear(b: Builder, x: str, module: str, output: str, num_out: int, num_in: int, *, bias: bool = False) -> str:
    """A linear layer [N, num_in] -> [N, num_out]; `output` names its Gemm and its result."""
    quant = stored_as(b.config.quantization, module)
    if quant is None or quant.algo is None:
        inputs = [x, b.weight(f"{module}.weight", (num_out, num_in)), *([b.weight(f"{module}.bias", (num_out,))] if bias else [])]
        return b.node("Gemm", inputs, output, transB=1)
    form = FORMATS[quant.algo]
    if quant.prequant:
        x = b.node("Mul", [x, b.weight(f"{module}.prequant_scaling_factor", (num_in,))], f"{output}.prequant")
    if quant.input_order:
        x = b.node("Gather", [x, b.weight(f"{module}.input_order", (num_in,), TensorProto.INT32)], f"{output}.ordered", axis=1)
    both = form.inputs == "static"
    if both:
        scale = b.weight(f"{module}.activation_scaling_factor", ())
        x = b.node("QuantizeLinear", [x, scale, _zero(b, form.number)], f"{output}.input.quantized")
        x = b.node("DequantizeLinear", [x, scale], f"{output}.input")
    if form.inputs == "blocks":
        x, both = blocks.rounded(b, x, module, output), True
    shape = form.scale_shape(num_out, num_in, quant.group_size)
    if form.inputs == "token" or (form.inputs == "static" and shape != (1,)):
        return _by_row(b, quant, x, module, output, num_out, num_in, bias=bias)
    inputs = [x, _matrix(b, quant, module, output, num_out, num_in)]
    if bias:
        inputs.append(b.weight(f"{module}.bias", (num_out,)))
    # Without rounded inputs a kernel of its own may widen E2M1 matrices: it is what reads them.
    b.products.append(Product(inputs[1] if form.scales == "block" and not both else output, form.number.plan, both))
    if not quant.zero_point:
        return b.node("Gemm", inputs, output, transB=1)
    product = b.node("Gemm", inputs, f"{output}.product", transB=1)
    b.products[-1] = Product(f"{output}.product", form.number.plan, both)
    op = "Sub" if form.zeros == "points" else "Add"
    return b.node(op, [product, _zeros(b, quant, x, module, output, num_out, num_in // quant.group_size)], output)


def table(b: Builder) -> str:
    """The embedding's matrix, [vocabulary, hidden]. Where it is quantized plans and onnxruntime widen only the rows that are looked up."""
    quant, config = stored_as(b.config.quantization, TABLE), b.config
    if quant is None:
        return b.weight(f"{TABLE}.weight", (config.vocab_size, config.hidden_size))
    return _matrix(b, quant, TABLE, "embedding", config.vocab_size, config.hidden_size)


def _matrix(b: Builder, quant: QuantConfig, module: str, output: str, num_out: int, num_in: int) -> str:
    """The stored numbers times their scales; what zero points add is left to `_zeros`."""
    form = FORMATS[quant.algo or ""]
    if form.scales == "block":
        return blocks.matrix(b, module, form.scale_name, output, num_out, num_in)
    weight = b.weight(f"{module}.weight", (num_out, num_in), elem_type(form.number))
    scale, shape = _scale(b, quant, module, num_out, num_in), form.scale_shape(num_out, num_in, quant.group_size)
    by: dict[str, Any] = {"axis": 1, "block_size": quant.group_size} if form.scales == "group" else {"axis": 0} if shape != (1,) else {}
    return b.node("DequantizeLinear", [weight, scale], f"{output}.matrix", **by)


def _scale(b: Builder, quant: QuantConfig, module: str, num_out: int, num_in: int) -> str:
    """A layer's scales in the graph's type; those that a checkpoint holds in float16 are no wider in a float32 engine's file."""
    form = FORMATS[quant.algo or ""]
    name, shape = f"{module}.{form.scale_name}", form.scale_shape(num_out, num_in, quant.group_size)
    if quant.scale_dtype != "float16" or b.build.dtype != "float32":
        return b.weight(name, () if shape == (1,) else shape)
    wide = f"{name}.wide"
    if all(node.output[0] != wide for node in b.nodes):
        b.node("Cast", [b.weight(name, shape, TensorProto.FLOAT16)], wide, to=TensorProto.FLOAT)
    return wide


def _by_row(b: Builder, quant: QuantConfig, x: str, module: str, output: str, num_out: int, num_in: int, *, bias: bool) -> str:
    """Both sides quantized, with a scale per row of the matrix, and per token where inputs have no static one: s * (x @ W^T) * r + bias."""
    form, spans = FORMATS[quant.algo or ""], []
    if form.inputs == "token":
        x, span = _rounded_by_token(b, x, form.number)
        spans = [span]
    weight = b.weight(f"{module}.weight", (num_out, num_in), elem_type(form.number))
    matrix = b.node("DequantizeLinear", [weight, _number(b, "row.step", form.number.row_step)], f"{output}.matrix")
    y = b.node("Gemm", [x, matrix], f"{output}.product", transB=1)
    b.products.append(Product(y, form.number.plan, True))
    shape = form.scale_shape(num_out, num_in, quant.group_size)
    after = [("Mul", b.weight(f"{module}.{form.scale_name}", shape, factor=1 / form.number.row_step)), *(("Mul", span) for span in spans)]
    after += [("Add", b.weight(f"{module}.bias", (num_out,)))] if bias else []
    for i, (op, other) in enumerate(after):
        y = b.node(op, [y, other], output if i == len(after) - 1 else f"{output}.{('rows', 'tokens')[i]}")
    return y


def _rounded_by_token(b: Builder, x: str, number: Number) -> tuple[str, str]:
    """(inputs on the grid of their token, divided by its range; the ranges [N, 1]): the largest input becomes the number's largest."""
    span, rounded = f"{x}.range", f"{x}.rounded"
    if all(node.output[0] != span for node in b.nodes):  # layers that read the same inputs round them once
        largest = b.node("ReduceMax", [b.node("Abs", [x], f"{x}.sizes"), _axis(b, 1)], f"{x}.largest", keepdims=1)
        over = b.node("Div", [largest, _number(b, "token.span", number.largest * TOKEN_STEP)], f"{x}.span")
        b.node("Max", [over, _number(b, "token.smallest", SMALLEST_RANGE)], span)
        step = _number(b, "token.step", TOKEN_STEP)
        b.node("QuantizeLinear", [b.node("Div", [x, span], f"{x}.scaled"), step, _zero(b, number)], f"{x}.quantized")
        b.node("DequantizeLinear", [f"{x}.quantized", step], rounded)
    return rounded, span


def _number(b: Builder, name: str, value: float) -> str:
    """A scalar of the graph's type."""
    if all(tensor.name != name for tensor in b.inline):
        b.inline.append(helper.make_tensor(name, b.elem_type, [], [value]))
    return name


def cache_in(b: Builder, x: str, attention: str, output: str) -> str:
    """New keys or values as the INT8 cache holds them; one scale a layer for both."""
    return b.node("QuantizeLinear", [x, b.weight(f"{attention}.kv_cache_scaling_factor", ()), _zero(b, INT8)], f"{output}.cached")


def cache_out(b: Builder, x: str, attention: str, output: str) -> str:
    """Live slots of the INT8 cache in the graph's type."""
    return b.node("DequantizeLinear", [x, b.weight(f"{attention}.kv_cache_scaling_factor", ())], f"{output}.wide")


def elem_type(number: Number) -> int:
    """ONNX's name of a type, as an element type."""
    return int(TensorProto.DataType.Value(number.onnx))


def _zero(b: Builder, number: Number) -> str:
    """The zero point, which also says to what type a QuantizeLinear rounds."""
    name = f"zero.{number.stored}"
    if all(tensor.name != name for tensor in b.inline):
        b.inline.append(helper.make_tensor(name, elem_type(number), [], b"\0", raw=True))
    return name


def _axis(b: Builder, axis: int) -> str:
    name = "groups.axis" if axis == 2 else "token.axis"
    if all(tensor.name != name for tensor in b.inline):
        b.constant(name, [axis])
    return name


def _zeros(b: Builder, quant: QuantConfig, x: str, module: str, output: str, num_out: int, num_groups: int) -> str:
    """What zero points add, or take away: each group's zero times the sum of its inputs. No plan's fused product knows zero points; this
    is exact."""
    form, zero = FORMATS[quant.algo or ""], f"{module}.zero"
    if form.zeros == "points":
        points = b.weight(zero, (num_out, num_groups), elem_type(form.number))
        points = b.node("DequantizeLinear", [points, _number(b, "zeros.step", 1.0)], f"{output}.zeros.points")
        zero = b.node("Mul", [points, _scale(b, quant, module, num_out, num_groups * quant.group_size)], f"{output}.zeros.scaled")
    else:
        b.weight(zero, (num_out, num_groups))
    shape = f"{output}.groups.shape"
    b.constant(shape, [0, num_groups, -1])
    groups = b.node("Reshape", [x, shape], f"{output}.groups")
    sums = b.node("ReduceSum", [groups, _axis(b, 2)], f"{output}.groups.sum", keepdims=0)
    return b.node("Gemm", [sums, zero], f"{output}.zeros", transB=1)
