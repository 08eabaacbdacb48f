"""The residual stream of every row between two layers, on disk: what makes memory small, and an interrupted run go on.

A directory holds the stream after layer k as one file of float32 [tokens, hidden]. The next layer writes a new file; the old one goes
once the new one is complete, so whatever moment a run ends at, one whole file is left.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class States:
    """Rows of `lengths` tokens each, back to back."""

    def __init__(self, root: Path, lengths: Sequence[int], hidden_size: int) -> None:
        self.root, self.lengths, self.hidden_size = root, list(lengths), hidden_size
        self.starts = np.cumsum([0, *lengths]).tolist()

    def path(self, layer: int) -> Path:
        return self.root / f"states.{layer + 1}"

    @property
    def num_bytes(self) -> int:
        return 4 * self.starts[-1] * self.hidden_size

    def is_whole(self, layer: int) -> bool:
        return self.path(layer).is_file() and self.path(layer).stat().st_size == self.num_bytes

    def read(self, layer: int, row: int) -> np.ndarray:
        """[tokens, hidden] of one row, as it left `layer` (-1: the embedding)."""
        out = np.empty((self.lengths[row], self.hidden_size), np.float32)
        with open(self.path(layer), "rb", buffering=0) as file:
            file.seek(4 * self.starts[row] * self.hidden_size)
            view = out.reshape(-1).view(np.uint8).data
            while view:
                view = view[file.readinto(view) :]
        return out

    def write(self, layer: int, row: int, value: np.ndarray) -> None:
        fd = os.open(self.path(layer), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            view, offset = np.ascontiguousarray(value, np.float32).reshape(-1).view(np.uint8).data, 4 * self.starts[row] * self.hidden_size
            while view:
                done = os.pwrite(fd, view, offset)
                view, offset = view[done:], offset + done
        finally:
            os.close(fd)

    def drop(self, layer: int) -> None:
        self.path(layer).unlink(missing_ok=True)
