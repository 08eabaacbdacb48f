"""What one system did with one question, and all of them as a file: the input of every number that `thoughtx-eval` prints.

    {"schema": "thoughtx.result/1", "system": {...}, "conditions": {...}, "records": [{...}, ...]}

A saved result stands for its system in a later comparison, so it is read as strictly as any other input (E160).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_thoughtx import __version__, report
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.evaluate.matching import EXACT, MATCHES
from trtllm_thoughtx.files import atomic_file, read_named
from trtllm_thoughtx.strictjson import parse_json

SCHEMA = "thoughtx.result/1"
RESULT_BYTES = 256 << 20
FREE, CUT = "free", "cut"
KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,), "dict[str, int]": (dict,)}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer. `mode` free: the system thinks and answers; cut: it was given part of a thought and answers at once.

    Tokens and steps are those that the system wrote; `num_redundant` of the steps repeat an earlier one. `seconds` run from the
    start of the batch to the last token. `confidence` is the probability of the answer's tokens in [0, 1], None without an answer;
    `coherence` the fraction of sound steps in [0, 1], None where the chain is not known. `truncated`: it ran out of tokens.
    `match` says how the answer was compared (see `matching`), `thinking_stop` why an engine's thinking ended, `num_layer_tokens` what the
    answer cost, in tokens times layers, 0 where not known.
    """

    id: str
    task: str
    size: int
    mode: str
    expected: str
    answer: str | None
    correct: bool
    f1: float
    num_prompt_tokens: int
    num_tokens: int
    num_steps: int
    num_redundant: int
    truncated: bool
    seconds: float
    confidence: float | None = None
    coherence: float | None = None
    thinking_stop: str | None = None
    num_layer_tokens: int = 0
    traits: dict[str, int] = field(default_factory=dict)
    match: str = EXACT


@dataclass(frozen=True, kw_only=True)
class Result:
    """`system`: name, path, kind, backend, dtype. `conditions`: what was asked of it and how, and its memory where measured."""

    system: dict[str, Any]
    conditions: dict[str, Any]
    records: tuple[Record, ...]

    def of(self, task: str | None = None, mode: str = FREE) -> list[Record]:
        return [record for record in self.records if record.mode == mode and task in (None, record.task)]

    @property
    def failed(self) -> frozenset[str]:
        """The questions that ended in an error: there is no record of them."""
        return frozenset(row["id"] for row in self.conditions.get("errors", ()))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(record.task for record in self.records))


def save(result: Result, path: Path) -> None:
    body = {"schema": SCHEMA, "tool_version": __version__, **{key: getattr(result, key) for key in ("system", "conditions", "records")}}
    with atomic_file(path) as file:
        file.write(report.to_json(body).encode())


def load(path: Path) -> Result:
    """A result that `save` wrote. E160 names what is wrong with it."""
    body = parse_json(read_named(path, RESULT_BYTES, code="E160"), str(path), "E160", max_marks=1 << 25)
    problems = []
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        problems.append(f"it must be an object with schema {SCHEMA!r}")
    else:
        problems += [f"{key} must be an object" for key in ("system", "conditions") if not isinstance(body.get(key), dict)]
        errors = body["conditions"].get("errors", []) if not problems else []
        if not isinstance(errors, list) or not all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in errors):
            problems.append("conditions.errors must be a list of objects with an id")
        rows = body.get("records")
        if not isinstance(rows, list) or not rows:
            problems.append("records must be a list that is not empty")
        else:
            problems += [f"record {number}: {why}" for number, row in enumerate(rows) if (why := wrong(row))]
    if problems:
        fix = "make it again: thoughtx-eval ... --output FILE"
        raise ThoughtxError("E160", "not a usable result file", where=str(path), why=listed(problems), fix=fix)
    return Result(system=body["system"], conditions=body["conditions"], records=tuple(Record(**row) for row in body["records"]))


def wrong(row: Any) -> str:
    """What is wrong with one record; empty when it is good."""
    fields = {f.name: str(f.type) for f in dataclasses.fields(Record)}
    if not isinstance(row, Mapping) or set(row) | {"match"} != set(fields):  # results of older versions do not name it
        return f"its keys must be {', '.join(fields)}"
    for name, kind in fields.items():
        value, plain = row.get(name, EXACT), kind.removesuffix(" | None")
        if value is None and plain != kind:
            continue
        if not isinstance(value, KINDS[plain]) or (plain != "bool" and isinstance(value, bool)):
            return f"{name} must be of type {kind}, not {shown(value, 60)}"
        if isinstance(value, (int, float)) and (not math.isfinite(value) or value < 0):
            return f"{name} must be a number from 0, not {shown(value, 60)}"
    fractions = [name for name in ("f1", "confidence", "coherence") if (row[name] or 0) > 1]
    if fractions:
        return f"{fractions[0]} must be at most 1"
    if row.get("match", EXACT) not in MATCHES:
        return f"match must be one of {', '.join(MATCHES)}"
    return "" if row["mode"] in (FREE, CUT) else f"mode must be {FREE} or {CUT}"
