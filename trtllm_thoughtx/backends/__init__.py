"""Backends: each builds engine files from a graph, runs them, or both. Only this package imports a runtime.

| backend       | builds on            | runs on                         | module                 |
|---------------|----------------------|---------------------------------|------------------------|
| onnxruntime   | any CPU              | CPU; CUDA provider when present | backends.onnxruntime   |
| tensorrt-rtx  | any CPU, no GPU      | RTX GPUs                        | backends.tensorrt      |
| tensorrt      | a host with its GPU  | that GPU                        | backends.tensorrt      |

`BACKENDS` has one record for each; everything else in the package that depends on a backend reads it from there.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trtllm_thoughtx.config import BuildConfig, ModelConfig, PartFiles
from trtllm_thoughtx.errors import ThoughtxError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What the rest of the package must know of a backend. `module`, `extra` and `oldest`: what is imported, how it is installed;
    `runner`: module and class of its `Runner`, both called as `open_runner` calls them."""

    name: str
    module: str
    runner: str
    extra: str = ""
    oldest: tuple[int, ...] = ()
    bound_to: int = 0  # leading numbers of its version that a plan must share with the runtime; 0: any version from `oldest` on
    plan_suffix: str = ""  # of the plan beside a part's graph; empty: the graph and its weights are the engine
    has_targets: bool = False  # a plan is for the compute capabilities that are named, not for the GPU at hand
    takes_plugins: bool = False
    runs_graph: bool = False  # hidden states can be tapped, and quantized products run as they stand (exact)
    kv_algos: tuple[str, ...] = ()  # quantized KV caches that it holds
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")  # computed in without emulation

    @property
    def builds_plans(self) -> bool:
        return bool(self.plan_suffix)


# In the order of preference for running.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="onnxruntime",
            module="onnxruntime",
            runner="onnxruntime.OnnxRuntimeRunner",
            oldest=(1, 24),
            runs_graph=True,
            kv_algos=("INT8",),
            dtypes=("float32", "float16"),
        ),
        Backend(
            name="tensorrt",
            module="tensorrt",
            runner="trt_runner.TensorRTRunner",
            extra="tensorrt",
            oldest=(10, 15),  # the first whose parser has opset 24's attention operators
            bound_to=4,
            plan_suffix=".trt.engine",
            takes_plugins=True,
        ),
        Backend(
            name="tensorrt-rtx",
            module="tensorrt_rtx",
            runner="trt_runner.TensorRTRunner",
            extra="rtx",
            oldest=(1, 7),
            bound_to=3,  # a plan is valid for one release
            plan_suffix=".engine",
            has_targets=True,
        ),
    )
}


def keeps_weights(names: Iterable[str]) -> bool:
    """Does one of these backends run the graph itself, so that its weights are written beside it?"""
    return any(not BACKENDS[name].builds_plans for name in names)


class Runner(Protocol):
    """A loaded engine: all parts of one model and their KV cache. Shapes as in `graph.decoder`."""

    is_exact: bool  # quantized products are computed as the graph has them, with no rounding of a faster operator's own
    max_logit_rows: int  # how many rows of logits one call can return for a sequence
    tapped: dict[int, np.ndarray]  # hidden states [B * S, H] of the last call by layer (-1: embedding); empty unless it taps layers

    def start(self, batch_size: int) -> None:
        """Forget everything; room for `batch_size` sequences of kv_capacity slots."""
        ...

    def exchange(self, a: int, b: int, num_slots: int) -> None:
        """Two rows of the KV cache change places, as far as their first `num_slots` slots, at least."""
        ...

    def set_adapter(self, row: int, matrices: Mapping[str, np.ndarray]) -> None:
        """A row has these matrices of an adapter, by input, and zeros for others; of engines with `max_lora_rank`. Rows that change places
        take theirs along, a new start leaves zeros."""
        ...

    def copy(self, source: int, target: int, num_slots: int) -> None:
        """The first `num_slots` slots, at least, of a row of the KV cache into another one."""
        ...

    def run(self, feeds: Mapping[str, np.ndarray], first: int, last: int, row: int = 0) -> dict[str, np.ndarray]:
        """One call through the parts `first` to `last - 1`; the KV cache is updated in place, of its rows `row` to `row` + B - 1.
        `feeds` by input name (input_ids, positions, kv_positions, write_indices, logit_indices, chunk_size), as far as these parts take
        them, and `hidden_states` [B, S, H] unless the first part is among them. Outputs of the last of them by name: hidden_states_out
        [B, S, H], draft_states [B, S, H] and draft_confidence [B, S] where it has an exit adapter; logits float32 [B, K, vocab], exit
        [B, K, 2]."""
        ...

    def close(self) -> None: ...


def open_runner(
    root: Path,
    parts: list[PartFiles],
    backend: str,
    config: ModelConfig,
    build: BuildConfig,
    *,
    num_threads: int | None,
    tap_layers: bool,
    exact: bool = False,
) -> Runner:
    """Load the engine in `root` for `backend`; the caller has checked its files against the manifest.

    `tap_layers` (of backends that run the graph, else E001) also keeps every layer's hidden state of the last call, for validation.
    `exact` (the same) runs quantized products as the graph has them, not on faster operators that round a little more.
    """
    for name, is_given in (("tap_layers", tap_layers), ("exact", exact)):
        if is_given and not BACKENDS[backend].runs_graph:
            why = f"a {backend} plan is run as it was built; hidden states and unfused products are those of the graph"
            fix = 'load the engine with backend="onnxruntime", or leave it out'
            raise ThoughtxError("E001", f"{name} cannot be used with {backend}", where=str(root), why=why, fix=fix)
    module, name = BACKENDS[backend].runner.split(".")
    opened = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    more = {"num_threads": num_threads, "tap_layers": tap_layers, "exact": exact} if BACKENDS[backend].runs_graph else {"backend": backend}
    runner: Runner = opened(root, parts, config, build, **more)
    return runner
