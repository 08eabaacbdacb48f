"""The KV cache in 8 bits: one scale a layer, and how much error attention makes of it.

A model without norms on queries and keys may have key channels that are far larger than the rest, a constant from the key's bias. One scale
for all of them then leaves the others a few steps of the grid; Qwen2.5 is known to break so. It is measured here, on held-out rows, and
refused with the layer's name rather than shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from trtllm_thoughtx.calibrate.quantize import grid
from trtllm_thoughtx.calibrate.quantize.model import Layer, Rotary, device
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families.formats import NUMBERS

Cache = Callable[[torch.Tensor], torch.Tensor]
MAX_ERROR = 0.01  # of the energy of an attention's result


def scale_of(layer: Layer, rows: Iterable[torch.Tensor], rotary: Rotary, kv_algo: str) -> torch.Tensor:
    """The scale [1] of a layer's keys (as they are cached, rotated) and values. FP8: at least 1, as ModelOpt writes it; the type has
    range enough."""
    amax = torch.zeros(1)

    def look(x: torch.Tensor) -> torch.Tensor:
        amax.copy_(torch.maximum(amax, x.abs().amax().cpu()))
        return x

    for x in rows:
        layer.forward(x, rotary, cache=look)
    scale = grid.tidy(amax / NUMBERS[kv_algo].largest)
    return scale.clamp(min=1.0) if NUMBERS[kv_algo].is_float else scale


def on_grid(scale: torch.Tensor, kv_algo: str) -> Cache:
    """Keys or values as they come back from the cache."""
    scale = scale.to(device())
    return lambda x: grid.to_grid(x / scale, NUMBERS[kv_algo]) * scale


def error_share(layer: Layer, rows: Iterable[torch.Tensor], rotary: Rotary, cache: Cache, kv_algo: str) -> float:
    """Share of the energy of the attention's result that the rounded cache changes; E166 when it is too much."""
    error = energy = 0.0
    for x in rows:
        seen: list[torch.Tensor] = []

        def linear(module: str, h: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            if module == "attention.dense":
                seen.append(h)
            return layer.plain(module, h)

        layer.forward(x, rotary, linear)
        layer.forward(x, rotary, linear, cache)
        error += float((seen[1] - seen[0]).double().square().sum())
        energy += float(seen[0].double().square().sum())
    share = error / energy if energy else 0.0
    if share > MAX_ERROR:
        why = f"rounding keys and values changes {share:.2g} of the energy of the attention's result, at most {MAX_ERROR:g} is allowed"
        if not layer.config.qk_norm:
            why += "; the model has no norms on queries and keys, so a few key channels may be far larger than the rest"
        fix = "leave --kv_cache_dtype out: the cache then stays in the engine's type"
        raise ThoughtxError("E166", f"the KV cache of {layer.name} does not survive {kv_algo}", where=layer.name, why=why, fix=fix)
    return share
