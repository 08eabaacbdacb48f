"""onnxruntime's own `MoE` in place of `thoughtx::SparseExperts` on a CPU: each token runs through its own experts only.

The graph's function would gather matrices, or run every token through all experts. `MoE` wants the rows of an expert's up and gate matrices
in turn, gates first, so those are read from the data file and put in that order; bfloat16 ones are widened, as in their graph's emulation
(`backends.ort_bfloat16`). `Engine.load(..., exact=True)` runs the graph as it stands.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

from trtllm_thoughtx.backends.ort_blocks import DOMAIN
from trtllm_thoughtx.backends.ort_fused import Fused, read_initializer, rewrite
from trtllm_thoughtx.checkpoint.weights import NUMPY_DTYPES
from trtllm_thoughtx.graph import experts

STORED: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


def fuse_experts(model: onnx.ModelProto, data: BinaryIO) -> Fused:
    """Rewrite the mixtures of a graph, or of the emulation of a bfloat16 graph, in place; `data` holds its external initializers."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    arrays: dict[str, np.ndarray] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != experts.NAME:
            nodes.append(node)
            continue
        x, logits, fc, proj = node.input
        stored = tensors[made[fc].input[0] if fc in made else fc]
        arrays[f"{fc}/in_turn"] = _in_turn(stored, data)
        said = {attribute.name: attribute.i for attribute in node.attribute}
        swiglu: dict[str, Any] = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
        swiglu |= {"k": said["top_k"], "normalize_routing_weights": said["normalized"]}
        inputs = [x, logits, f"{fc}/in_turn", "", proj]
        nodes.append(helper.make_node("MoE", inputs, list(node.output), name=node.name, domain=DOMAIN, **swiglu))
    if arrays:
        rewrite(model, nodes, arrays)
    return Fused(arrays, len(arrays), num_rounding=0)


def _in_turn(fc: onnx.TensorProto, data: BinaryIO) -> np.ndarray:
    """[E, 2X, H] with an expert's ups before its gates -> the same with gates and ups in turn, in float32 or float16."""
    num_experts, num_rows, hidden = fc.dims
    halves = read_initializer(fc, data).view(NUMPY_DTYPES[STORED[fc.data_type]]).reshape(num_experts, 2, num_rows // 2, hidden)
    dtype = np.float16 if fc.data_type == TensorProto.FLOAT16 else np.float32
    out = np.empty((num_experts, num_rows // 2, 2, hidden), dtype)
    out[:, :, 0], out[:, :, 1] = halves[:, 1], halves[:, 0]
    return out.reshape(num_experts, num_rows, hidden)
