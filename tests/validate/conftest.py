"""One random Qwen2, its chunked engine and the golden file of both, for every file here that has none of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.validate.validate import validate

OPTIONS = {"backend": "onnxruntime", "max_seq_len": 48, "max_input_len": 32}
CHUNKS = {"use_chunked_attention": True, "chunk_size": 6, "sink_tokens": 2, "left_chunks": 1}


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hf_models = pytest.importorskip("hf_models", reason="torch or transformers is not installed")
    return hf_models.save(tmp_path_factory.mktemp("hf") / "model", "qwen2")


@pytest.fixture(scope="session")
def engine_dir(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "engine"
    build(hf, out, {**OPTIONS, **CHUNKS})
    return out


@pytest.fixture(scope="session")
def golden(hf: Path, engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    assert validate(engine_dir, reference=hf, record=path).ok
    return path
