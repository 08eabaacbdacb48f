"""Emulation of a bfloat16 graph in float32, for hosts whose kernels do not know bfloat16 (onnxruntime on a CPU).

The emulation is derived from the very graph that a plan was built from: the same nodes on the same weights, computed in float32, with each
arithmetic result rounded to bfloat16 and back. So it is not faster than float32, but it is off by what bfloat16 is off by.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

# Everything else in the graph moves data, or works on integers, and rounds nothing.
ROUNDED = (
    "Gemm",
    "DequantizeLinear",
    "ReduceSum",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Swish",
    "RMSNormalization",
    "RotaryEmbedding",
    "Attention",
    "ChunkedAttention",
    "SparseExperts",
    "Sigmoid",
    "RoundedInBlocks",
)


def is_bfloat16(model: onnx.ModelProto) -> bool:
    return any(x.data_type == TensorProto.BFLOAT16 for x in model.graph.initializer)


def emulated_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with bfloat16 emulated in float32; initializers stay bfloat16 (and external), widened by a Cast that folds away."""
    emulated = onnx.ModelProto()
    emulated.CopyFrom(model)
    graph = emulated.graph
    branches = [
        attribute.g for function in emulated.functions for node in function.node for attribute in node.attribute if attribute.HasField("g")
    ]
    for value in (*graph.input, *graph.output, *(value for branch in branches for value in branch.output)):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes, wide = [], {}
    for weight in graph.initializer:
        if weight.data_type == TensorProto.BFLOAT16:
            wide[weight.name] = f"{weight.name}/float32"
            nodes.append(helper.make_node("Cast", [weight.name], [wide[weight.name]], name=wide[weight.name], to=TensorProto.FLOAT))
    for node in graph.node:
        node.input[:] = [wide.get(name, name) for name in node.input]
        nodes.append(node)
        if node.op_type in ROUNDED:
            exact, narrow = f"{node.output[0]}/exact", f"{node.output[0]}/bfloat16"
            rounded, node.output[0] = node.output[0], exact
            nodes.append(helper.make_node("Cast", [exact], [narrow], name=narrow, to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [narrow], [rounded], name=f"{rounded}/round", to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    return emulated
