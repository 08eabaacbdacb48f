"""Every row of the catalogue gets its answer: the right code, at once, in four parts, and with nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from badfiles import CATALOGUE, BadFile

from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.errors import CODES, Exit, ThoughtxError

MAX_SECONDS = 10.0  # of processor time; a quadratic reader takes minutes
MAX_RSS = 200 << 20  # bytes a refusal may add to the memory of a process that has only imported the package


def run_convert(model: Path) -> object:
    return convert(model, model.parent / "out")


def run_read(model: Path) -> object:
    with open_weights(model) as source:
        return [source.read(name) for name in source.names()]


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_mode, p.lstat().st_size) for p in sorted(root.rglob("*"))}


@pytest.mark.parametrize("action", [run_convert, run_read], ids=["convert", "read"])
@pytest.mark.parametrize("row", CATALOGUE, ids=[row.name.replace(" ", "-") for row in CATALOGUE])
def test_row(row: BadFile, action: Callable[[Path], object], tmp_path: Path) -> None:
    row.build(tmp_path / "model")
    before = snapshot(tmp_path)
    start = time.process_time()
    with pytest.raises(ThoughtxError) as caught:
        action(tmp_path / "model")
    seconds = time.process_time() - start
    error = caught.value
    text = error.render()
    assert (error.code, error.exit) == (row.code, Exit(row.exit)), text
    assert all(part.strip() for part in (error.what, error.where, error.why, error.fix)), text
    assert text.isascii() and all(line.isprintable() for line in text.split("\n")), repr(text)
    assert len(text) < 8000
    assert "model" in error.where, "where does not name the input"
    assert snapshot(tmp_path) == before, "something was left behind"
    assert seconds < MAX_SECONDS


def test_names_are_unique_and_codes_exist() -> None:
    names = [row.name for row in CATALOGUE]
    assert len(set(names)) == len(names)
    assert {row.code for row in CATALOGUE} <= CODES.keys()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_base_is_good(family: str, shards: int, tmp_path: Path) -> None:
    """Rows are refused for what they say, not because the directory they start from is."""
    tiny.write_tiny(tmp_path / "model", family=family, shards=shards)
    run_read(tmp_path / "model")
    run_convert(tmp_path / "model")
    assert (tmp_path / "out" / "rank0.safetensors").is_file()


@pytest.mark.parametrize("name", ["a million empty tensors", "a million numbers", "config with millions of brackets", "index too large"])
def test_a_refusal_is_small(name: str, tmp_path: Path) -> None:
    """A file that would grow in memory is refused before it does. A child process, so that the peak is its own."""
    next(row for row in CATALOGUE if row.name == name).build(tmp_path / "model")
    code = """
import resource, sys
from pathlib import Path
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.errors import ThoughtxError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_weights(Path(sys.argv[1]))
except ThoughtxError:
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True, check=True)
    assert int(done.stdout) < MAX_RSS


def test_a_device_node_is_refused(tmp_path: Path) -> None:
    """A device inside the directory itself, which no look at links would find."""
    tiny.write_tiny(tmp_path / "model")
    shard = tmp_path / "model" / "model.safetensors"
    shard.unlink()
    try:
        os.mknod(shard, 0o20600, os.makedev(1, 5))
    except OSError as error:
        pytest.skip(f"device nodes cannot be made here: {error.strerror}")
    with pytest.raises(ThoughtxError, match="E104"):
        run_convert(tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["config true for an integer", "config hidden_act", "missing tensor", "NaN weight", "index: parent directory", "empty file"]
)
def test_a_hostile_directory_name(name: str, tmp_path: Path) -> None:
    """The path itself comes from a download or an archive, and is printed in every message."""
    (tmp_path / "\x1b[2J\nINFO fine").mkdir()
    model = tmp_path / "\x1b[2J\nINFO fine" / "model\x9b"
    next(row for row in CATALOGUE if row.name == name).build(model)
    with pytest.raises(ThoughtxError) as caught:
        run_convert(model)
    lines = caught.value.render().split("\n")
    assert all(line.isprintable() and line.isascii() for line in lines)
    assert not any(line.startswith("INFO") for line in lines)
