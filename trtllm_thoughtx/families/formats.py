"""Quantization formats, one row each: what every reader, writer, search, graph and backend knows of a format is written here.

A `Number` is a grid that values are rounded to, a `Format` how a linear layer is stored in such numbers. Names are those of TensorRT-LLM
1.2 and ModelOpt, but for the rows marked as ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BLOCK = 16  # inputs of a block


@dataclass(frozen=True, kw_only=True)
class Number:
    """A type of quantized numbers. Values run from `lowest` to `largest`, in units of their scale."""

    name: str  # as TensorRT-LLM's kv_cache_quant_algo has it
    stored: str  # safetensors type that holds it
    onnx: str  # TensorProto's name
    plan: str  # as a plan's layer information spells it
    bits: int
    lowest: float
    largest: float
    is_float: bool = False
    # A step that products of rows with scales of their own are computed in. A power of two is the same number in every type, and this one
    # leaves the product about as large as the layer's output: rows of common matrices reach 0.2.
    row_step: float = 0.0
    first_capability: tuple[int, int] = (0, 0)  # GPU generation whose products take it

    @property
    def per_item(self) -> int:
        """Numbers in one stored item, the earlier in the lower bits."""
        return 8 // self.bits

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape` in items: rows that do not fill their last item are stored as one run of numbers."""
        if not shape or shape[-1] % self.per_item == 0:
            return (*shape[:-1], shape[-1] // self.per_item) if shape else shape
        return (-(-math.prod(shape) // self.per_item),)

    @property
    def sign(self) -> int:
        """A byte that turns two's complement into an offset of half the range, by exclusive or."""
        return 0x80 if self.bits == 8 else 0x88


@dataclass(frozen=True, kw_only=True)
class Format:
    """A stored linear layer [out, in]: one scale a `tensor`, `row`, or `group` of a row's inputs, or an E4M3 one a `block` of 16 and a
    second one for all of them; inputs `as they are`, rounded with one `static` scale, with a scale per `token`, or in `blocks`, whose E4M3
    scales follow from the inputs and whose second scale is static."""

    algo: str  # TensorRT-LLM's quant_algo
    number: Number
    scales: str = "row"
    inputs: str = "as they are"
    scale_name: str = "weights_scaling_factor"
    qformat: str | None = None  # thoughtx-calibrate's name; None: only imported
    search: str | None = None  # smoothquant | awq: factors per input channel
    zeros: str | None = None  # that groups may have: `points` on the number's grid, or numbers that are `added`
    has_order: bool = False  # inputs may be put in the order of their groups
    wide: str | None = None  # format of layers of 8 bits that may stand beside its own
    of_rows: str | None = None  # the same with a scale a row in place of groups, for matrices that no group divides, or on demand

    @property
    def is_weight_only(self) -> bool:
        return self.inputs == "as they are"

    @property
    def is_grouped(self) -> bool:
        return self.scales in ("group", "block")

    @property
    def is_static(self) -> bool:
        """Whether a scale of the inputs is stored."""
        return self.inputs in ("static", "blocks")

    @property
    def input_span(self) -> float:
        """The largest input, in units of the stored scale."""
        return self.number.largest * (FP8.largest if self.inputs == "blocks" else 1)

    def scale_shape(self, num_out: int, num_in: int, group_size: int) -> tuple[int, ...]:
        return {"tensor": (1,), "row": (num_out,)}.get(self.scales, (num_out, num_in // group_size))

    def bits(self, group_size: int, zero_point: bool = False) -> float:
        """Bits of a weight, with its part of a group's 16-bit scale and zero point, or of a block's scale."""
        if self.scales == "block":
            return self.number.bits + FP8.bits / BLOCK
        of_zero = 0 if not zero_point else self.number.bits if self.zeros == "points" else 16
        return self.number.bits + ((16 + of_zero) / group_size if self.scales == "group" else 0.0)


FP8 = Number(
    name="FP8", stored="F8_E4M3", onnx="FLOAT8E4M3FN", plan="FP8", bits=8, lowest=-448.0, largest=448.0, is_float=True,
    row_step=2.0**-11, first_capability=(8, 9),
)  # fmt: skip
INT8 = Number(name="INT8", stored="I8", onnx="INT8", plan="Int8", bits=8, lowest=-127.0, largest=127.0, row_step=2.0**-9)
INT4 = Number(name="INT4", stored="U8", onnx="INT4", plan="Int4", bits=4, lowest=-8.0, largest=7.0)
FP4 = Number(
    name="FP4", stored="U8", onnx="FLOAT4E2M1", plan="FP4E2M1", bits=4, lowest=-6.0, largest=6.0, is_float=True, first_capability=(12, 0)
)  # E2M1
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what its three bits below the sign stand for
NUMBERS = {number.name: number for number in (FP8, INT8, INT4, FP4)}

FORMATS = {
    row.algo: row
    for row in (
        Format(algo="FP8", number=FP8, scales="tensor", inputs="static", qformat="fp8"),
        Format(algo="W8A8_SQ_PER_CHANNEL", number=INT8, inputs="static", qformat="int8_sq", search="smoothquant"),
        Format(algo="W8A16", number=INT8, scale_name="per_channel_scale"),  # int8_wo by rows
        Format(algo="W8A16_GPTQ", number=INT8, scales="group", qformat="int8_wo", of_rows="W8A16"),
        Format(algo="W4A16_AWQ", number=INT4, scales="group", qformat="int4_awq", search="awq", wide="W8A16_GPTQ"),
        Format(algo="W4A16", number=INT4, scales="group", qformat="int4_wo", zeros="points", wide="W8A16_GPTQ"),
        Format(algo="FP8_PER_CHANNEL", number=FP8, inputs="static"),  # ours
        Format(algo="FP8_PER_CHANNEL_PER_TOKEN", number=FP8, inputs="token", scale_name="per_channel_scale"),
        Format(algo="W8A16_FP8", number=FP8),  # ours
        Format(algo="W8A16_FP8_GROUPS", number=FP8, scales="group"),  # ours
        Format(algo="W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", number=INT8, inputs="token", scale_name="per_channel_scale"),
        Format(algo="W4A16_GPTQ", number=INT4, scales="group", zeros="added", has_order=True),
        Format(algo="NVFP4", number=FP4, scales="block", inputs="blocks", qformat="nvfp4", search="smoothquant", wide="FP8"),
        Format(algo="W4A16_NVFP4", number=FP4, scales="block", qformat="nvfp4_wo", wide="W8A16_FP8"),
    )
}
OF_EMBEDDING = "W8A16_GPTQ"  # embeddings are stored so, or by its rows, beside layers of any format
QUANT_ALGOS = {row.qformat: row.algo for row in FORMATS.values() if row.qformat}  # --qformat -> quant_algo
KV_ALGOS = {number.name.lower(): number.name for number in (FP8, INT8)}  # --kv_cache_dtype -> kv_cache_quant_algo


def algo_of(number: Number, scales: str, inputs: str) -> str:
    """The format of layers that were stored so by others."""
    found = [row for row in FORMATS.values() if (row.number, row.scales, row.inputs) == (number, scales, inputs)]
    return min(found, key=lambda row: row.search is not None).algo
