"""Backends: each builds engine files from a graph, runs them, or both. Only this package imports a runtime.

| backend       | builds on            | runs on                         | module                 |
|---------------|----------------------|---------------------------------|------------------------|
| onnxruntime   | any CPU              | CPU; CUDA provider when present | engines.onnxruntime    |
| tensorrt-rtx  | any CPU, no GPU      | RTX GPUs                        | engines.tensorrt       |
| tensorrt      | a host with its GPU  | that GPU                        | engines.tensorrt       |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trtllm_thoughtx.config import BuildConfig, ModelConfig


class Runner(Protocol):
    """A loaded engine: all parts of one model and their KV cache. Shapes as in `graph.decoder`."""

    max_logit_rows: int  # how many rows of logits one step can return for a sequence
    exit_chances: np.ndarray | None  # of the last call: float32 [B, K, 2] (ready to answer, end of a step) of an exit head

    def start(self, batch_size: int) -> None:
        """Forget everything; room for `batch_size` sequences of kv_capacity slots."""
        ...

    def step(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """One call through all parts: feeds by input name (input_ids, positions, kv_positions, write_indices, logit_indices,
        chunk_size) -> logits float32 [B, K, vocab]. The KV cache is updated in place."""
        ...

    def run(self, feeds: Mapping[str, np.ndarray], first: int, last: int) -> dict[str, np.ndarray]:
        """The parts `first` to `last - 1` alone. `feeds` has the inputs of `step`, as far as they take them, and `hidden_states`
        [B, S, H] unless the first part is among them. Outputs of the last of them by name: hidden_states_out [B, S, H], draft_states
        [B, S, H] and draft_confidence [B, S] where it has an exit adapter; logits, exit."""
        ...

    def close(self) -> None: ...


def open_runner(
    root: Path,
    parts: list[dict[str, Any]],
    backend: str,
    config: ModelConfig,
    build: BuildConfig,
    *,
    num_threads: int | None,
    tap_layers: bool,
    exact: bool = False,
) -> Runner:
    """Load the engine in `root` for `backend`; the caller has checked its files against the manifest.

    `tap_layers` (onnxruntime only) also keeps every layer's hidden state of the last step, for validation.
    `exact` (onnxruntime only) runs quantized products as the graph has them, not on faster operators that round a little more.
    """
    if backend == "onnxruntime":
        from trtllm_thoughtx.engines.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(root, parts, config, build, num_threads=num_threads, tap_layers=tap_layers, exact=exact)
    from trtllm_thoughtx.engines.tensorrt import TensorRTRunner

    return TensorRTRunner(root, parts, backend, config, build)
