"""The parts of a graph that let a runtime stop early: the exit head beside the logits, and the draft behind a stage.

    exit [B, K, 2]             ready to answer, end of a step: probabilities for each row of logits
    draft_states [B, S, H]     of a stage: what the head takes instead of the last layer's output, for a draft
    draft_confidence [B, S]    of a stage: probability that the draft's next token is the full model's

Both are small matrices in the graph's type; an engine whose checkpoint carries none of them is the same graph as ever.
"""

from __future__ import annotations

from onnx import TensorProto

from trtllm_thoughtx.checkpoint.exits import ExitAdapter, ExitHead
from trtllm_thoughtx.graph.builder import Builder

EXIT, DRAFT, CONFIDENCE = "exit", "draft_states", "draft_confidence"


def add_exit_head(b: Builder, normed: str, head: ExitHead) -> None:
    """`normed` [B * K, H] is the final norm's output of the rows that are projected; `shape.rows` is their [B, K]."""
    weight, bias = b.table("exit_head.weight", head.weight), b.table("exit_head.bias", head.bias)
    scores = b.node("Gemm", [normed, weight, bias], "exit_head.scores", transB=1)
    scores = b.node("Cast", [scores], "exit_head.float32", to=TensorProto.FLOAT)
    probabilities = b.node("Sigmoid", [scores], "exit_head.chances")
    b.constant("shape.exit_tail", [2])
    b.node("Concat", ["shape.rows", "shape.exit_tail"], "shape.exit", axis=0)
    b.node("Reshape", [probabilities, "shape.exit"], b.output(EXIT, TensorProto.FLOAT, ["B", "K", 2]))


def add_draft(b: Builder, x: str, adapter: ExitAdapter) -> None:
    """`x` [N, H] is the stage's output; `shape.tokens` and `shape.hidden` are [B, S] and [B, S, H]."""
    name = f"exit_adapter.{adapter.layer}"
    gain = b.table(f"{name}.norm.weight", adapter.norm)
    normed = b.node("RMSNormalization", [x, gain], f"{name}.norm", axis=-1, epsilon=b.config.norm_eps)
    down = b.node("Gemm", [normed, b.table(f"{name}.down.weight", adapter.down)], f"{name}.down", transB=1)
    up = b.node("Gemm", [down, b.table(f"{name}.up.weight", adapter.up)], f"{name}.up", transB=1)
    draft = b.node("Add", [x, up], f"{name}.draft")
    b.node("Reshape", [draft, "shape.hidden"], b.output(DRAFT, b.elem_type, ["B", "S", b.config.hidden_size]))
    tables = [b.table(f"{name}.confidence.weight", adapter.confidence), b.table(f"{name}.confidence.bias", adapter.bias)]
    score = b.node("Gemm", [normed, *tables], f"{name}.confidence.score", transB=1)
    score = b.node("Cast", [score], f"{name}.confidence.float32", to=TensorProto.FLOAT)
    probability = b.node("Sigmoid", [score], f"{name}.confidence.chance")
    b.node("Reshape", [probability, "shape.tokens"], b.output(CONFIDENCE, TensorProto.FLOAT, ["B", "S"]))
