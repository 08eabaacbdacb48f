"""A directory that is evaluated, by its kind: an engine, or a Hugging Face model beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.checkpoint.directory import kind_of
from trtllm_thoughtx.errors import ThoughtxError, counted, shown
from trtllm_thoughtx.evaluate.systems import EngineSystem, System
from trtllm_thoughtx.process.outside import need
from trtllm_thoughtx.ship.signature import verify_signature

SYSTEMS = ("engine", "huggingface")  # what answers questions, in the words of `checkpoint.directory`


def open_system(
    path: Path,
    *,
    backend: str | None = None,
    num_threads: int | None = None,
    batch_size: int | None = None,
    chunk_size: int | str | None = None,
    exact: bool = False,
    verify_key: Path | None = None,
) -> System:
    """The system of a directory; refused as by `check_system`."""
    if check_system(path, backend=backend, batch_size=batch_size, chunk_size=chunk_size, exact=exact, verify_key=verify_key) == "engine":
        return EngineSystem(path, backend, num_threads, batch_size, chunk_size, exact=exact, verify_key=verify_key)
    from trtllm_thoughtx.evaluate.models import ModelSystem  # torch

    return ModelSystem(path, num_threads, batch_size)


def check_system(
    path: Path,
    *,
    backend: str | None = None,
    batch_size: int | None = None,
    chunk_size: int | str | None = None,
    exact: bool = False,
    verify_key: Path | None = None,
    engine_flags: Sequence[str] = (),
) -> str:
    """Its kind, "engine" or "huggingface", with all refused that can be without loading it: a system that is compared comes last.
    E101 for one that is neither, E001 for flags of engines, E122 for a batch that is too large, E124 for one that `verify_key` did not
    sign, E201 without transformers."""
    kind = kind_of(path, SYSTEMS)
    if kind == "engine":
        directory = EngineDir.open(path)
        directory.choose(backend)
        if verify_key is not None:
            verify_signature(directory.root, verify_key, directory.manifest)
        most = directory.build.max_batch_size
        if batch_size is not None and batch_size > most:
            why = f"the engine was built for {counted(most, 'sequence')} in one call"
            fix = f"ask for at most {most}, or build again with more: thoughtx-build --max_batch_size {batch_size}"
            raise ThoughtxError("E122", f"--batch_size {batch_size}", where=str(path), why=why, fix=fix)
        return kind
    flags = {"--backend": backend, "--chunk_size": chunk_size, "--exact": exact or None, "--verify_key": verify_key} | {
        f"--{name}": True for name in engine_flags
    }
    named = [flag for flag, value in flags.items() if value is not None]
    if named:
        fix = f"leave {', '.join(named)} out, or give an engine directory"
        why = "transformers runs this one, and its thinking is not followed"
        raise ThoughtxError("E001", f"{', '.join(named)} is for engines", where=shown(str(path)), why=why, fix=fix)
    what, fix = "a Hugging Face model needs torch and transformers", 'pip install "trtllm-thoughtx[reference]"'
    need(("torch", "transformers"), what, where=shown(str(path)), fix=fix)
    return kind
