"""What can be refused is refused before the work: no engine is asked, built or timed for a command that cannot end well."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run

QUESTION = '{"prompt": "1 + 1", "answer": "2"}\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("made")
    write_tiny(work / "m", num_layers=2, max_position=256, tokenizer=True)
    for name, size in (("e", 4), ("narrow", 1)):
        options = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64, "max_batch_size": size}
        build(work / "m", work / name, options)
    (work / "questions.jsonl").write_text(QUESTION)
    (work / "long.jsonl").write_text("".join(json.dumps({"prompt": f"{n}" + "x" * 300, "answer": "2"}) + "\n" for n in range(40)))
    return work


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading an engine, building one, or starting the reference is the work."""

    def stop(*_: Any, **__: Any) -> None:
        raise AssertionError("the work had begun")

    monkeypatch.setattr("trtllm_thoughtx.runtime.engine.open_runner", stop)
    monkeypatch.setattr("trtllm_thoughtx.calibrate.exits.calibrate.build", stop)
    monkeypatch.setattr("trtllm_thoughtx.calibrate.chunks.job.Look", stop)


EVAL = "eval --engine_dir {0}/e --dataset {0}/questions.jsonl --max_new_tokens 8"
CASES = [
    (f"{EVAL} --compare {{0}}/questions", "E101", ()),
    (f"{EVAL} --compare {{0}}/m --max_thinking_tokens 4", "E001", ()),
    (f"{EVAL} --compare {{0}}/m --backend onnxruntime", "E001", ()),
    (f"{EVAL} --compare {{0}}/narrow --batch_size 2", "E122", ()),
    (f"{EVAL} --compare {{0}}/m", "E201", ("transformers",)),
    (f"{EVAL} --plot {{0}}/p.png", "E201", ("matplotlib",)),
    (f"{EVAL} --plot {{0}}/p.bmp", "E001", ()),
    (f"{EVAL} --output {{0}}/none/r.json", "E130", ()),
    ("eval --engine_dir {0}/e --harness boolq --data_dir {0}", "E101", ()),
    ("bench --engine_dir {0}/e --prompt_len 2 --max_new_tokens 2 --against {0}/e", "E101", ()),
    ("bench --engine_dir {0}/e --prompt_len 2 --max_new_tokens 2 --against {0}/none", "E101", ()),
    ("bench --engine_dir {0}/e --prompt_len 2 --max_new_tokens 2 --against {0}/m", "E201", ("torch",)),
    ("calibrate --model_dir {0}/m --output_dir {0}/o --fit_exit_head --task chain", "E112", ()),
    ("calibrate --model_dir {0}/m --output_dir {0}/o --exit_layers 1 --dataset {0}/long.jsonl", "E122", ()),
    ("calibrate --model_dir {0}/m --output_dir {0}/e/config.json --exit_layers 1 --task chain --num_items 4", "E130", ()),
    ("calibrate --model_dir {0}/m --output_dir {0}/o --chunk_report --context 64", "E201", ("matplotlib",)),
    ("validate --engine_dir {0}/e --reference {0}/m --record {0}/none/g.safetensors", "E130", ()),
    ("validate --engine_dir {0}/e --reference {0}/m --junit {0}/none/v.xml", "E130", ()),
]


@pytest.mark.parametrize(
    ("line", "code", "missing"), CASES, ids=[f"{line.split()[0]}-{code}-{n}" for n, (line, code, _) in enumerate(CASES)]
)
def test_refused_before_the_work(
    line: str,
    code: str,
    missing: tuple[str, ...],
    made: Path,
    no_work: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch", reason="calibrate imports torch")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    before = sorted(made.rglob("*"))
    command, *args = line.format(made).split()
    status = run(cli.COMMANDS[command], f"thoughtx-{command}", [*args, "--json", "--quiet"])
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["error"]["code"]) == (False, code), said
    assert status in (2, 3, 4) and sorted(made.rglob("*")) == before
    assert "/thoughtx-" not in said["error"]["where"] + said["error"]["why"], "a scratch path is none of the user's"


def test_saved_answers_to_other_questions_are_refused_first(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = ["--engine_dir", str(made / "e"), "--dataset", str(made / "questions.jsonl"), "--max_new_tokens", "2", "--json", "--quiet"]
    assert run(cli.COMMANDS["eval"], "thoughtx-eval", [*saved, "--output", str(tmp_path / "r.json")]) == 0
    (tmp_path / "other.jsonl").write_text(QUESTION.replace("1 + 1", "2 + 2").replace('"2"', '"4"'))
    monkeypatch.setattr("trtllm_thoughtx.runtime.engine.open_runner", lambda *_, **__: pytest.fail("the work had begun"))
    saved[3] = str(tmp_path / "other.jsonl")
    capsys.readouterr()
    assert run(cli.COMMANDS["eval"], "thoughtx-eval", [*saved, "--compare", str(tmp_path / "r.json")]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "E160"


@pytest.mark.slow
def test_a_model_without_steps_is_refused_under_its_own_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That it has tags and never thinks is known only when it has answered."""
    pytest.importorskip("torch", reason="calibrate imports torch")
    write_tiny(tmp_path / "m", num_layers=2, max_position=256, tokenizer=True)
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0]['content'] }}{# <think> </think> #}"
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    args = ["--model_dir", str(tmp_path / "m"), "--output_dir", str(tmp_path / "o"), "--fit_exit_head", "--task", "chain"]
    assert run(cli.COMMANDS["calibrate"], "thoughtx-calibrate", [*args, "--num_items", "12", "--max_new_tokens", "4", "--json", "-q"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["where"]) == ("E112", str(tmp_path / "m"))
