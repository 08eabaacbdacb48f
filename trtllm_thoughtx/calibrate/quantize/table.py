"""The embedding in 8 bits, a scale for each block of a row, and the head in the same form, tied to it or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from trtllm_thoughtx.calibrate.quantize import grid
from trtllm_thoughtx.calibrate.quantize.model import device
from trtllm_thoughtx.calibrate.quantize.search import Quantized
from trtllm_thoughtx.config import QuantConfig
from trtllm_thoughtx.families.formats import FORMATS

FILE = "embedding.safetensors"
ROWS = 8192  # rounded at a time


def rounded(weight: torch.Tensor, name: str, quant: QuantConfig) -> dict[str, np.ndarray]:
    """The tensors of a matrix [vocabulary, hidden], by their names; `quant` is that of the embedding."""
    algo = quant.algo or ""
    parts = [weight[at : at + ROWS] for at in range(0, len(weight), ROWS)]
    scales = [grid.weight_scale(part, algo, quant.group_size) for part in parts]
    numbers = [grid.pack(part, scale, algo) for part, scale in zip(parts, scales, strict=True)]
    scale = torch.cat(scales).numpy(force=True).astype(quant.scale_dtype)
    return {f"{name}.weight": np.concatenate(numbers), f"{name}.{FORMATS[algo].scale_name}": scale}


def looked_up(tensors: Mapping[str, np.ndarray], name: str, ids: Sequence[int], quant: QuantConfig) -> torch.Tensor:
    """Rows of the embedding, [tokens, hidden] float32, as an engine looks them up."""
    index, scale = np.asarray(ids), tensors[f"{name}.{FORMATS[quant.algo or ''].scale_name}"]
    return torch.from_numpy(grid.unpack(tensors[f"{name}.weight"][index], scale[index])).to(device())


def found(tensors: Mapping[str, np.ndarray], name: str, quant: QuantConfig) -> Quantized:
    """The matrix as a head."""
    scale = tensors[f"{name}.{FORMATS[quant.algo or ''].scale_name}"]
    matrix = torch.from_numpy(grid.unpack(tensors[f"{name}.weight"], scale)).to(device())
    return Quantized(matrix, torch.from_numpy(scale.astype(np.float32)), None, None, None, 0.0, 0.0)
