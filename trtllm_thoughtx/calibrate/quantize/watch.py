"""One linear layer of the walk: what is seen of its inputs, which grid it gets, what that does to held-out rows, and its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trtllm_thoughtx.calibrate.quantize import grid
from trtllm_thoughtx.calibrate.quantize.search import Inputs, Quantized, search
from trtllm_thoughtx.config import QuantConfig
from trtllm_thoughtx.families.formats import FORMATS
from trtllm_thoughtx.families.quantization import SECOND, stored_as

NUM_SAMPLED = 256  # rows of inputs that a search compares candidates on
FLOAT16_LARGEST = 65504.0
PANEL = 512  # rows of a Hessian that are summed at a time


class Watch:
    """Collects `Inputs` of one unit over all calibrating rows, in their order."""

    def __init__(self, picks: Sequence[Sequence[int]], rounding: str = "nearest") -> None:
        self.picks, self.rows, self.is_first, self.num, self.num_sequences = picks, [], [], 0, 0
        self.amax: torch.Tensor | None = None
        self.rounding, self.hessian = rounding, None

    rows: list[torch.Tensor]
    is_first: list[bool]
    hessian: torch.Tensor | None

    def add(self, x: torch.Tensor, row: int) -> None:
        size = x.abs()
        if self.amax is None:
            self.amax = torch.zeros_like(size[0])
            self.halves = [torch.zeros_like(self.amax), torch.zeros_like(self.amax)]
            self.sum, self.squares = torch.zeros_like(self.amax, dtype=torch.float64), torch.zeros_like(self.amax, dtype=torch.float64)
        largest = size.amax(0)
        self.amax = torch.maximum(self.amax, largest)
        self.halves[row % 2] = torch.maximum(self.halves[row % 2], largest)
        self.sum += size.double().sum(0)
        self.squares += x.double().square().sum(0)
        self.num += len(x)
        self.num_sequences += 1
        self.rows.append(x[list(self.picks[row])])
        self.is_first += [row % 2 == 0] * len(self.picks[row])
        if self.rounding == "gptq":
            num = x.shape[1]
            self.hessian = torch.zeros(num, num, device=x.device) if self.hessian is None else self.hessian
            for at in range(0, num, PANEL):  # the upper half; the lower one is the same
                self.hessian[at : at + PANEL, at:].addmm_(x[:, at : at + PANEL].T, x[:, at:])

    def inputs(self) -> Inputs:
        assert self.amax is not None
        rows = torch.cat(self.rows)
        first, second = self.halves if bool(self.halves[1].any()) else (self.amax, self.amax)
        is_first = torch.tensor(self.is_first, device=rows.device)
        mean, square = (self.sum / self.num).float(), (self.squares / self.num).float()
        hessian = None
        if self.hessian is not None:
            upper = torch.triu(self.hessian).div_(self.num)
            hessian, self.hessian = upper + torch.triu(upper, 1).T, None
        return Inputs(self.amax, (first, second), is_first, mean, square, rows, self.num_sequences, hessian, self.rounding != "plain")


class Judge:
    """What a found grid does to held-out rows of one linear layer."""

    def __init__(self, found: Quantized, algo: str) -> None:
        self.found, self.algo = found, algo
        self.error = self.energy = 0.0
        self.num_clipped = self.num = 0

    def add(self, x: torch.Tensor, wanted: torch.Tensor, got: torch.Tensor) -> None:
        self.error += float((got - wanted).double().square().sum())
        self.energy += float(wanted.double().square().sum())
        if self.found.input_scale is not None:
            scaled = (x if self.found.factor is None else x * self.found.factor).abs()
            self.num_clipped += int((scaled > self.found.input_scale * FORMATS[self.algo].input_span).sum())
        self.num += x.numel()

    def facts(self) -> dict[str, Any]:
        share = self.error / self.energy if self.energy else 0.0
        return {
            "sqnr_db": float(-10 * np.log10(max(share, 1e-30))),
            "error_share": share,
            "clipped_share": self.num_clipped / max(self.num, 1) if self.found.input_scale is not None else None,
        }


def picks_of(lengths: Sequence[int], num: int = NUM_SAMPLED) -> list[list[int]]:
    """Positions of each row, spread evenly over all tokens: the sample depends on the rows alone, not on how they are grouped."""
    starts = np.cumsum([0, *lengths])
    wanted = np.unique(np.linspace(0, starts[-1] - 1, min(num, int(starts[-1]))).round().astype(int))
    return [(wanted[(wanted >= a) & (wanted < b)] - a).tolist() for a, b in itertools.pairwise(starts)]


def choose(prefix: str, weights: dict[str, torch.Tensor], seen: Inputs, quant: QuantConfig) -> tuple[dict[str, Quantized], dict[str, Any]]:
    """Grids of layers that read the same inputs: one search for all, so that they share factor, input scale and (FP8) weight scale.

    A layer whose inputs are always zero stays as it is: no scale stands for them.
    """
    assert quant.algo is not None
    covered = [module for module in weights if quant.covers(f"{prefix}.{module}".strip("."))]
    amax = float(seen.amax.amax())
    facts: dict[str, Any] = {}
    for module, weight in weights.items():
        facts[f"{prefix}.{module}".strip(".")] = {
            "quantized": module in covered and amax > 0,
            "input_amax": amax,
            "weight_amax": float(weight.abs().amax()),
            "num_weights": weight.numel(),
            "num_zero_rows": int((weight.abs().amax(1) == 0).sum()),
            "exceeds_float16": amax > FLOAT16_LARGEST,
        }
    if not covered or not amax:
        return {}, facts
    made: dict[str, Quantized] = {}
    forms = {module: stored_as(quant, f"{prefix}.{module}".strip(".")) or quant for module in covered}
    for form in dict.fromkeys(forms.values()):
        together, first = [module for module in covered if forms[module] == form], 0
        found = search(torch.cat([weights[module] for module in together]), seen, form)
        for module in together:
            end = first + weights[module].shape[0]
            made[module] = found.part(first, end, has_own_scales=FORMATS[form.algo or ""].scales != "tensor")
            facts[f"{prefix}.{module}".strip(".")] |= {
                "alpha": found.alpha,
                "search_error": found.error,
                "search_error_nearest": found.error_nearest,
                "rounding": found.rounding,
                "rounding_fallback": found.why,
            }
            first = end
    return made, facts


def stored_tensors(name: str, one: Quantized, quant: QuantConfig) -> dict[str, np.ndarray]:
    """A quantized layer's tensors as a checkpoint holds them; `name` is its whole one."""
    quant = stored_as(quant, name) or quant
    algo = quant.algo or ""
    form, shape = FORMATS[algo], FORMATS[algo].scale_shape(one.matrix.shape[0], one.matrix.shape[1], quant.group_size)
    tensors, scale = {f"{name}.weight": grid.pack(one.matrix, one.scale, algo, one.zero)}, one.scale.reshape(shape).numpy(force=True)
    if form.scales == "block":
        tensors[f"{name}.{form.scale_name}"], tensors[f"{name}.{SECOND}"] = grid.two_scales(scale)
    else:
        tensors[f"{name}.{form.scale_name}"] = scale.astype(quant.scale_dtype)
    if one.input_scale is not None:
        tensors[f"{name}.activation_scaling_factor"] = one.input_scale.numpy(force=True)
    if one.zero is not None:
        tensors[f"{name}.zero"] = grid.pack_points(one.zero, algo)
    if one.factor is not None:
        tensors[f"{name}.prequant_scaling_factor"] = one.factor.numpy(force=True)
    return tensors
