"""The settings of chunked attention that are tried, and how many slots of KV cache each needs."""

from __future__ import annotations

from typing import Any

from trtllm_thoughtx.config import CHUNK_STEP, BuildConfig
from trtllm_thoughtx.errors import counted
from trtllm_thoughtx.validate.golden import ChunkSpec

NUM_SINKS = 4  # first tokens hold attention mass that says nothing (StreamingLLM, arXiv 2309.17453, section 3)
LEFT = (0, 1, 3, 7, 14, 30, 62)  # many small chunks reach evenly far back, but a prompt is read a chunk at a time
ANCHORS = (0, 8)


def settings(window: ChunkSpec, context: int) -> dict[str, Any]:
    """The options of a build, and fields of `BuildConfig`, for this window over a cache for `context` tokens."""
    return {
        "use_chunked_attention": True,
        "max_seq_len": context,
        "chunk_size": window.chunk_size,
        "max_chunk_size": window.chunk_size,
        "sink_tokens": window.sink,
        "left_chunks": window.left,
        "num_anchors": window.anchors,
    }


def num_slots(window: ChunkSpec, context: int) -> int:
    """KV slots of one sequence, `context` where the window is no smaller."""
    return BuildConfig(**settings(window, context)).kv_capacity


def candidates(context: int) -> list[ChunkSpec]:
    """Windows smaller than `context`, the smallest cache first; chunks of 16 or 48 times powers of two."""
    sizes = [size for i in range(24) for size in (CHUNK_STEP << i, 3 * CHUNK_STEP << i) if size < context]
    made = [ChunkSpec(size, NUM_SINKS, left, anchors) for size in sizes for left in LEFT for anchors in ANCHORS]
    made = [window for window in made if num_slots(window, context) < context]
    return sorted(made, key=lambda window: (num_slots(window, context), -window.left, window.anchors))


def name_of(window: ChunkSpec) -> str:
    anchors = f", {counted(window.anchors, 'anchor')}" if window.anchors else ""
    return f"chunk {window.chunk_size}, {window.left} behind, {counted(window.sink, 'sink')}{anchors}"
