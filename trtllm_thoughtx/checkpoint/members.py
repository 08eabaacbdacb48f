"""What a checkpoint directory holds: the one list of its files, by what they are for.

    config.json, the index, hf_quant_config.json, weights    what a model is
    exits.json, exits.safetensors                            its early exits: see exits
    CARRIED                                                  tokenizer, templates, calibration, licence: what travels with it

Every step that reads a checkpoint takes its inputs from here, and every step that writes one either passes each member on, or says
what became of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trtllm_thoughtx import files
from trtllm_thoughtx.checkpoint.directory import ADAPTER_CONFIG, INDEX, ignored_files
from trtllm_thoughtx.errors import ThoughtxError, shown

CONFIG = "config.json"
QUANT_FILE = "hf_quant_config.json"
EXIT_JSON, EXIT_TENSORS = EXITS = ("exits.json", "exits.safetensors")
CALIBRATION, CALIBRATION_PAGE = "calibration.json", "report.html"
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    CALIBRATION,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
)
CARRIED_LIMIT = 512 << 20  # bytes of one


class Stamps:
    """Files as they were when this was made; `verify` finds one that changed."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._at_first = {path: _stamp(path) for path in paths}

    def verify(self) -> None:
        """E111 when one is no longer the file that it was."""
        for path, stamp in self._at_first.items():
            if _stamp(path) != stamp:
                raise changed(path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def changed(path: Path) -> ThoughtxError:
    return ThoughtxError(
        "E111",
        f"{shown(path.name)} changed while it was read",
        where=str(path),
        why="its size, time or identity is no longer what it was when the run began",
        fix="let whatever writes the checkpoint finish, then run again",
    )


class Members:
    """The files of one checkpoint, whose weights are in `weights`. E104 for one that leads out of the directory."""

    def __init__(self, root: Path, kind: str, weights: Sequence[str], config: Mapping[str, Any], adapter: Members | None = None) -> None:
        """`adapter`: the members of a PEFT directory that is merged."""
        self.root, self.weights, self.config = root, tuple(weights), config  # config.json, parsed
        self.adapter = adapter
        about = {"huggingface": (CONFIG, INDEX, QUANT_FILE), "peft": (ADAPTER_CONFIG,)}.get(kind, (CONFIG,))
        self.model = (*(name for name in about if os.path.lexists(root / name)), *weights)
        self.exits = self._present(EXITS)
        self.carried = self._present(CARRIED)
        self.pages = self._present((CALIBRATION_PAGE,))  # for people; goes along where the weights stay
        self._stamps = Stamps(self.inputs())

    def _present(self, names: Sequence[str]) -> tuple[str, ...]:
        found = tuple(name for name in names if os.path.lexists(self.root / name))
        for name in found:
            files.open_inside(self.root, name).close()
        return found

    def inputs(self) -> list[Path]:
        """Every file that determines what is made of the checkpoint."""
        own = [self.root / name for name in (*self.model, *self.exits, *self.carried)]
        return own if self.adapter is None else own + [self.adapter.root / name for name in self.adapter.model]

    def roots(self) -> list[Path]:
        """The directories that they are in."""
        return [self.root] if self.adapter is None else [self.root, self.adapter.root]

    def verify_unchanged(self) -> None:
        """E111 when a member is no longer the file that it was when the checkpoint was opened."""
        self._stamps.verify()

    def notes(self) -> list[str]:
        """A sentence about safetensors files that hold no part of the model; none without such files."""
        names = ignored_files(self.root, [*self.weights, *self.exits])
        return [f"not part of the model, and not read: {', '.join(shown(n, 80) for n in names[:20])}"] if names else []
