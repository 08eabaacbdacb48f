"""How others say that a checkpoint is quantized: their sections of config.json and hf_quant_config.json, read into one `Scheme`.

What is not read is E103, with the name that its writer gave it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from trtllm_thoughtx import files
from trtllm_thoughtx.checkpoint.members import QUANT_FILE
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.families.fields import Fields
from trtllm_thoughtx.families.formats import BLOCK, FORMATS, FP4, FP8, INT8, algo_of

QUANTIZE = "use the original checkpoint, and quantize it with thoughtx-calibrate"
MARKS = {"packed": "weight_packed", "awq": "qweight", "gptq": "qweight"}  # of a quantized layer; else its scale


@dataclass(frozen=True)
class Scheme:
    """How the matrices are stored: `kind` is fp8 | fp8 blocks | int8 | nvfp4 | packed | awq | gptq."""

    kind: str
    group_size: int = 128  # inputs of a group; 0: a row has one scale
    bits: int = 4  # of packed, awq and gptq
    zero_offset: int = 0  # what is added to a stored zero
    has_zeros: bool = True  # packed: zeros are stored
    needs_order: bool = False  # the config speaks of activation order, so g_idx cannot be missing
    inputs: str = "static"  # `Format.inputs`
    block: tuple[int, int] = (0, 0)  # rows and columns of a block of FP8
    scale: str = "weight_scale"
    divides: bool = False  # nvfp4: compressed-tensors' names, and second scales that values are divided by
    note: str = ""  # what a person should know

    @property
    def mark(self) -> str:
        return "weight_packed" if self.divides else MARKS.get(self.kind, self.scale)


def scheme_of(source: Checkpoint) -> Scheme:
    """E103 for a format whose numbers cannot be kept."""
    where, raw = source.where, source.raw.get("quantization_config")
    if not raw:
        where = str(source.path / QUANT_FILE)
        table = Fields(files.read_json(source.path, QUANT_FILE), where).table("quantization")
        return _modelopt(table, f"{QUANT_FILE}: quant_algo", where)
    fields = Fields(raw, where, "quantization_config.")
    method = fields.text("quant_method")
    if method == "modelopt":
        return _modelopt(fields, "modelopt", where)
    if method == "compressed-tensors":
        return _compressed(fields, where)
    if method == "fp8":
        return _fp8_blocks(fields.get("weight_block_size"), "weight_scale_inv", where)
    if method not in ("awq", "gptq"):
        return unread(f"quant_method {shown(method)}", where)
    bits, known = fields.integer("bits", 1, 64, 4), (4,) if method == "awq" else (4, 8)
    if bits not in known:
        return unread(f"{method} with {bits} bits", where)
    if method == "awq" and str(fields.get("version", "gemm")).lower() != "gemm":
        return unread(f"awq version {shown(fields.get('version'))}", where)
    size = 0 if fields.get("group_size") == -1 else fields.integer("group_size", 2, 1 << 16, 128)
    if method == "awq":
        return Scheme(method, size)
    packing = fields.get("checkpoint_format", "gptq")
    if packing not in ("gptq", "gptq_v2"):
        return unread(f"gptq with checkpoint_format {shown(packing)}", where)
    return Scheme(method, size, bits, 1 if packing == "gptq" else 0, needs_order=fields.boolean("desc_act", False))


def unread(what: str, where: str, fix: str = QUANTIZE) -> NoReturn:
    why = "read are FP8 with scales per tensor, row, token or block, NVFP4, INT8 (compressed-tensors), and 4 and 8 bits in groups"
    raise ThoughtxError("E103", f"{what} is not read", where=where, why=why, fix=fix)


def _modelopt(fields: Fields | None, what: str, where: str) -> Scheme:
    algo = fields.get("quant_algo") if fields else None
    form = FORMATS.get(algo) if isinstance(algo, str) else None
    if fields and form and form.scales == "block":
        size = fields.get("group_size", BLOCK)
        return Scheme("nvfp4", inputs=form.inputs) if size == BLOCK else unread(f"{what} {shown(algo)} in blocks of {shown(size)}", where)
    if form is None or algo not in (algo_of(FP8, "tensor", "static"), algo_of(FP8, "row", "token")):
        return unread(f"{what} {shown(algo)}", where)
    return Scheme("fp8", inputs=form.inputs)


def _compressed(fields: Fields, where: str) -> Scheme:
    groups, fmt = fields.get("config_groups"), fields.get("format")
    if isinstance(groups, dict) and len(groups) > 1:
        return unread(f"compressed-tensors with {len(groups)} config_groups, a mixture of formats,", where)
    if not isinstance(groups, dict) or not groups:
        return unread(f"compressed-tensors format {shown(fmt)}", where)
    group = Fields(next(iter(groups.values())), where, "quantization_config.config_groups.")
    weights, inputs = group.table("weights"), group.table("input_activations")
    readers = {
        "float-quantized": _compressed_eight,
        "naive-quantized": _compressed_eight,
        "int-quantized": _compressed_eight,
        "pack-quantized": _compressed_packed,
        "nvfp4-pack-quantized": _compressed_nvfp4,
    }
    if not weights or fmt not in readers:
        return unread(f"compressed-tensors format {shown(fmt)}", where)
    return readers[fmt](weights, inputs, where)


def _compressed_eight(weights: Fields, inputs: Fields | None, where: str) -> Scheme:
    """FP8 or INT8, one number a weight."""
    number = {"float": FP8, "int": INT8}.get(str(weights.get("type")))
    strategy = weights.get("strategy")
    if number == FP8 and weights.get("num_bits") == 8 and strategy == "block":
        return _fp8_blocks(weights.get("block_structure"), "weight_scale", where)
    if number is None or weights.get("num_bits") != 8 or strategy not in ("tensor", "channel") or not weights.get("symmetric", True):
        return unread("compressed-tensors weights that are not FP8 or symmetric INT8 with a scale per tensor, channel or block", where)
    if not inputs:
        return Scheme(number.name.lower(), inputs="as they are")
    if inputs.get("type") != weights.get("type") or inputs.get("num_bits") != 8 or not inputs.get("symmetric", True):
        return unread(f"compressed-tensors {number.name} weights with inputs of another type", where)
    how = (inputs.get("dynamic", False), inputs.get("strategy"))
    if how not in ((False, "tensor"), (True, "token")):
        return unread(f"{number.name} with input scales of dynamic {shown(how[0])}, strategy {shown(how[1])}", where)
    return Scheme(number.name.lower(), inputs="token" if how[0] else "static")


def _fp8_blocks(block: Any, scale: str, where: str) -> Scheme:
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and 2 <= size <= 1 << 16 for size in block):
        return unread(f"FP8 in blocks of {shown(block)}", where)
    note = f"weights in blocks of {block[0]} by {block[1]} are kept; inputs, which were to be rounded as they come, stay as they are"
    return Scheme("fp8 blocks", block[1], block=(block[0], block[1]), scale=scale, inputs="as they are", note=note)


def _compressed_packed(weights: Fields, inputs: Fields | None, where: str) -> Scheme:
    """Integers in words of 32 bits."""
    bits, strategy, is_symmetric = weights.get("num_bits"), weights.get("strategy"), weights.get("symmetric", True)
    if inputs:
        return unread("compressed-tensors pack-quantized with rounded inputs", where)
    if weights.get("type") != "int" or bits not in (4, 8) or strategy not in ("group", "channel") or (bits == 8 and not is_symmetric):
        what = f"{shown(weights.get('type'))} of {shown(bits)} bits, strategy {shown(strategy)}, symmetric {shown(is_symmetric)}"
        return unread(f"compressed-tensors pack-quantized with {what}", where)
    if weights.get("actorder") not in (None, "weight", "static"):
        return unread(f"compressed-tensors pack-quantized with actorder {shown(weights.get('actorder'))}", where)
    size = weights.get("group_size")
    is_row = strategy == "channel" or size == -1
    if not is_row and (type(size) is not int or not 2 <= size <= 1 << 16):
        return unread(f"compressed-tensors pack-quantized with group_size {shown(size)}", where)
    return Scheme("packed", 0 if is_row else size, bits, has_zeros=not is_symmetric)


def _compressed_nvfp4(weights: Fields, inputs: Fields | None, where: str) -> Scheme:
    def fits(side: Mapping[str, Any]) -> bool:
        kind = (side.get("type"), side.get("num_bits"), side.get("strategy"), side.get("group_size"), side.get("symmetric", True))
        return kind == ("float", FP4.bits, "tensor_group", BLOCK, True)

    def told(side: Fields) -> str:
        return f"{shown(side.get('num_bits'))} bits, {shown(side.get('strategy'))}, group_size {shown(side.get('group_size'))}"

    if not fits(weights.raw):
        return unread(f"nvfp4-pack-quantized with weights of {told(weights)},", where)
    if inputs and not (fits(inputs.raw) and inputs.get("dynamic") == "local"):
        return unread(f"nvfp4-pack-quantized with inputs of {told(inputs)}, dynamic {shown(inputs.get('dynamic'))},", where)
    return Scheme("nvfp4", divides=True, inputs="blocks" if inputs else "as they are")
