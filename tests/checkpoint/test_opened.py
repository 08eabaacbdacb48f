"""`Checkpoint`: a directory's files are each parsed once, whatever a command makes of it."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import TINY
from quantized_models import fp8
from tiny import write_tiny

from trtllm_thoughtx import Engine, strictjson
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.checkpoint.exits import ExitAdapter, ExitHead, ExitWeights, write_exits
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.quantized import import_quantized
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.inspection import describe
from trtllm_thoughtx.report import read_manifest

OPTIONS = {"backend": ("onnxruntime",), "max_seq_len": 64}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each JSON text was parsed, by the file that holds it: JSON files and headers of safetensors files."""
    found: Counter[str] = Counter()
    parse = strictjson.parse_json

    def counted(text: Any, where: str, *args: Any, **more: Any) -> Any:
        found[Path(where.removesuffix(", header")).relative_to("/").as_posix()] += 1
        return parse(text, where, *args, **more)

    for module in list(sys.modules.values()):
        if getattr(module, "parse_json", None) is parse:
            monkeypatch.setattr(module, "parse_json", counted)
    return found


def read_once(parsed: Counter[str], root: Path, *wanted: str) -> None:
    """Each of `wanted` was parsed, and no file below `root` twice."""
    mine = {Path("/", name).relative_to(root).as_posix(): num for name, num in parsed.items() if Path("/", name).is_relative_to(root)}
    assert set(wanted) <= set(mine) and set(mine.values()) == {1}, mine
    parsed.clear()


def with_exits(root: Path) -> None:
    """An exit head and an exit adapter that decide nothing."""
    with open_weights(root) as source:
        config = source.config
    zeros = [np.zeros((rows, config.hidden_size), np.float32) for rows in (2, 1, 1)]
    head = ExitHead(zeros[0], np.zeros(2, np.float32), 0.5)
    norm, bias = np.ones(config.hidden_size, np.float32), np.zeros(1, np.float32)
    write_exits(root, ExitWeights(head, (ExitAdapter(1, norm, zeros[1], zeros[1].T.copy(), zeros[2], bias, 0.5),)), config)


def test_every_file_of_a_checkpoint_is_read_once(tmp_path: Path, parsed: Counter[str]) -> None:
    """A Hugging Face directory with shards, an index and exits, and the TensorRT-LLM one made of it."""
    hf, made = tmp_path / "m", tmp_path / "c"
    write_tiny(hf, shards=3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, hf / name)
    with_exits(hf)
    shards = [path.name for path in hf.glob("model-*.safetensors")]
    assert len(shards) == 3
    wanted = ("config.json", "model.safetensors.index.json", "exits.json", "exits.safetensors", *shards)
    parsed.clear()
    convert(hf, made)
    read_once(parsed, hf, *wanted)
    build(hf, tmp_path / "e", OPTIONS)
    read_once(parsed, hf, *wanted, "tokenizer_config.json")
    build(made, tmp_path / "f", OPTIONS)
    read_once(parsed, made, "config.json", "rank0.safetensors", "exits.json", "exits.safetensors")


def test_a_calibration_reads_every_file_once(tmp_path: Path, parsed: Counter[str]) -> None:
    pytest.importorskip("torch")
    from trtllm_thoughtx.calibrate.quantize.job import calibrate

    hf = tmp_path / "m"
    write_tiny(hf, shards=2)
    with_exits(hf)
    parsed.clear()
    calibrate(hf, tmp_path / "q", qformat="int8_wo", calib_size=2, calib_seq_len=8)
    read_once(parsed, hf, "config.json", "model.safetensors.index.json", "exits.json", "exits.safetensors")


def test_an_import_reads_every_file_once(tmp_path: Path, parsed: Counter[str]) -> None:
    """Through the same object that the command has opened to look for its quantization."""
    fp8(tmp_path / "q", per_row=True)
    parsed.clear()
    checkpoint = Checkpoint.open(tmp_path / "q")
    assert checkpoint.is_quantized()
    import_quantized(checkpoint, tmp_path / "c")
    read_once(parsed, tmp_path / "q", "config.json", "model.safetensors")


def test_an_engine_reads_every_file_once(tmp_path: Path, parsed: Counter[str]) -> None:
    write_tiny(tmp_path / "m", tokenizer=True)
    build(tmp_path / "m", tmp_path / "e", OPTIONS)
    for look in (describe, lambda root: Engine.load(root).close()):
        parsed.clear()
        look(tmp_path / "e")
        read_once(parsed, tmp_path / "e", "config.json", "manifest.json", "tokenizer_config.json")


def test_a_checkpoint_stands_for_its_path(tmp_path: Path) -> None:
    """Manifests record the same command, and what is made is the same, byte for byte."""
    write_tiny(tmp_path / "m")
    for name in "ab":
        (tmp_path / name).mkdir()
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert Checkpoint.open(checkpoint) is checkpoint
        by_object, by_path = convert(checkpoint, tmp_path / "a" / "c"), convert(tmp_path / "m", tmp_path / "b" / "c")
        assert by_object["files"] == by_path["files"]
        assert read_manifest(tmp_path / "a" / "c")["command"] == read_manifest(tmp_path / "b" / "c")["command"]
        assert convert(checkpoint, tmp_path / "a" / "c")["up_to_date"]


@pytest.mark.parametrize("split", [(2, 1), (1, 2), (2, 2)])
def test_inspect_counts_every_rank(tmp_path: Path, split: tuple[int, int]) -> None:
    """Tensor and pipeline parallel sizes are told apart, and all ranks are looked at."""
    write_tiny(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "c", tp_size=split[0], pp_size=split[1])
    found = describe(tmp_path / "c")
    assert (found["tp_size"], found["pp_size"]) == split
    assert found["weight_files"] == [f"rank{rank}.safetensors" for rank in range(split[0] * split[1])]
