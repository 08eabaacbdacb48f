"""`--exact`: the graph as it stands in place of a CPU's faster operators, from each command that runs an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import TINY as SAMPLE

pytest.importorskip("torch")

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.quantize.job import calibrate
from trtllm_thoughtx.cli.commands import thoughtx


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exact")
    calibrate(SAMPLE, root / "c", qformat="int4_wo", calib_size=8, calib_seq_len=64)
    build(root / "c", root / "e", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 128})
    return root / "e"


COMMANDS = (
    ("run", "--input_ids", "4,5,6", "--max_new_tokens", "2"),
    ("validate", "--reference", str(SAMPLE)),
    ("eval", "--task", "chain", "--num_items", "1", "--sizes", "1", "--max_new_tokens", "4"),
    ("bench", "--prompt_len", "4", "--max_new_tokens", "2", "--repeats", "1", "--warmup", "0"),
)


@pytest.mark.parametrize("words", COMMANDS, ids=[words[0] for words in COMMANDS])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.slow
def test_every_command_that_runs_an_engine_takes_it(engine, monkeypatch, capsys, words, exact):
    seen, real = [], Engine.load.__func__

    def load(cls, *args, **options):
        seen.append(real(cls, *args, **options))
        return seen[-1]

    monkeypatch.setattr(Engine, "load", classmethod(load))
    thoughtx([words[0], "--engine_dir", str(engine), *words[1:], *(["--exact"] if exact else []), "--json"], standalone_mode=False)
    assert seen and all(one.is_exact == exact for one in seen)
    assert json.loads(capsys.readouterr().out)
