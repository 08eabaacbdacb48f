"""Quantized matrices as others lay them out, one at a time in our form: the same numbers, in another order.

    FP8     weight F8_E4M3 [out, in], weight_scale [1] or [out, 1], input_scale [1]; none if tokens have their own, or inputs stay
    blocks  of FP8: weight_scale_inv, or weight_scale, [out / rows, in / columns], which is repeated for the rows of its block
    INT8    weight I8 [out, in], scales as those of FP8
    NVFP4   weight U8 [out, in / 2], weight_scale F8_E4M3 [out, in / 16], weight_scale_2 [], input_scale []; of compressed-tensors
            weight_packed, weight_scale, weight_global_scale [1] and input_global_scale [1], which values are divided by
    packed  weight_packed I32 [out, in / 8], weight_scale [out, in / group], weight_zero_point I32 [out / 8, in / group]; 8 bits: / 4
    AWQ     qweight I32 [in, out / 8], qzeros I32 [in / group, out / 8], scales [in / group, out]; eight outputs a word, as 0 2 4 6 1 3 5 7
    GPTQ    qweight I32 [in / 8, out], qzeros I32 [in / group, out / 8], scales, g_idx [in]; zeros are stored less one, except in gptq_v2

q, k and v keep their own scales: where they differ, a matrix has a scale per row. A zero point z becomes a number added per group,
(q - z) * s = (q - 8) * s + (8 - z) * s, which is exact on every engine. With activation order g_idx names the group of each channel:
channels are sorted by it, so that a group is a run again, and the order is kept for the inputs. Rows of one group (group_size -1) are cut
into several groups of the same scale.
"""

from __future__ import annotations

import numpy as np

from trtllm_thoughtx.checkpoint import tensor_file
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.schemes import Scheme, unread
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families import Tensor
from trtllm_thoughtx.families.formats import BLOCK, FORMATS, FP4, FP8, INT8, algo_of
from trtllm_thoughtx.families.quantization import SECOND

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Made = dict[str, np.ndarray]  # suffix -> tensor


def unpack_words(words: np.ndarray, axis: int, order: tuple[int, ...] = (), bits: int = 4) -> np.ndarray:
    """The numbers of each 32-bit word, uint8, unfolded along `axis`; place i of a word holds number `order[i]`."""
    wide = words.astype("<u4") if axis == 1 else words.T.astype("<u4")
    num = 32 // bits
    out = np.empty((*wide.shape, num), np.uint8)
    for place, number in enumerate(order or range(num)):
        out[..., number] = (wide >> np.uint32(bits * place)) & np.uint32((1 << bits) - 1)
    flat = out.reshape(wide.shape[0], -1)
    return flat if axis == 1 else flat.T


def made(source: Checkpoint, tensor: Tensor, scheme: Scheme, group_size: int) -> Made:
    """The tensors of one matrix; groups of 4-bit formats have `group_size` inputs. E108 for a scale that is no positive number."""
    kinds = {"fp8": _made_eight, "int8": _made_eight, "fp8 blocks": _made_blocks, "nvfp4": _made_nvfp4}
    return kinds[scheme.kind](source, tensor, scheme) if scheme.kind in kinds else _made_words(source, tensor, scheme, group_size)


def _scales(source: Checkpoint, name: str, shape: tuple[int, ...] | None = None, kinds: tuple[str, ...] = ()) -> np.ndarray:
    """Scales in float32. E108 for one that is no positive number."""
    found = source.read(name, shape, kinds) if kinds else source.read(name, shape)
    wide = found.astype(np.float32)
    if num := int(np.count_nonzero(~(np.isfinite(wide) & (wide > 0)))):
        why, fix = "a scale must be a positive number", "download the checkpoint again, or ask its authors: such scales are damage"
        raise ThoughtxError("E108", f"{name}: {num} values cannot be used", where=str(source.path), why=why, fix=fix)
    return wide


def _one(source: Checkpoint, name: str) -> np.ndarray:
    """A scale of a whole tensor, [1]."""
    found = _scales(source, name)
    if found.size != 1:
        raise source.misfit(name, f"{list(found.shape)}, wanted one number")
    return found.reshape(1)


def _read_words(source: Checkpoint, base: str, num_out: int, num_in: int, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numbers [out, in], zeros [out, groups], scales [out, groups]) of one layer, as they are stored."""
    num_groups, bits, per = num_in // (scheme.group_size or num_in), scheme.bits, 32 // scheme.bits
    if num_in % (scheme.group_size or num_in):
        raise source.misfit(base, f"groups of {scheme.group_size} do not cut its {num_in} inputs")
    if scheme.kind == "packed":
        scales = _scales(source, f"{base}.weight_scale", (num_out, num_groups))
        numbers = unpack_words(source.read(f"{base}.weight_packed", (num_out, -(-num_in // per)), ("I32",)), 1, bits=bits)[:, :num_in]
        if not scheme.has_zeros:
            return numbers, np.full(scales.shape, 1 << (bits - 1), np.int16), scales
        words = source.read(f"{base}.weight_zero_point", (-(-num_out // per), num_groups), ("I32",))
        return numbers, unpack_words(words, 0, bits=bits)[:num_out].astype(np.int16), scales
    scales = _scales(source, f"{base}.scales", (num_groups, num_out)).T
    words = source.read(f"{base}.qzeros", (num_groups, num_out // per), ("I32",))
    if scheme.kind == "awq":
        numbers = unpack_words(source.read(f"{base}.qweight", (num_in, num_out // 8), ("I32",)), 1, AWQ_ORDER).T
        zeros = unpack_words(words, 1, AWQ_ORDER).T
    else:
        numbers = unpack_words(source.read(f"{base}.qweight", (num_in // per, num_out), ("I32",)), 0, bits=bits).T
        zeros = unpack_words(words, 1, bits=bits).T
    return numbers, zeros.astype(np.int16) + scheme.zero_offset, scales


def input_order(source: Checkpoint, tensor: Tensor, scheme: Scheme) -> np.ndarray:
    """Input channels in the order of their groups, I32 [in]; rising where the layer has no activation order.

    E107 when g_idx is missing or names groups that do not exist, E103 when groups differ in size, or the parts of a matrix in order.
    """
    num_in, size = tensor.shape[1], scheme.group_size or tensor.shape[1]
    found = np.arange(num_in, dtype=np.int32)
    orders: list[np.ndarray] = []
    for part in tensor.parts if scheme.kind == "gptq" else ():
        name = f"{part.source.removesuffix('.weight')}.g_idx"
        groups = source.read(name, (num_in,), ("I32",)) if scheme.needs_order or name in source.stored else found // size
        if groups.min() < 0 or groups.max() >= num_in // size:
            raise source.misfit(name, f"it must name the groups 0 to {num_in // size - 1}")
        if np.any(np.bincount(groups, minlength=num_in // size) != size):
            unread(f"GPTQ with groups that do not have {size} channels each ({name})", str(source.path))
        orders.append(np.argsort(groups, kind="stable").astype(np.int32))
        if not np.array_equal(orders[0], orders[-1]):
            unread(f"GPTQ with an activation order of its own for a part of one matrix ({name})", str(source.path))
    return orders[0] if orders else found


def _made_words(source: Checkpoint, tensor: Tensor, scheme: Scheme, group_size: int) -> Made:
    parts = [_read_words(source, part.source.removesuffix(".weight"), part.shape[0], part.shape[1], scheme) for part in tensor.parts]
    numbers, zeros, scales = (np.concatenate([part[i] for part in parts]) for i in range(3))
    order, middle = input_order(source, tensor, scheme), 1 << (scheme.bits - 1)
    if scheme.bits == INT8.bits:
        if np.any(zeros != middle) or np.any(np.diff(order) < 0):
            unread(f"{scheme.kind} with 8 bits and zero points, or an activation order ({tensor.name}),", str(source.path))
        weight = (numbers ^ np.uint8(INT8.sign)).view(np.int8)
        row = {FORMATS[algo_of(INT8, "row", "as they are")].scale_name: np.ascontiguousarray(scales[:, 0])}
        return {"weight": weight, **(row if not scheme.group_size else {"weights_scaling_factor": np.ascontiguousarray(scales)})}
    packed = tensor_file.pack_four(numbers[:, order].astype(np.int8) - 8)
    repeats = numbers.shape[1] // group_size // scales.shape[1]
    scales, zero = (np.repeat(one, repeats, 1) for one in (scales, (middle - zeros).astype(np.float32) * scales))
    return {"weight": packed, "weights_scaling_factor": scales, "zero": zero, "input_order": order}


def _made_eight(source: Checkpoint, tensor: Tensor, scheme: Scheme) -> Made:
    """The rows as they are, a scale per row, and the largest of the static input scales."""
    number = FP8 if scheme.kind == "fp8" else INT8
    weights, rows, inputs = [], [], []
    for part in tensor.parts:
        base = part.source.removesuffix(".weight")
        weights.append(source.read(f"{base}.weight", part.shape, (number.stored,)))
        scale = _scales(source, f"{base}.weight_scale")
        if scale.shape not in ((), (1,), (1, 1), (part.shape[0],), (part.shape[0], 1)):
            unread(f"{number.name} with blocks ({base}.weight_scale)", str(source.path))
        rows.append(np.broadcast_to(scale.reshape(-1), (part.shape[0],)))
        if scheme.inputs == "static":
            if f"{base}.input_scale" not in source.stored:
                unread(f"{number.name} without static input scales ({base}.input_scale is missing)", str(source.path))
            inputs.append(_one(source, f"{base}.input_scale"))
    found = {"weight": np.concatenate([weight.view(np.uint8) for weight in weights]).view(weights[0].dtype)}
    found[FORMATS[algo_of(number, "row", scheme.inputs)].scale_name] = np.concatenate(rows)
    return found | ({"activation_scaling_factor": np.max(inputs, axis=0)} if inputs else {})


def _made_blocks(source: Checkpoint, tensor: Tensor, scheme: Scheme) -> Made:
    """The rows as they are, with the scales of their blocks."""
    weights, scales, (high, wide) = [], [], scheme.block
    for part in tensor.parts:
        base, (num_out, num_in) = part.source.removesuffix(".weight"), part.shape
        if num_in % wide:
            unread(f"FP8 in blocks of {high} by {wide} that do not cut the {num_in} inputs of {base}", str(source.path))
        weights.append(source.read(f"{base}.weight", part.shape, (FP8.stored,)))
        found = _scales(source, f"{base}.{scheme.scale}", (-(-num_out // high), num_in // wide))
        scales.append(np.repeat(found, high, 0)[:num_out])
    weight = np.concatenate([one.view(np.uint8) for one in weights]).view(weights[0].dtype)
    return {"weight": weight, "weights_scaling_factor": np.concatenate(scales)}


def _made_nvfp4(source: Checkpoint, tensor: Tensor, scheme: Scheme) -> Made:
    """The bytes as they are. The parts of a matrix share its second scale; inputs have the largest of their scales."""
    weights, scales, seconds, inputs = [], [], [], []
    for part in tensor.parts:
        base, (num_out, num_in) = part.source.removesuffix(".weight"), part.shape
        names = (
            ("weight_packed", "weight_global_scale", "input_global_scale")
            if scheme.divides
            else ("weight", "weight_scale_2", "input_scale")
        )
        weights.append(source.read(f"{base}.{names[0]}", (num_out, num_in // FP4.per_item), (FP4.stored,)))
        _scales(source, f"{base}.weight_scale", (num_out, num_in // BLOCK), (FP8.stored,))
        scales.append(source.read(f"{base}.weight_scale", None, (FP8.stored,)).view(np.uint8))
        seconds.append(_one(source, f"{base}.{names[1]}"))
        inputs += [_one(source, f"{base}.{names[2]}")] if scheme.inputs == "blocks" else []
    if len({float(second[0]) for second in seconds}) > 1:
        unread(f"NVFP4 with second scales that differ within one matrix ({tensor.name}),", str(source.path))
    if scheme.divides:
        seconds, inputs = ([np.float32(1) / one for one in ones] for ones in (seconds, inputs))
    found = {"weight": np.concatenate(weights), "weights_scaling_factor": np.concatenate(scales).view(tensor_file.DTYPES[FP8.stored])}
    found[SECOND] = seconds[0]
    return found | ({"activation_scaling_factor": np.max(inputs, axis=0)} if inputs else {})
