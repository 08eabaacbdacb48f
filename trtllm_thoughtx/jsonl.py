"""JSON Lines that users bring: prompts, questions, calibration rows, traces. Every command reads them here.

One object a line, strict JSON; blank lines are skipped, null is as good as absent, `-` is stdin. A column that the command does not
read is no fault: `Rows.note` names such columns and counts their lines. A line that cannot be used is named with its number and
its id (`id`, or `custom_id` as batches for servers call it; without either, its number).
"""

from __future__ import annotations

import functools
import io
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from trtllm_thoughtx.errors import ThoughtxError, counted, listed, shown
from trtllm_thoughtx.files import open_inside, open_named
from trtllm_thoughtx.strictjson import parse_json

STDIN = Path("-")
FILE_BYTES = 1 << 30
LINE_BYTES = 16 << 20
ID_LENGTH = 200
MAX_NAMED = 20  # columns in a note
# Settings of a request, here and in the servers that people use: no data, so a command that has no use for one says so.
_SETTINGS = """
    max_new_tokens max_tokens max_completion_tokens temperature top_k top_p min_p seed stop stop_token_ids stop_strings ignore_eos n
    num_return_sequences logprobs top_logprobs repetition_penalty presence_penalty frequency_penalty logit_bias bad_words chunk_size
    max_reasoning_depth max_thinking_tokens exit_threshold exit_probe probe_agree probe_tokens exit_policy draft_threshold
    prompt_lookup
    enable_thinking chat_template_kwargs reasoning_effort response_format tools tool_choice functions function_call match
"""
SETTINGS = frozenset(_SETTINGS.split())
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """Where a row stands: `place` in its file ("line 3"); `id` is its own, if `has_own_id`, else its number."""

    file: str
    place: str
    id: str
    has_own_id: bool = False

    @property
    def label(self) -> str:
        return f"{self.place} (id {shown(self.id, 60)})" if self.has_own_id else self.place

    @property
    def where(self) -> str:
        return f"{self.file}, {self.label}"


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    line: Line
    error: ThoughtxError

    def __str__(self) -> str:
        return f"{self.line.label}: {self.error.what}"


@dataclass
class Rows(Generic[T]):
    """What a file holds, in its order."""

    name: str
    code: str
    fix: str
    good: list[T] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    num_unread: Counter[str] = field(default_factory=Counter)  # lines of each column that was not read

    def all(self, note: Callable[[str], object] | None = None) -> list[T]:
        """The rows, when all of them can be used; else the command's error, which names every bad one. `note` gets `Rows.note`."""
        if self.bad:
            more = "" if len(self.bad) == 1 else f" and {len(self.bad) - 1} more"
            what = f"{counted(len(self.bad), 'row')} cannot be used"
            raise ThoughtxError(
                self.code, what, where=f"{self.bad[0].line.where}{more}", why=listed([str(bad) for bad in self.bad]), fix=self.fix
            )
        if note is not None and self.note:
            note(self.note)
        return self.good

    @property
    def note(self) -> str:
        """The columns that were not read; empty without any."""
        texts = [
            f"{what}: "
            + ", ".join(f"{shown(name, 60)} ({counted(num, 'line')})" for name, num in found[:MAX_NAMED])
            + (f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else "")
            for what, is_setting in (("columns not read", False), ("settings not applied by this command", True))
            if (found := [(name, num) for name, num in sorted(self.num_unread.items()) if (name in SETTINGS) == is_setting])
        ]
        return f"{self.name}: {'; '.join(texts)}" if texts else ""


def read_rows(
    path: Path,
    make: Callable[[dict[str, Any], Line], T],
    *,
    code: str,
    columns: Collection[str],
    fix: str,
    root: Path | None = None,
    has_ids: bool = True,
) -> Rows[T]:
    """The rows of a JSONL file that the user named (with `root`: that lies in a directory which the user named), each as `make` turns
    it. `make` raises ValueError or ThoughtxError for one that cannot be used. `code` for a file without rows, E101 for a missing one."""
    name = "stdin" if path == STDIN else shown(str(path if root is None else root / path), 400)
    return collect(name, _values(path, root, name, code), make, code=code, columns=columns, fix=fix, has_ids=has_ids)


def collect(
    name: str,
    items: Iterable[tuple[str, Any]],
    make: Callable[[dict[str, Any], Line], T],
    *,
    code: str,
    columns: Collection[str],
    fix: str,
    has_ids: bool = True,
) -> Rows[T]:
    """`read_rows` of values that are there already, each with its place. A value that is an error is a bad row."""
    rows: Rows[T] = Rows(name, code, fix)
    seen: dict[str, str] = {}
    for place, value in items:
        line = Line(name, place, place.rpartition(" ")[2])
        try:
            if isinstance(value, ThoughtxError):
                raise value
            if not isinstance(value, dict):
                raise ValueError(f"it must be an object, not {shown(value, 40)}")
            row = {key: one for key, one in value.items() if one is not None}
            if has_ids:
                line = _named(row, line, seen)
            unread = [key for key in row if key not in columns]
            rows.good.append(make({key: one for key, one in row.items() if key in columns}, line))
            rows.num_unread.update(unread)
        except ThoughtxError as error:
            rows.bad.append(Bad(line, error.at(line.where)))
        except ValueError as error:
            what = shown(str(error), 600)
            rows.bad.append(Bad(line, ThoughtxError(code, what, where=line.where, why="the row cannot be used as it is", fix=fix)))
    if not rows.good and not rows.bad:
        raise ThoughtxError(code, "there are no rows in it", where=name, why="it is empty", fix=fix)
    return rows


def text_of(row: dict[str, Any], name: str) -> str:
    """A column that must hold a text that is not empty, else ValueError."""
    if not isinstance(value := row.get(name), str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty, not {shown(value, 40)}")
    return value


def texts_of(row: dict[str, Any], name: str) -> list[str]:
    """A column that must hold a list of texts that are not empty, else ValueError."""
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
        raise ValueError(f"{name} must be a list of texts that are not empty, not {shown(value, 40)}")
    return value


def _named(row: dict[str, Any], line: Line, seen: dict[str, str]) -> Line:
    key = "id" if "id" in row else "custom_id"
    value = row.pop(key, None)
    if value is not None:
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "" or len(str(value)) > ID_LENGTH:
            raise ValueError(f"{key} must be a short text or a whole number, not {shown(value, 40)}")
        line = Line(line.file, line.place, str(value), has_own_id=True)
    if line.id in seen:
        raise ValueError(f"the id {shown(line.id, 60)} appears twice: {seen[line.id]} has it too")
    seen[line.id] = line.place
    return line


def _values(path: Path, root: Path | None, name: str, code: str) -> Iterator[tuple[str, Any]]:
    """(place, value or the error that reading it gave) of every line that is not blank."""
    if path == STDIN and root is None:
        yield from _parsed(io.BytesIO(_stdin()), name, code)
        return
    with open_named(path) if root is None else open_inside(root, str(path)) as raw:
        assert isinstance(raw, io.FileIO)
        with io.BufferedReader(raw) as handle:
            yield from _parsed(handle, name, code)


@functools.cache
def _stdin() -> bytes:
    """All of it, so that a command may read it twice."""
    return sys.stdin.buffer.read(FILE_BYTES + 1)


def _parsed(handle: BinaryIO, name: str, code: str) -> Iterator[tuple[str, Any]]:
    number = total = 0
    while data := handle.readline(LINE_BYTES + 1):
        number, total = number + 1, total + len(data)
        place = f"line {number}"
        if len(data) > LINE_BYTES or total > FILE_BYTES:
            what, most = ("the line", LINE_BYTES) if len(data) > LINE_BYTES else ("the file", FILE_BYTES)
            why = f"at most {most >> 20} MiB are read"
            raise ThoughtxError(code, f"{what} is too long", where=f"{name}, {place}", why=why, fix="check that it is the right file")
        if data.strip():
            try:
                yield place, parse_json(data, f"{name}, {place}", code)
            except ThoughtxError as error:
                yield place, error
