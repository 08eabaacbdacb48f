"""A quantized linear layer as an engine computes it: as its graph has it, in torch, or on onnxruntime's operators."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from trtllm_thoughtx.backends.ort_product import FusedProduct, kind_of
from trtllm_thoughtx.calibrate.quantize import grid
from trtllm_thoughtx.calibrate.quantize.model import Layer
from trtllm_thoughtx.calibrate.quantize.search import Quantized
from trtllm_thoughtx.checkpoint.tensor_file import doubled
from trtllm_thoughtx.config import QuantConfig
from trtllm_thoughtx.families.formats import FORMATS, FP4


def operators_of(quant: QuantConfig) -> str | None:
    """The operators of `ort_product` that round more than the graph in an engine of this format; None where none does."""
    return kind_of(FORMATS[quant.algo or ""], quant.group_size)


def fused(tensors: Mapping[str, np.ndarray], module: str, algo: str) -> FusedProduct:
    """A layer that is stored, on onnxruntime's operators."""
    stored, scale = tensors[f"{module}.weight"], grid.stored_scale(tensors, module, algo)
    if FORMATS[algo].number == FP4:
        return FusedProduct(doubled(stored), scale / 2)
    return FusedProduct(stored, scale, tensors.get(f"{module}.zero"))


def quantized(layer: Layer, module: str, found: Quantized, algo: str, x: torch.Tensor, product: FusedProduct | None = None) -> torch.Tensor:
    """A linear layer as an engine computes it: as the graph has it, or on onnxruntime's operators."""
    bias = layer.weights.get(f"{module}.bias")
    if product is None:
        return F.linear(found.inputs(x, algo), found.matrix, bias)
    out = on_head(found, x, algo, product)
    return out if bias is None else out + bias


def on_head(found: Quantized, x: torch.Tensor, algo: str, product: FusedProduct | None) -> torch.Tensor:
    """A quantized layer without a bias."""
    if product is None:
        return F.linear(found.inputs(x, algo), found.matrix)
    return torch.from_numpy(product(found.inputs(x, algo).numpy(force=True))).to(x.device)
