"""Which factors per input channel, and which scales, cost a linear layer least: measured on rows of its own inputs.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) moves the size of outlier channels into the matrix, AWQ (Lin et al. 2023, arXiv 2306.00978)
protects the channels that matter; both are a factor per channel, x * p and W / p, of one exponent. Each layer tries several, and none
at all, so that on these rows it never does worse than plain rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from trtllm_thoughtx.calibrate.quantize import gptq, grid
from trtllm_thoughtx.config import QuantConfig
from trtllm_thoughtx.families.formats import FORMATS

ALPHAS = tuple(round(0.05 * i, 2) for i in range(1, 20))
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
MAX_OUTPUTS = 4096  # rows of a matrix that candidates are compared on
FEW_SEQUENCES, QUIET = 32, 0.8  # below so many, the share of channels whose size is taken to be unknown


@dataclass
class Inputs:
    """What was seen of the inputs of one linear layer. All per channel [in]; `rows` [n, in] is an even sample of them.

    Every other sequence belongs to half 0, the rest to half 1: a candidate's input scale is taken from the half that a row is not in, so
    that one which clips numbers it has not seen is not chosen.
    """

    amax: torch.Tensor
    halves: tuple[torch.Tensor, torch.Tensor]  # amax of each
    is_first: torch.Tensor  # [n], rows of half 0
    mean: torch.Tensor  # of the absolute values
    square: torch.Tensor  # mean
    rows: torch.Tensor
    num_sequences: int  # that were seen, with or without a row in the sample
    hessian: torch.Tensor | None = None  # mean of x x^T [in, in], where the matrix is rounded by it
    fits_scales: bool = True  # scales of blocks


@dataclass
class Quantized:
    """A linear layer on its grid. `matrix` is what the stored one stands for; errors are shares of the outputs' energy."""

    matrix: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None
    factor: torch.Tensor | None
    alpha: float | None
    error: float
    error_nearest: float  # of plain rounding
    zero: torch.Tensor | None = None  # zero points of groups
    rounding: str = "nearest"
    why: str | None = None  # it is not the rounding that was asked for
    algo: str | None = None  # where it is not that of the other layers

    def part(self, first: int, end: int, *, has_own_scales: bool) -> Quantized:
        """Some rows of it."""
        scale = self.scale[first:end] if has_own_scales else self.scale
        return replace(self, matrix=self.matrix[first:end], scale=scale, zero=None if self.zero is None else self.zero[first:end])

    def inputs(self, x: torch.Tensor, algo: str) -> torch.Tensor:
        """The inputs as the graph computes with them."""
        x = x if self.factor is None else x * self.factor
        return x if self.input_scale is None else grid.input_on_grid(x, self.input_scale, self.algo or algo)


def widened(weight: torch.Tensor, input_amax: float, quant: QuantConfig) -> Quantized:
    """A matrix in a format without groups or searches, as layers of 8 bits beside those of fewer are; `quant` is theirs."""
    algo = quant.algo or ""
    scale = grid.weight_scale(weight, algo, quant.group_size)
    inputs = grid.input_scale(input_amax, algo).to(weight.device) if FORMATS[algo].is_static else None
    return Quantized(grid.on_grid(weight, scale, algo), scale, inputs, None, None, 0.0, 0.0, algo=algo)


def search(weight: torch.Tensor, seen: Inputs, quant: QuantConfig) -> Quantized:
    """The best grid for a float32 matrix [out, in] (of several layers that share inputs: stacked)."""
    assert quant.algo is not None
    algo, size = quant.algo, quant.group_size
    step = -(-weight.shape[0] // MAX_OUTPUTS)
    wanted = seen.rows @ weight[::step].T
    energy = float(wanted.double().square().sum()) or 1.0
    form = FORMATS[algo]
    static = form.is_static

    def error(factor: torch.Tensor | None, scale: torch.Tensor | None = None) -> float:
        part = weight[::step] if factor is None else weight[::step] / factor
        if scale is None:
            whole = weight if form.scales == "tensor" and factor is None else part
            scale = grid.weight_scale(whole, algo, size)
        else:
            scale = scale[::step]
        x = seen.rows if factor is None else seen.rows * factor
        if static:
            first, second = (_input_scale(half, factor, algo) for half in seen.halves)
            x = grid.input_on_grid(x, torch.where(seen.is_first, second, first)[:, None], algo)
        return float((x @ grid.on_grid(part, scale, algo).T - wanted).double().square().sum()) / energy

    nearest = error(None)
    best, alpha, factor = nearest, None, None
    if quant.prequant:
        for tried in ALPHAS:
            candidate = factors(weight, seen, tried, algo, size)
            cost = error(candidate)
            if cost < best:
                best, alpha, factor = cost, tried, candidate
    scaled = weight if factor is None else weight / factor
    scale = grid.weight_scale(scaled, algo, size)
    if form.search == "awq" and quant.prequant:
        clipped = _shrunk(scaled, scale, seen.square if factor is None else seen.square * factor.square(), algo)
        cost = error(factor, clipped)
        if cost < best:
            best, scale = cost, clipped
    if quant.prequant and factor is None:
        factor = torch.ones_like(seen.amax)
    static_scale = _input_scale(seen.amax, factor, algo) if static else None
    found = Quantized(grid.on_grid(scaled, scale, algo), scale, static_scale, factor, alpha, best, nearest)

    def rounded(made: gptq.Rounded, rounding: str) -> Quantized:
        x = seen.rows if factor is None else seen.rows * factor
        cost = float((x @ made.matrix[::step].T - wanted).double().square().sum()) / energy
        return replace(found, matrix=made.matrix, scale=made.scale, zero=made.zero, error=cost, rounding=rounding)

    if quant.zero_point or (form.scales == "block" and seen.fits_scales):
        energy_of = seen.square if factor is None else seen.square * factor.square()
        found = rounded(gptq.nearest(scaled, quant, energy_of), "nearest")
    if seen.hessian is None:
        return found
    made = gptq.compensated(scaled, seen.hessian if factor is None else seen.hessian * torch.outer(factor, factor), quant)
    if made is None:
        return replace(found, why="the sum of the products of its inputs has no inverse")
    return min(found, rounded(made, "gptq"), key=lambda one: one.error)


def factors(weight: torch.Tensor, seen: Inputs, alpha: float, algo: str, group_size: int) -> torch.Tensor:
    """The factor of each input channel for one exponent, about 1 on average; 1 for a channel that was always zero.

    Both rules weigh the inputs' size against the matrix's, so that a channel which is large in one and small in the other gets the factor
    that it would have had if the two were alike.

    SmoothQuant makes quiet channels as large as the scale holds. In a few sequences a channel may be quiet by chance, and clips once it is
    not; no half of them shows it. Then only the loudest channels are made smaller, and the rest keep their headroom.
    """
    if FORMATS[algo].search == "smoothquant":  # both sides' largest values
        x, w = seen.amax.double(), weight.abs().amax(0).double()
        if seen.num_sequences < FEW_SEQUENCES:
            x = x.clamp(min=float(torch.quantile(x, QUIET)))
        wide = w.clamp(min=1e-12) ** (1 - alpha) / x.clamp(min=1e-12) ** alpha
    else:  # AWQ: the inputs' mean size, and the mean share that a weight has of its group's largest
        groups = weight.abs().reshape(weight.shape[0], -1, group_size)
        share = (groups / groups.amax(2, keepdim=True).clamp(min=1e-12)).reshape(weight.shape).mean(0).double()
        wide = share ** (1 - alpha) / seen.mean.double().clamp(min=1e-12) ** alpha
    live = (seen.amax > 0) & (wide > 0)
    logs = torch.log(wide)[live]
    wide = torch.where(live, torch.exp(torch.log(wide) - logs.mean()) if len(logs) else wide, 1.0)
    return grid.tidy(wide.clamp(2.0**-12, 2.0**12), up=False)


def _input_scale(amax: torch.Tensor, factor: torch.Tensor | None, algo: str) -> torch.Tensor:
    return grid.input_scale((amax if factor is None else amax * factor).amax(), algo)


def _shrunk(weight: torch.Tensor, scale: torch.Tensor, square: torch.Tensor, algo: str) -> torch.Tensor:
    """For each group the share of its scale that costs least, each channel's error weighted by the energy of its inputs."""
    best, chosen = torch.full_like(scale, float("inf")), scale
    for shrink in SHRINKS:
        tried = grid.tidy(scale * shrink)
        cost = ((grid.on_grid(weight, tried, algo) - weight).square() * square).reshape(*scale.shape, -1).sum(-1)
        chosen, best = torch.where(cost < best, tried, chosen), torch.minimum(best, cost)
    return chosen
