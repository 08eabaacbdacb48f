"""onnxruntime's own operators for quantized products on a CPU: `MatMulNBits` for weight-only ones, `QGemm` for INT8 by INT8.

The graph's Q/DQ form is what every engine shares; onnxruntime fuses it only in part, and widens the other matrices again in every step.
So the float32 graph is rewritten while it is read, with the same stored numbers:

    INT4 weights           `MatMulNBits`, which rounds its inputs to 8 bits, group by group (accuracy level 4). Its other levels are not
                           faster than float32, and beside 4-bit weights the loss cannot be seen. It takes zero points on the grid.
    INT8 embedding         rows are looked up, and multiplied by their scales. Beside 4-bit layers the head is a `MatMulNBits` as well.
    INT8 weights           in blocks `MatMulNBits`, by rows `QGemm`: inputs are rounded to 16 bits, 8 of them in each of two products.
                           Inputs of 8 bits would double the loss.
    NVFP4                  twice an E2M1 number is an integer: as INT8 weights in blocks, whether inputs were rounded or not.
    INT8 by INT8           `QGemm`, the graph's own integers. Signed by signed has no kernel on x86; unsigned by unsigned is as exact.
    FP8, odd group sizes   widened to float32 once, where memory has room: no CPU computes with them.

BENCHMARKS.md has the losses and speeds. `Engine.load(..., exact=True)` runs the graph as it stands.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from trtllm_thoughtx.backends.ort_blocks import (
    DOMAIN,
    LONGEST,
    block_of,
    blocked,
    blocked_bytes,
    blocks_node,
    session_of,
    split_nodes,
    takes_bytes,
)
from trtllm_thoughtx.checkpoint.tensor_file import doubled, unpack_e2m1, unpack_four
from trtllm_thoughtx.families.formats import INT8
from trtllm_thoughtx.process.machine import available_bytes

MIDDLE, ZERO = "zero/unsigned", "zero/signed"
HIGH, LOW, ONE, AXIS, SMALLEST = "split/high", "split/low", "split/one", "split/axis", "split/smallest"
LAST = "lookup/axis"
CONSTANTS: dict[str, np.ndarray] = {
    MIDDLE: np.asarray(np.uint8(128)),
    ZERO: np.asarray(np.int8(0)),
    HIGH: np.asarray(np.float32(1 / 127)),  # a token's inputs are at most as large as their length, by which they are divided
    LOW: np.asarray(np.float32(1 / 127 / 254)),
    ONE: np.asarray(np.float32(1)),
    AXIS: np.asarray([1], np.int64),
    LAST: np.asarray([-1], np.int64),
    SMALLEST: np.asarray(np.float32(2.0**-100)),  # the length of a token of zeros
}
ROOM = 2.2  # memory that widened matrices need while a session packs them, in units of their size


@dataclass
class Fused:
    """Initializers that the rewritten graph takes from memory, by name; how many products `MatMulNBits` and `QGemm` compute, how many
    matrices were widened, and how many of those were left as they are for want of memory."""

    arrays: dict[str, np.ndarray]
    num_products: int = 0
    num_rounding: int = 0  # of them, those that round their inputs, which the graph does not
    num_wide: int = 0
    num_left: int = 0
    num_lookups: int = 0  # in quantized matrices


def fuse(model: onnx.ModelProto, data: BinaryIO, *, rounds_inputs: bool = False) -> Fused:
    """Rewrite the quantized products of a float32 graph in place; `data` holds its external initializers. `rounds_inputs`: inputs of
    INT8 matrices with a scale a row are rounded to 8 bits, as those of 4-bit layers are."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    found, nodes, done = Fused({}), list[onnx.NodeProto](), dict[str, None]()
    wide = [m for node in graph.node if (m := _matrix(node, made)) and _kind(node, m, made, tensors) == "wide"]
    room = available_bytes()
    has_room = room is None or room > ROOM * 4 * sum(math.prod(tensors[m.input[0]].dims) for m in wide)
    points = _points(graph, made, tensors)
    for node in graph.node:
        matrix = _matrix(node, made)
        lookup = _looked_up(node, made)
        if lookup is not None:
            nodes += lookup
            found.num_lookups += 1
            continue
        if matrix is None:
            nodes.append(node)
            continue
        kind = _kind(node, matrix, made, tensors)
        if kind == "wide":
            if has_room:
                name = f"{matrix.output[0]}/wide"
                found.arrays[name] = _widened(matrix, made, tensors, data)
                node.input[1] = name
            found.num_wide, found.num_left = found.num_wide + has_room, found.num_left + (not has_room)
            nodes.append(node)
            continue
        if kind == "static":
            products, arrays = _static_product(node, matrix, made, tensors, data)
        elif kind in ("rows", "bytes") and (size := _size_of(matrix, tensors, rounds_inputs)):
            raw, scales = read_initializer(tensors[matrix.input[0]], data), scales_of(matrix, made, tensors, data)
            names = (f"{matrix.input[0]}/blocks", f"{matrix.input[1]}/blocks")
            num_out, num_in = tensors[matrix.input[0]].dims
            if tensors[matrix.input[0]].data_type == TensorProto.FLOAT4E2M1:  # twice the numbers are integers
                raw, scales = doubled(raw), scales / 2
            arrays = dict(zip(names, blocked_bytes(raw.reshape(num_out, num_in), scales, size), strict=True))
            where = (node.input[0], names, _output(node), num_out, num_in, size)
            products = bytes_nodes(*where, rounds_inputs=rounds_inputs and kind == "rows", done=done)
        elif kind == "rows":
            products, arrays = _rows_product(node, matrix, tensors, data, set(done))
        else:
            sub, zero = points.get(node.output[0], (None, None))
            products, arrays = _blocks_product(node, matrix, made, tensors, data, zero)
            if sub is not None:  # the operator subtracts what the graph subtracts behind the product
                node.output[0], sub.output[0] = sub.output[0], f"{sub.output[0]}/unused"
                products[0].output[0] = products[0].name = _output(node)
        found.arrays |= arrays
        found.num_products += 1
        found.num_rounding += kind != "static"
        nodes += products
        done |= dict.fromkeys(name for product in products for name in product.output)
        if len(node.input) > 2:
            nodes.append(helper.make_node("Add", [_output(node), node.input[2]], [node.output[0]], name=f"{node.output[0]}/bias"))
    if found.num_products or found.num_wide or found.num_lookups:
        used = {name for node in nodes for name in node.input}
        graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in CONSTANTS.items() if name in used)
        rewrite(model, nodes, found.arrays)
    return found


def _points(
    graph: onnx.GraphProto, made: Mapping[str, onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto]
) -> dict[str, tuple[onnx.NodeProto, onnx.TensorProto]]:
    """Products of 4-bit matrices with zero points on their grid, by their names: the node that subtracts the zeros, and the points."""
    found = {}
    for node in graph.node:
        pair = [made.get(name) for name in node.input] if node.op_type == "Sub" else []
        if len(pair) != 2 or any(one is None or one.op_type != "Gemm" for one in pair):
            continue
        product, zeros = (one for one in pair if one is not None)
        matrix, scaled = _matrix(product, made), made.get(zeros.input[1])
        points = made.get(scaled.input[0]) if scaled is not None and scaled.op_type == "Mul" else None
        if matrix is not None and points is not None and points.op_type == "DequantizeLinear" and block_of(_group(matrix)):
            found[product.output[0]] = (node, tensors[points.input[0]])
    return found


def _looked_up(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto] | None:
    """A lookup in a quantized matrix, by the stored numbers: it would be widened whole for a few rows otherwise."""
    matrix = made.get(node.input[0]) if node.op_type == "Gather" else None
    if matrix is None or matrix.op_type != "DequantizeLinear":
        return None
    (weight, scale), ids, output = matrix.input[:2], node.input[1], node.output[0]
    rows, wide, scales = f"{output}/rows", f"{output}/wide", f"{output}/scales"
    if _group(matrix):
        stored = made[scale].input[0] if scale in made else scale  # in float16: only what is looked up is widened
        return [
            helper.make_node("Gather", [weight, ids], [rows], name=rows),
            helper.make_node("Gather", [stored, ids], [f"{scales}/stored"], name=f"{scales}/stored"),
            helper.make_node("Cast", [f"{scales}/stored"], [scales], name=scales, to=TensorProto.FLOAT),
            helper.make_node("DequantizeLinear", [rows, scales], [output], name=output, axis=-1, block_size=_group(matrix)),
        ]
    return [
        helper.make_node("Gather", [weight, ids], [rows], name=rows),
        helper.make_node("Cast", [rows], [wide], name=wide, to=TensorProto.FLOAT),
        helper.make_node("Gather", [scale, ids], [f"{scales}/flat"], name=f"{scales}/flat"),
        helper.make_node("Unsqueeze", [f"{scales}/flat", LAST], [scales], name=scales),
        helper.make_node("Mul", [wide, scales], [output], name=output),
    ]


def _matrix(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """What makes the quantized matrix of a Gemm."""
    matrix = made.get(node.input[1]) if node.op_type == "Gemm" else None
    return matrix if matrix is not None and matrix.op_type == "DequantizeLinear" else None


def _kind(node: onnx.NodeProto, matrix: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto]) -> str:
    """static: INT8 by INT8; rows, bytes, blocks: weight-only, with a scale for each row, or block of 8 or 4 bits; wide: anything else."""
    source, weight = made.get(node.input[0]), tensors[matrix.input[0]]
    if weight.data_type == TensorProto.FLOAT4E2M1:
        return "bytes" if takes_bytes() else "wide"
    if source is not None and source.op_type == "DequantizeLinear":
        return "static" if weight.data_type == TensorProto.INT8 else "wide"
    if weight.data_type == TensorProto.INT8 and not _group(matrix):
        return "rows"
    if weight.data_type == TensorProto.INT8 and block_of(_group(matrix)) and takes_bytes():
        return "bytes"
    return "blocks" if weight.data_type == TensorProto.INT4 and block_of(_group(matrix)) else "wide"


def _size_of(matrix: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], rounds_inputs: bool) -> int:
    num_in, group = tensors[matrix.input[0]].dims[1], _group(matrix)
    return size_of_bytes(num_in, num_in // group if group else 0, rounds_inputs=rounds_inputs)


def size_of_bytes(num_in: int, num_groups: int, *, rounds_inputs: bool) -> int:
    """Inputs of a block of `MatMulNBits` for an INT8 matrix with so many groups (0: a scale a row); 0 for none. Matrices with a scale a row
    take it where their inputs are rounded to 8 bits, block by block."""
    if not num_groups and not rounds_inputs:
        return 0
    return block_of(num_in // num_groups if num_groups else num_in, LONGEST) if takes_bytes() else 0


def bytes_nodes(
    x: str, names: Sequence[str], output: str, num_out: int, num_in: int, size: int, *, rounds_inputs: bool, done: Container[str] = ()
) -> list[onnx.NodeProto]:
    """Float inputs by an INT8 matrix in blocks: rounded to 8 bits, or to 16."""
    if rounds_inputs:
        return [blocks_node(x, names, output, num_out, num_in, size, bits=8)]
    return split_nodes(x, names, output, num_out, num_in, size, done)


def _group(matrix: onnx.NodeProto) -> int:
    return next((a.i for a in matrix.attribute if a.name == "block_size"), 0)


def rewrite(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], arrays: Mapping[str, np.ndarray]) -> None:
    """Give the graph these nodes, in their order, less those that nothing reads any more, and `arrays` as initializers that the session
    gets from memory; initializers that nothing reads go."""
    graph = model.graph
    used, kept = {value.name for value in graph.output}, list[onnx.NodeProto]()
    for node in reversed(nodes):
        if used & set(node.output):
            kept.insert(0, node)
            used |= set(node.input)
    del graph.node[:]
    graph.node.extend(kept)
    rest = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(rest)
    for name, array in arrays.items():
        tensor = graph.initializer.add(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
    if all(one.domain != DOMAIN for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _output(node: onnx.NodeProto) -> str:
    """The product's own result: the Gemm's, or what its bias is added to."""
    return f"{node.output[0]}/product" if len(node.input) > 2 else node.output[0]


@functools.cache
def takes_signed_weights() -> bool:
    """Whether unsigned by signed integers are exact on this CPU, with any number of rows; they are twice as fast then in a prefill.
    Without VNNI sums of two products saturate at 16 bits. Found by multiplying the largest numbers."""
    num = 256
    weight = np.tile(np.array([[127], [-128]], np.int8), (8, num))
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, ["N", num])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", len(weight)])]
    constants = {"one": np.float32(1), "low": np.uint8(0), "weight": weight, "zero": np.int8(0)}
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    node = helper.make_node("QGemm", ["x", "one", "low", "weight", "one", "zero"], ["y"], domain=DOMAIN, transB=1)
    session = session_of([node], inputs, outputs, tensors)
    for rows in (1, 2, 3, 4, 7, 64):
        x = np.full((rows, num), 255, np.uint8)
        wanted = x.astype(np.int64) @ weight.T.astype(np.int64)
        if not np.array_equal(session.run(None, {"x": x})[0], wanted.astype(np.float32)):
            return False
    return True


def _static_product(
    node: onnx.NodeProto,
    matrix: onnx.NodeProto,
    made: Mapping[str, onnx.NodeProto],
    tensors: Mapping[str, onnx.TensorProto],
    data: BinaryIO,
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """INT8 inputs by an INT8 matrix, each with one scale; float32 out. Scales per row are multiplied behind it, in the graph.

    Inputs are rounded to unsigned numbers around 128 instead; so are weights where the CPU needs that."""
    quantize = made[made[node.input[0]].input[0]]
    weight, zero, arrays = _integers(matrix, tensors, data)
    quantize.input[2] = MIDDLE
    inputs = [quantize.output[0], quantize.input[1], MIDDLE, weight, matrix.input[1], zero]
    return [helper.make_node("QGemm", inputs, [_output(node)], name=node.name, domain=DOMAIN, transB=1)], arrays


def _integers(matrix: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], data: BinaryIO) -> tuple[str, str, dict[str, np.ndarray]]:
    """(matrix, zero point, arrays) of an INT8 matrix as this CPU multiplies it."""
    stored = matrix.input[0]
    if takes_signed_weights():
        return stored, ZERO, {}
    raw = read_initializer(tensors[stored], data)
    raw ^= np.uint8(INT8.sign)
    return f"{stored}/unsigned", MIDDLE, {f"{stored}/unsigned": raw.reshape(tensors[stored].dims)}


def _rows_product(
    node: onnx.NodeProto, matrix: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], data: BinaryIO, done: Container[str]
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    weight, zero, arrays = _integers(matrix, tensors, data)
    return rows_nodes(node.input[0], weight, matrix.input[1], zero, _output(node), done), arrays


def rows_nodes(x: str, weight: str, scale: str, zero: str, output: str, done: Container[str] = ()) -> list[onnx.NodeProto]:
    """Float inputs by an INT8 matrix with a scale for each row. A token's inputs, divided by their length, are the sum of two numbers of
    8 bits, each multiplied exactly. Layers that read the same inputs split them once: `done` has names that were made before."""
    length, high, low = f"{x}/length", f"{x}/high", f"{x}/low"
    nodes = [] if length in done else [
        helper.make_node("ReduceL2", [x, AXIS], [f"{x}/norm"], keepdims=1),
        helper.make_node("Max", [f"{x}/norm", SMALLEST], [length]),
        helper.make_node("Div", [x, length], [f"{x}/unit"]),
        helper.make_node("QuantizeLinear", [f"{x}/unit", HIGH, MIDDLE], [high]),
        helper.make_node("DequantizeLinear", [high, HIGH, MIDDLE], [f"{x}/first"]),
        helper.make_node("Sub", [f"{x}/unit", f"{x}/first"], [f"{x}/rest"]),
        helper.make_node("QuantizeLinear", [f"{x}/rest", LOW, MIDDLE], [low]),
    ]  # fmt: skip
    for part, step in ((high, HIGH), (low, LOW)):
        inputs = [part, step, MIDDLE, weight, ONE, zero]
        nodes.append(helper.make_node("QGemm", inputs, [f"{output}/of/{part}"], domain=DOMAIN, transB=1))
    nodes.append(helper.make_node("Add", [f"{output}/of/{high}", f"{output}/of/{low}"], [f"{output}/unit"]))
    nodes.append(helper.make_node("Mul", [f"{output}/unit", scale], [f"{output}/rows"]))
    nodes.append(helper.make_node("Mul", [f"{output}/rows", length], [output]))
    return nodes


def scales_of(
    matrix: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto], data: BinaryIO
) -> np.ndarray:
    """The scales of a matrix in float32; the file may hold them in float16. Those of blocks of E2M1 numbers come as the graph has them: a
    float16 or bfloat16 one rounds their products with the second scale."""
    cast, kind = made.get(matrix.input[1]), TensorProto.FLOAT
    if cast is not None and tensors[matrix.input[0]].data_type == TensorProto.FLOAT4E2M1:
        kind, cast = (cast.attribute[0].i, made[cast.input[0]]) if cast.op_type == "Cast" else (kind, cast)
        stored, second = (read_initializer(tensors[name], data) for name in cast.input)
        found = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * second.view(np.float32)
        rounded = found.astype(helper.tensor_dtype_to_np_dtype(kind))
        return rounded if kind == TensorProto.FLOAT16 else rounded.astype(np.float32)
    scale = tensors[matrix.input[1] if cast is None else cast.input[0]]
    if not scale.external_data:
        return onnx.numpy_helper.to_array(scale)
    return read_initializer(scale, data).view(helper.tensor_dtype_to_np_dtype(scale.data_type)).astype(np.float32)


def _widened(
    matrix: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto], data: BinaryIO
) -> np.ndarray:
    """What DequantizeLinear makes of a stored matrix: [out, in] float32."""
    weight = tensors[matrix.input[0]]
    num_out, num_in = weight.dims
    raw = read_initializer(weight, data)
    if weight.data_type == TensorProto.INT4:
        values = unpack_four(raw).astype(np.float32)
    elif weight.data_type == TensorProto.FLOAT4E2M1:
        values = unpack_e2m1(raw)
    else:
        values = raw.view(helper.tensor_dtype_to_np_dtype(weight.data_type)).astype(np.float32)
    scales = scales_of(matrix, made, tensors, data)
    rows = num_out if scales.size > 1 else 1
    wide = values.reshape(rows, scales.size // rows, -1)
    wide *= scales.reshape(rows, -1, 1)
    return wide.reshape(num_out, num_in)


def _blocks_product(
    node: onnx.NodeProto,
    matrix: onnx.NodeProto,
    made: Mapping[str, onnx.NodeProto],
    tensors: Mapping[str, onnx.TensorProto],
    data: BinaryIO,
    zero: onnx.TensorProto | None,
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    weight, group = tensors[matrix.input[0]], _group(matrix)
    scales = scales_of(matrix, made, tensors, data).reshape(weight.dims[0], -1)
    arrays = blocked(read_initializer(weight, data), scales, group, None if zero is None else read_initializer(zero, data))
    names = [f"{matrix.input[0]}/unsigned", f"{matrix.input[1]}/blocks", *([] if zero is None else [f"{zero.name}/blocks"])]
    return [blocks_node(node.input[0], names, _output(node), weight.dims[0], weight.dims[1], group)], dict(zip(names, arrays, strict=True))


def read_initializer(tensor: onnx.TensorProto, data: BinaryIO) -> np.ndarray:
    """The bytes of an external tensor."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    data.seek(int(where["offset"]))
    out = np.empty(int(where["length"]), np.uint8)
    view, done = out.data, 0
    while done < len(out):
        piece = data.read(min(len(out) - done, 64 << 20))
        if not piece:
            raise ValueError(f"the data file ends inside {tensor.name}")
        view[done : done + len(piece)] = piece
        done += len(piece)
    assert math.prod(tensor.dims)
    return out
