"""What is asked: generated items of held-out splits, or rows of the user's own file.

A question of mode `cut` hands over the beginning of a right thought, closed; where that does not suffice, `?` is the right
answer. Systems that are to be compared must be asked the same, so an id says everything that a question depends on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.evaluate.matching import EXACT, MATCHES, accepted_answers, check_match, match_for
from trtllm_thoughtx.evaluate.record import CUT, FREE
from trtllm_thoughtx.jsonl import STDIN, Line, Rows, read_rows, text_of
from trtllm_thoughtx.tasks import TASKS, draw, item
from trtllm_thoughtx.tasks.item import Item
from trtllm_thoughtx.text import prompts
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.prompts import Prompt
from trtllm_thoughtx.text.text import Text, prompt_settings

SIZES = {task: tuple(range(1, 13 if task == "chain" else 5)) for task in TASKS}
OWN = ("answer", "task", "match")
COLUMNS = (*prompts.FORMS, "method", "url", "body", *OWN)
UNUSED = ("num_return_sequences", "logprobs", "chunk_size")  # settings of a request that a question has no use for
SETTINGS = {*prompts.SETTINGS, *prompts.TEMPLATE, *prompts.ALIASES} - {*UNUSED}
FIX = 'each line is an object like {"prompt": "...", "answer": "..."}'


@dataclass(frozen=True, kw_only=True)
class Question:
    """`thought` None: the system thinks for itself; else it is given this one, closed. `item` is known for generated tasks. `match` says
    how answers are compared (see `matching`), with `expected` and with what `also` counts. `request` is a line's own: what `prompt` is the
    text of, and settings that replace those of the command."""

    id: str
    task: str
    prompt: str
    expected: str
    size: int = 0
    thought: str | None = None
    item: Item | None = None
    traits: dict[str, int] = field(default_factory=dict)
    match: str = EXACT
    also: tuple[str, ...] = ()
    request: Prompt | None = None
    where: str = field(default="", compare=False)  # its file and line

    @property
    def accepted(self) -> tuple[str, ...]:
        return (" ".join(self.expected.split()), *self.also)

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.request is None else self.request.settings

    def settings_for(self, text: Text | None) -> dict[str, Any]:
        return {} if self.request is None else prompt_settings(self.request, text)

    @property
    def mode(self) -> str:
        return FREE if self.thought is None else CUT


def sha256_of_questions(questions: Sequence[Question]) -> str:
    """Of what is asked and expected: the setting that decides what was measured."""
    rows = [[asked.id, asked.prompt, *asked.accepted, asked.match, *_more(asked.request)] for asked in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _more(request: Prompt | None) -> list[Any]:
    """What is asked beside a text."""
    if request is None or request == Prompt(id=request.id, prompt=request.prompt):
        return []
    return [
        request.messages,
        request.input_ids,
        request.template_kwargs,
        sorted(request.settings.items()),
        request.is_raw,
        *[True] * request.is_closed,
    ]


def generated(
    tasks: Sequence[str],
    split: str,
    *,
    num_items: int,
    seed: int,
    sizes: Sequence[int] | None = None,
    lengths: Sequence[int] = (0,),
    cut_share: float = 0.0,
) -> list[Question]:
    """`num_items` questions of each task, spread evenly over its sizes and (lookups) over context lengths in words, and beside them
    `cut_share` times as many whose thought is cut. E001 for sizes or lengths that a task does not have."""
    made = []
    for task in tasks:
        most = TASKS[task][1]
        wanted = SIZES[task] if sizes is None else tuple(sizes)
        wrong = [size for size in wanted if not 1 <= size <= most]
        if wrong or not wanted:
            why = f"{task} has sizes 1 to {most}"
            raise ThoughtxError("E001", f"{task} of size {wrong}", where="--sizes", why=why, fix="leave it out, or ask for those")
        grid = [(size, words) for words in (lengths if task == "lookup" else (0,)) for size in wanted]
        num_cut = round(num_items * cut_share)
        for place in range(num_items + num_cut):
            size, words = grid[place % len(grid)]
            one = draw(task, split, size=size, seed=seed * 1_000_003 + place, num_words=words)
            name = f"{task}/{split}/size{size}/words{words}/seed{seed}/{place}"
            thought = None
            if place >= num_items:
                kept = random.Random(f"cut {name}").randint(0, len(one.steps))
                thought, name = item.thought(one.steps[:kept]), f"{name}/cut{kept}"
            expected = one.answer if thought is None else one.answer_after(kept)
            traits = {"num_sufficient": one.num_sufficient, "asked_words": words, **one.traits}
            asked = Question(id=name, task=task, prompt=one.prompt, expected=expected, size=size, thought=thought, item=one, traits=traits)
            made.append(asked)
    return made


def from_file(
    path: Path, limit: int | None = None, note: Callable[[str], object] | None = None, match: str | None = None
) -> list[Question]:
    """The questions of a file, all with the command's own settings. E140 names the lines that cannot be used."""
    return file_rows(path, match).all(note)[:limit]


def file_rows(path: Path, match: str | None = None, *, with_settings: bool = False) -> Rows[Question]:
    """JSONL rows: a request as `text.prompts` reads it (settings only `with_settings`) and its "answer", with optional "id", "task" and
    "match" (else `match`, else what the answer's form suggests). An answer is a text, a number, or a list of those that count."""
    task, unread = "stdin" if path == STDIN else path.stem, Counter[str]()

    def question(row: dict[str, Any], line: Line) -> Question:
        if "prompt" in row:
            text_of(row, "prompt")
        request = prompts.prompt_of_row({name: value for name, value in row.items() if name not in OWN}, line)
        if request.settings.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences must be 1: a question gets one answer")
        settings = {name: value for name, value in request.settings.items() if with_settings and name not in UNUSED}
        unread.update(request.settings.keys() - settings.keys())
        GenerationParams(**settings)
        request = replace(request, settings=settings, template_kwargs=request.template_kwargs if with_settings else None)
        accepted = accepted_answers(row.get("answer"))
        how = row.get("match", match or match_for(accepted))
        if how not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}, not {shown(how, 40)}")
        check_match(how, accepted)
        task_name, text = text_of({"task": task, **row}, "task"), request.prompt
        if text is None:
            text = str(request.messages[-1].get("content") or "") if request.messages else json.dumps(request.input_ids)
        rest = {"expected": accepted[0], "also": accepted[1:], "match": how, "where": line.where}
        return Question(id=line.id, task=task_name, prompt=text, request=request, **rest)

    rows = read_rows(path, question, code="E140", columns={*COLUMNS, *(SETTINGS if with_settings else ())}, fix=FIX)
    rows.num_unread.update(unread)
    return rows
