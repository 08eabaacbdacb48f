"""Prompts from a file: one JSON object per line, read strictly and completely before anything runs.

A line is {"prompt": TEXT}, {"messages": [...]} or {"input_ids": [...]}, with an optional "id" (default: its line number).
Every problem is E140 with the line and its id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import shown
from trtllm_thoughtx.jsonl import Line, Rows, read_rows
from trtllm_thoughtx.text.chat import plain_messages, template_settings

FORMS = ("prompt", "messages", "input_ids")
TEMPLATE = ("enable_thinking", "chat_template_kwargs")
FIX = 'write one object per line, such as {"prompt": "What is 2 + 3?"}'


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request. Exactly one of the three forms is set. `where` names its line."""

    id: str
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    input_ids: tuple[int, ...] | None = None
    template_kwargs: dict[str, Any] | None = None  # of the line alone, over the command's
    where: str = field(default="the prompt", compare=False)


def read_prompts(path: Path, note: Callable[[str], object] | None = None) -> list[Prompt]:
    """All prompts of a JSONL file, in order; E140 for malformed lines, for two equal ids and for a file without prompts."""
    return prompt_rows(path).all(note)


def prompt_rows(path: Path) -> Rows[Prompt]:
    """The same, bad lines kept apart."""
    return read_rows(path, _prompt, code="E140", columns=(*FORMS, *TEMPLATE), fix=FIX)


def _prompt(row: dict[str, Any], line: Line) -> Prompt:
    forms = [form for form in FORMS if form in row]
    if len(forms) != 1:
        raise ValueError(f"exactly one of {', '.join(FORMS)} is needed, found {len(forms)}")
    form, value = forms[0], row[forms[0]]
    if form == "prompt" and not (isinstance(value, str) and value):
        raise ValueError(f"the prompt must be a text that is not empty, not {shown(value, 40)}")
    if form == "input_ids":
        value = token_ids(value)
    if form == "messages":
        value = tuple(plain_messages(value, line.where))
    settings = template_settings(row.get(TEMPLATE[0]), row.get(TEMPLATE[1]), line.where, "E140")
    return Prompt(id=line.id, where=line.where, template_kwargs=settings or None, **{form: value})


def token_ids(value: Any) -> tuple[int, ...]:
    """A list of token ids from JSON, else ValueError."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"input_ids must be a list that is not empty, not {shown(value, 40)}")
    bad = [v for v in value if isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < 2**31]
    if bad:
        raise ValueError(f"input_ids must hold token ids, not {shown(bad[0], 40)}")
    return tuple(value)
