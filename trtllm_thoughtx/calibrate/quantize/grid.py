"""Numbers on a grid: scales, stored integers and 8-bit floats, and what they stand for. The arithmetic of `graph.quantized`, in torch.

Scales and prequant factors have at most eight significant bits and stay within float16's range, so that they are the same numbers in a
float32, float16 or bfloat16 engine. A scale is rounded up: the largest value never clips. Scales of blocks are E4M3 numbers, the second
one a power of two; here, a block's scale is the product of both.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch

from trtllm_thoughtx.checkpoint.tensor_file import pack_four, unpack_e2m1, unpack_four
from trtllm_thoughtx.families.formats import BLOCK, FORMATS, FP4, FP8, Number
from trtllm_thoughtx.families.quantization import SECOND

SMALLEST = 2.0**-24  # float16's smallest number
EIGHT_BITS_FROM = 2.0**-17  # below, float16 holds multiples of its smallest number with fewer bits
LARGEST = 65280.0  # of eight bits, in float16
SMALLEST_BLOCK = 2.0**-9  # E4M3's smallest number
HEADROOM = 1.75  # of the scales of blocks: weights grow while others are rounded, and a scale may be larger than nothing needs


def tidy(values: torch.Tensor, *, up: bool = True) -> torch.Tensor:
    """The nearest numbers (`up`: not smaller ones) with eight significant bits in float16's range; float32, positive."""
    wide = values.double().clamp(min=0)
    mantissa, exponent = torch.frexp(wide)
    turn = torch.ceil if up else torch.round
    rounded = torch.ldexp(turn(mantissa * 256) / 256, exponent)
    steps = turn(wide / SMALLEST).clamp(min=1) * SMALLEST
    return torch.where(rounded < EIGHT_BITS_FROM, steps, rounded).clamp(SMALLEST, LARGEST).float()


def weight_scale(weight: torch.Tensor, algo: str, group_size: int) -> torch.Tensor:
    """The scale of a float32 matrix [out, in]: [1], [out] or [out, in / group_size], by the format."""
    form = FORMATS[algo]
    shape = form.scale_shape(weight.shape[0], weight.shape[1], group_size)
    if form.scales == "block":
        return of_blocks(weight.reshape(*shape, -1).abs().amax(-1) / form.number.largest, second_scale(weight))
    return tidy(weight.reshape(*shape, -1).abs().amax(-1) / form.number.largest)


def second_scale(weight: torch.Tensor) -> torch.Tensor:
    """The second scale [] of a matrix, with which the scales of its blocks are E4M3 numbers."""
    return _power_of_two(weight.abs().amax() * HEADROOM / (FP4.largest * FP8.largest))


def _power_of_two(values: torch.Tensor) -> torch.Tensor:
    """The smallest that is not smaller; 2^-24 at least."""
    mantissa, exponent = torch.frexp(values.double().clamp(min=SMALLEST))
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype)).float()


def of_blocks(scale: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The nearest scales that blocks can have."""
    return (scale / second).clamp(SMALLEST_BLOCK, FP8.largest).to(torch.float8_e4m3fn).float() * second


def _grouped(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of both that broadcast against each other."""
    if scale.dim() == 2:
        return weight.reshape(*scale.shape, -1), scale[..., None]
    return weight, scale.reshape(-1, *[1] * (weight.dim() - 1)) if scale.numel() > 1 else scale.reshape(1, 1)


def to_grid(values: torch.Tensor, number: Number) -> torch.Tensor:
    """Values in units of their scale, rounded to what can be stored (nearest, ties to even, saturated); float32."""
    bounded = values.clamp(number.lowest, number.largest)
    if number == FP4:
        size = bounded.abs()
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        return torch.round(bounded / step) * step
    return bounded.to(torch.float8_e4m3fn).float() if number.is_float else torch.round(bounded)


def on_grid(weight: torch.Tensor, scale: torch.Tensor, algo: str, zero: torch.Tensor | None = None) -> torch.Tensor:
    """What the stored matrix stands for: [out, in] float32. `zero` has the zero points, on the number's own grid."""
    values, by = _grouped(weight, scale)
    if zero is None:
        return (to_grid(values / by, FORMATS[algo].number) * by).reshape(weight.shape)
    return ((to_grid(torch.round(values / by) + zero[..., None], FORMATS[algo].number) - zero[..., None]) * by).reshape(weight.shape)


def input_scale(amax: torch.Tensor | float, algo: str) -> torch.Tensor:
    """The static scale [1] of inputs whose largest size is `amax`."""
    form = FORMATS[algo]
    wanted = torch.as_tensor(amax, dtype=torch.float32).reshape(1) / form.input_span
    return _power_of_two(wanted) if form.inputs == "blocks" else tidy(wanted)


def input_on_grid(x: torch.Tensor, scale: torch.Tensor, algo: str) -> torch.Tensor:
    form = FORMATS[algo]
    if form.inputs != "blocks":
        return to_grid(x / scale, form.number) * scale
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    second = scale[..., None] if scale.dim() == x.dim() else scale
    wanted = blocks.abs().amax(-1, keepdim=True) / (form.number.largest * second)
    by = wanted.clamp(max=FP8.largest).to(torch.float8_e4m3fn).float() * second
    return (to_grid(blocks / by.where(by > 0, 1.0), form.number) * by).reshape(x.shape)


def pack(weight: torch.Tensor, scale: torch.Tensor, algo: str, zero: torch.Tensor | None = None) -> np.ndarray:
    """The stored matrix: float8_e4m3fn or int8 [out, in], or uint8 [out, in / 2] with the earlier number in the low half."""
    number = FORMATS[algo].number
    values, by = _grouped(weight, scale)
    steps = values / by if zero is None else torch.round(values / by) + zero[..., None]
    steps = to_grid(steps, number).reshape(weight.shape)
    if number == FP4:
        return pack_four(steps.numpy(force=True).astype(ml_dtypes.float4_e2m1fn).view(np.int8))
    if number.is_float:
        return steps.to(torch.float8_e4m3fn).view(torch.uint8).numpy(force=True).view(ml_dtypes.float8_e4m3fn)
    numbers = steps.to(torch.int8).numpy(force=True)
    return numbers if number.per_item == 1 else pack_four(numbers)


def pack_points(zero: torch.Tensor, algo: str) -> np.ndarray:
    """Zero points [out, groups] as they are stored."""
    number, values = FORMATS[algo].number, zero.to(torch.int8).numpy(force=True)
    if number.per_item == 1:
        return values
    shape = number.stored_shape(values.shape)
    return pack_four(np.pad(values.reshape(1, -1), ((0, 0), (0, values.size % 2)))).reshape(shape)


def stored_scale(tensors: Mapping[str, np.ndarray], module: str, algo: str) -> np.ndarray:
    """The scales of a layer that is stored, float32; those of blocks times the second one."""
    scale = tensors[f"{module}.{FORMATS[algo].scale_name}"].astype(np.float32)
    return scale * tensors[f"{module}.{SECOND}"] if FORMATS[algo].scales == "block" else scale


def two_scales(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(E4M3 scales of blocks, the second scale [1]) of their products: with the smallest second scale, all that had another have it."""
    second = _power_of_two(torch.tensor(float(scale.max()) / FP8.largest)).reshape(1).numpy()
    return (scale / second).astype(ml_dtypes.float8_e4m3fn), second


def unpack(stored: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None, *, algo: str = "") -> np.ndarray:
    """Inverse of `pack` up to the grid: what a stored matrix stands for, [out, in]; `zero` as `pack_points` makes it. `algo` tells two
    types of 4 bits apart. NumPy alone."""
    if algo and FORMATS[algo].number == FP4:
        values = unpack_e2m1(stored)
    else:
        values = (unpack_four(stored) if stored.dtype == np.uint8 else stored).astype(np.float32)
    steps = values.reshape(*scale.shape, -1)
    if zero is not None:
        points = unpack_four(zero.reshape(-1)) if zero.dtype == np.uint8 else zero.reshape(-1)
        steps = steps - points[: scale.size].reshape(*scale.shape, 1)
    return (steps * scale[..., None].astype(np.float32)).reshape(values.shape)
