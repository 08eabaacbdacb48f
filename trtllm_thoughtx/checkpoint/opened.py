"""`Checkpoint`: a directory, opened. Its config.json and the header of each weight file are parsed once, when they are first asked for.

Every step that reads a checkpoint reads it through this: names and shapes by `stored`, bytes by `pread` and `read`, its files by `members`,
its exits by `exits`. What the tensors ought to be is the business of `families`; `weights` compares the two.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trtllm_thoughtx import files
from trtllm_thoughtx.checkpoint import directory
from trtllm_thoughtx.checkpoint.exits import ExitWeights, read_exits
from trtllm_thoughtx.checkpoint.members import QUANT_FILE, Members, changed
from trtllm_thoughtx.checkpoint.tensor_check import STORED_DTYPES
from trtllm_thoughtx.checkpoint.tensor_file import DTYPES
from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.families.trtllm_config import mapping_of


class Checkpoint:
    """A directory of one of the kinds `wanted`; `raw` is its config.json. E101 for anything else.

    It stands for its path wherever one is taken. Several threads may read from it. With an `adapter`, the files of a PEFT directory, it
    is the model that these make of it: `weights.open_weights` merges them.
    """

    def __init__(self, path: Path, wanted: Sequence[str] = directory.CHECKPOINTS, known: tuple[str, dict[str, Any]] | None = None) -> None:
        """`known`: what `kind_and_config` says of the path, where it was asked already."""
        self.path = path
        self.adapter: Checkpoint | None = None
        self.kind, self.raw = known or directory.kind_and_config(path, wanted)
        self.where = str(path / "config.json")
        self.used: set[str] = set()  # names that `read` was asked for
        self._handles: dict[str, BinaryIO] = {}
        self._exits: ExitWeights | None = None

    @classmethod
    def open(cls, path: Path | Checkpoint, wanted: Sequence[str] = directory.CHECKPOINTS, lora_dir: Path | None = None) -> Checkpoint:
        """The checkpoint at `path`, or the one that is open already; with the adapter in `lora_dir`."""
        opened = path if isinstance(path, Checkpoint) else cls(Path(path), wanted)
        if lora_dir is not None:
            opened.adapter = cls.adapter_in(lora_dir)
        return opened

    @classmethod
    def adapter_in(cls, lora_dir: Path) -> Checkpoint:
        """The files of a PEFT directory. E101 for another path, E109 for a pickle."""
        path = Path(lora_dir)
        return cls(path, known=("peft", directory.adapter_config(path)))

    def again(self) -> Checkpoint:
        """The same, with file handles of its own."""
        twin = Checkpoint(self.path, known=(self.kind, self.raw))
        twin.adapter = self.adapter
        return twin

    def __fspath__(self) -> str:
        return str(self.path)

    def is_quantized(self) -> bool:
        """A Hugging Face directory that says that its weights are quantized."""
        says = bool(self.raw.get("quantization_config")) or os.path.lexists(self.path / QUANT_FILE)
        return self.kind == "huggingface" and says

    @functools.cached_property
    def mapping(self) -> tuple[int, int, int]:
        """(tp_size, pp_size, cp_size): the ranks that it is split for."""
        return mapping_of(self.raw, self.where) if self.kind == "tensorrt-llm" else (1, 1, 1)

    @functools.cached_property
    def _weights(self) -> tuple[list[str], list[dict[str, directory.TensorInfo]]]:
        """The files of the weights and the tensors of each; E106 where index and files do not agree."""
        if self.kind == "huggingface":
            names, stored = directory.model_files(self.path)
            return names, [stored]
        names = [f"rank{rank}.safetensors" for rank in range(math.prod(self.mapping))]
        names = [directory.ADAPTER_TENSORS] if self.kind == "peft" else names
        return names, [directory.read_tensors(self.path, [name]) for name in names]

    @property
    def shards(self) -> list[str]:
        return self._weights[0]

    def tensors(self) -> list[directory.TensorInfo]:
        """Of all files; ranks hold shards of the same names."""
        return [info for found in self._weights[1] for info in found.values()]

    @functools.cached_property
    def stored(self) -> dict[str, directory.TensorInfo]:
        """Tensors by name, of a checkpoint in one piece."""
        return self._weights[1][0]

    @functools.cached_property
    def members(self) -> Members:
        return Members(self.path, self.kind, self.shards, self.raw, self.adapter.members if self.adapter else None)

    def exits(self, config: ModelConfig) -> ExitWeights:
        """The early exits that it carries, checked; none (all None) where it has no such files."""
        if self._exits is None:
            self._exits = read_exits(self.path, config)
        return self._exits

    def pread(self, info: directory.TensorInfo, first_row: int, into: np.ndarray) -> None:
        """Rows of a tensor from `first_row` on, as they are stored; `into` has its type. E111 when the file became shorter."""
        row_bytes = into.nbytes // into.shape[0]
        view, offset = into.reshape(-1).view(np.uint8).data, info.offset + first_row * row_bytes
        fd = self.handle(info.file).fileno()
        while view:
            num_read = os.preadv(fd, [view], offset)
            if num_read <= 0:
                self.members.verify_unchanged()
                raise changed(self.path / info.file)
            view, offset = view[num_read:], offset + num_read

    def read(self, name: str, wanted: tuple[int, ...] | None = None, kinds: Collection[str] = tuple(STORED_DTYPES)) -> np.ndarray:
        """A tensor as it is stored. E107 when it is missing, or not of the wanted shape and one of the safetensors types `kinds`."""
        info = self.stored.get(name)
        if info is None or (wanted is not None and info.shape != wanted) or info.dtype not in kinds:
            found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise self.misfit(name, f"{found}, wanted {' or '.join(kinds)} {list(wanted) if wanted else ''}".rstrip())
        self.used.add(name)
        out = np.empty(info.shape, DTYPES[info.dtype])
        if out.size:
            self.pread(info, 0, out.reshape(-1))
        return out

    def misfit(self, name: str, why: str) -> ThoughtxError:
        return ThoughtxError("E107", f"{shown(name)} does not fit", where=str(self.path), why=why, fix="download the checkpoint again")

    def handle(self, name: str) -> BinaryIO:
        if name not in self._handles:
            self._handles[name] = files.open_inside(self.path, name)
        return self._handles[name]

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()
        if self.adapter is not None:
            self.adapter.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
