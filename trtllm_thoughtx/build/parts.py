"""Parts of an engine that are built apart, on as many machines as there are parts, and put together.

    thoughtx-build ... --only_part 1 --output_dir PART       the files of one part, part.json and a manifest
    thoughtx-build ... --built_part PART0 --built_part PART1 --output_dir ENGINE

The engine has the bytes that it has when it is built at once: what was built apart is taken only if its manifest says that the same
version made it of the same inputs with the same settings, and its files are intact.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtllm_thoughtx import report
from trtllm_thoughtx.build.engine_dir import read_part
from trtllm_thoughtx.checkpoint.outputs import Output
from trtllm_thoughtx.config import PartFiles
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import read_json

PART = "part.json"
KEY = "part"  # of the settings in the manifest of a part


def number_of(only_part: int, names: Sequence[str]) -> int:
    """E001 unless the build has such a part."""
    if only_part < len(names):
        return only_part
    listed = ", ".join(f"{index} is {name}" for index, name in enumerate(names))
    fix = f"use 0 to {len(names) - 1}: {listed}"
    raise ThoughtxError("E001", "there is no such part", where=f"--only_part {only_part}", why=f"the engine has {len(names)}", fix=fix)


def take(directories: Sequence[Path], names: Sequence[str], output: Output) -> tuple[list[PartFiles], list[dict[str, Any]]]:
    """Put the files of the parts `names` into `output`; the parts and their checks, in this order. E101 for a missing part, E120 for one
    that was made of something else."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for directory in directories:
        manifest = report.read_manifest(directory)
        name = manifest["config"].get(KEY)
        same = manifest["tool"] == report.TOOL and manifest["config"] == report.plain({**output.settings, KEY: name})
        if not same or name not in names or manifest["inputs"] != output.inputs():
            why = "its version, its settings or its inputs are not those of this build"
            fix = "build the part again with the flags of this command, and --only_part"
            raise ThoughtxError("E120", "a part belongs to another engine", where=shown(str(directory), 400), why=why, fix=fix)
        report.verify_files(directory, manifest=manifest)
        found[name] = directory, manifest
    if missing := [f"{index} ({name})" for index, name in enumerate(names) if name not in found]:
        fix = f"build it with --only_part {missing[0].split()[0]}, and name its directory with --built_part"
        why = f"no directory holds part {', '.join(missing)}"
        raise ThoughtxError("E101", "a part of the engine is missing", where="--built_part", why=why, fix=fix)
    parts, checks = list[PartFiles](), list[dict[str, Any]]()
    for directory, manifest in (found[name] for name in names):
        parts.append(read_part(read_json(directory, PART, code="E121"), shown(str(directory / PART), 400)))
        for row in manifest["outputs"]:
            if row["name"] != PART:
                _link(directory / row["name"], output.partial / row["name"])
                output.hashes[row["name"]] = row["sha256"]
        checks += manifest["checks"]
    return parts, checks


def _link(source: Path, target: Path) -> None:
    """A second name where the file system has one: nothing writes into files that are there."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target, follow_symlinks=False)
