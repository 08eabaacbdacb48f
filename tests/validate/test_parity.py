"""Engines against transformers: random checkpoints of every family and shape, through every way from checkpoint to engine.

Each row is one checkpoint, made and saved by transformers. It is built as one graph from the Hugging Face directory, and in
three stages (or two, or one a layer) by way of a converted checkpoint; both engines must pass every check of `validate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import save

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.validate.validate import Report, validate

CHUNKS: dict[str, Any] = {"use_chunked_attention": True, "chunk_size": 5, "sink_tokens": 2, "left_chunks": 1}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
OLD: dict[str, Any] = {"old_style": True}
SHARDS: dict[str, Any] = {"max_shard_size": "20KB"}


def heads(num: int, num_kv: int, head_dim: int | None = None) -> dict[str, Any]:
    sizes = {"num_attention_heads": num, "num_key_value_heads": num_kv}
    return sizes if head_dim is None else {**sizes, "head_dim": head_dim}


# family, what is special, whether the engine has chunked attention
ROWS: list[tuple[str, dict[str, Any], bool]] = [
    ("qwen2", {}, True),
    ("qwen2", {**TIED, **OLD}, False),
    ("qwen2", {"rope": "yarn", **SHARDS}, True),
    ("qwen2", {"rope": "linear", **OLD, "vocab_size": 131}, False),
    ("qwen2", {"rope": "llama3", **TIED}, True),
    ("qwen2", {**heads(4, 4), "vocab_size": 64}, True),
    ("qwen2", {**heads(4, 1), **SHARDS, **TIED}, False),
    ("qwen2", {**heads(7, 1), "hidden_size": 56, "rope": "yarn", **OLD}, True),
    ("qwen2", {"num_hidden_layers": 6, "rms_norm_eps": 1e-5}, False),
    ("qwen3", {}, True),
    ("qwen3", {**TIED, **heads(4, 2, 16)}, False),
    ("qwen3", {**heads(6, 3, 10), "rope": "yarn", **OLD}, True),
    ("qwen3", {**heads(4, 1, 24), "attention_bias": True}, True),
    ("qwen3", {**heads(2, 2, 8), "rope": "linear", **SHARDS}, False),
    ("qwen3", {"rope": "llama3", **OLD, **TIED, "vocab_size": 151}, True),
    ("qwen3", {**heads(8, 2, 6), "hidden_size": 40, "intermediate_size": 72}, False),
    ("llama", {}, False),
    ("llama", {**TIED, "rope": "llama3"}, True),
    ("llama", {"rope": "llama3", **OLD, **SHARDS}, False),
    ("llama", {"rope": "linear", **heads(4, 4)}, True),
    ("llama", {"rope": "yarn", **heads(4, 1, 16), **TIED}, False),
    ("llama", {"attention_bias": True, **heads(6, 2, 12), "hidden_size": 48}, True),
    ("llama", {**heads(3, 1, 16), "hidden_size": 36, "vocab_size": 101, **OLD}, True),
    ("llama", {"num_hidden_layers": 5, "intermediate_size": 20, "rms_norm_eps": 1e-3}, True),
    ("llama", {"num_hidden_layers": 1, **TIED, **SHARDS}, True),
    ("mistral", {}, False),
    ("mistral", {"sliding_window": None, **heads(4, 1, 16), **SHARDS}, True),
    ("mistral", {"rope": "yarn", **OLD, **TIED}, True),
    ("qwen3", {"num_hidden_layers": 2, "rope": "yarn", "max_position_embeddings": 64, **heads(4, 2, 18)}, True),
]
SIXTEEN = [
    ("qwen2", "bfloat16", "bfloat16"),
    ("qwen3", "bfloat16", "float16"),
    ("llama", "float16", "float16"),
    ("qwen3", "float32", "bfloat16"),
]


def name_of(row: tuple[str, dict[str, Any], bool]) -> str:
    family, special, chunked = row
    words = [str(v) if k == "rope" else f"{k}{v}" for k, v in special.items()]
    return "-".join([family, *words, "chunked" if chunked else "full"]).replace("num_", "")


def stages_of(num_layers: int) -> list[int]:
    return sorted({1, num_layers - 1} & set(range(1, num_layers)))


def judged(checkpoint: Path, out: Path, hf: Path, options: dict[str, Any]) -> Report:
    build(checkpoint, out, {"backend": "onnxruntime", "max_seq_len": 48, "max_input_len": 20, **options})
    result = validate(out, reference=hf)
    assert not [f"{check.name}: {check.reason}" for check in result.checks if check.status != "passed"]
    return result


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow if row[1] else [], id=name_of(row)) for row in ROWS])
def test_engine_equals_transformers(tmp_path: Path, row: tuple[str, dict[str, Any], bool]) -> None:
    family, special, chunked = row
    hf = save(tmp_path / "hf", family, seed=ROWS.index(row), **special)
    options = CHUNKS if chunked else {}
    judged(hf, tmp_path / "whole", hf, options)
    convert(hf, tmp_path / "checkpoint")
    stages = stages_of(special.get("num_hidden_layers", 3))
    judged(tmp_path / "checkpoint", tmp_path / "stages", hf, {**options, "early_exit_layers": stages} if stages else options)


@pytest.mark.parametrize(("family", "stored", "dtype"), SIXTEEN)
@pytest.mark.slow
def test_sixteen_bit_engines_stay_within_their_rounding(tmp_path: Path, family: str, stored: str, dtype: str) -> None:
    hf = save(tmp_path / "hf", family, dtype=stored, seed=40)
    judged(hf, tmp_path / "whole", hf, {**CHUNKS, "dtype": dtype})
    convert(hf, tmp_path / "checkpoint", dtype=dtype)
    judged(tmp_path / "checkpoint", tmp_path / "stages", hf, {"dtype": dtype, "early_exit_layers": [1, 2]})


def test_a_large_enough_chunk_is_full_attention_bit_for_bit(tmp_path: Path) -> None:
    hf = save(tmp_path / "hf", "qwen2", seed=41)
    options = {"backend": "onnxruntime", "max_seq_len": 48, "max_input_len": 20}
    build(hf, tmp_path / "chunked", {**options, **CHUNKS, "max_chunk_size": 48})
    build(hf, tmp_path / "full", options)
    ids = np.random.default_rng(0).integers(0, 97, 33).tolist()
    chunked = Engine.load(tmp_path / "chunked").forward([ids], chunk_size=33)[0]
    assert np.array_equal(chunked, Engine.load(tmp_path / "full").forward([ids])[0])


def test_stages_change_no_bit(tmp_path: Path) -> None:
    hf = save(tmp_path / "hf", "qwen3", seed=42)
    options = {"backend": "onnxruntime", "max_seq_len": 48, "max_input_len": 20, **CHUNKS}
    build(hf, tmp_path / "whole", options)
    build(hf, tmp_path / "stages", {**options, "early_exit_layers": [1, 2]})
    ids = np.random.default_rng(0).integers(0, 97, 33).tolist()
    whole, stages = (Engine.load(tmp_path / name).forward([ids])[0] for name in ("whole", "stages"))
    assert np.array_equal(whole, stages)
