"""Rows of a JSONL file: one reader, whichever command asks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trtllm_thoughtx import jsonl
from trtllm_thoughtx.calibrate.data import read_data
from trtllm_thoughtx.distill.traces import read_traces
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.benchmarks import read_rows as benchmark_rows
from trtllm_thoughtx.evaluate.questions import from_file
from trtllm_thoughtx.text.prompts import prompt_rows


def _calibration(path: Path, note: Any) -> list[Any]:
    data = read_data(path, None, vocab_size=9, num_samples=9, max_len=9, seed=0)
    note(next((warning for warning in data.warnings if "column" in warning), ""))
    return data.held + data.rows


# command's reader, a good row, its error
READERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "prompts": (lambda path, note: prompt_rows(path).all(note), {"prompt": "q"}, "E140"),
    "questions": (lambda path, note: from_file(path, note=note), {"prompt": "q", "answer": "a"}, "E140"),
    "benchmarks": (lambda path, note: benchmark_rows(path.parent, path.name, "gsm8k", note), {"question": "q", "answer": "#### 1"}, "E140"),
    "calibration": (_calibration, {"input_ids": [1, 2]}, "E164"),
    "traces": (read_traces, {"prompt": "q", "steps": ["s"], "answer": "a"}, "E161"),
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize("name", READERS)
def test_columns_that_are_not_read_are_counted_and_named_once(name, tmp_path):
    read, row, _ = READERS[name]
    notes: list[str] = []
    path = write(tmp_path / "d.jsonl", row | {"source": "x", "level": 3}, "", row | {"source": "y", "tools": [], "level": None}, row)
    assert len(read(path, notes.append)) == 3
    assert notes == [f"{path}: columns not read: level (1 line), source (2 lines); settings not applied by this command: tools (1 line)"]


@pytest.mark.parametrize("name", READERS)
def test_bad_lines_are_named_with_file_line_and_id(name, tmp_path):
    read, row, code = READERS[name]
    bad = ('{"id": "a7"}', "[1]", "{", '{"id": "b", "id": "c"}', json.dumps(row) + "x", '{"x": NaN}')
    path = write(tmp_path / "d.jsonl", row, *bad)
    with pytest.raises(ThoughtxError) as caught:
        read(path, None)
    assert (caught.value.code, caught.value.what) == (code, f"{len(bad)} rows cannot be used")
    lines = caught.value.why.split("\n")
    assert len(lines) == len(bad) and all(f"line {number}" in line for number, line in enumerate(lines, 2))
    assert caught.value.where.startswith(f"{path}, line 2") and caught.value.where.endswith("and 5 more")
    if name not in ("benchmarks", "calibration"):  # these data have no ids
        assert "line 2 (id a7)" in caught.value.where and "line 2 (id a7)" in caught.value.why


@pytest.mark.parametrize("name", READERS)
def test_empty_files_and_long_lines(name, tmp_path, monkeypatch):
    read, row, code = READERS[name]
    with pytest.raises(ThoughtxError, match="no rows") as caught:
        read(write(tmp_path / "d.jsonl", "", " "), None)
    assert caught.value.code == code
    monkeypatch.setattr(jsonl, "LINE_BYTES", 100)
    with pytest.raises(ThoughtxError, match="too long") as caught:
        read(write(tmp_path / "d.jsonl", row, row | {"x": "y" * 100}), None)
    assert caught.value.code == code and "line 2" in caught.value.where
    monkeypatch.setattr(jsonl, "LINE_BYTES", 1000)
    monkeypatch.setattr(jsonl, "FILE_BYTES", 200)
    with pytest.raises(ThoughtxError, match="too long") as caught:
        read(write(tmp_path / "d.jsonl", *[row | {"x": "y" * 80}] * 3), None)
    assert caught.value.code == code


def test_null_is_absent_and_ids_are_kept_apart(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "messages": None, "id": None}, {"prompt": "b", "custom_id": "x"})
    assert [(one.id, one.prompt) for one in prompt_rows(path).all()] == [("1", "a"), ("x", "b")]
    with pytest.raises(ThoughtxError) as caught:
        prompt_rows(write(path, {"prompt": "a", "id": "x"}, {"prompt": "b", "custom_id": "x"})).all()
    assert "appears twice: line 1 has it too" in caught.value.why


def test_a_dash_is_stdin_as_often_as_it_is_read():
    code = (
        "import sys; from pathlib import Path; from trtllm_thoughtx.text.prompts import prompt_rows\n"
        "print([one.prompt for _ in range(2) for one in prompt_rows(Path('-')).all()])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=b'{"prompt": "a"}\n{"prompt": "b"}', capture_output=True, check=True)
    assert done.stdout.decode().strip() == "['a', 'b', 'a', 'b']"
    done = subprocess.run([sys.executable, "-c", code], input=b'{"prompt": 5}', capture_output=True, check=False)
    assert b"stdin, line 1" in done.stderr or b"E140" in done.stderr
