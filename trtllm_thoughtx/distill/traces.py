"""Traces of a teacher, from a JSONL file: read strictly, cut to what suffices, spoiled for contrast.

    {"prompt": "...", "steps": ["...", ...], "answer": "...", "num_sufficient": 3, "teacher_traces": [["..."], ...]}

`thought` (one text, its steps parted by blank lines) may stand for `steps`; the last two keys may be absent.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_thoughtx.jsonl import Line, read_rows, text_of, texts_of
from trtllm_thoughtx.tasks.item import steps_of

COLUMNS = ("prompt", "steps", "thought", "answer", "num_sufficient", "teacher_traces")
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


def read_traces(path: Path, note: Callable[[str], object] | None = None) -> list[Trace]:
    """All rows, or E161 that names the bad ones by their lines."""
    fix = 'each line is an object like {"prompt": "...", "steps": ["..."], "answer": "..."}. Nothing was trained.'
    return read_rows(path, _trace, code="E161", columns=COLUMNS, fix=fix).all(note)


def _steps(row: dict[str, Any], key: str) -> tuple[str, ...]:
    steps = tuple(step.strip() for step in texts_of(row, key))
    if not steps:
        raise ValueError(f"{key} must not be empty")
    return steps


def _trace(row: dict[str, Any], line: Line) -> Trace:
    if ("steps" in row) == ("thought" in row):
        raise ValueError("one of steps and thought is needed")
    steps = _steps(row, "steps") if "steps" in row else tuple(steps_of(text_of(row, "thought")))
    sufficient = row.get("num_sufficient")
    if sufficient is not None and (isinstance(sufficient, bool) or not isinstance(sufficient, int) or not 0 <= sufficient <= len(steps)):
        raise ValueError(f"num_sufficient must be a whole number from 0 to {len(steps)}")
    others = row.get("teacher_traces", [])
    if not isinstance(others, list):
        raise ValueError("teacher_traces must be a list of lists of texts")
    told = tuple(_steps({"teacher_traces": other}, "teacher_traces") for other in others)
    return Trace(line.id, text_of(row, "prompt"), steps, text_of(row, "answer"), sufficient, told)


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
