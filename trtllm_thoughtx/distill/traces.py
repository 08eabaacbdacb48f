"""Traces of a teacher, from a JSONL file: read strictly, cut to what suffices, spoiled for contrast.

    {"prompt": "...", "steps": ["...", ...], "answer": "...", "num_sufficient": 3, "teacher_traces": [["..."], ...]}

`thought` (one text, its steps parted by blank lines) may stand for `steps`; the last two keys may be absent.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.files import open_named
from trtllm_thoughtx.tasks.item import steps_of

LINE_BYTES = 4 << 20
KEYS = frozenset({"id", "prompt", "steps", "thought", "answer", "num_sufficient", "teacher_traces"})
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Trace:
    """One question with its chain. `others` are further right chains for it; after `num_sufficient` steps the answer is known."""

    id: str
    prompt: str
    steps: tuple[str, ...]
    answer: str
    num_sufficient: int | None = None
    others: tuple[tuple[str, ...], ...] = ()


def read_traces(path: Path) -> list[Trace]:
    """All rows, or E161 that names the bad ones by their lines."""
    traces, wrong, seen = [], [], dict[str, int]()
    with open_named(path) as file:
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                wrong.append(f"line {number}: longer than {LINE_BYTES >> 20} MiB")
                break
            if not line.strip():
                continue
            try:
                trace = _trace(line, number)
                if trace.id in seen:
                    raise ValueError(f"id {shown(trace.id)} is also in line {seen[trace.id]}")
                seen[trace.id] = number
                traces.append(trace)
            except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
                wrong.append(f"line {number}: {shown(str(error))}")
    if wrong or not traces:
        raise ThoughtxError(
            "E161",
            f"{len(wrong)} rows cannot be used" if wrong else "no rows",
            where=str(path),
            why=listed(wrong) if wrong else "the file is empty",
            fix='each line is an object like {"prompt": "...", "steps": ["..."], "answer": "..."}. Nothing was trained.',
        )
    return traces


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a text that is not empty")
    return value


def _steps(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(step, str) and step.strip() for step in value):
        raise ValueError(f"{key} must be a list of texts, none of them empty")
    return tuple(step.strip() for step in value)


def _trace(line: bytes, number: int) -> Trace:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not an object")
    unknown = sorted(set(row) - KEYS)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]}")
    if ("steps" in row) == ("thought" in row):
        raise ValueError("one of steps and thought is needed")
    steps = _steps(row["steps"], "steps") if "steps" in row else tuple(steps_of(_text(row, "thought")))
    sufficient = row.get("num_sufficient")
    if sufficient is not None and (isinstance(sufficient, bool) or not isinstance(sufficient, int) or not 0 <= sufficient <= len(steps)):
        raise ValueError(f"num_sufficient must be a whole number from 0 to {len(steps)}")
    others = row.get("teacher_traces", [])
    if not isinstance(others, list):
        raise ValueError("teacher_traces must be a list of lists of texts")
    given = row.get("id", number)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise ValueError("id must be a text or a number")
    return Trace(
        str(given), _text(row, "prompt"), steps, _text(row, "answer"), sufficient, tuple(_steps(o, "teacher_traces") for o in others)
    )


def shortest_sufficient(trace: Trace, reasoning_steps: str | int) -> tuple[str, ...] | None:
    """The shortest chain that suffices; None when `reasoning_steps` is a number and even that one has more steps."""
    own = trace.steps if trace.num_sufficient is None else trace.steps[: trace.num_sufficient]
    best = min((own, *trace.others), key=len)
    return None if isinstance(reasoning_steps, int) and len(best) > reasoning_steps else best


def corrupt(steps: tuple[str, ...], at: int, rng: random.Random, elsewhere: tuple[str, ...] = ()) -> str:
    """An unsound step for place `at`: a number or a word is wrong, or a step is skipped, or it is one from `elsewhere`.

    Never the sound step, and never one that was made before (that would be a recheck). `elsewhere` may hold words too.
    """
    sound, taken = steps[at], set(steps[: at + 1])
    for _ in range(100):
        kind = rng.choice(("number", "word", "later"))
        made = sound
        if kind == "number" and (found := list(NUMBER.finditer(sound))):
            number = rng.choice(found)
            digits = "".join(rng.choice("0123456789") for _ in number.group())
            made = sound[: number.start()] + digits + sound[number.end() :]
        elif kind == "word" and elsewhere:
            words = sound.split(" ")
            words[rng.randrange(len(words))] = rng.choice(elsewhere)
            made = " ".join(words)
        elif kind == "later" and at + 1 < len(steps):
            made = rng.choice(steps[at + 1 :])
        if made not in taken:
            return made
    return f"{sound} {sound}"
