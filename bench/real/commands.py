"""The installed commands as a user types them."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(name: str, *flags: object) -> list[str]:
    """Of `thoughtx-NAME`."""
    return [str(Path(sys.executable).with_name(f"thoughtx-{name}")), *map(str, flags)]


def build_flags(checkpoint: Path, engine: Path, *more: object) -> list[object]:
    """Of an engine for onnxruntime."""
    return ["--checkpoint_dir", checkpoint, "--output_dir", engine, "--backend", "onnxruntime", *more]
