"""The arguments of a TensorRT-RTX build of a tiny decoder, for this process and for others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trtllm_thoughtx.backends import tensorrt  # noqa: F401  # for the processes that evaluate an expression with this module
from trtllm_thoughtx.build.build import profiles_of
from trtllm_thoughtx.config import BuildConfig, ModelConfig, RopeConfig
from trtllm_thoughtx.graph import external
from trtllm_thoughtx.graph.decoder import decoder_graph, parts_of
from trtllm_thoughtx.progress import SILENT

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CONFIG = ModelConfig(
    family="qwen2", architecture="Qwen2ForCausalLM", dtype="float16", vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-6, rope=RopeConfig(theta=10000.0), max_position=64, tied=False, qkv_bias=True,
    o_bias=False, qk_norm=False,
)  # fmt: skip


def job(path: Path, dtype: str = "float16", **changes: Any) -> dict[str, Any]:
    """Arguments of `build_plan` for a two-layer chunked decoder; the plan goes to `path`, the log beside it."""
    sizes = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64, "chunk_size": 16, "sink_tokens": 4, "left_chunks": 1}
    build = BuildConfig(dtype=dtype, use_chunked_attention=True, **sizes)
    graph = decoder_graph(dataclasses.replace(CONFIG, dtype=dtype), build, parts_of(CONFIG, ())[0])
    bound = external.bind(graph, dtype, "absent.data")

    def initializers() -> Any:
        rng = np.random.default_rng(0)
        for entry in graph.initializers:
            value = rng.standard_normal(entry.shape) * 0.05 if entry.array is None else entry.array
            yield entry.name, value.astype(NUMPY[dtype])

    arguments = {
        "backend": "tensorrt-rtx",
        "model": bound.model,
        "initializers": initializers,
        "plan_path": path,
        "profiles": profiles_of(graph, build),
        "compute_capabilities": ("8.9",),
        "optimization_level": None,
        "num_attention": graph.num_attention,
        "float32": dtype == "float32",
        "log_path": path.with_suffix(".log"),
        "progress": SILENT,
    }
    return arguments | changes
