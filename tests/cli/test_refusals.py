"""What a refusal advises works: each row makes an input that is refused, follows the `fix:` as a user would, and the command succeeds."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from advice import ROWS, Row

from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli import params as console
from trtllm_thoughtx.errors import CODES

CONVERT = "convert --model_dir @m --output_dir @out"
BUILD = "build --checkpoint_dir @m --output_dir @out --backend onnxruntime"


def run(root: Path, line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Status and JSON document of a command; @NAME is a path in `root`."""
    name, *words = [str(root / word[1:]) if word.startswith("@") else word for word in shlex.split(line)]
    capsys.readouterr()
    status = console.run(cli.COMMANDS[name], f"thoughtx-{name}", [*words, "--json", "-q"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines that rows are asked for things that they cannot do: e (plain), c (chunked)."""
    root = tmp_path_factory.mktemp("engines")
    tiny.write_tiny(root / "m", tokenizer=True)
    common = ["--checkpoint_dir", str(root / "m"), "--backend", "onnxruntime", "--max_batch_size", "2", "--max_seq_len", "64", "-q"]
    for name, flags in (("e", ()), ("c", ("--use_chunked_attention", "--chunk_size", "16"))):
        assert console.run(cli.build, "thoughtx-build", [*common, *flags, "--output_dir", str(root / name)]) == 0
    return root


@pytest.mark.parametrize("row", ROWS, ids=[row.name.replace(" ", "-") for row in ROWS])
@pytest.mark.slow
def test_the_advice_works(row: Row, engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in set(re.findall(r"@([ec])\b", row.command)):
        shutil.copytree(engines / name, tmp_path / name)
    row.make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, document = run(tmp_path, row.command, capsys)
    error = document.get("error") or pytest.fail(f"not refused: {document}")
    assert (error["code"], status) == (row.code, CODES[row.code][0]), error
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
    found = re.search(row.fix, error["fix"])
    assert found, error["fix"]
    assert "None" not in error["fix"] and not unknown_flags(error["fix"], (row.command.split()[0],))
    for line in row.follow(tmp_path) or [row.then or row.command]:
        for number, group in enumerate(found.groups(), 1):
            line = line.replace(f"{{{number}}}", group if group.startswith("--") else shlex.quote(group))
        status, document = run(tmp_path, line, capsys)
        assert status == 0, document


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


# --- what is no reason to refuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "value_head.safetensors", "consolidated.safetensors", "._model.safetensors"])
def test_other_safetensors_are_passed_over(name: str, shards: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tiny.write_tiny(tmp_path / "m", shards=shards)
    (tmp_path / "m" / name).write_bytes(b"\0\5\26\7 not even a safetensors file")
    for line in (CONVERT, BUILD, "inspect @m"):
        status, document = run(tmp_path, line, capsys)
        assert status == 0, document
        assert name in " ".join(document["ignored_files"] if "ignored_files" in document else document["notes"])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with open_weights(tmp_path / "m") as source:
        assert {part.source for tensor in source.tensors() for part in tensor.parts} == written.keys()


def test_notes_are_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_tiny(tmp_path / "m")
    (tmp_path / "m" / "adapter_model.safetensors").write_bytes(b"x")
    assert (
        console.run(cli.COMMANDS["convert"], "thoughtx-convert", ["--model_dir", str(tmp_path / "m"), "--output_dir", str(tmp_path / "c")])
        == 0
    )
    assert "not part of the model, and not read: adapter_model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_float64_is_rounded(dtype: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = np.random.default_rng(0).standard_normal((96, 64))
    tiny.write_tiny(tmp_path / "m", dtype="float64", tied=tied, tensors={"model.layers.1.mlp.up_proj.weight": wanted})
    status, document = run(tmp_path, f"{CONVERT} --dtype {dtype}", capsys)
    assert status == 0 and any("float64" in note for note in document["notes"]), document
    with open_weights(tmp_path / "out") as made:
        assert made.config.dtype == ("float32" if dtype == "auto" else dtype)
        values = made.read("transformer.layers.1.mlp.gate.weight")
    np.testing.assert_array_equal(values, wanted.astype(values.dtype))


def test_float64_beyond_the_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_tiny(tmp_path / "m", dtype="float64", tensors={"model.norm.weight": np.full(64, 1e39)})
    status, document = run(tmp_path, CONVERT, capsys)
    assert (status, document["error"]["code"]) == (3, "E108") and "64 values are beyond the range of float32" in document["error"]["why"]


def test_a_tilde_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A shell leaves the tilde of --model_dir=~/m alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.write_tiny(tmp_path / "m")
    assert console.run(cli.COMMANDS["convert"], "thoughtx-convert", ["--model_dir=~/m/", "--output_dir=~/out", "-q"]) == 0
    assert (tmp_path / "out" / "rank0.safetensors").is_file()
    capsys.readouterr()


# --- what messages name exists ----------------------------------------------------------------------------------------

PACKAGE = Path(cli.__file__).parents[1]
RUNNING = ("run", "eval", "bench", "validate", "calibrate")
# module -> the commands whose user reads its messages; a folder holds for its files, the longest entry counts
READERS = {
    "serve/": ("serve",),
    "": tuple(cli.COMMANDS),
    "bench.py": ("bench",),
    "build/build.py": ("build",),
    "build/options.py": ("build",),
    "build/parts.py": ("build",),
    "calibrate/": ("calibrate",),
    "checkpoint/quantized.py": ("convert",),
    "checkpoint/convert.py": ("convert",),
    "distill/": ("distill",),
    "build/trtllm.py": ("build",),
    "backends/ort": RUNNING,
    "backends/onnxruntime.py": RUNNING,
    "backends/tensorrt.py": ("build",),
    "backends/trt_builder.py": ("build",),
    "backends/trt_module.py": ("build",),
    "backends/trt_runner.py": ("run", "eval", "bench", "validate"),
    "build/engine_dir.py": ("run", "eval", "bench", "validate"),
    "evaluate/": ("eval",),
    "files.py": ("convert", "build", "calibrate", "distill"),
    "inspection.py": ("inspect",),
    "ship/": ("sign",),
    "ship/export/": ("export",),
    "ship/preflight.py": ("inspect",),
    "validate/given.py": ("validate",),
    "validate/golden.py": ("validate",),
    "validate/merging.py": ("validate",),
    "validate/quality.py": ("validate",),
    "release/": ("release",),
    "report.py": ("convert", "build", "calibrate", "distill"),  # it names the command that made an output
    "cli/run.py": ("run",),
    "runtime/": ("run", "eval"),
    "runtime/answers.py": ("run",),
    "runtime/jobs.py": ("run",),
    "text/": ("run", "eval"),
    "text/params.py": ("run",),
    "validate/validate.py": ("validate",),
    "checkpoint/weights.py": ("convert", "build"),
}
# flags' own help, scripts, flags of accelerate and of Polygraphy, variables of CSS
NO_ADVICE = (
    *(f"cli/{name}.py" for name in ("commands", "calibrate", "distill", "evaluate", "framework", "demo")),
    *("distill/plan.py", "distill/sample.py", "validate/polygraphy.py", "release/page.py"),
)
NOT_COMMANDS = {"tiny", "bug", "weights", "windows", "harness"}  # the sample's name; directories in the system's temporary place
FLAGS = {
    name: {option.lstrip("-").replace("-", "_") for param in command.params for option in (*param.opts, *param.secondary_opts)} | {"help"}
    for name, command in cli.COMMANDS.items()
}


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """String literals of a module but its docstrings; what an f-string fills in is X."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            skipped.add(id(node.body[0].value))  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in ast.walk(node))
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    yield from (
        (n.lineno, n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in skipped
    )


def unknown_flags(text: str, commands: tuple[str, ...]) -> list[str]:
    """Flags in a message that the command lacks: the one named before them in the message, else each of `commands`."""
    wrong, named = [], commands
    for command, flag in re.findall(r"thoughtx-([a-z]+)|(?<![\w-])--(?!upgrade)([a-z]\w*)", text):
        if command and command not in NOT_COMMANDS:
            named = (command,)
            wrong += [] if command in FLAGS else [f"thoughtx-{command}"]
        elif flag:
            wrong += [f"thoughtx-{one} --{flag}" for one in named if flag not in FLAGS.get(one, {flag})]
    return wrong


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "tree"), [pytest.param(*pair, id=pair[0]) for pair in modules()])
def test_messages_name_flags_and_commands_that_exist(name: str, tree: ast.Module) -> None:
    if name.startswith(NO_ADVICE):
        return
    commands = READERS[max((prefix for prefix in READERS if name.startswith(prefix)), key=len)]
    wrong = [f"line {line}: {what} in {text!r}" for line, text in messages(tree) for what in unknown_flags(text, commands) if " " in text]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_walk_sees_what_it_must() -> None:
    assert unknown_flags("give --input_ids", ("run", "eval")) == ["thoughtx-eval --input_ids"]
    assert unknown_flags("thoughtx-run --input_ids, or thoughtx-run --tp_size", ("eval",)) == ["thoughtx-run --tp_size"]
    assert unknown_flags("thoughtx-make it", ("eval",)) == ["thoughtx-make"]
    assert READERS.keys() - {""} == {prefix for prefix in READERS if prefix and any(name.startswith(prefix) for name, _ in modules())}
    assert [text for _, text in messages(ast.parse('"""doc"""\nx = f"a {b} c"\ny = "d"'))] == ["a X c", "d"]


def test_extras_that_are_advised_exist() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(
        re.findall(r"^(\w+) = \[", text[text.index("[project.optional-dependencies]") : text.index("[project.scripts]")], re.MULTILINE)
    )
    named = {extra for _, tree in modules() for _, text in messages(tree) for extra in re.findall(r"trtllm-thoughtx\[(\w+)\]", text)}
    assert named - {"X"} and named - {"X"} <= extras


@pytest.mark.slow
def test_advice_says_how() -> None:
    """Advice that only repeats that something is wrong."""
    vague = {"correct the file", "correct the value", "correct the flag", "use another model", "check the path"}
    assert not [f"{name} line {line}: {text}" for name, tree in modules() for line, text in messages(tree) if text in vague]
