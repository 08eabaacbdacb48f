"""Models with a sliding window are built as far as the window shows everything; what slides is decided as transformers does."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.engine import Engine

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WINDOW = 24
LENGTH = 100  # a full-attention engine's, far beyond the window
SLIDES: dict[str, dict[str, Any]] = {
    "qwen2": {"max_window_layers": 1},
    "qwen3": {"max_window_layers": 0},
    "qwen2_moe": {"max_window_layers": 2},
    "qwen3_moe": {},
    "mistral": {},
}
TYPES = ["full_attention", "sliding_attention", "full_attention"]
FULL = ["full_attention"] * 3


def saved(path: Path, family: str, **config: Any) -> Any:
    """A tiny model written to `path`, as transformers reads it back: it makes the masks itself."""
    hf_models.save(path, family, **{"sliding_window": WINDOW, **config})
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def engine_logits(engine_dir: Path, ids: list[int]) -> np.ndarray:
    with contextlib.closing(Engine.load(engine_dir)) as engine:
        return np.asarray(engine.forward([ids])[0])


def transformers_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def ids_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 97, length).tolist()


@pytest.mark.parametrize("family", SLIDES)
def test_built_up_to_the_window(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "m", family, use_sliding_window=True, **SLIDES[family])
    convert(tmp_path / "m", tmp_path / "c")  # the window travels in the checkpoint
    for source in ("m", "c"):
        summary = build(tmp_path / source, tmp_path / f"e-{source}", {"backend": ("onnxruntime",)})
        assert summary["build"]["max_seq_len"] == WINDOW and any("sliding window" in note for note in summary["notes"])
        ids = ids_of(WINDOW)
        np.testing.assert_allclose(engine_logits(tmp_path / f"e-{source}", ids), transformers_logits(model, ids), atol=2e-4)
        with pytest.raises(ThoughtxError) as caught:
            build(tmp_path / source, tmp_path / "x", {"backend": ("onnxruntime",), "max_seq_len": WINDOW + 1})
        assert caught.value.code == "E001" and caught.value.fix == f"use at most {WINDOW}"
    ids = ids_of(WINDOW + 1)
    full = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, sliding_window=512).eval()
    assert np.abs(transformers_logits(model, ids)[-1] - transformers_logits(full, ids)[-1]).max() > 1e-3, "one more position is hidden"


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 28}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "layer_types": FULL}),
        ("qwen2", {"use_sliding_window": False, "max_window_layers": 0}),
        ("qwen2_moe", {"use_sliding_window": False}),
        ("qwen3_moe", {"use_sliding_window": False}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_no_layer_slides(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = saved(tmp_path / "m", family, **config)
    summary = build(tmp_path / "m", tmp_path / "e", {"backend": ("onnxruntime",)})
    assert summary["build"]["max_seq_len"] == 256 and not [note for note in summary["notes"] if "window" in note]
    ids = ids_of(LENGTH)
    np.testing.assert_allclose(engine_logits(tmp_path / "e", ids), transformers_logits(model, ids), atol=2e-4)


@pytest.mark.parametrize(
    ("family", "config", "window"),
    [
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 28, "layer_types": TYPES}, WINDOW),
        ("qwen2", {"use_sliding_window": False, "layer_types": TYPES}, WINDOW),  # layer_types has the last word
        ("llama", {}, WINDOW),  # of a Mistral saved as Llama
        ("llama", {"use_sliding_window": False}, None),
        ("mistral", {"use_sliding_window": False}, WINDOW),  # a key that transformers does not read there
        ("qwen2", {}, None),
    ],
)
def test_what_config_says(family: str, config: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    import tiny

    raw = {key: config.get(key, tiny.MISSING) for key in ("use_sliding_window", "max_window_layers")}
    tiny.write_tiny(tmp_path, family=family, num_layers=3, config={"sliding_window": WINDOW, **raw, **config})
    with open_weights(tmp_path) as source:
        assert source.config.sliding_window == window


def test_a_null_window_and_the_default_of_transformers(tmp_path: Path) -> None:
    import tiny

    asked = {"use_sliding_window": True, "max_window_layers": 0}
    for value, window in ((None, None), (tiny.MISSING, 4096)):
        tiny.write_tiny(tmp_path, config={**asked, "sliding_window": value})
        with open_weights(tmp_path) as source:
            assert source.config.sliding_window == window and source.config.longest == 512
            assert source.notes == (), "a window beyond max_position_embeddings hides nothing"
    for value, window in ((None, None), (tiny.MISSING, 4096), (64, 64)):
        tiny.write_tiny(tmp_path, family="mistral", config={"sliding_window": value, "max_position_embeddings": 8192})
        with open_weights(tmp_path) as source:
            assert (source.config.sliding_window, source.config.longest) == (window, window or 8192)
