"""onnxruntime's own operators for quantized products on a CPU: `MatMulNBits` for weight-only ones, `QGemm` for INT8 by INT8.

The graph's Q/DQ form is what every engine shares; onnxruntime fuses it only in part, and widens the other matrices again in every step.
So the float32 graph is rewritten while it is read, with the same stored numbers:

    INT4 weights           `MatMulNBits`, which rounds its inputs to 8 bits, group by group (accuracy level 4). Its other levels are not
                           faster than float32, and beside 4-bit weights the loss cannot be seen.
    INT8 weights           `QGemm`, twice: inputs are rounded to 16 bits, 8 of them in each product. `MatMulNBits` would double the loss.
    INT8 by INT8           `QGemm`, the graph's own integers. Signed by signed has no kernel on x86; unsigned by unsigned is as exact.
    FP8, odd group sizes   widened to float32 once, where memory has room: no CPU computes with them.

BENCHMARKS.md has the losses and speeds. `Engine.load(..., exact=True)` runs the graph as it stands.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from trtllm_thoughtx.checkpoint.tensor_file import unpack_four
from trtllm_thoughtx.families.formats import INT4, INT8
from trtllm_thoughtx.process.machine import available_bytes

DOMAIN = "com.microsoft"
BLOCKS = (16, 32, 64, 128, 256)  # that `MatMulNBits` knows
LEVEL = 4
MIDDLE, ZERO = "zero/unsigned", "zero/signed"
HIGH, LOW, ONE, AXIS, SMALLEST = "split/high", "split/low", "split/one", "split/axis", "split/smallest"
CONSTANTS: dict[str, np.ndarray] = {
    MIDDLE: np.asarray(np.uint8(128)),
    ZERO: np.asarray(np.int8(0)),
    HIGH: np.asarray(np.float32(1 / 127)),  # a token's inputs are at most as large as their length, by which they are divided
    LOW: np.asarray(np.float32(1 / 127 / 254)),
    ONE: np.asarray(np.float32(1)),
    AXIS: np.asarray([1], np.int64),
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


def fuse(model: onnx.ModelProto, data: BinaryIO) -> Fused:
    """Rewrite the quantized products of a float32 graph in place; `data` holds its external initializers."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    found, nodes, done = Fused({}), list[onnx.NodeProto](), dict[str, None]()
    wide = [m for node in graph.node if (m := _matrix(node, made)) and _kind(node, m, made, tensors) == "wide"]
    room = available_bytes()
    has_room = room is None or room > ROOM * 4 * sum(math.prod(tensors[m.input[0]].dims) for m in wide)
    for node in graph.node:
        matrix = _matrix(node, made)
        if matrix is None:
            nodes.append(node)
            continue
        kind = _kind(node, matrix, made, tensors)
        if kind == "wide":
            if has_room:
                name = f"{matrix.output[0]}/wide"
                found.arrays[name] = _widened(matrix, tensors, data)
                node.input[1] = name
            found.num_wide, found.num_left = found.num_wide + has_room, found.num_left + (not has_room)
            nodes.append(node)
            continue
        if kind == "static":
            products, arrays = _static_product(node, matrix, made, tensors, data)
        elif kind == "rows":
            products, arrays = _rows_product(node, matrix, tensors, data, set(done))
        else:
            products, arrays = _blocks_product(node, matrix, tensors, data)
        found.arrays |= arrays
        found.num_products += 1
        found.num_rounding += kind != "static"
        nodes += products
        done |= dict.fromkeys(name for product in products for name in product.output)
        if len(node.input) > 2:
            nodes.append(helper.make_node("Add", [_output(node), node.input[2]], [node.output[0]], name=f"{node.output[0]}/bias"))
    if found.num_products or found.num_wide:
        used = {name for node in nodes for name in node.input}
        graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in CONSTANTS.items() if name in used)
        rewrite(model, nodes, found.arrays, unused=("DequantizeLinear",))
    return found


def _matrix(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """What makes the quantized matrix of a Gemm."""
    matrix = made.get(node.input[1]) if node.op_type == "Gemm" else None
    return matrix if matrix is not None and matrix.op_type == "DequantizeLinear" else None


def _kind(node: onnx.NodeProto, matrix: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto]) -> str:
    """static: INT8 by INT8; rows, blocks: weight-only, with a scale for each; wide: anything else."""
    source, weight = made.get(node.input[0]), tensors[matrix.input[0]]
    if source is not None and source.op_type == "DequantizeLinear":
        return "static" if weight.data_type == TensorProto.INT8 else "wide"
    if weight.data_type == TensorProto.INT8 and not _group(matrix):
        return "rows"
    return "blocks" if weight.data_type == TensorProto.INT4 and block_of(_group(matrix)) else "wide"


def _group(matrix: onnx.NodeProto) -> int:
    return next((a.i for a in matrix.attribute if a.name == "block_size"), 0)


def block_of(group: int) -> int:
    """Inputs of a block of `MatMulNBits`: the largest that a group of the format's scales can be cut into; 0 for none."""
    return max((size for size in BLOCKS if group and group % size == 0), default=0)


def rewrite(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], arrays: Mapping[str, np.ndarray], *, unused: Sequence[str]) -> None:
    """Give the graph these nodes, less those of the types `unused` that nothing reads any more, and `arrays` as initializers that the
    session gets from memory; initializers that nothing reads go."""
    graph = model.graph
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [node for node in nodes if node.op_type not in unused or used & set(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    rest = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(rest)
    for name, array in arrays.items():
        tensor = graph.initializer.add(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
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


def session_of(nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any], tensors: list[onnx.TensorProto]) -> ort.InferenceSession:
    """A session of a few operators on the CPU."""
    graph = helper.make_graph(nodes, "products", inputs, outputs, tensors)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch's threads have the CPU between two calls
    made = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


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


def _widened(matrix: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], data: BinaryIO) -> np.ndarray:
    """What DequantizeLinear makes of a stored matrix: [out, in] float32."""
    weight, scale = tensors[matrix.input[0]], tensors[matrix.input[1]]
    num_out, num_in = weight.dims
    raw = read_initializer(weight, data)
    if weight.data_type == TensorProto.INT4:
        values = unpack_four(raw).astype(np.float32)
    else:
        values = raw.view(helper.tensor_dtype_to_np_dtype(weight.data_type)).astype(np.float32)
    scales = read_initializer(scale, data).view(np.float32) if scale.external_data else onnx.numpy_helper.to_array(scale)
    rows = num_out if scales.size > 1 else 1
    wide = values.reshape(rows, scales.size // rows, -1)
    wide *= scales.reshape(rows, -1, 1)
    return wide.reshape(num_out, num_in)


def _blocks_product(
    node: onnx.NodeProto, matrix: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], data: BinaryIO
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    weight, group = tensors[matrix.input[0]], _group(matrix)
    scales = read_initializer(tensors[matrix.input[1]], data).view(np.float32).reshape(weight.dims[0], -1)
    names = (f"{matrix.input[0]}/unsigned", f"{matrix.input[1]}/blocks")
    arrays = blocked(read_initializer(weight, data), scales, group)
    return [blocks_node(node.input[0], names, _output(node), weight.dims[0], weight.dims[1], group)], dict(zip(names, arrays, strict=True))


def blocked(raw: np.ndarray, scales: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scales as `MatMulNBits` takes them, from a stored 4-bit matrix's bytes and its scales [out, in / group]. A scale is
    repeated for each block of its group."""
    size = block_of(group)
    scales = np.repeat(scales, group // size, 1)
    return (raw ^ np.uint8(INT4.sign)).reshape(*scales.shape, size // 2), scales


def blocks_node(x: str, names: tuple[str, str], output: str, num_out: int, num_in: int, group: int) -> onnx.NodeProto:
    """Float inputs by a 4-bit matrix with a scale for each block of inputs; `names` are those of numbers and scales."""
    attributes: dict[str, Any] = {"K": num_in, "N": num_out, "bits": 4, "block_size": block_of(group), "accuracy_level": LEVEL}
    return helper.make_node("MatMulNBits", [x, *names], [output], name=output, domain=DOMAIN, **attributes)


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
