"""The commands as a user meets them: help, spellings, recipes, exit statuses and the shape of every refusal."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from places import ROOT
from places import TINY as SAMPLE

from trtllm_thoughtx import report
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli import entry
from trtllm_thoughtx.cli import params as console
from trtllm_thoughtx.errors import CODES, ThoughtxError

NAMES = ("distill", "eval", "release", "convert", "build", "validate", "run", "bench", "sign", "export", "inspect")
HEAVY = {"numpy", "torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "yaml", "rich", "tokenizers", "jinja2"}


def run(name: str, *args: object) -> int:
    return console.run(cli.COMMANDS[name], f"thoughtx-{name}", [str(arg) for arg in args])


def refused(capsys: pytest.CaptureFixture[str], code: str, name: str, *args: object) -> dict[str, str]:
    """Run, expect `code` as four parts on stderr and as JSON on stdout; return the JSON's error."""
    status = run(name, *args, "--json")
    out, err = capsys.readouterr()
    assert err.count("error[") == 1 and f"error[{code}]" in err, err
    assert all(f"  {part}:" in err for part in ("where", "why", "fix"))
    document = json.loads(out)
    assert document["ok"] is False and document["error"]["code"] == code
    assert all(document["error"][part] for part in ("what", "where", "why", "fix"))
    assert status == CODES[code][0]
    assert "Traceback" not in err
    return document["error"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    target = tmp_path_factory.mktemp("cli") / "checkpoint"
    assert run("convert", "--model_dir", SAMPLE, "--output_dir", target, "-q") == 0
    return target


@pytest.fixture(scope="module")
def engine(checkpoint):
    target = checkpoint.parent / "engine"
    recipe = ROOT / "build_configs" / "thoughtx-tiny.yaml"
    arguments = ("--config", recipe, "--backend", "onnxruntime", "--checkpoint_dir", checkpoint, "--output_dir", target, "-q")
    assert run("build", *arguments) == 0
    return target


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *NAMES])
def test_help_is_light_and_complete(name):
    """None of the modules that take long to import is loaded."""
    probe = (
        "import sys\nfrom trtllm_thoughtx.cli.commands import thoughtx\nfrom trtllm_thoughtx.cli.params import run\n"
        "code = run(thoughtx, 'thoughtx', sys.argv[1:] + ['--help'])\n"
        "print('loaded', sorted(sys.modules), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", probe, *([name] if name else [])], capture_output=True, text=True, check=True)
    loaded = {module.strip("' ").partition(".")[0] for module in done.stderr.split("loaded [")[1].split("]")[0].split(",")}
    assert not loaded & HEAVY
    assert max(map(len, done.stdout.splitlines())) <= 110
    assert "Exit codes" in done.stdout
    if name:
        assert "Examples:" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_is_explained_and_spelled_with_underscores(name):
    options = [param for param in cli.COMMANDS[name].params if isinstance(param, click.Option)]
    assert [option.opts for option in options if not option.help] == []
    assert [option.opts for option in options if any("-" in flag.lstrip("-") for flag in option.opts)] == []
    assert {"--config", "--json", "--quiet", "--debug"} <= {flag for option in options for flag in option.opts}


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_help_parse(name, monkeypatch, tmp_path):
    """Every example of every help text is a command line that the parser takes."""
    import shlex

    monkeypatch.chdir(ROOT)
    command = cli.COMMANDS[name]
    examples = [line.strip() for line in (command.epilog or "").splitlines() if line.strip().startswith("thoughtx-")]
    assert len(examples) >= 2
    for example in examples:
        program, *words = shlex.split(example)
        assert program == f"thoughtx-{name}"
        command.make_context(program, words)


def test_h_and_version(capsys):
    assert run("build", "-h") == 0
    assert run("build", "--version") == 0
    assert "trtllm-thoughtx" in capsys.readouterr().out


def test_no_command_prints_help(capsys):
    assert console.run(cli.thoughtx, "thoughtx", []) == 2
    assert "Commands:" in "".join(capsys.readouterr())


def test_installed_scripts_exist():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in NAMES:
        assert f'thoughtx-{name} = "trtllm_thoughtx.cli.entry:{name}_main"' in text
        assert getattr(entry, f"{name}_main").args == (name,)


# --- spelling --------------------------------------------------------------------------------------------------------


def test_both_spellings_of_a_flag(checkpoint, tmp_path, capsys):
    for flags in (("--max_seq_len", "64", "--dry_run"), ("--max-seq-len=64", "--dry-run")):
        assert run("build", "--checkpoint_dir", checkpoint, "--output-dir", tmp_path / "e", *flags, "--json") == 0
        assert json.loads(capsys.readouterr().out)["build"]["max_seq_len"] == 64
    assert not (tmp_path / "e").exists()


def test_a_dry_run_says_which_gpus_a_plan_is_for(checkpoint, tmp_path, capsys):
    words = ("build", "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "e", "--dry_run", "--compute_capabilities", "8.9,12.0")
    assert run(*words, "--backend", "onnxruntime,tensorrt-rtx") == 0
    assert "tensorrt-rtx: 8.9, 12.0" in capsys.readouterr().out
    assert run(*words[:-2], "--backend", "onnxruntime") == 0
    assert "GPU generations" not in capsys.readouterr().out
    assert run("build", "--help") == 0
    assert "[default: 8.6,8.9,12.0]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [["onnxruntime,tensorrt_rtx"], ["onnxruntime", "tensorrt-rtx"]])
def test_backends_joined_or_repeated(words, checkpoint, tmp_path, capsys):
    flags = [flag for word in words for flag in ("--backend", word)]
    assert run("build", "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "e", "--dry_run", "--json", *flags) == 0
    assert json.loads(capsys.readouterr().out)["build"]["backends"] == ["onnxruntime", "tensorrt-rtx"]


def test_values_keep_their_dashes(engine, tmp_path, capsys):
    error = refused(capsys, "E101", "inspect", tmp_path / "no-such-name")
    assert "no-such-name" in error["where"]


def test_a_path_that_looks_like_a_flag(engine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(engine, tmp_path / "--json")
    assert run("inspect", "--", "--json") == 0
    assert "engine" in capsys.readouterr().out


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_flag_gets_a_hint(name, capsys):
    assert "--config" in refused(capsys, "E001", name, "--confg", "x")["what"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "eval"])
def test_a_missing_argument(name, capsys):
    assert "Missing" in refused(capsys, "E001", name)["what"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("build", ["--max_seq_len", "0"]),
        ("build", ["--max_seq_len", "1.5"]),
        ("build", ["--max_seq_len", "9" * 400]),
        ("build", ["--max_seq_len"]),
        ("build", ["--dtype", "float64"]),
        ("build", ["--backend", "cuda"]),
        ("build", ["--early_exit_layers", "4,x"]),
        ("build", ["--compute_capabilities", "89"]),
        ("build", ["--output_dir", ""]),
        ("convert", ["--dtype", "int8"]),
        ("convert", ["--tp_size", "0"]),
        ("run", ["--temperature", "nan"]),
        ("run", ["--temperature", "-1"]),
        ("run", ["--top_p", "0"]),
        ("run", ["--input_ids", "1,,2"]),
        ("run", ["--input_ids", "-1"]),
        ("run", ["--backend", "\x1b[31mred"]),
        ("validate", ["--engine_dir"]),
        ("bench", ["--repeats", "many"]),
        ("inspect", ["a", "b"]),
    ],
)
def test_a_wrong_value(name, words, capsys):
    error = refused(capsys, "E001", name, *words)
    assert "\x1b" not in "".join(error.values())


def test_an_unknown_command_gets_a_hint(capsys):
    assert console.run(cli.thoughtx, "thoughtx", ["biuld"]) == 2
    assert "build" in capsys.readouterr().err


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_flags_win_over_the_recipe(checkpoint, tmp_path, capsys):
    path = recipe(tmp_path, f"checkpoint_dir: {checkpoint}\nmax_seq_len: 64\nmax_batch_size: 2\nbackend: onnxruntime\nforce: true\n")
    assert run("build", "--config", path, "--output_dir", tmp_path / "e", "--max_seq_len", "128", "--dry_run", "--json") == 0
    build = json.loads(capsys.readouterr().out)["build"]
    assert (build["max_seq_len"], build["max_batch_size"], build["backends"]) == (128, 2, ["onnxruntime"])


def test_a_recipe_works_under_the_group_too(checkpoint, tmp_path, capsys):
    path = recipe(tmp_path, "max_seq_len: 64\n")
    arguments = [
        "build",
        "--config",
        str(path),
        "--checkpoint_dir",
        str(checkpoint),
        "--output_dir",
        str(tmp_path / "e"),
        "--dry_run",
        "--json",
    ]
    assert console.run(cli.thoughtx, "thoughtx", arguments) == 0
    assert json.loads(capsys.readouterr().out)["build"]["max_seq_len"] == 64


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("dtype: float16\nmax_sequence_len: 6\n", 2, "max_seq_len"),
        ("max_seq_len: 5\n\nmax_seq_len: 6\n", 3, "twice"),
        ("top_k: 1\n", 1, "thoughtx-run"),
        ("max_seq_len: true\n", 1, "whole number"),
        ("max_seq_len: '5'\n", 1, "whole number"),
        ("max_seq_len: 5.0\n", 1, "whole number"),
        ("max_seq_len: 0\n", 1, "from 1"),
        ("max_seq_len:\n", 1, "whole number"),
        ("max_seq_len: [5]\n", 1, "whole number"),
        ("force: 1\n", 1, "true or false"),
        ("dtype: 16\n", 1, "text"),
        ("dtype: half\n", 1, "float16"),
        ("early_exit_layers: [1, true]\n", 1, "list"),
        ("early_exit_layers: {a: 1}\n", 1, "list"),
        ("backend: [cuda]\n", 1, "onnxruntime"),
        ("json: true\n", 1, "json"),
        ("- 1\n", 1, "mapping"),
        ("just text\n", 1, "mapping"),
        ("dtype: !!python/object/apply:os.system [id]\n", 1, "python/object"),
        ("a: 1\n\tb: 2\n", 2, ""),
        ("a: &x [1]\nb: *x\n", None, "anchors"),
        ("a: [1\n", None, ""),
        (b"\xff\xfe\x00\x01\x02", None, ""),
        ("? [1]\n: 2\n", 1, ""),
        ("1: 2\n", 1, "unknown key"),
        ("\x1b[31m: 2\n", None, ""),
        ("a: 1\n---\nb: 2\n", None, ""),
        ("a: " + "[" * 5000 + "]" * 5000, None, ""),
    ],
)
def test_a_wrong_recipe(text, line, says, tmp_path, capsys):
    error = refused(capsys, "E002", "build", "--config", recipe(tmp_path, text), "--checkpoint_dir", "a", "--output_dir", "b")
    assert line is None or f"line {line}" in error["where"]
    assert says in "".join(error.values())
    assert "\x1b" not in "".join(error.values())


def test_an_empty_recipe_changes_nothing(checkpoint, tmp_path, capsys):
    arguments = ("--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "e", "--dry_run", "--json")
    assert run("build", "--config", recipe(tmp_path, "# nothing\n"), *arguments) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_missing_recipe(tmp_path, capsys):
    refused(capsys, "E101", "build", "--config", tmp_path / "none.yaml", "--checkpoint_dir", "a", "--output_dir", "b")


# --- refusals of each command ----------------------------------------------------------------------------------------


def wanted_flags(name: str, path: Path, other: Path) -> list[object]:
    return {
        "convert": ["--model_dir", path, "--output_dir", other],
        "build": ["--checkpoint_dir", path, "--output_dir", other],
        "validate": ["--engine_dir", path, "--reference", SAMPLE],
        "run": ["--engine_dir", path, "--input_ids", "1"],
        "bench": ["--engine_dir", path],
        "sign": ["--engine_dir", path, "--key", other],
        "export": ["--engine_dir", path, "--oci", other],
        "inspect": [path],
    }[name]


@pytest.mark.parametrize("name", NAMES[3:])
def test_a_path_that_is_not_there(name, tmp_path, capsys):
    refused(capsys, "E101", name, *wanted_flags(name, tmp_path / "nothing", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES[3:])
def test_an_empty_directory(name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused(capsys, "E101", name, *wanted_flags(name, tmp_path / "empty", tmp_path / "out"))


@pytest.mark.parametrize("name", NAMES[3:])
def test_a_file_where_a_directory_belongs(name, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    refused(capsys, "E101", name, *wanted_flags(name, tmp_path / "file", tmp_path / "out"))


@pytest.mark.parametrize("name", ["validate", "run", "bench"])
def test_a_checkpoint_is_not_an_engine(name, checkpoint, tmp_path, capsys):
    for path in (SAMPLE, checkpoint):
        refused(capsys, "E101", name, *wanted_flags(name, path, tmp_path / "out"))


def test_convert_wants_a_model_and_not_an_engine(engine, tmp_path, capsys):
    refused(capsys, "E101", "convert", *wanted_flags("convert", engine, tmp_path / "out"))


@pytest.mark.parametrize("name", ["convert", "build"])
@pytest.mark.parametrize("kind", ["full", "file", "input", "inside", "link"])
def test_an_output_that_cannot_be_used(name, kind, checkpoint, tmp_path, capsys):
    source = SAMPLE if name == "convert" else checkpoint
    target = {"input": source, "inside": source / "out"}.get(kind, tmp_path / "out")
    if kind == "full":
        target.mkdir()
        (target / "precious").write_text("x")
    elif kind == "file":
        target.write_text("x")
    elif kind == "link":
        target.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = sorted(path.name for path in source.iterdir())
    refused(capsys, "E130", name, *wanted_flags(name, source, target))
    assert sorted(path.name for path in source.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ([] if kind in ("input", "inside") else ["out"])


def test_build_refuses_what_the_model_does_not_have(checkpoint, tmp_path, capsys):
    refused(capsys, "E001", "build", *wanted_flags("build", checkpoint, tmp_path / "out"), "--max_seq_len", 100_000)


def test_a_damaged_engine_is_not_run(engine, tmp_path, capsys):
    broken = tmp_path / "engine"
    shutil.copytree(engine, broken)
    data = bytearray((broken / "rank0.data").read_bytes())
    data[1000] ^= 1
    (broken / "rank0.data").write_bytes(data)
    for name in ("run", "bench"):
        assert "rank0.data" in refused(capsys, "E120", name, *wanted_flags(name, broken, tmp_path))["why"]
    assert run("inspect", broken, "--json") == 3
    description = json.loads(capsys.readouterr().out)
    assert (description["ok"], description["matches_manifest"], description["error"]["code"]) == (False, False, "E120")


def test_an_engine_without_manifest_is_not_run(engine, tmp_path, capsys):
    broken = tmp_path / "engine"
    shutil.copytree(engine, broken)
    (broken / "manifest.json").unlink()
    refused(capsys, "E121", "run", *wanted_flags("run", broken, tmp_path))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("E001", []),
        ("E001", ["--prompt", "a", "--input_ids", "1"]),
        ("E140", ["--prompt", ""]),
        ("E122", ["--input_ids", "9999"]),
        ("E122", ["--input_ids", ",".join(["4"] * 513)]),
        ("E101", ["--prompts", "none.jsonl"]),
        ("E101", ["--input_ids", "4", "--backend", "tensorrt"]),
    ],
)
def test_requests_that_cannot_be_served(code, words, engine, capsys):
    refused(capsys, code, "run", "--engine_dir", engine, *words)


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": ""}', '{"prompt": "a", "chunk_size": 0}', '{"input_ids": [true]}', ""])
def test_a_wrong_prompts_file(line, engine, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(line)
    refused(capsys, "E140", "run", "--engine_dir", engine, "--prompts", tmp_path / "p.jsonl")


def test_bench_refuses_more_than_the_engine_takes(engine, capsys):
    refused(capsys, "E122", "bench", "--engine_dir", engine, "--prompt_len", 4096)
    refused(capsys, "E122", "bench", "--engine_dir", engine, "--batch_size", 64)


@pytest.mark.parametrize("target", ["none/out", "."])
def test_an_output_file_that_cannot_be_written_is_refused_before_the_work(target, engine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trtllm_thoughtx.runtime.engine.Engine.load", lambda *a, **k: pytest.fail("work was done"))
    refused(capsys, "E130", "run", "--engine_dir", engine, "--input_ids", "4", "--output_logits_npy", tmp_path / target)
    refused(capsys, "E130", "validate", "--engine_dir", engine, "--reference", SAMPLE, "--junit", tmp_path / target)


def validated(statuses: dict[str, str]):
    """A stand-in for `validate.validate`: this file tests what the command makes of a report."""
    from trtllm_thoughtx.report import Check
    from trtllm_thoughtx.validate.validate import Report

    checks = tuple(Check(name, status, "" if status == "passed" else f"{name} says so", {"rms": 0.5}) for name, status in statuses.items())
    return lambda engine_dir, **options: Report(checks, "a test")


@pytest.mark.parametrize(
    ("statuses", "flags", "status", "closing"),
    [
        ({"a": "passed"}, [], 0, "PASSED: 1 passed, 0 failed, 0 skipped"),
        ({"a": "passed", "b": "skipped"}, [], 0, "PASSED WHAT WAS CHECKED: 1 passed, 0 failed, 1 skipped"),
        ({"a": "passed", "b": "skipped"}, ["--strict"], 1, "FAILED: 1 passed, 1 failed, 0 skipped"),
        ({"a": "failed", "b": "skipped"}, [], 1, "FAILED: 0 passed, 1 failed, 1 skipped"),
    ],
)
def test_validate_says_what_was_checked(statuses, flags, status, closing, engine, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers", reason="trtllm_thoughtx.validate.validate is tested with its reference installed")
    monkeypatch.setattr("trtllm_thoughtx.validate.validate.validate", validated(statuses))
    words = ("--engine_dir", engine, "--reference", SAMPLE, "--junit", tmp_path / "r.xml", *flags)
    assert run("validate", *words) == status
    assert capsys.readouterr().out.splitlines()[-1] == closing
    assert run("validate", *words, "--json") == status
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is (status == 0) and len(document["checks"]) == len(statuses)
    assert (tmp_path / "r.xml").read_text().count("<testcase") == len(statuses)


# --- results ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_answered_on_stdout(engine, capsys):
    assert run("run", "--engine_dir", engine, "--prompt", "x1 = 38 x2 = 75 ?") == 0
    out, err = capsys.readouterr()
    assert out.rstrip().endswith("</think> 13")
    assert "tokens/s" in err and "eos" in err


def test_quiet_is_quiet(engine, capsys):
    assert run("run", "--engine_dir", engine, "--prompt", "x1 = 38 ?", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_ids_and_logits(engine, tmp_path, capsys):
    import numpy as np

    path = tmp_path / "logits.npy"
    words = ("--input_ids", "4,214,8,20,25,6,2", "--max_new_tokens", 3, "--ignore_eos", "--output_logits_npy", path, "--json")
    assert run("run", "--engine_dir", engine, *words) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["results"]
    logits = np.load(path, allow_pickle=False)
    vocab_size = json.loads((SAMPLE / "config.json").read_text())["vocab_size"]
    assert (logits.shape, logits.dtype) == ((3, vocab_size), np.float32)
    assert logits.argmax(1).tolist() == row["output_ids"]
    assert (row["num_prompt_tokens"], row["stop_reason"], row["chunk_size"]) == (7, "length", 64)
    assert (document["schema"], document["ok"]) == ("thoughtx.run/1", True)


def test_a_file_of_prompts(engine, tmp_path, capsys):
    lines = [{"prompt": "x1 = 38 x2 = 75 ?"}, {"id": "b", "input_ids": [4, 214, 8, 20, 25, 6, 2]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("run", "--engine_dir", engine, "--prompts", tmp_path / "p.jsonl", "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["results"]
    assert first["text"].endswith("</think> 13") and second["text"].endswith("</think> 38") and second["id"] == "b"
    assert run("run", "--engine_dir", engine, "--prompts", tmp_path / "p.jsonl", "-q") == 0
    answers = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert sorted(answers) == ["[1]", "[b]"], "each under its id, in the order in which they are done"


def test_the_template_can_be_left_out(engine, capsys):
    words = ("--engine_dir", engine, "--max_new_tokens", 1, "--json")
    assert run("run", *words, "--prompt", "x1 = 38 ?") == run("run", *words, "--prompt", "Q x1 = 38 ? <think>", "--no_chat_template") == 0
    out = capsys.readouterr().out
    first, second = (json.loads(text) for text in out.replace("}\n{", "}\n\0{").split("\0"))
    assert first["results"][0]["output_ids"] == second["results"][0]["output_ids"]
    assert first["results"][0]["num_prompt_tokens"] == second["results"][0]["num_prompt_tokens"]


@pytest.mark.parametrize("kind", ["huggingface", "tensorrt-llm", "engine", "onnx"])
def test_inspect_knows_what_it_sees(kind, checkpoint, engine, capsys):
    path = {"huggingface": SAMPLE, "tensorrt-llm": checkpoint, "engine": engine, "onnx": engine / "rank0.onnx"}[kind]
    assert run("inspect", path) == 0
    assert kind in capsys.readouterr().out
    assert run("inspect", path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["schema"], document["ok"]) == (kind, "thoughtx.inspect/1", True)
    if kind == "onnx":
        assert document["functions"][0]["name"] == "thoughtx::ChunkedAttention"
        assert document["operators"]["TensorScatter"] == 16
        assert document["belongs_to"] == str(engine)
    if kind in ("huggingface", "tensorrt-llm"):
        assert document["model"]["num_layers"] == 8 and document["weight_bytes"] == 2 * document["num_parameters"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x0b" * 3 + b"\xff", b"<html>"])
def test_inspect_refuses_what_is_no_graph(content, tmp_path, capsys):
    (tmp_path / "x.onnx").write_bytes(content)
    refused(capsys, "E101", "inspect", tmp_path / "x.onnx")


def test_inspect_does_not_open_a_plan(tmp_path, capsys):
    (tmp_path / "x.engine").write_bytes(b"not a plan")
    assert run("inspect", tmp_path / "x.engine", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["bytes"], document["belongs_to"]) == (10, None)


def test_build_again_is_up_to_date(engine, checkpoint, capsys):
    words = ("--config", ROOT / "build_configs" / "thoughtx-tiny.yaml", "--backend", "onnxruntime", "--checkpoint_dir", checkpoint)
    assert run("build", *words, "--output_dir", engine) == 0
    assert "up to date" in capsys.readouterr().out


def test_bench_measures(engine, capsys):
    assert run("bench", "--engine_dir", engine, "--prompt_len", 8, "--max_new_tokens", 4, "--repeats", 2, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["phase"] for row in document["rows"]] == ["prefill", "decode"]
    for row in document["rows"]:
        assert 0 < row["p10"] <= row["median"] <= row["p90"] and (row["num_runs"], row["num_warmup"]) == (2, 1)
    assert document["peak_rss_bytes"] > 1 << 20 and document["ratio_to_transformers"] is None


# --- the end of every error ------------------------------------------------------------------------------------------


def raising(error: BaseException) -> click.Command:
    def callback() -> None:
        raise error

    return click.Command("x", params=[click.Option(["--json"], is_flag=True, expose_value=False)], callback=callback)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ThoughtxError("E202", "no GPU", where="here", why="none", fix="buy one"), 4, "E202"),
        (MemoryError(), 4, "E204"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 4, "E203"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 4, "E206"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (click.UsageError("wrong"), 2, "E001"),
        (click.exceptions.Exit(1), 1, ""),
    ],
)
def test_every_error_has_its_status(error, status, says, capsys):
    assert console.run(raising(error), "thoughtx-x", ["--json"]) == status
    out, err = capsys.readouterr()
    assert says in err and "Traceback" not in err
    if says.startswith("E"):
        assert json.loads(out)["error"]["code"] == says


def test_a_bug_asks_for_a_report(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert console.run(raising(ZeroDivisionError("x\x1b")), "thoughtx-x", []) == 70
    err = capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    assert str(kept) in err and "report" in err and "Traceback" not in err and "\x1b" not in err
    assert "ZeroDivisionError" in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0


def test_debug_prints_the_traceback(capsys):
    command = raising(ZeroDivisionError("x"))
    command.params.append(click.Option(["--debug"], is_flag=True, expose_value=False))
    assert console.run(command, "thoughtx-x", ["--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(engine):
    script = "import sys\nfrom trtllm_thoughtx.cli.entry import inspect_main\nsys.argv = ['thoughtx-inspect', sys.argv[1]]\ninspect_main()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", script, str(engine)], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    script = "from trtllm_thoughtx.cli.commands import main; main()"
    environment = {**os.environ, "_THOUGHTX_COMPLETE": f"{shell}_source"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if "Bash version" in done.stderr or "bash" in done.stderr:
        pytest.skip(f"click cannot find out the version of this machine's {shell}")
    assert "thoughtx" in done.stdout


def test_run_says_which_settings_it_does_not_apply(tmp_path, engine):
    from trtllm_thoughtx.cli.run import run_requests

    with_penalty = tmp_path / "e"
    shutil.copytree(engine, with_penalty)
    config = json.loads((with_penalty / "generation_config.json").read_text())
    (with_penalty / "generation_config.json").write_text(json.dumps({**config, "num_beams": 4, "temperature": [1], "max_new_tokens": -1}))
    made = report.read_manifest(with_penalty)
    report.write_manifest(with_penalty, command="x", inputs=made["inputs"], config={}, checks=[], environment={})
    done = run_requests(engine_dir=with_penalty, input_ids=(4, 5), max_new_tokens=2, top_p=0.5, temperature=0.0)
    assert done["not_applied"] == ["num_beams", "--top_p"]
    done = run_requests(engine_dir=with_penalty, input_ids=(4, 5), top_k=3)
    assert done["not_applied"] == ["temperature", "max_new_tokens", "num_beams"] + ["--top_k"] * (not config.get("do_sample"))
    assert run_requests(engine_dir=engine, input_ids=(4, 5), max_new_tokens=2)["not_applied"] == []
