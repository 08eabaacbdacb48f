"""NVFP4 on onnxruntime, which has no 4-bit floats: the same numbers, in operators that it has.

    matrices   twice an E2M1 number is an integer: they become INT8 in blocks, with half the scales
    inputs     a block's scale is its largest number over 6 and over the second scale, rounded to E4M3 (nearest, ties to even, at most 448);
               each number over the product of both scales is rounded to E2M1 (nearest, ties to even, at most 6), and multiplied by it

The graph's form stays what plans are built from. Whatever the engine's type, inputs are rounded in float32.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

from trtllm_thoughtx.backends.ort_fused import Fused, read_initializer, rewrite, scales_of
from trtllm_thoughtx.checkpoint.tensor_file import doubled
from trtllm_thoughtx.families.formats import BLOCK, FP4, FP8
from trtllm_thoughtx.graph import blocks, chunked_attention

ROUND = "RoundedInBlocks"
BODY = f"""
<opset_import: ["" : {chunked_attention.OPSET}], domain: "{chunked_attention.DOMAIN}">
{ROUND} (x, second) => (y)
{{
    by_blocks = Constant <value = int64[3] {{0, -1, {BLOCK}}}> ()
    last = Constant <value = int64[1] {{-1}}> ()
    largest = Constant <value = float {{{FP4.largest}}}> ()
    top = Constant <value = float {{{FP8.largest}}}> ()
    half = Constant <value = float {{0.5}}> ()
    one = Constant <value = float {{1.0}}> ()
    two = Constant <value = float {{2.0}}> ()
    four = Constant <value = float {{4.0}}> ()
    zero = Constant <value = float {{0.0}}> ()
    wide = Cast <to = {TensorProto.FLOAT}> (x)
    in_blocks = Reshape (wide, by_blocks)
    sizes = Abs (in_blocks)
    amax = ReduceMax <keepdims = 1> (sizes, last)
    whole = Mul (largest, second)
    wanted = Div (amax, whole)
    bounded = Min (wanted, top)
    stored = Cast <to = {TensorProto.FLOAT8E4M3FN}> (bounded)
    scale = Cast <to = {TensorProto.FLOAT}> (stored)
    by = Mul (scale, second)
    is_zero = Equal (by, zero)
    over = Where (is_zero, one, by)
    units = Div (in_blocks, over)
    low = Neg (largest)
    inside = Clip (units, low, largest)
    amount = Abs (inside)
    is_fine = Less (amount, two)
    is_middle = Less (amount, four)
    coarse = Where (is_middle, one, two)
    step = Where (is_fine, half, coarse)
    steps = Div (inside, step)
    rounded = Round (steps)
    on_grid = Mul (rounded, step)
    values = Mul (on_grid, by)
    shape = Shape (x)
    flat = Reshape (values, shape)
    y = CastLike (flat, x)
}}
"""


def has_blocks(model: onnx.ModelProto) -> bool:
    return any(tensor.data_type == TensorProto.FLOAT4E2M1 for tensor in model.graph.initializer)


def without_fp4(model: onnx.ModelProto, data: BinaryIO) -> Fused:
    """Rewrite a graph in place; `data` holds its external initializers."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    arrays: dict[str, np.ndarray] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        source = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        weight = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is not None and weight.data_type == TensorProto.FLOAT4E2M1:
            names = [f"{name}/doubled" for name in node.input]
            scales = scales_of(node, made, tensors, data).reshape(weight.dims[0], -1)
            numbers = doubled(read_initializer(weight, data)).reshape(weight.dims)
            arrays |= {names[0]: numbers, names[1]: scales / scales.dtype.type(2)}
            node.input[:] = names
        elif source is not None and source.op_type == blocks.ROUND and node.input[0] == source.output[0]:
            node = helper.make_node(ROUND, list(source.input), [node.output[0]], name=node.output[0], domain=chunked_attention.DOMAIN)
        nodes.append(node)
    rewrite(model, nodes, arrays)
    if any(node.op_type == ROUND for node in nodes):
        model.functions.append(onnx.parser.parse_function(BODY))
        if all(one.domain != chunked_attention.DOMAIN for one in model.opset_import):
            model.opset_import.append(helper.make_opsetid(chunked_attention.DOMAIN, 1))
    return Fused(arrays)
