"""What a step will take: memory, disk, and the bytes of weights that its duration goes by. From sizes alone; nothing is opened twice.

`thoughtx-build --dry_run` says the same of a build, within what is not known before the calibration: which layers stay as they are.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.build.options import OPTIONS, resolve
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.config import BuildConfig, ModelConfig
from trtllm_thoughtx.families.formats import FORMATS, QUANT_ALGOS
from trtllm_thoughtx.families.hf_config import model_config_from_hf
from trtllm_thoughtx.families.size import layer_parameters, num_parameters
from trtllm_thoughtx.families.trtllm_config import model_config_from_trtllm
from trtllm_thoughtx.release.document import Flag, Flagged

LIBRARIES = 512 << 20  # what a command's process holds beside the weights
TORCH = 900 << 20
PLAN_FACTOR = 4.2  # of a TensorRT build, over the weights of its largest part (build.build)
REST_BYTES = 16 << 20
SCALES = 1.06  # of a quantized matrix, with its scales


@dataclass(frozen=True)
class Size:
    """A model: parameters of all, of a layer, of one embedding table."""

    config: ModelConfig
    total: int
    layer: int
    table: int


@functools.cache
def size_of(path: Path) -> Size:
    """Of a Hugging Face or TensorRT-LLM directory."""
    with Checkpoint.open(path) as opened:
        read = model_config_from_hf if opened.kind == "huggingface" else model_config_from_trtllm
        config = replace(read(opened.raw, opened.where), quantization=None)
    return Size(config, num_parameters(config), layer_parameters(config, whole=True), config.vocab_size * config.hidden_size)


def item_bytes(dtype: str, config: ModelConfig) -> int:
    return 4 if (config.dtype if dtype == "auto" else dtype) == "float32" else 2


def bits_of(quantized: Flagged, item: int) -> float:
    """Mean bits of a weight of the layers; the embedding stays or has 8."""
    algo = QUANT_ALGOS.get(quantized.value("qformat") or "")
    return 8.0 * item if algo is None else FORMATS[algo].number.bits * SCALES


def settings_of(size: Size, flags: Mapping[str, Flag]) -> BuildConfig:
    """What a build with these flags resolves to; E001 for what cannot be built."""
    given: dict[str, Any] = {}
    for name, flag in flags.items():
        takes = OPTIONS[name].takes
        given[name] = True if not flag.words else flag.file if flag.file else takes.convert(flag.words[0], None, None)
    return resolve(size.config, given)


@dataclass(frozen=True)
class Built:
    """A build: bytes of its weights, and what it takes."""

    weights: int
    memory: int
    disk: int
    run_memory: int  # of a process that runs the engine
    parts: tuple[int, ...]  # bytes of the weights of each part that has plans


def built(size: Size, settings: BuildConfig, bits: float) -> Built:
    item = 4 if settings.dtype == "float32" else 2
    bits = min(bits, 8.0 * item)
    edges = (0, *settings.stages, size.config.num_layers)
    table = size.table * item
    parts = [size.layer * (last - first) * bits / 8 for first, last in itertools.pairwise(edges)]
    parts[0] += table
    if settings.stages:
        parts.append(table)  # the head, a part of its own
    elif not size.config.tied:
        parts[0] += table
    plans = [name for name in settings.backends if BACKENDS[name].builds_plans]
    weights = int(sum(parts))
    copies = len(plans) + (len(plans) < len(settings.backends))
    kv = size.config.kv_bytes_per_token(settings.cache_dtype) * settings.kv_capacity * settings.max_batch_size
    return Built(
        weights=weights,
        memory=int(max(parts) * (PLAN_FACTOR if plans else 0)) + LIBRARIES,
        disk=int(weights * copies * 1.02) + REST_BYTES,
        parts=tuple(int(part) for part in parts) if plans else (),
        run_memory=math.ceil(weights * 1.3) + kv + LIBRARIES,
    )
