"""One weight-only linear layer on the operators that an onnxruntime engine runs it on, on a CPU: what a calibration measures with."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from trtllm_thoughtx.backends import ort_blocks, ort_fused
from trtllm_thoughtx.families.formats import FP4, INT4, INT8, Format

OPERATORS = {
    "rows": "QGemm twice, inputs rounded to 16 bits",
    "bytes": f"MatMulNBits at accuracy level {ort_blocks.LEVEL}, inputs rounded to 16 bits by blocks",
    "blocks": f"MatMulNBits at accuracy level {ort_blocks.LEVEL}, inputs rounded to 8 bits by blocks",
}


class FusedProduct:
    """Callable: float32 [tokens, in] -> [tokens, out], without bias. `stored` is int8 [out, in] or uint8 [out, in / 2], `scale` [out] or
    [out, in / group]."""

    def __init__(self, stored: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None, *, rounds_inputs: bool = False) -> None:
        """`zero` are the stored zero points of a 4-bit matrix; `rounds_inputs`: as `ort_fused.fuse` has it."""
        num_out = len(stored)
        size = ort_fused.size_of_bytes(stored.shape[1], scale.shape[1] if scale.ndim == 2 else 0, rounds_inputs=rounds_inputs)
        if stored.dtype == np.uint8:
            num_in = 2 * stored.shape[1]
            group = num_in // scale.shape[1]
            arrays = dict(zip("wsz", ort_blocks.blocked(stored, scale, group, zero), strict=False))
            nodes = [ort_blocks.blocks_node("x", [*arrays], "y", num_out, num_in, group)]
        elif size:
            num_in = stored.shape[1]
            arrays = dict(zip("ws", ort_blocks.blocked_bytes(stored, scale, size), strict=True))
            nodes = ort_fused.bytes_nodes("x", [*arrays], "y", num_out, num_in, size, rounds_inputs=rounds_inputs)
        else:
            num_in, arrays = stored.shape[1], {"w": stored, "s": scale, **ort_fused.CONSTANTS}
            if not ort_fused.takes_signed_weights():
                arrays["w"] = stored.view(np.uint8) ^ np.uint8(INT8.sign)
            middle = ort_fused.ZERO if arrays["w"].dtype == np.int8 else ort_fused.MIDDLE
            nodes = ort_fused.rows_nodes("x", "w", "s", middle, "y")
        tensors = [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in arrays.items()]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", num_in])]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", num_out])]
        self.session = ort_blocks.session_of(nodes, inputs, outputs, tensors)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        out: np.ndarray = self.session.run(None, {"x": x})[0]
        return out


def kind_of(form: Format, group_size: int) -> str | None:
    """The operators that round more than the graph: a key of `OPERATORS`, or None where the graph's own numbers are computed."""
    if form.number == FP4:
        return "bytes" if ort_blocks.takes_bytes() else None
    if not form.is_weight_only:
        return None
    if (form.number, form.scales) == (INT8, "row"):
        return "rows"
    if not ort_blocks.block_of(group_size) or (form.number == INT8 and not ort_blocks.takes_bytes()):
        return None
    return {INT4: "blocks", INT8: "bytes"}.get(form.number)
