"""Manifests, tables, JSON and JUnit; and the progress lines."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from trtllm_thoughtx import progress as progress_module
from trtllm_thoughtx import report
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.progress import SILENT, Progress


def write(root: Path, **changes) -> None:
    arguments = {"command": "thoughtx-build", "inputs": [], "config": {"b": 1, "a": (1, 2)}, "checks": [], "environment": {}, **changes}
    report.write_manifest(root, **arguments)


@pytest.fixture
def made(tmp_path):
    (tmp_path / "b.bin").write_bytes(b"bb")
    (tmp_path / "a.bin").write_bytes(b"a")
    write(tmp_path)
    return tmp_path


def refused(code: str, root: Path, *names) -> ThoughtxError:
    with pytest.raises(ThoughtxError) as caught:
        report.verify_files(root, *names)
    assert caught.value.code == code
    assert all(caught.value.as_dict().values())
    return caught.value


def test_a_manifest_is_canonical_and_lists_every_file(made):
    first = (made / "manifest.json").read_bytes()
    manifest = report.read_manifest(made)
    assert [row["name"] for row in manifest["outputs"]] == ["a.bin", "b.bin"]
    assert manifest["config"] == {"a": [1, 2], "b": 1}
    assert first.endswith(b"}\n") and b"\r" not in first
    assert list(manifest) == sorted(manifest)
    write(made)
    second = (made / "manifest.json").read_bytes()
    blank = re.compile(rb'"created": "[^"]*"')
    assert blank.sub(b"", first) == blank.sub(b"", second) and blank.search(first)


def test_known_hashes_are_used_and_files_are_not_read_again(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"a")
    write(tmp_path, hashes={"a.bin": "0" * 64})
    assert report.read_manifest(tmp_path)["outputs"][0]["sha256"] == "0" * 64


def test_intact_files_verify(made):
    report.verify_files(made)
    report.verify_files(made, ["a.bin"])


def test_every_difference_is_named(made):
    (made / "a.bin").write_bytes(b"x")
    (made / "b.bin").unlink()
    error = refused("E120", made)
    assert "a.bin: its content changed" in error.why and "b.bin: missing" in error.why
    assert "thoughtx-build" in error.fix


def test_size_is_told_before_content(made):
    (made / "a.bin").write_bytes(b"more")
    assert "4 bytes, the manifest says 1" in refused("E120", made, ["a.bin"]).why


def test_an_unlisted_file_does_not_verify(made):
    (made / "c.bin").write_bytes(b"c")
    report.verify_files(made)
    assert "c.bin: not listed" in refused("E120", made, ["c.bin"]).why
    assert "c.bin: added" in refused("E120", made, [], ["c.bin"]).why


def test_a_link_out_of_the_directory_does_not_verify(made, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "a.bin"
    outside.write_bytes(b"a")
    (made / "a.bin").unlink()
    (made / "a.bin").symlink_to(outside)
    refused("E104", made)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "thoughtx.manifest/2"}, "schema"),
        ({"outputs": None}, "outputs must be of type list"),
        ({"checks": {}}, "checks must be of type list"),
        ({"outputs": [{"name": "../secret", "bytes": 1, "sha256": "0" * 64}]}, "plain name"),
        ({"outputs": [{"name": "a.bin", "bytes": True, "sha256": "0" * 64}]}, "plain name"),
        ({"outputs": [{"name": "a.bin", "bytes": 1, "sha256": "0"}]}, "sha256"),
        ({"outputs": [{"name": "a.bin", "bytes": 1, "sha256": "0" * 64}] * 2}, "twice"),
    ],
)
def test_a_malformed_manifest_is_refused(made, change, says):
    path = made / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert says in refused("E121", made).why


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"schema": NaN}', b"\xff", b'{"a": 1, "a": 2}'])
def test_garbage_is_refused(made, content):
    (made / "manifest.json").write_bytes(content)
    refused("E121", made)


def test_a_missing_manifest_is_refused(tmp_path):
    assert "missing" in refused("E121", tmp_path).why


def test_inputs_are_hashed_under_their_names(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"abc")
    (row,) = report.manifest_inputs([tmp_path / "w.bin"])
    assert row == {"name": "w.bin", "bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}


def test_json_has_no_nan_and_no_foreign_types(tmp_path):
    @dataclasses.dataclass
    class Thing:
        value: float
        path: Path

    text = report.to_json(
        {"x": Thing(float("nan"), tmp_path), "i": np.int64(3), "f": np.float32("inf"), "s": {2, 1}, "a": np.arange(2), "n": None}
    )
    assert json.loads(text) == {"x": {"value": None, "path": str(tmp_path)}, "i": 3, "f": None, "s": [1, 2], "a": [0, 1], "n": None}
    assert json.loads(text, parse_constant=pytest.fail) is not None


def rendered(table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_tables_print_what_they_are_given():
    text = rendered(report.table("t [red]", ["name", "count"], [["[bold]x[/bold]", 3], ["\x1b[31mred", 0.25], [None, True]]))
    assert "[bold]x[/bold]" in text and "\x1b" not in text and "0.25" in text and "t [red]" in text


def test_junit_counts_and_carries_reasons(tmp_path):
    checks = [
        report.Check("a", "passed", evidence={"rms": 0.5}),
        report.Check("b", "failed", "too far \x00 <&>"),
        report.Check("c", "skipped", "no GPU"),
    ]
    report.junit(tmp_path / "r.xml", checks, "thoughtx-validate")
    suite = ElementTree.fromstring((tmp_path / "r.xml").read_bytes())
    assert (suite.get("name"), suite[0].get("classname")) == ("thoughtx-validate", "thoughtx.validate")
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    cases = {case.get("name"): case for case in suite}
    assert cases["c"].find("skipped").get("message") == "no GPU"
    assert cases["b"].find("failure").get("message") == "too far \\x00 <&>"


def test_progress_in_a_log_is_a_few_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(stream=stream).stage("weights", 100 << 20, "bytes") as stage:
        for _ in range(100):
            now[0] += 0.5
            stage.advance(1 << 20)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "weights (100.0 MiB) ..."
    assert lines[1] == "weights: 20.0 MiB of 100.0 MiB, eta 00:40"
    assert lines[-1] == "weights: done in 50.0 s"
    assert len(lines) == 2 + 5


def test_progress_of_a_failed_stage_does_not_say_done():
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"), Progress(stream=stream).stage("work"):
        raise ValueError("no")
    assert "done" not in stream.getvalue()


def test_silent_progress_is_silent(capsys):
    silent = SILENT
    silent.note("nothing")
    with silent.stage("work", 3) as stage:
        stage.advance(3)
        assert stage.done == 3
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(stream=stream).stage("weights [x]", 10, "steps") as stage:
        stage.advance(10)
    assert "weights [x]" in stream.getvalue() and "10/10" in stream.getvalue()


def test_the_command_that_makes_it_again_is_printed_whole(tmp_path):
    command = "thoughtx-build --checkpoint_dir m --output_dir e " + " ".join(f"--flag_{i} value" for i in range(60))
    (tmp_path / "a").write_text("a")
    report.write_manifest(tmp_path, command=command, inputs=[], config={}, checks=[], environment={})
    (tmp_path / "a").write_text("b")
    with pytest.raises(ThoughtxError) as raised:
        report.verify_files(tmp_path)
    assert raised.value.code == "E120" and f"{command} --force" in raised.value.fix
