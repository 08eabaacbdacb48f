"""How long a walk will take, before it starts: one row of noise through the first layer, and one search of that layer's grids."""

from __future__ import annotations

import time

import torch

from trtllm_thoughtx.calibrate.quantize.layers import Walk
from trtllm_thoughtx.calibrate.quantize.model import UNITS, Layer
from trtllm_thoughtx.calibrate.quantize.watch import NUM_SAMPLED, Watch, choose


def seconds(walk: Walk) -> float:
    """About how long `walk.run` takes; layers of an earlier run are left out."""
    config, length = walk.source.config, sorted(walk.lengths)[len(walk.lengths) // 2]
    with torch.inference_mode():
        layer = Layer(walk.source, 0)
        x = torch.randn(length, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(walk.rotary.cos.device)
        watches = {unit[0]: Watch([list(range(min(length, NUM_SAMPLED)))], walk.rounding) for unit in UNITS}

        def linear(module: str, h: torch.Tensor) -> torch.Tensor:
            if module in watches:
                watches[module].add(h, 0)
            return layer.plain(module, h)

        layer.forward(x, walk.rotary, linear)  # first calls cost more
        began = time.perf_counter()
        layer.forward(x, walk.rotary)
        forward = time.perf_counter() - began
        watches = {name: Watch([[0]], walk.rounding) for name in watches}
        layer.forward(x, walk.rotary, linear)
        watched = time.perf_counter() - began - forward
        for unit in UNITS:
            choose(layer.name, {module: layer.weights[f"{module}.weight"] for module in unit}, watches[unit[0]].inputs(), walk.quant)
        searched = time.perf_counter() - began - forward - watched
    held = sum(walk.lengths[row] for row in walk.held)
    rows = sum(walk.lengths[: walk.num_rows])
    tokens = rows * walk.compensates + (2 + len(walk.ways)) * held  # held-out ones also go through the layer as it was, twice
    head = config.vocab_size * config.hidden_size / sum(weight.numel() for weight in layer.weights.values())
    passes = (config.num_layers - walk.resume_point()) * tokens + head * (1 + len(walk.ways)) * held
    layers = config.num_layers - walk.resume_point()
    return forward / length * passes + layers * (watched / length * rows + searched)
