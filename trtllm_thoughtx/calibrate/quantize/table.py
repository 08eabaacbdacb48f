"""The embedding in 8 bits, a scale for each row, and the head in the same form, tied to it or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from trtllm_thoughtx.calibrate.quantize import grid
from trtllm_thoughtx.calibrate.quantize.model import device
from trtllm_thoughtx.calibrate.quantize.search import Found
from trtllm_thoughtx.families.formats import FORMATS, OF_EMBEDDING

FILE = "embedding.safetensors"
ROWS = 8192  # rounded at a time
SCALE = FORMATS[OF_EMBEDDING].scale_name


def rounded(weight: torch.Tensor, name: str) -> dict[str, np.ndarray]:
    """The tensors of a matrix [vocabulary, hidden], by their names."""
    parts = [weight[at : at + ROWS] for at in range(0, len(weight), ROWS)]
    scales = [grid.weight_scale(part, OF_EMBEDDING, weight.shape[1]) for part in parts]
    numbers = [grid.pack(part, scale, OF_EMBEDDING) for part, scale in zip(parts, scales, strict=True)]
    return {f"{name}.weight": np.concatenate(numbers), f"{name}.{SCALE}": torch.cat(scales).numpy(force=True)}


def looked_up(tensors: Mapping[str, np.ndarray], name: str, ids: Sequence[int]) -> torch.Tensor:
    """Rows of the embedding, [tokens, hidden] float32, as an engine looks them up."""
    index = np.asarray(ids)
    return torch.from_numpy(grid.unpack(tensors[f"{name}.weight"][index], tensors[f"{name}.{SCALE}"][index])).to(device())


def found(tensors: Mapping[str, np.ndarray], name: str) -> Found:
    """The matrix as a head."""
    scale = tensors[f"{name}.{SCALE}"]
    matrix = torch.from_numpy(grid.unpack(tensors[f"{name}.weight"], scale)).to(device())
    return Found(matrix, torch.from_numpy(scale.copy()), None, None, None, 0.0, 0.0)
