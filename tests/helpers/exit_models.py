"""A random checkpoint that carries a made-up exit head and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny import write_tiny

from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.checkpoint.exits import ExitAdapter, ExitHead, ExitWeights, write_exits
from trtllm_thoughtx.checkpoint.weights import open_weights


def some_exits(hidden: int, layers: tuple[int, ...] = (), rank: int = 4, seed: int = 0) -> ExitWeights:
    rng = np.random.default_rng(seed)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) / np.float32(4)

    head = ExitHead(noise(2, hidden), noise(2), 0.75)
    adapters = tuple(
        ExitAdapter(n, 1 + noise(hidden), noise(rank, hidden), noise(hidden, rank), noise(1, hidden), noise(1), 0.5) for n in layers
    )
    return ExitWeights(head, adapters, {"made": "up"})


def checkpoint(root: Path, exits: ExitWeights, **options: Any) -> Path:
    """A random TensorRT-LLM checkpoint that carries `exits`."""
    write_tiny(root / "hf", **options)
    convert(root / "hf", root / "ckpt")
    with open_weights(root / "ckpt") as source:
        write_exits(root / "ckpt", exits, source.config)
    return root / "ckpt"
