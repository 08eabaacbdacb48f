"""The files of an engine directory that leave this machine: those of the build and of `thoughtx-sign`, checked before and while they are
copied."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.files import Advances, open_inside
from trtllm_thoughtx.report import MANIFEST
from trtllm_thoughtx.ship.sign import MADE
from trtllm_thoughtx.ship.signature import present, verify


def checked_names(directory: EngineDir, verify_key: Path | None) -> list[str]:
    """The files in order, once they match the manifest, and the signature of `verify_key`. E120, E121 and E124 where they do not, E130 for
    files that the build did not make."""
    root = directory.root
    rows = {row["name"] for row in directory.manifest["outputs"]}
    names = sorted(rows | {MANIFEST} | (set(MADE) & {path.name for path in root.iterdir()}))
    if others := sorted(present(root) - set(names)):
        why = f"{MANIFEST} does not list: {listed([shown(name) for name in others])}"
        raise ThoughtxError("E130", "the directory holds files that the build did not make", where=str(root), why=why, fix="remove them")
    verify(directory, verify_key)
    return names


def num_bytes(directory: EngineDir, names: list[str]) -> int:
    return sum((directory.root / name).stat().st_size for name in names)


def copy(directory: EngineDir, name: str, target: Path, stage: Advances) -> tuple[str, int]:
    """Write the new file `target`; its sha256 and size. E111 when the file is not what was verified."""
    digest, size = hashlib.sha256(), 0
    with open_inside(directory.root, name) as source, target.open("xb") as out:
        while block := source.read(1 << 22):
            out.write(block)
            digest.update(block)
            size += len(block)
            stage.advance(len(block))
    if any(row["sha256"] != digest.hexdigest() for row in directory.manifest["outputs"] if row["name"] == name):
        where, fix = str(directory.root / name), "let nothing write to the directory meanwhile, and export again"
        raise ThoughtxError("E111", "a file changed while it was copied", where=where, why="its sha256 is another now", fix=fix)
    return digest.hexdigest(), size
