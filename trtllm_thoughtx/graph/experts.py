"""A mixture of experts in place of an MLP: the router, the experts it picks for each token, and the expert that all tokens share.

    p = softmax(router x) in float32;  y = sum over the k largest p_e, as they are or made to sum to 1, of p_e * expert_e(x)

`thoughtx::SparseExperts` is the sum, with its weights as TensorRT-LLM stacks them: fc [E, 2X, H], in which an expert's up_proj comes before
its activated gate_proj, and proj [E, H, X]. Its function body has two ways through standard operators, and takes the one that
reads less: few tokens gather the matrices of their experts, many run through all of them and keep what their router asked for. A
backend with a kernel replaces the function by name (onnxruntime's `MoE`, see `backends.ort_experts`).
Source: transformers `Qwen2MoeSparseMoeBlock` and `Qwen3MoeExperts`, which the reference runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trtllm_thoughtx.config import ExpertsConfig
from trtllm_thoughtx.graph.builder import Builder
from trtllm_thoughtx.graph.quantized import linear

DOMAIN = "thoughtx"
NAME = "SparseExperts"
OPSET = 24
COPIES = 3  # a gathered matrix is read, written and read again; one that all tokens run through is read once


def mlp(b: Builder, h: str, layer: int) -> str:
    """[N, H] -> [N, H], the layer's mixture."""
    experts, hidden = b.config.experts, b.config.hidden_size
    assert experts is not None
    name, weights = f"layers.{layer}.mlp", f"transformer.layers.{layer}.mlp"
    logits = linear(b, h, f"{weights}.router", f"{name}.router", experts.num_experts, hidden)
    fc = b.weight(f"{weights}.fc.weight", (experts.num_experts, 2 * experts.intermediate_size, hidden))
    proj = b.weight(f"{weights}.proj.weight", (experts.num_experts, hidden, experts.intermediate_size))
    y = b.node(NAME, [h, logits, fc, proj], f"{name}.experts", domain=DOMAIN, **attributes(experts))
    if not experts.shared_size:
        return y
    both = linear(b, h, f"{weights}.shared_expert.fc", f"{name}.shared.fc", 2 * experts.shared_size, hidden)
    parts = [f"{name}.shared.up", f"{name}.shared.gate"]
    b.nodes.append(helper.make_node("Split", [both], parts, name=f"{name}.shared.split", axis=-1, num_outputs=2))
    active = b.node("Swish", [parts[1]], f"{name}.shared.active")
    product = b.node("Mul", [active, parts[0]], f"{name}.shared.product")
    down = linear(b, product, f"{weights}.shared_expert.proj", f"{name}.shared.proj", hidden, experts.shared_size)
    opened = b.node("Sigmoid", [linear(b, h, f"{weights}.shared_expert_gate", f"{name}.shared.open", 1, hidden)], f"{name}.shared.share")
    return b.node("Add", [y, b.node("Mul", [down, opened], f"{name}.shared.output")], f"{name}.output")


def attributes(experts: ExpertsConfig) -> dict[str, int]:
    """What a node says about itself, for those that replace it; the function has them built in."""
    return {"top_k": experts.num_active, "normalized": int(experts.is_normalized)}


def function_proto(experts: ExpertsConfig, elem_type: int) -> onnx.FunctionProto:
    """x [N, H], logits [N, E], fc [E, 2X, H], proj [E, H, X] -> y [N, H]; `elem_type` is that of x."""
    num, active = experts.num_experts, experts.num_active
    body = _Body()
    wide = body("Cast", ["se_logits"], "se_wide", to=TensorProto.FLOAT)
    p = body("Softmax", [wide], "se_p", axis=-1)
    picked = ["se_best", "se_expert"]
    body.nodes.append(helper.make_node("TopK", [p, body.ints("se_k", [active])], picked, axis=-1))
    share = picked[0]
    if experts.is_normalized:
        share = body("Div", [share, body("ReduceSum", [share, body.ints("se_last", [1])], "se_total")], "se_normal")
    share = body("CastLike", [share, "se_x"], "se_share")
    count = body("Shape", ["se_x"], "se_count", start=0, end=1)
    few = body("Less", [count, body.ints("se_most", [-(-num // (active * COPIES))])], "se_is_few")
    cond = body("Squeeze", [few], "se_cond")
    branches = {"then_branch": _gathered(active, elem_type), "else_branch": _dense(num, elem_type)}
    body.nodes.append(helper.make_node("If", [cond], ["se_y"], **branches))
    opsets = [helper.make_opsetid("", OPSET)]
    inputs = ["se_x", "se_logits", "se_fc", "se_proj"]
    return helper.make_function(DOMAIN, NAME, inputs, ["se_y"], body.nodes, opsets, list(attributes(experts)))


class _Body:
    """Nodes of a function or branch, with their constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def ints(self, name: str, values: list[int]) -> str:
        value = numpy_helper.from_array(np.array(values, np.int64), name)
        self.nodes.append(helper.make_node("Constant", [], [name], value=value))
        return name

    def graph(self, name: str, output: str, elem_type: int) -> onnx.GraphProto:
        return helper.make_graph(self.nodes, name, [], [helper.make_tensor_value_info(output, elem_type, ["N", "H"])])


def _activated(body: _Body, x: str, prefix: str, axis: int) -> str:
    """up * silu(gate) of both halves along `axis`."""
    halves = [f"{prefix}_up", f"{prefix}_gate"]
    body.nodes.append(helper.make_node("Split", [x], halves, axis=axis, num_outputs=2))
    return body("Mul", [halves[0], body("Swish", [halves[1]], f"{prefix}_active")], f"{prefix}_product")


def _gathered(num_active: int, elem_type: int) -> onnx.GraphProto:
    """Each token's experts' matrices, N * k of them, and one product with each."""
    body = _Body()
    flat = body("Reshape", ["se_expert", body.ints("sg_one", [-1])], "sg_flat")
    fc = body("Gather", ["se_fc", flat], "sg_fc", axis=0)
    per_token = body("Concat", ["se_count", body.ints("sg_k", [num_active])], "sg_shape", axis=0)
    token = body("Unsqueeze", ["se_x", body.ints("sg_axis", [1])], "sg_token")  # [N, 1, H]
    wide = body("Concat", [per_token, body("Shape", ["se_x"], "sg_hidden", start=1, end=2)], "sg_wide", axis=0)
    x = body("Expand", [token, wide], "sg_copies")  # [N, k, H]
    tall = body("Concat", [body.ints("sg_any", [-1]), "sg_hidden", body.ints("sg_single", [1])], "sg_tall", axis=0)
    x = body("Reshape", [x, tall], "sg_x")  # [N k, H, 1]
    product = _activated(body, body("MatMul", [fc, x], "sg_both"), "sg", axis=1)  # [N k, X, 1]
    proj = body("Gather", ["se_proj", flat], "sg_proj", axis=0)
    down = body("Reshape", [body("MatMul", [proj, product], "sg_down"), wide], "sg_outputs")  # [N, k, H]
    scaled = body("Mul", [down, body("Unsqueeze", ["se_share", body.ints("sg_last", [2])], "sg_shares")], "sg_scaled")
    body("ReduceSum", [scaled, body.ints("sg_of", [1])], "sg_y", keepdims=0)
    return body.graph("gathered", "sg_y", elem_type)


def _dense(num_experts: int, elem_type: int) -> onnx.GraphProto:
    """All tokens through all experts; what a router did not ask for is multiplied by 0 before the second product."""
    body = _Body()
    every = body.ints("sd_every", list(range(num_experts)))
    which = body("Equal", [body("Unsqueeze", ["se_expert", body.ints("sd_axis", [2])], "sd_which"), every], "sd_is")  # [N, k, E]
    shares = body("Unsqueeze", ["se_share", "sd_axis"], "sd_share")
    spread = body("Mul", [body("CastLike", [which, "se_share"], "sd_ones"), shares], "sd_spread")
    gates = body("ReduceSum", [spread, body.ints("sd_of", [1])], "sd_gates", keepdims=0)  # [N, E]
    gates = body("Unsqueeze", [body("Transpose", [gates], "sd_by_expert", perm=[1, 0]), "sd_of"], "sd_rows")  # [E, 1, N]
    x = body("Transpose", ["se_x"], "sd_x", perm=[1, 0])
    product = _activated(body, body("MatMul", ["se_fc", x], "sd_both"), "sd", axis=1)  # [E, X, N]
    down = body("MatMul", ["se_proj", body("Mul", [product, gates], "sd_gated")], "sd_down")  # [E, H, N]
    total = body("ReduceSum", [down, body.ints("sd_first", [0])], "sd_total", keepdims=0)
    body("Transpose", [total], "sd_y", perm=[1, 0])
    return body.graph("dense", "sd_y", elem_type)
