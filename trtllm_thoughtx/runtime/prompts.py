"""Prompts from a file: one JSON object per line, read strictly and completely before anything runs.

A line is {"prompt": TEXT}, {"messages": [...]} or {"input_ids": [...]}, with an optional "id" (default: its line number).
Blank lines are skipped. Every problem is E140 with the line number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import parse_json, read_named
from trtllm_thoughtx.runtime.chat import plain_messages

FILE_BYTES = 256 << 20
LINE_BYTES = 16 << 20
FORMS = ("prompt", "messages", "input_ids")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request. Exactly one of the three forms is set."""

    id: str
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    input_ids: tuple[int, ...] | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a JSONL file, in order; E140 for a malformed line, for two equal ids and for a file without prompts."""
    name = shown(str(path), 400)
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(read_named(path, FILE_BYTES, code="E140").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        if len(line) > LINE_BYTES:
            raise _refused("the line is too long", where, f"{len(line):,} bytes; at most {LINE_BYTES:,} are read")
        prompt = _prompt(parse_json(line, where, "E140"), number, where)
        if prompt.id in lines:
            raise _refused(f"the id {shown(prompt.id)!r} appears twice", where, f"line {lines[prompt.id]} has it too")
        lines[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise _refused("there are no prompts in the file", name, "it is empty")
    return prompts


def _prompt(raw: object, number: int, where: str) -> Prompt:
    if not isinstance(raw, dict):
        raise _refused(f"the line must hold an object, not {shown(raw, 40)}", where, "each line is one request")
    forms = [form for form in FORMS if form in raw]
    unknown = sorted(raw.keys() - {"id", *FORMS})
    if unknown or len(forms) != 1:
        what = f"unknown field {shown(unknown[0])!r}" if unknown else f"exactly one of {', '.join(FORMS)} is needed, found {len(forms)}"
        raise _refused(what, where, "the fields of a line are id and one of these three")
    name = raw.get("id", number)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "" or len(str(name)) > 200:
        raise _refused("the id must be a short text or a whole number", where, f"it is {shown(name, 40)}")
    form, value = forms[0], raw[forms[0]]
    if form == "prompt" and not (isinstance(value, str) and value):
        raise _refused("the prompt must be a text that is not empty", where, f"it is {shown(value, 40)}")
    if form == "input_ids":
        if not isinstance(value, list) or not value:
            raise _refused("input_ids must be a list that is not empty", where, f"it is {shown(value, 40)}")
        bad = next((v for v in value if isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < 2**31), None)
        if bad is not None or None in value:
            raise _refused("input_ids must hold token ids", where, f"found {shown(bad, 40)}")
        value = tuple(value)
    if form == "messages":
        value = tuple(plain_messages(value, where))
    return Prompt(id=str(name), **{form: value})


def _refused(what: str, where: str, why: str) -> ThoughtxError:
    return ThoughtxError("E140", what, where=where, why=why, fix='write one object per line, such as {"prompt": "What is 2 + 3?"}')
