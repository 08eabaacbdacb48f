"""What is asked: generated items of held-out splits, or rows of the user's own file.

A question of mode `cut` hands over the beginning of a right thought, closed; where that does not suffice, `?` is the right
answer. Systems that are to be compared must be asked the same, so an id says everything that a question depends on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.evaluate.matching import EXACT, MATCHES, accepted_answers, check_match, match_for
from trtllm_thoughtx.evaluate.record import CUT, FREE
from trtllm_thoughtx.jsonl import STDIN, Line, read_rows, text_of
from trtllm_thoughtx.tasks import TASKS, draw, item
from trtllm_thoughtx.tasks.item import Item

SIZES = {task: tuple(range(1, 13 if task == "chain" else 5)) for task in TASKS}
COLUMNS = ("prompt", "answer", "task", "match")
FIX = 'each line is an object like {"prompt": "...", "answer": "..."}'


@dataclass(frozen=True, kw_only=True)
class Question:
    """`thought` None: the system thinks for itself; else it is given this one, closed. `item` is known for generated tasks. `match` says
    how answers are compared (see `matching`), with `expected` and with what `also` counts."""

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
    where: str = field(default="", compare=False)  # its file and line

    @property
    def accepted(self) -> tuple[str, ...]:
        return (" ".join(self.expected.split()), *self.also)

    @property
    def mode(self) -> str:
        return FREE if self.thought is None else CUT


def sha256_of_questions(questions: Sequence[Question]) -> str:
    """Of what is asked and expected: the setting that decides what was measured."""
    return hashlib.sha256(json.dumps([[asked.id, asked.prompt, *asked.accepted, asked.match] for asked in questions]).encode()).hexdigest()


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
            one = draw(task, split, size=size, seed=item_seed(seed, place), num_words=words)
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


def item_seed(seed: int, place: int) -> int:
    """A seed for one item; no two of one evaluation are equal."""
    return seed * 1_000_003 + place


def from_file(
    path: Path, limit: int | None = None, note: Callable[[str], object] | None = None, match: str | None = None
) -> list[Question]:
    """JSONL rows {"prompt", "answer"} with optional "id", "task" and "match" (else `match`, else what the answer's form suggests). An
    answer is a text, a number, or a list of those that count. E140 names the lines that cannot be used."""
    task = "stdin" if path == STDIN else path.stem

    def question(row: dict[str, Any], line: Line) -> Question:
        prompt, accepted = text_of(row, "prompt"), accepted_answers(row.get("answer"))
        how = row.get("match", match or match_for(accepted))
        if how not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}, not {shown(how, 40)}")
        check_match(how, accepted)
        task_name = text_of({"task": task, **row}, "task")
        return Question(id=line.id, task=task_name, prompt=prompt, expected=accepted[0], match=how, also=accepted[1:], where=line.where)

    return read_rows(path, question, code="E140", columns=COLUMNS, fix=FIX).all(note)[:limit]
