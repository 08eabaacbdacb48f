"""4-bit floats (E2M1) in blocks, as NVFP4 has them: a matrix whose scales are E4M3 numbers times a second scale, and inputs whose scales
are found when the engine runs.

TensorRT computes a product of two such sides on tensor cores of its own, and knows it by this form. Rounding inputs is an operator of
TensorRT, `trt::TRT_FP4DynamicQuantize`; `backends.ort_fp4` says what it computes.
"""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, helper

from trtllm_thoughtx.families.formats import BLOCK
from trtllm_thoughtx.families.quantization import SECOND
from trtllm_thoughtx.graph.builder import Builder

DOMAIN, ROUND = "trt", "TRT_FP4DynamicQuantize"


def matrix(b: Builder, module: str, scale_name: str, output: str, num_out: int, num_in: int) -> str:
    """The stored numbers times their scales, in the graph's type."""
    weight = b.weight(f"{module}.weight", (num_out, num_in), TensorProto.FLOAT4E2M1)
    scale = b.weight(f"{module}.{scale_name}", (num_out, num_in // BLOCK), TensorProto.FLOAT8E4M3FN)
    second = b.weight(f"{module}.{SECOND}", (), TensorProto.FLOAT)
    return _widened(b, weight, scale, second, f"{output}.matrix")


def rounded(b: Builder, x: str, module: str, output: str) -> str:
    """Inputs [N, in] on the grid of their blocks."""
    second = b.weight(f"{module}.activation_scaling_factor", (), TensorProto.FLOAT)
    made = [f"{output}.input.quantized", f"{output}.input.scales"]
    options: dict[str, Any] = {"axis": -1, "block_size": BLOCK, "scale_type": TensorProto.FLOAT8E4M3FN}
    b.nodes.append(helper.make_node(ROUND, [x, second], made, name=made[0], domain=DOMAIN, **options))
    return _widened(b, made[0], made[1], second, f"{output}.input")


def _widened(b: Builder, numbers: str, scales: str, second: str, output: str) -> str:
    scale = b.node("DequantizeLinear", [scales, second], f"{output}.scale")
    if b.elem_type != TensorProto.FLOAT:
        scale = b.node("Cast", [scale], f"{output}.scale.narrow", to=b.elem_type)
    return b.node("DequantizeLinear", [numbers, scale], output, axis=-1, block_size=BLOCK)
