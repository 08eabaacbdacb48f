"""Which steps a release has, which of them engines share, and what changes their keys."""

from __future__ import annotations

import ast
import json
import shutil

import pytest
from places import ROOT, TINY

from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.cli.release import flags_of_documents
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.progress import SILENT
from trtllm_thoughtx.release.facts import NEVER, NOT_RUN
from trtllm_thoughtx.release.job import commands, open_plan

TEXT = """name: r
models: {m: {path: MODEL}}
formats: {plain: {}, int8: {qformat: int8_sq, calib_size: 8}}
targets:
  cpu: {backend: onnxruntime, max_seq_len: 64}
  rtx: {backend: tensorrt-rtx, max_seq_len: 64}
evaluate: {task: chain}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return shutil.copytree(TINY, tmp_path_factory.mktemp("plan") / "model")


def plan(tmp_path, model, *changes):
    text = TEXT.replace("MODEL", str(model))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "r.yaml").write_text(text)
    return open_plan(tmp_path / "r.yaml", flags_of_documents(), None, SILENT)


def names(made):
    return {step.name: key for key, step in made.steps.items()}


def test_the_graph(tmp_path, model):
    made = plan(tmp_path, model)
    steps = names(made)
    assert len(steps) == 12 and len(made.engines) == 4  # 1 convert, 1 calibrate, 4 builds, 4 validations, 2 evaluations
    by_name = {step.name: step for step in made.steps.values()}
    assert by_name["build m-int8-rtx"].inputs == by_name["build m-int8-cpu"].inputs == (steps["calibrate m-int8"],)
    assert by_name["evaluate m-int8-cpu"].inputs == (steps["build m-int8-cpu"], steps["evaluate m-plain-cpu"])
    assert made.engines[1].missing["evaluate"].startswith("no GPU here")
    order = list(made.steps)
    assert all(order.index(need) < order.index(key) for key, step in made.steps.items() for need in step.needs)


CHANGES = [
    ((), set()),
    ((("name: r", "name: other"),), set()),
    ((("max_seq_len: 64}\n  rtx", "max_seq_len: 32}\n  rtx"),), {"build m-plain-cpu", "build m-int8-cpu"}),
    ((("calib_size: 8", "calib_size: 9"),), {"calibrate m-int8"}),
    ((("evaluate:", "limits: {max_kl: 1}\nevaluate:"),), set()),
    ((("task: chain", "task: lookup"),), {"evaluate m-plain-cpu"}),
    ((("name: r", "name: r\ndate: 2026-01-01"),), {"convert m", "calibrate m-int8"}),
    ((("name: r", "name: r\ncores: {calibrate: 2}"),), {"calibrate m-int8"}),
]


@pytest.mark.parametrize(("changes", "first"), CHANGES)
def test_a_change_makes_again_what_depends_on_it_and_nothing_else(changes, first, tmp_path, model):
    before, after = plan(tmp_path, model), plan(tmp_path, model, *changes)
    same = set(before.steps) & set(after.steps)
    new = {step.name: step for key, step in after.steps.items() if key not in same}
    assert {name for name, step in new.items() if all(need in same for need in step.inputs)} == first


def test_keys_go_by_content_not_by_place(tmp_path, model):
    there = plan(tmp_path, model)
    moved = plan(tmp_path, shutil.copytree(model, tmp_path / "moved"))
    assert set(there.steps) == set(moved.steps)
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config | {"x": 1}))
    assert not set(there.steps) & set(plan(tmp_path, tmp_path / "moved").steps)


def test_other_code_is_another_key(tmp_path, model, monkeypatch):
    """Of the kinds that run it."""
    from trtllm_thoughtx.release import facts

    before = plan(tmp_path, model)
    rows = facts._sources()
    monkeypatch.setattr(facts, "_sources", lambda: (*rows, ("graph/new.py", "0" * 64)))
    facts._code.cache_clear()
    after = plan(tmp_path, model)
    facts._code.cache_clear()
    kinds = {before.steps[key].kind for key in set(before.steps) & set(after.steps)}
    assert kinds == {"convert"}


ENTRIES = {
    "convert": ("checkpoint/convert.py", "checkpoint/quantized.py"),
    "part": ("build/build.py",),
    "build": ("build/build.py",),
    "validate": ("validate/validate.py",),
    "sign": ("ship/sign.py",),
    "export": ("ship/export/oci.py",),
}


@pytest.mark.parametrize("kind", NOT_RUN)
def test_code_that_a_step_does_not_run_is_really_not_run(kind):
    """By its imports, those inside functions too."""
    package = ROOT / "trtllm_thoughtx"
    todo, seen = list(ENTRIES[kind]), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((package / name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trtllm_thoughtx"):
                base = (node.module or "").removeprefix("trtllm_thoughtx").strip(".").replace(".", "/")
                for path in (f"{base}.py", f"{base}/__init__.py", *(f"{base}/{alias.name}.py".lstrip("/") for alias in node.names)):
                    todo += [path] if path != ".py" and (package / path).is_file() else []
    assert {name.partition("/")[0] for name in seen} & NOT_RUN[kind] == set()
    assert NOT_RUN[kind] >= NEVER


def test_commands_of_an_engine_are_three(tmp_path, model):
    made = plan(tmp_path, model)
    lines = commands(made.engines[2], made.steps)
    assert [line.split()[0] for line in lines] == ["thoughtx-calibrate", "thoughtx-build", "thoughtx-validate"]
    assert "--output_dir m-int8 " in lines[0] and "--checkpoint_dir m-int8 " in lines[1] and "@" not in "".join(lines)


def test_dry_run(tmp_path, model, capsys):
    plan(tmp_path, model)
    words = [str(tmp_path / "r.yaml"), "--output_dir", str(tmp_path / "out"), "--dry_run", "--json", "-q"]
    assert run(cli.COMMANDS["release"], "thoughtx-release", words) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["steps"]) == 12 and document["num_found"] == 0 and not (tmp_path / "out").exists()
    assert all(step["memory_bytes"] > 0 for step in document["steps"])


def test_what_is_not_there_is_said(tmp_path, model):
    with pytest.raises(ThoughtxError) as refused:
        plan(tmp_path, model, ("evaluate:", "sign: {key: none.pem}\nevaluate:"))
    assert refused.value.code == "E101" and "none.pem" in refused.value.where


def test_stages_of_plans_are_steps_of_their_own(tmp_path, model):
    made = plan(tmp_path, model, ("tensorrt-rtx, max_seq_len: 64", "tensorrt-rtx, max_seq_len: 64, num_stages: 2"))
    by_name = {step.name: step for step in made.steps.values()}
    parts = [by_name[f"part m-plain-rtx-part{index}"] for index in range(3)]
    build = by_name["build m-plain-rtx"]
    assert set(build.inputs) == {by_name["convert m"].key, *(step.key for step in parts)}
    assert [step.words[-2:] for step in parts] == [("--only_part", str(index)) for index in range(3)]
    assert all(step.memory > build.memory for step in parts)
    line = commands(made.engines[1], made.steps)[1]
    assert "--num_stages 2" in line and "part" not in line


def test_two_engines_of_one_name(tmp_path, model):
    with pytest.raises(ThoughtxError) as refused:
        plan(tmp_path, model, ("formats: {plain: {}, int8:", "formats: {a: {}, a-b: {}, int8:"), ("  cpu:", "  b-c:"), ("  rtx:", "  c:"))
    assert refused.value.code == "E002" and "m-a-b-c" in refused.value.why
