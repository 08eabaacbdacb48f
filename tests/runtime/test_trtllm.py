"""An engine of TensorRT-LLM's own kind under `thoughtx-run`, with a stand-in for that package: what it is asked, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import write_tiny

from trtllm_thoughtx import report
from trtllm_thoughtx.checkpoint.outputs import environment
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.runtime.trtllm import is_trtllm


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """As `thoughtx-build --backend tensorrt-llm` leaves one."""
    write_tiny(tmp_path / "m", tokenizer=True)
    root = tmp_path / "e"
    root.mkdir()
    for path in (tmp_path / "m").iterdir():
        if path.suffix == ".json" and path.name != "config.json":
            (root / path.name).write_bytes(path.read_bytes())
    (root / "config.json").write_text(json.dumps({"pretrained_config": {"mapping": {"world_size": 1}}, "build_config": {}}))
    (root / "rank0.engine").write_bytes(b"plan")
    report.write_manifest(root, command="build", inputs=[], config={}, checks=[], environment=environment(()))
    return root


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answers each prompt with its last three ids, backwards; `calls` has what it was told."""
    told = SimpleNamespace(models=[], calls=[], closed=0, breaks="")

    class LLM:
        def __init__(self, **words: Any) -> None:
            told.models.append(words)

        def generate(self, prompts: Any, *, sampling_params: Any, use_tqdm: bool) -> Any:
            if told.breaks:
                raise RuntimeError(told.breaks)
            told.calls += zip(prompts, sampling_params, strict=True)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids[:-4:-1], finish_reason="stop")]) for ids in prompts]

        def shutdown(self) -> None:
            told.closed += 1

    module, inner = ModuleType("tensorrt_llm"), ModuleType("tensorrt_llm._tensorrt_engine")
    module.SamplingParams, inner.LLM = dict, LLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_llm", module)
    monkeypatch.setitem(sys.modules, "tensorrt_llm._tensorrt_engine", inner)
    return told


def ask(*words: object) -> int:
    return run(cli.COMMANDS["run"], "thoughtx-run", [*map(str, words), "--json", "-q"])


def test_the_executor_is_asked(engine: Path, package: Any, capsys: Any) -> None:
    assert is_trtllm(engine) and not is_trtllm(engine.parent / "m") and not is_trtllm(engine / "none")
    words = ("--engine_dir", engine, "--input_ids", "5,6,7,8", "--max_new_tokens", 3)
    assert ask(*words, "--temperature", 0) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["results"]
    assert (row["output_ids"], row["stop_reason"], document["backend"]) == ([8, 7, 6], "eos", "tensorrt-llm") and row["text"]
    ((ids, settings),) = package.calls
    assert ids == [5, 6, 7, 8] and (settings["max_tokens"], settings["top_k"]) == (3, 1) and "temperature" not in settings
    assert package.models == [{"model": str(engine), "skip_tokenizer_init": True}] and package.closed == 1
    assert ask(*words, "--temperature", 0.5, "--top_p", 0.9, "--seed", 4, "--ignore_eos", "--stop_token_ids", "9,10") == 0
    settings = package.calls[-1][1]
    assert (settings["temperature"], settings["top_p"], settings["seed"], settings["end_id"]) == (0.5, 0.9, 4, -1)
    assert settings["stop_token_ids"] == [9, 10] and settings["ignore_eos"] is True


def test_several_prompts_go_at_once(engine: Path, package: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "a", "input_ids": [4, 5, 6]}\n{"id": "b", "input_ids": [7, 8, 9], "max_new_tokens": 2}\n')
    assert ask("--engine_dir", engine, "--prompts", tmp_path / "p.jsonl") == 0
    assert [(row["id"], row["output_ids"]) for row in json.loads(capsys.readouterr().out)["results"]] == [
        ("a", [6, 5, 4]),
        ("b", [9, 8, 7]),
    ]
    assert package.calls[1][1]["max_tokens"] == 2


@pytest.mark.parametrize(
    "more",
    ["--max_reasoning_depth 2", "--chunk_size 16", "--logprobs 1", "--stop x", "--backend onnxruntime", "--exact", "--prompt_lookup 3"],
)
def test_what_it_cannot_be_told_is_refused(more: str, engine: Path, package: Any, capsys: Any) -> None:
    assert ask("--engine_dir", engine, "--input_ids", "5,6", *more.split()) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "E001" and more.split()[0] in error["what"] and error["fix"] and not package.calls


def test_failures(engine: Path, package: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(code: str, status: int) -> str:
        assert ask("--engine_dir", engine, "--input_ids", "5,6") == status
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["code"] == code and all(error[part] for part in ("what", "where", "why", "fix"))
        return str(error["why"])

    package.breaks = "CUDA error: no kernel image"
    assert "no kernel image" in refused("E205", 4) and package.closed == 1
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_llm", None)
        refused("E201", 4)
    (engine / "rank0.engine").write_bytes(b"another")
    assert "rank0.engine" in refused("E120", 3) and len(package.models) == 1
