"""Adapters of a running engine that was built with `--max_lora_rank`: a PEFT directory becomes what a row of the graph's inputs takes.

Only products of the layers' matrices can be brought by a row. An adapter that changes more (whole modules, biases, the embedding, DoRA's
magnitudes) is refused here and merged instead: thoughtx-build --lora_dir.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.checkpoint.adapter import Adapter
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.families import tensors_of
from trtllm_thoughtx.graph import lora

Matrices = Mapping[str, np.ndarray]  # by input of the graph, of one row


def read_adapter(path: Path, directory: EngineDir) -> dict[str, np.ndarray]:
    """The matrices of an adapter, its factor in `up`, in the type of the engine's inputs. Those that it has not are missing.

    E122 for an engine that takes none or one of a smaller rank, E103 for an adapter that must be merged, E101 to E109 for a bad one.
    """
    config, build = directory.config, directory.build
    if not build.max_lora_rank:
        why, fix = (
            "it was built for none",
            "build it with thoughtx-build --max_lora_rank R, or merge the adapter: thoughtx-build --lora_dir",
        )
        raise ThoughtxError("E122", "this engine takes no adapters", where=str(directory.root), why=why, fix=fix)
    table = tensors_of(config)
    with Checkpoint.adapter_in(path) as stored:
        adapter = Adapter(stored, table, config.tied)
        _refuse(adapter, build.max_lora_rank)
        found, shapes = dict[str, np.ndarray](), lora.shapes_of(config, build.max_lora_rank)
        for tensor in table:
            module = tensor.suffix.removesuffix(".weight")
            if tensor.layer is None or module not in shapes or not tensor.suffix.endswith(".weight"):
                continue
            modules = [part.source.removesuffix(".weight") for part in tensor.parts]
            if not any(name in adapter.products for name in modules):
                continue
            down, up = (np.zeros(shape) for shape in shapes[module])
            begin = 0
            for index, (name, part) in enumerate(zip(modules, tensor.parts, strict=True)):
                end = begin + part.shape[0]
                if name in adapter.products:
                    own, first, last = adapter.products[name]
                    a, b, scale = adapter.factors(own)
                    at = slice(index * build.max_lora_rank, index * build.max_lora_rank + len(a))
                    down[:, at], up[at, begin:end] = a.T, (b[first:last] * scale).T
                begin = end
            for name, value in zip(lora.inputs_of(module, tensor.layer), (down, up), strict=True):
                found[name] = _typed(value, build.dtype)
                if not np.isfinite(found[name]).all():
                    why = f"{name}: they are no numbers, or leave the range of {build.dtype}"
                    fix = "ask its author, or build an engine with a wider type"
                    raise ThoughtxError("E108", "the adapter holds values that cannot be used", where=adapter.where, why=why, fix=fix)
    return found


def digest_of(matrices: Matrices) -> str:
    """sha256 of what an adapter adds."""
    found = hashlib.sha256()
    for name in sorted(matrices):
        found.update(name.encode() + matrices[name].tobytes())
    return found.hexdigest()


def _typed(value: np.ndarray, dtype: str) -> np.ndarray:
    """As the engine's inputs hold it; onnxruntime emulates bfloat16 in float32."""
    with np.errstate(over="ignore"):
        wide: np.ndarray[Any, Any] = value.astype(np.float32)
        if dtype == "bfloat16":
            return wide.astype(ml_dtypes.bfloat16).astype(np.float32)
        return wide.astype(np.float16) if dtype == "float16" else wide


def _refuse(adapter: Adapter, most: int) -> None:
    config = adapter.config
    others = [*adapter.replaced, *(f"{name}: rows of tokens" for name, module in adapter.modules.items() if module.rows)]
    others += [f"{name}: DoRA" for name, module in adapter.modules.items() if module.magnitude]
    others += [f"{name}: a bias" for name, module in adapter.modules.items() if module.up_bias]
    others += [name for name in adapter.products if ".layers." not in name]
    if others:
        what, fix = "the adapter changes more than a row can bring", "merge it into an engine of its own: thoughtx-build --lora_dir"
        raise ThoughtxError("E103", what, where=adapter.where, why=listed([shown(name) for name in others]), fix=fix)
    ranks = {name: config.rank_of(name) for name in adapter.modules}
    if (largest := max(ranks.values())) > most:
        why = f"the engine was built for rank {most}, and this has {largest}"
        fix = f"build with thoughtx-build --max_lora_rank {largest}"
        raise ThoughtxError("E122", "the rank of the adapter is too large", where=adapter.where, why=why, fix=fix)
