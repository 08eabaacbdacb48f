"""The answers of a job as a file: a JSON line each, written as soon as it is there, so that a stopped job goes on where it was.

A row says what it came from (`engine_sha256`, `prompt_sha256`, `settings`). Going on reads the rows back, drops a torn last line and rows
that hold errors, and refuses, by name, what is not the same now.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

from trtllm_thoughtx import report
from trtllm_thoughtx.errors import ThoughtxError, counted, listed, shown
from trtllm_thoughtx.files import atomic_file, read_named
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.strictjson import parse_json

FILE_BYTES = 16 << 30
STAMP = ("engine_sha256", "prompt_sha256", "settings")


class Stamp(NamedTuple):
    """What an answer depends on."""

    engine_sha256: str
    prompt_sha256: str
    settings: dict[str, Any]


def stamp(engine_sha256: str, ids: Sequence[int], settings: Mapping[str, Any]) -> Stamp:
    return Stamp(engine_sha256, sha256_of(list(ids)), report.plain(settings))


def sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(report.plain(value), sort_keys=True).encode()).hexdigest()


class Answers:
    """`done`: rows that were there before, by id and index. `num_tokens`: the column of a row that counts its tokens."""

    def __init__(self, path: Path, *, resume: bool, num_tokens: str = "num_output_tokens") -> None:
        report.check_file_output(path)
        self.path, self.num_tokens, self.done = path, num_tokens, dict[tuple[str, int], dict[str, Any]]()
        if path.exists():
            if not resume:
                why = "a job never writes over answers"
                fix = "give --resume to go on with it, or choose another output path"
                raise ThoughtxError("E130", "the output file exists", where=shown(str(path), 400), why=why, fix=fix)
            self._read()

    def check(self, stamps: Mapping[str, Stamp]) -> None:
        """E160 unless every row that is kept would be made the same way now."""
        wrong = []
        for (name, _), row in self.done.items():
            now = stamps.get(name)
            if now is None:
                wrong.append(f"id {shown(name, 60)} is not among the requests")
                continue
            if row["engine_sha256"] != now.engine_sha256:
                wrong.append("the engine is another one")
            if row["prompt_sha256"] != now.prompt_sha256:
                wrong.append(f"the prompt of id {shown(name, 60)} (or its chat template) is another one")
            there, here = row["settings"], now.settings
            wrong += [
                f"{key} is {shown(there.get(key), 40)} there, {shown(here.get(key), 40)} now"
                for key in sorted({*there, *here})
                if there.get(key) != here.get(key)
            ]
        if wrong:
            why, fix = listed(list(dict.fromkeys(wrong)), 5), "give the same engine, prompts and flags as before, or another --output"
            raise ThoughtxError("E160", "the answers there were made otherwise", where=shown(str(self.path), 400), why=why, fix=fix)

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of one request; those that are there already are not written again."""
        new = [row for row in rows if (row["id"], row.get("index", 0)) not in self.done]
        self._file.write(b"".join(_line(row) for row in new))
        self._file.flush()

    @contextlib.contextmanager
    def writing(self, progress: Progress, rows: Sized) -> Iterator[None]:
        """The file is open to `write`; Ctrl-C says how many requests, those of `rows`, are done."""
        if self.path.exists():
            with atomic_file(self.path) as file:
                file.write(b"".join(map(_line, self.done.values())))
        with open(self.path, "ab") as self._file:
            try:
                yield
            except KeyboardInterrupt:
                progress.note(f"{counted(len(rows), 'request')} done in {self.path}; --resume goes on with the others")
                raise

    def _read(self) -> None:
        where = shown(str(self.path), 400)
        lines = read_named(self.path, FILE_BYTES, code="E160").split(b"\n")[:-1]  # behind the last line end: nothing, or half a row
        for number, line in enumerate(lines, 1):
            row = parse_json(line, f"{where}, line {number}", "E160")
            if isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get("error"), dict):
                continue
            if (
                not isinstance(row, dict)
                or not all(isinstance(row.get(key), str) for key in ("id", *STAMP[:2]))
                or not self._has_numbers(row)
            ):
                why, fix = "a row lacks what answers say of themselves", "choose another output path"
                raise ThoughtxError("E160", "this is no file of answers", where=f"{where}, line {number}", why=why, fix=fix)
            self.done[row["id"], row["index"]] = row

    def _has_numbers(self, row: Mapping[str, Any]) -> bool:
        return isinstance(row.get("settings"), dict) and type(row.get("index")) is int and type(row.get(self.num_tokens)) is int


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(report.plain(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
