"""onnxruntime's own operators for quantized products on a CPU: `MatMulNBits` for weight-only ones, `QGemm` for INT8 by INT8.

The graph's Q/DQ form is what every engine shares; onnxruntime fuses it only in part, and would otherwise widen all weights when it loads.
So the float32 graph is rewritten while it is read: the same stored numbers, four- and eight-bit ones made unsigned as `MatMulNBits` wants
them. That operator rounds its inputs to 8 bits, block by block, as it goes (accuracy level 4): several times faster, and a little less
exact than the graph; `Engine.load(..., exact=True)` runs the graph as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

DOMAIN = "com.microsoft"
BLOCKS = (128, 64, 32, 16)
SIGN = {4: 0x88, 8: 0x80}  # turns two's complement into an offset of half the range


@dataclass
class Fused:
    """Initializers that the rewritten graph takes from memory, by name; `num_products` counts the nodes that were rewritten."""

    arrays: dict[str, np.ndarray]
    num_products: int


def fuse(model: onnx.ModelProto, data: BinaryIO) -> Fused:
    """Rewrite the quantized products of a float32 graph in place; `data` holds its external initializers."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    arrays: dict[str, np.ndarray] = {}
    nodes: list[onnx.NodeProto] = []
    num_products = 0
    for node in graph.node:
        matrix = made.get(node.input[1]) if node.op_type == "Gemm" else None
        if matrix is None or matrix.op_type != "DequantizeLinear":
            nodes.append(node)
            continue
        source = made.get(node.input[0])
        weight = tensors[matrix.input[0]]
        is_static = source is not None and source.op_type == "DequantizeLinear"
        if is_static and weight.data_type == TensorProto.INT8:
            assert source is not None
            product = _static_product(node, source, matrix, made)
        elif not is_static and weight.data_type in (TensorProto.INT4, TensorProto.INT8) and (found := _weight_only(matrix, tensors, data)):
            product, new = _weight_only_product(node, matrix, weight, *found)
            arrays |= new
        else:
            nodes.append(node)
            continue
        num_products += 1
        nodes.append(product)
        if len(node.input) > 2:
            nodes.append(helper.make_node("Add", [product.output[0], node.input[2]], [node.output[0]], name=f"{node.output[0]}/bias"))
    if num_products:
        rewrite(model, nodes, arrays, unused=("DequantizeLinear",))
    return Fused(arrays, num_products)


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


def _static_product(
    node: onnx.NodeProto, source: onnx.NodeProto, matrix: onnx.NodeProto, made: dict[str, onnx.NodeProto]
) -> onnx.NodeProto:
    """INT8 inputs by an INT8 matrix, each with one scale; float32 out. Scales per row are multiplied behind it, in the graph."""
    zero = made[source.input[0]].input[2]
    inputs = [source.input[0], source.input[1], zero, matrix.input[0], matrix.input[1], zero]
    return helper.make_node("QGemm", inputs, [_output(node)], name=node.name, domain=DOMAIN, transB=1)


def _weight_only(matrix: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], data: BinaryIO) -> tuple[np.ndarray, np.ndarray, int] | None:
    """(bytes, scales [out, blocks], block size) of a weight-only matrix; None when no block size fits."""
    weight, scale = tensors[matrix.input[0]], tensors[matrix.input[1]]
    num_out, num_in = weight.dims
    given = {a.name: a.i for a in matrix.attribute}.get("block_size", 0)
    size = given or next((b for b in BLOCKS if num_in % b == 0), 0)
    if size not in (*BLOCKS, 256):
        return None
    scales = read_initializer(scale, data).view(np.float32).reshape(num_out, -1)
    return read_initializer(weight, data), np.ascontiguousarray(np.broadcast_to(scales, (num_out, num_in // size))), size


def _weight_only_product(
    node: onnx.NodeProto, matrix: onnx.NodeProto, weight: onnx.TensorProto, raw: np.ndarray, scales: np.ndarray, size: int
) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    bits = 4 if weight.data_type == TensorProto.INT4 else 8
    num_out, num_in = weight.dims
    names = [f"{matrix.input[0]}/unsigned", f"{matrix.input[1]}/blocks"]
    raw ^= np.uint8(SIGN[bits])
    arrays = {names[0]: raw.reshape(num_out, num_in // size, size * bits // 8), names[1]: scales}
    attributes = {"K": num_in, "N": num_out, "bits": bits, "block_size": size, "accuracy_level": 4}
    made = helper.make_node("MatMulNBits", [node.input[0], *names], [_output(node)], name=node.name, domain=DOMAIN, **attributes)
    return made, arrays


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
