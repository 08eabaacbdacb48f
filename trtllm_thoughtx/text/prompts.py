"""Prompts from a file: one JSON object per line, read strictly and completely before anything runs.

A line is {"prompt": TEXT}, {"messages": [...]} or {"input_ids": [...]}, with an optional "id" (default: its line number) and settings
of its own, which replace those of the command. Lines of a batch for OpenAI's servers ({"custom_id", "url", "body"}) are read as well.
Every problem is E140 with the line and its id.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_thoughtx.config import AUTO
from trtllm_thoughtx.errors import shown
from trtllm_thoughtx.jsonl import Line, Rows, read_rows
from trtllm_thoughtx.text.body import ALIASES, CHAT, COMPLETIONS, SETTINGS, TEMPLATE, own_row
from trtllm_thoughtx.text.chat import template_settings, text_messages

FORMS = ("prompt", "messages", "input_ids")
COLUMNS = (*FORMS, *TEMPLATE, *SETTINGS, *ALIASES, "method", "url", "body")
FIX = 'write one object per line, such as {"prompt": "What is 2 + 3?"}'


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request. Exactly one of the three forms is set. `where` names its line."""

    id: str
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    input_ids: tuple[int, ...] | None = None
    template_kwargs: dict[str, Any] | None = None  # of the line alone, over the command's
    settings: dict[str, Any] = field(default_factory=dict)  # likewise: fields of GenerationParams, and chunk_size
    is_raw: bool = False  # the text goes in without a chat template
    is_closed: bool = False  # no thinking is wanted
    where: str = field(default="the prompt", compare=False)
    place: int = field(default=0, compare=False)  # in its file, from 0: its random stream


def prompt_rows(path: Path) -> Rows[Prompt]:
    """The prompts of a JSONL file, in order, bad lines kept apart (E140): malformed, equal ids, or a file without prompts."""
    return read_rows(path, prompt_of_row, code="E140", columns=COLUMNS, fix=FIX)


def prompt_of_row(row: dict[str, Any], line: Line) -> Prompt:
    """The request of a line that holds no other columns than `COLUMNS`; ValueError or ThoughtxError for one that cannot be used."""
    is_raw = is_closed = False
    if "body" in row:
        row, is_raw, is_closed = _body(row)
    forms = [form for form in FORMS if form in row]
    if len(forms) != 1:
        raise ValueError(f"exactly one of {', '.join(FORMS)} is needed, found {len(forms)}")
    form, value = forms[0], row[forms[0]]
    if form == "prompt" and not (isinstance(value, str) and value):
        raise ValueError(f"the prompt must be a text that is not empty, not {shown(value, 40)}")
    if form == "input_ids":
        value = token_ids(value)
    if form == "messages":
        value = text_messages(value, line.where)
    settings = template_settings(row.get(TEMPLATE[0]), row.get(TEMPLATE[1]), line.where, "E140")
    own = _settings(row)
    place = int(line.place.rpartition(" ")[2]) - 1
    more: dict[str, Any] = {"template_kwargs": settings or None, "settings": own, "is_raw": is_raw, "is_closed": is_closed, form: value}
    return Prompt(id=line.id, where=line.where, place=place, **more)


def _settings(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        key = ALIASES.get(name, name)
        if key not in SETTINGS:
            continue
        if key in found and found[key] != value:
            raise ValueError(f"{name} and another name of {key} differ")
        if key in ("stop", "stop_token_ids"):
            value = tuple(value) if isinstance(value, list) else (value,)
        found[key] = value
    if "chunk_size" in found and found["chunk_size"] != AUTO and (type(found["chunk_size"]) is not int or found["chunk_size"] < 1):
        raise ValueError(f"chunk_size must be a whole number from 1, or auto, not {shown(found['chunk_size'], 40)}")
    return found


def _body(row: dict[str, Any]) -> tuple[dict[str, Any], bool, bool]:
    """Of a line of a batch: the same as a row of ours, whether its text goes in raw, and whether no thinking is wanted."""
    body, url = row["body"], row.get("url", CHAT)
    if not isinstance(body, dict) or url not in (CHAT, COMPLETIONS) or row.get("method", "POST") != "POST":
        raise ValueError(f"only POST to {CHAT} and {COMPLETIONS} with an object as body is answered, not {shown(url, 60)}")
    extra = [name for name in row if name not in ("body", "url", "method")]
    if extra:
        raise ValueError(f"{shown(extra[0], 60)} must stand in the body")
    own, is_closed = own_row(body, url)
    return own, url == COMPLETIONS, is_closed


def token_ids(value: Any) -> tuple[int, ...]:
    """A list of token ids from JSON, else ValueError."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"input_ids must be a list that is not empty, not {shown(value, 40)}")
    bad = [v for v in value if isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < 2**31]
    if bad:
        raise ValueError(f"input_ids must hold token ids, not {shown(bad[0], 40)}")
    return tuple(value)
