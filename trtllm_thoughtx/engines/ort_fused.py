"""onnxruntime's own operators for quantized products on a CPU: `MatMulNBits` for weight-only ones, `QGemm` for INT8 by INT8.

The graph's Q/DQ form is what every engine shares; onnxruntime fuses it only in part, and widens the other matrices again in every step.
So the float32 graph is rewritten while it is read, with the same stored numbers:

    INT4, INT8 weights     `MatMulNBits`, numbers made unsigned as it wants them. It rounds its inputs to 8 bits, by blocks of
                           `BLOCK` inputs (accuracy level 4): the one level that is not slower than float32, and a little less exact.
    INT8 by INT8           `QGemm`, the graph's own integers. Signed by signed has no kernel on x86; unsigned by unsigned is as exact.
    FP8, odd group sizes   widened to float32 once, where memory has room: no CPU computes with them.

`Engine.load(..., exact=True)` runs the graph as it stands.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from trtllm_thoughtx.host import available_bytes

DOMAIN = "com.microsoft"
BLOCK = 32  # inputs that `MatMulNBits` rounds with one scale; BENCHMARKS.md has what other sizes cost
BLOCKS = (16, 32, 64, 128, 256)  # that it knows
LEVEL = 4
MIDDLE, ZERO = "zero/unsigned", "zero/signed"
SIGN = {4: 0x88, 8: 0x80}  # turns two's complement into an offset of half the range
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
    found, nodes = Fused({}), list[onnx.NodeProto]()
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
            product, arrays = _static_product(node, matrix, made, tensors, data)
        else:
            product, arrays = _weight_only_product(node, matrix, tensors, data)
            found.num_rounding += 1
        found.arrays |= arrays
        found.num_products += 1
        nodes.append(product)
        if len(node.input) > 2:
            nodes.append(helper.make_node("Add", [product.output[0], node.input[2]], [node.output[0]], name=f"{node.output[0]}/bias"))
    if found.arrays:
        rewrite(model, nodes, found.arrays, unused=("DequantizeLinear",))
    return found


def _matrix(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """What makes the quantized matrix of a Gemm."""
    matrix = made.get(node.input[1]) if node.op_type == "Gemm" else None
    return matrix if matrix is not None and matrix.op_type == "DequantizeLinear" else None


def _kind(node: onnx.NodeProto, matrix: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto]) -> str:
    """static: INT8 by INT8; blocks: weight-only in blocks; wide: anything else."""
    source, weight = made.get(node.input[0]), tensors[matrix.input[0]]
    if source is not None and source.op_type == "DequantizeLinear":
        return "static" if weight.data_type == TensorProto.INT8 else "wide"
    return "blocks" if weight.data_type in (TensorProto.INT4, TensorProto.INT8) and block_of(_group(matrix), weight.dims[1]) else "wide"


def _group(matrix: onnx.NodeProto) -> int:
    return next((a.i for a in matrix.attribute if a.name == "block_size"), 0)


def block_of(group: int, num_in: int) -> int:
    """Inputs of a block of `MatMulNBits`: `BLOCK`, or the largest that a group of the format's scales (0: whole rows) is cut into by."""
    whole = group or num_in
    fitting = [size for size in BLOCKS if whole % size == 0]
    return BLOCK if BLOCK in fitting else max((size for size in fitting if size < BLOCK), default=0)


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
    session = _session_of([node], inputs, outputs, tensors)
    for rows in (1, 2, 3, 4, 7, 64):
        x = np.full((rows, num), 255, np.uint8)
        wanted = x.astype(np.int64) @ weight.T.astype(np.int64)
        if not np.array_equal(session.run(None, {"x": x})[0], wanted.astype(np.float32)):
            return False
    return True


def _session_of(
    nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any], tensors: list[onnx.TensorProto]
) -> ort.InferenceSession:
    """A session of a few operators on the CPU."""
    graph = helper.make_graph(nodes, "products", inputs, outputs, tensors)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    made = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _static_product(
    node: onnx.NodeProto,
    matrix: onnx.NodeProto,
    made: Mapping[str, onnx.NodeProto],
    tensors: Mapping[str, onnx.TensorProto],
    data: BinaryIO,
) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    """INT8 inputs by an INT8 matrix, each with one scale; float32 out. Scales per row are multiplied behind it, in the graph.

    Inputs are rounded to unsigned numbers around 128 instead; so are weights where the CPU needs that."""
    quantize, weight = made[made[node.input[0]].input[0]], matrix.input[0]
    arrays = {MIDDLE: np.asarray(np.uint8(128))}
    if takes_signed_weights():
        zero, arrays[ZERO] = ZERO, np.asarray(np.int8(0))
    else:
        zero, raw = MIDDLE, read_initializer(tensors[weight], data)
        raw ^= np.uint8(SIGN[8])
        weight = f"{weight}/unsigned"
        arrays[weight] = raw.reshape(tensors[matrix.input[0]].dims)
    quantize.input[2] = MIDDLE
    inputs = [quantize.output[0], quantize.input[1], MIDDLE, weight, matrix.input[1], zero]
    return helper.make_node("QGemm", inputs, [_output(node)], name=node.name, domain=DOMAIN, transB=1), arrays


def _widened(matrix: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], data: BinaryIO) -> np.ndarray:
    """What DequantizeLinear makes of a stored matrix: [out, in] float32."""
    weight, scale = tensors[matrix.input[0]], tensors[matrix.input[1]]
    num_out, num_in = weight.dims
    raw = read_initializer(weight, data)
    if weight.data_type == TensorProto.INT4:
        raw = np.stack([raw & 15, raw >> 4], -1).reshape(-1)
        values = ((raw.astype(np.int8) ^ 8) - 8).astype(np.float32)
    else:
        values = raw.view(helper.tensor_dtype_to_np_dtype(weight.data_type)).astype(np.float32)
    scales = read_initializer(scale, data).view(np.float32) if scale.external_data else onnx.numpy_helper.to_array(scale)
    rows = num_out if scales.size > 1 else 1
    wide = values.reshape(rows, scales.size // rows, -1)
    wide *= scales.reshape(rows, -1, 1)
    return wide.reshape(num_out, num_in)


def _weight_only_product(
    node: onnx.NodeProto, matrix: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], data: BinaryIO
) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    weight = tensors[matrix.input[0]]
    scales = read_initializer(tensors[matrix.input[1]], data).view(np.float32)
    bits = 4 if weight.data_type == TensorProto.INT4 else 8
    names = (f"{matrix.input[0]}/unsigned", f"{matrix.input[1]}/blocks")
    numbers, scales, said = blocked(read_initializer(weight, data), scales, bits, weight.dims[0], weight.dims[1], _group(matrix))
    made = helper.make_node("MatMulNBits", [node.input[0], *names], [_output(node)], name=node.name, domain=DOMAIN, **said)
    return made, dict(zip(names, (numbers, scales), strict=True))


def blocked(
    raw: np.ndarray, scales: np.ndarray, bits: int, num_out: int, num_in: int, group: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(numbers, scales, attributes) of `MatMulNBits` from a stored matrix's bytes, two's complement, and its scales by `group` of inputs
    (0: by row). A scale is repeated for each block of its group."""
    size = block_of(group, num_in)
    each = scales.reshape(num_out, -1)
    numbers = (raw ^ np.uint8(SIGN[bits])).reshape(num_out, num_in // size, size * bits // 8)
    attributes = {"K": num_in, "N": num_out, "bits": bits, "block_size": size, "accuracy_level": LEVEL}
    return numbers, np.repeat(each, num_in // size // each.shape[1], 1), attributes


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
