"""Models without thinking tags: what does not need the tags works, what does is refused by name."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from tiny import write_tiny

from trtllm_thoughtx.backends import open_runner
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.cli.commands import calibrate, thoughtx
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.engine import Engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("untagged")
    write_tiny(root / "m", tokenizer=True)
    return root / "m"


FEW = ("--task", "chain", "--num_items", "2", "--max_new_tokens", "6", "--quiet")


def command(model, out, *words: str) -> int:
    return run(calibrate, "thoughtx-calibrate", ["--model_dir", str(model), "--output_dir", str(out), *words])


def test_exit_adapters_are_fitted_without_thinking_tags(model, tmp_path):
    assert command(model, tmp_path / "ckpt", "--exit_layers", "1", "--adapter_rank", "4", *FEW) == 0
    build(tmp_path / "ckpt", tmp_path / "e", {"backend": ("onnxruntime",), "max_seq_len": 64, "early_exit_layers": (1,)})
    engine = Engine.load(tmp_path / "e", num_threads=1)
    assert engine.build.draft_layers == (1,) and engine.text.think_ids is None
    engine.close()


def test_an_exit_head_still_needs_them(model, tmp_path, capsys):
    assert command(model, tmp_path / "ckpt", "--fit_exit_head", "--exit_layers", "1", *FEW) == 3
    assert "thinking tags" in capsys.readouterr().err and not (tmp_path / "ckpt").exists()


@pytest.mark.slow
def test_a_chunk_report_needs_no_thinking_tags(model, tmp_path, capsys):
    words = ("--chunk_report", "--context", "256", "--calib_size", "2", "--eval_items", "3", "--target_capture", "0.1")
    assert command(model, tmp_path / "chunks", *words, "--quiet") == 0
    found = json.loads((tmp_path / "chunks" / "chunks.json").read_text())
    assert found["chosen"] is not None and found["adaptive"]["threshold_low"] == 0
    assert any("thinking tags" in one for one in found["skipped"])


@pytest.mark.parametrize("name", ["int8_sq", "int4_awq", "int8_wo"])
def test_help_and_messages_spell_formats_as_the_texts_do(name):
    said = CliRunner().invoke(thoughtx, ["calibrate", "--help"]).output
    wrong = CliRunner().invoke(thoughtx, ["calibrate", "--model_dir", "m", "--output_dir", "o", "--qformat", "int9"]).output
    for text in (said, wrong):
        assert name in text and name.replace("_", "-") not in text


@pytest.mark.parametrize("flag", ["tap_layers", "exact"])
def test_what_only_onnxruntime_can_is_refused_elsewhere(tmp_path, flag):
    with pytest.raises(ThoughtxError, match=f"{flag} cannot be used with tensorrt-rtx"):
        open_runner(tmp_path, [], "tensorrt-rtx", None, None, num_threads=None, **{"tap_layers": False, flag: True})
