"""No way to use an engine directory passes over a file that was edited, deleted or added since it was built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny

from trtllm_thoughtx import Engine, report
from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.build.engine_dir import READ_WHERE_PRESENT, EngineDir
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.config import PLUGIN_LIBRARY
from trtllm_thoughtx.errors import ThoughtxError

CARRIED = {
    "chat_template.jinja": "{{ messages[0]['content'] }}",
    "special_tokens_map.json": '{"pad_token": "<pad>"}',
    "calibration.json": '{"limits": {}}',
    "LICENSE": "as you like",
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, every kind of file that travels with a model, and a plan that only another machine could run."""
    work = tmp_path_factory.mktemp("engine")
    write_tiny(work / "m", num_layers=2, max_position=256, tokenizer=True)
    for name, text in CARRIED.items():
        (work / "m" / name).write_text(text)
    build(work / "m", work / "e", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64, "early_exit_layers": (1,)})
    edit(work / "e", lambda build, parts: (build["backends"].append("tensorrt-rtx"), [add_plan(work / "e", part) for part in parts]))
    return work / "e"


def edit(root: Path, change: Callable[[dict[str, Any], list[dict[str, Any]]], object]) -> None:
    """`change` the build settings and the parts of a config.json, and hash all files again."""
    raw = json.loads((root / "config.json").read_text())
    change(raw["thoughtx"]["build"], raw["thoughtx"]["parts"])
    (root / "config.json").write_text(json.dumps(raw))
    rows = report.read_manifest(root)["inputs"]
    report.write_manifest(root, command="x", inputs=rows, config={}, checks=[], environment={})


def add_plan(root: Path, part: dict[str, Any], backend: str = "tensorrt-rtx") -> None:
    file = part["name"] + BACKENDS[backend].plan_suffix
    part["plans"][backend] = {"file": file}
    (root / file).write_bytes(b"a plan")


@pytest.fixture
def copy(intact: Path, tmp_path: Path) -> Path:
    (tmp_path / "questions.jsonl").write_text(json.dumps({"prompt": "1 + 1", "answer": "2"}))
    return Path(shutil.copytree(intact, tmp_path / "e"))


def ways(root: Path) -> dict[str, list[str]]:
    """Each command on the engine in `root`; none of them can go on without all of its files."""
    engine = ["--engine_dir", str(root), "--json", "--quiet"]
    return {
        "run": [*engine, "--input_ids", "1,2,3", "--max_new_tokens", "1"],
        "eval": [*engine, "--dataset", str(root.parent / "questions.jsonl"), "--max_new_tokens", "1"],
        "bench": [*engine, "--prompt_len", "2", "--max_new_tokens", "2", "--repeats", "1", "--warmup", "0"],
        "validate": [*engine, "--golden", str(root.parent / "none.safetensors")],
        "inspect": [str(root), "--json"],
    }


def assert_refused_by_all(root: Path, name: str, capsys: pytest.CaptureFixture[str], code: str = "E120") -> None:
    with pytest.raises(ThoughtxError) as caught:
        Engine.load(root)
    assert caught.value.code == code and name in caught.value.why
    for command, args in ways(root).items():
        capsys.readouterr()
        status = run(cli.COMMANDS[command], command, args)
        said = json.loads(capsys.readouterr().out)
        assert not said["ok"], command
        if said["schema"].startswith("thoughtx.validate"):
            assert (status, said["checks"][0]["status"], said["count"]["passed"]) == (1, "failed", 0)
            assert name in said["checks"][0]["reason"]
        else:
            assert status == 3 and said["error"]["code"] == code, command
            assert name in said["error"]["why"], command


def names(root: Path) -> list[str]:
    return [path.name for path in sorted(root.iterdir()) if path.name != report.MANIFEST]


def test_the_intact_engine_is_taken_by_all(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Engine.load(copy).close()
    for command, args in ways(copy).items():
        status = run(cli.COMMANDS[command], command, args)
        said = json.loads(capsys.readouterr().out)
        assert (status, said["ok"]) == ((0, True) if command != "validate" else (3, False)), command  # there is no golden file
    assert {"tokenizer.json", "generation_config.json", "rank0.head.engine", "rank0.head.data", *CARRIED} <= set(names(copy))


@pytest.mark.slow
def test_every_edited_file_is_seen(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in names(copy):
        intact = (copy / name).read_bytes()
        is_json = name.endswith(".json")  # which means the same with another space in it
        (copy / name).write_bytes(intact.replace(b":", b": ", 1) if is_json else bytes([intact[0] ^ 1]) + intact[1:])
        assert_refused_by_all(copy, name, capsys)
        (copy / name).write_bytes(intact)


def test_every_deleted_file_is_seen(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in names(copy):
        if name != "config.json":  # without it the directory is not an engine
            (copy / name).rename(copy.parent / "away")
            assert_refused_by_all(copy, name, capsys)
            (copy.parent / "away").rename(copy / name)


@pytest.mark.parametrize("name", READ_WHERE_PRESENT)
def test_a_file_that_would_be_read_cannot_be_added(name: str, intact: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / name).unlink(missing_ok=True)
    rows = report.read_manifest(intact)["inputs"]
    report.write_manifest(copy, command="x", inputs=rows, config={}, checks=[], environment={})
    EngineDir.open(copy).verify()
    (copy / name).write_bytes((intact / name).read_bytes() if (intact / name).exists() else b"{}")
    assert_refused_by_all(copy, name, capsys)


@pytest.mark.parametrize("name", ["rank0.trt.engine", "rank1.onnx", "rank0.stage7.data", "model.plan", PLUGIN_LIBRARY])
def test_an_engine_file_that_no_part_or_backend_has_is_refused(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the manifest lists it or not: what another build left is not passed over."""
    (copy / name).write_bytes(b"of another build")
    assert_refused_by_all(copy, name, capsys, "E121")
    edit(copy, lambda build, parts: None)
    assert_refused_by_all(copy, name, capsys, "E121")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda build, parts: build["backends"].remove("tensorrt-rtx"), "rank0.stage0 has a plan for tensorrt-rtx, which"),
        (lambda build, parts: build["backends"].append("tensorrt"), "rank0.stage0 has no plan for tensorrt, which"),
        (lambda build, parts: parts[1]["plans"].clear(), "rank0.stage1 has no plan for tensorrt-rtx, which"),
        (lambda build, parts: parts[0].update(data=None), "rank0.stage0 has no weights, and"),
        (lambda build, parts: build["backends"].remove("onnxruntime"), "rank0.stage0 has weights, and"),
        (lambda build, parts: build["backends"].append("warp"), "backends cannot be"),
        (lambda build, parts: build["backends"].clear(), "is empty"),
    ],
)
def test_backends_and_files_that_contradict_each_other_are_malformed(change: Any, says: str, copy: Path) -> None:
    edit(copy, change)
    with pytest.raises(ThoughtxError) as caught:
        EngineDir.open(copy)
    assert caught.value.code == "E121" and says in caught.value.why


def test_what_nobody_reads_may_be_added(copy: Path) -> None:
    (copy / "NOTES.txt").write_text("signed by us")
    Engine.load(copy).close()
