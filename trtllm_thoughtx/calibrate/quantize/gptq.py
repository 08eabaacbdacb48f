"""Rounding a matrix so that the errors of its columns make up for each other: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

What rounding costs is measured on the layer's outputs: for inputs x with H = mean(x x^T), a row w that becomes q costs (w - q) H (w - q)^T.
Columns are rounded in order, and each one's error is taken out of the columns that are still to come, by the inverse of H. A group's scale
and zero point are chosen when its first column is reached, for the weights as they are by then, each weighted by its inputs' energy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtllm_thoughtx.calibrate.quantize import grid
from trtllm_thoughtx.config import QuantConfig
from trtllm_thoughtx.families.formats import FORMATS, Number

DAMPING = (0.1, 1.0, 10.0)  # added to H's diagonal, in units of its mean: the first with which H has an inverse
BLOCK = 128  # columns whose errors reach the rest of the matrix together
ROWS = 4096  # of a matrix that are rounded at a time
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of the scale that clips nothing
# Of E2M1 numbers, whose steps are 1 from 2 to 4 and 2 above: a block may be better off with its largest at 4. E4M3 has no scales between.
BLOCK_SHRINKS = (1.0, 0.875, 0.8125, 0.75, 0.6875, 1.125, 1.25, 1.375, 1.5)


@dataclass(frozen=True)
class Rounded:
    """`matrix` is what the stored numbers stand for; scale and zero point (None: without) as the format has them."""

    matrix: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


def nearest(weight: torch.Tensor, quant: QuantConfig, energy: torch.Tensor | None = None) -> Rounded:
    """Every weight to the nearest number of its group, with the scale that costs least where `energy` [in] of the inputs is known."""
    groups = weight.reshape(weight.shape[0], -1, _width(weight, quant))
    second = grid.second_scale(weight)
    parts = [best_scale(groups[:, i].T, _of(energy, i, groups.shape[2]), quant, second) for i in range(groups.shape[1])]
    scale = torch.stack([part[0] for part in parts], 1)
    zero = torch.stack([part[1] for part in parts], 1) if quant.zero_point else None
    return _made(grid.on_grid(weight, scale, quant.algo or "", zero), scale, zero, quant)


def compensated(weight: torch.Tensor, hessian: torch.Tensor, quant: QuantConfig) -> Rounded | None:
    """The float32 matrix [out, in] rounded for inputs of this `hessian` [in, in]; None when it has no inverse, however damped."""
    inverse = inverse_factor(hessian)
    if inverse is None:
        return None
    energy, second = hessian.diagonal(), grid.second_scale(weight)
    parts = [_rows(weight[at : at + ROWS], inverse, energy, quant, second) for at in range(0, weight.shape[0], ROWS)]
    matrix, scale, zero = (torch.cat([part[i] for part in parts]) for i in range(3))
    return _made(matrix, scale, zero if quant.zero_point else None, quant)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """The upper Cholesky factor of the inverse of H, damped. Channels that were always zero cost nothing, and are left to themselves."""
    if not bool(torch.isfinite(hessian).all()):
        return None
    diagonal = hessian.diagonal()
    mean = diagonal[diagonal > 0].mean() if bool((diagonal > 0).any()) else None
    if mean is None or not float(mean) > 0:
        return None
    for damping in DAMPING:
        damped = hessian / mean
        damped.diagonal().add_(damping).add_((diagonal == 0).float())
        lower, bad = torch.linalg.cholesky_ex(damped)
        if int(bad):
            continue
        upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(bad) and bool(torch.isfinite(upper).all()):
            return upper
    return None


def best_scale(
    weight: torch.Tensor, energy: torch.Tensor | None, quant: QuantConfig, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero point) of each column of `weight` [group, rows], of those tried the one with the least error weighted by `energy`
    [group]; without `energy` the one that clips nothing. `second` is the matrix's second scale, for formats that have one."""
    form = FORMATS[quant.algo or ""]
    number, has_second = form.number, form.scales == "block"
    if quant.zero_point:
        low, high = weight.amin(0).clamp(max=0), weight.amax(0).clamp(min=0)
        whole, middle = (high - low) / (number.largest - number.lowest), (low + high) / 2
    else:
        whole, middle = weight.abs().amax(0) / number.largest, None
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    least = torch.full_like(whole, float("inf"))
    shrinks = BLOCK_SHRINKS if has_second else SHRINKS
    for shrink in shrinks if energy is not None else shrinks[:1]:
        scale = grid.of_blocks(whole * shrink, second) if has_second else grid.tidy(whole * shrink, up=shrink == 1)
        zero = torch.zeros_like(scale)
        if middle is not None:
            zero = ((number.lowest + number.largest) / 2 - middle / scale).round().clamp(number.lowest, number.largest)
        if energy is None:
            return scale, zero
        steps = _steps(weight / scale, zero, number)
        cost = ((steps * scale - weight).square() * energy[:, None]).sum(0)
        better = cost < least
        found = [(torch.where(better, scale, found[0][0]), torch.where(better, zero, found[0][1]))] if found else [(scale, zero)]
        least = torch.minimum(least, cost)
    return found[0]


def _steps(values: torch.Tensor, zero: torch.Tensor, number: Number) -> torch.Tensor:
    """The nearest numbers, less the zero point."""
    if number.is_float:
        return grid.to_grid(values, number)
    return values.round_().add_(zero).clamp_(number.lowest, number.largest).sub_(zero)


def _rows(
    weight: torch.Tensor, inverse: torch.Tensor, energy: torch.Tensor, quant: QuantConfig, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(matrix, scales, zero points) of some rows; columns are worked on as rows of the transposed matrix."""
    number, width = FORMATS[quant.algo or ""].number, _width(weight, quant)
    rest, done = weight.T.clone(memory_format=torch.contiguous_format), torch.empty(weight.shape[1], weight.shape[0], device=weight.device)
    whole = width == weight.shape[1]
    scales, zeros = [], []
    if whole:  # a scale for a row: chosen before its weights change
        scales, zeros = ([part] for part in best_scale(rest, energy, quant, second))
    step = BLOCK if whole else max(BLOCK // width, 1) * width
    for begin in range(0, len(rest), step):
        end = min(begin + step, len(rest))
        block, errors, part = (
            rest[begin:end],
            torch.empty(end - begin, weight.shape[0], device=weight.device),
            inverse[begin:end, begin:end],
        )
        for i in range(end - begin):
            if not whole and (begin + i) % width == 0:
                scale, zero = best_scale(block[i : i + width], energy[begin + i : begin + i + width], quant, second)
                scales.append(scale)
                zeros.append(zero)
            done[begin + i] = _steps(block[i] / scales[-1], zeros[-1], number).mul_(scales[-1])
            errors[i] = (block[i] - done[begin + i]) / part[i, i]
            block[i + 1 :].addr_(part[i, i + 1 :], errors[i], alpha=-1)
        rest[end:].addmm_(inverse[begin:end, end:].T, errors, alpha=-1)
    return done.T.contiguous(), torch.stack(scales, 1), torch.stack(zeros, 1)


def _width(weight: torch.Tensor, quant: QuantConfig) -> int:
    """Inputs that share a scale."""
    return quant.group_size if FORMATS[quant.algo or ""].is_grouped else weight.shape[1]


def _of(energy: torch.Tensor | None, index: int, width: int) -> torch.Tensor | None:
    return None if energy is None else energy[index * width : (index + 1) * width]


def _made(matrix: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant: QuantConfig) -> Rounded:
    shape = FORMATS[quant.algo or ""].scale_shape(matrix.shape[0], matrix.shape[1], quant.group_size)
    return Rounded(matrix, scale.reshape(shape), zero)
