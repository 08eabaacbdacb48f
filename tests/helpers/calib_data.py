"""Rows of calibration data, and what calibration stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position": 256}


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ids(num: int, seed: int = 0, low: int = 12, high: int = 40, vocab: int = 90) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(1, vocab, rng.integers(low, high)).tolist()} for _ in range(num)]


def stored_bytes(path: Path) -> bytes:
    return (path / "rank0.safetensors").read_bytes()
