"""The sequences that a model is calibrated on: the user's own, or generated ones where there are none.

A JSONL line is {"text": ...}, {"prompt": ..., "thought" or "steps": ..., "answer": ...}, {"messages": [...]} or {"input_ids": [...],
"attention_mask": [...]}; a .txt file is text parted by blank lines; a directory is one that `datasets` saved, with rows like the lines.
Prompts and messages go through the chat template. Tokens that the mask hides, and padding at the ends of a row, are dropped: no pad is
ever part of a statistic. Which rows are taken depends on the seed alone. Every row that cannot be used is E164 with its line number.

Of the held-out sequences some travel with the checkpoint, so that its engines can be judged on them. Data that must not leave is judged
on all the same; generated tasks travel in its place.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_thoughtx.calibrate import prose
from trtllm_thoughtx.errors import ThoughtxError, counted, shown
from trtllm_thoughtx.files import read_named, sha256_of
from trtllm_thoughtx.jsonl import FILE_BYTES, STDIN, Line, Rows, collect, read_rows
from trtllm_thoughtx.tasks import TASKS, draw
from trtllm_thoughtx.tasks.item import steps_of, thought
from trtllm_thoughtx.text.chat import text_messages
from trtllm_thoughtx.text.text import Text, trace_ids

COLUMNS = ("text", "prompt", "thought", "steps", "answer", "messages", "input_ids", "attention_mask", "num_sufficient", "id")
FIX = 'each line is an object like {"prompt": "...", "answer": "..."}, {"text": "..."} or {"input_ids": [1, 2]}. Nothing was written.'
FORMS = ("text", "prompt", "messages", "input_ids")
MAX_HELD = 16
NUM_STORED = 8  # held-out sequences that travel
CONTEXTS = (0, 64, 128, 256)  # words
BUILT_IN = "generated tasks"
WITH_PROSE = "documentation and sources of Python, and generated tasks"
OF_PROSE = 4  # one row in so many is a generated task, where the tokenizer was made for prose
Make = Callable[[dict[str, Any], Line], list[int]]


@dataclass(frozen=True)
class Data:
    """`rows` calibrate, `held` (others, where there are enough) judge the result; token ids. `facts` go into the manifest.

    `public` are sequences that travel in place of held-out ones; without any the first of `held` do."""

    rows: list[list[int]]
    held: list[list[int]]
    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    public: list[list[int]] = field(default_factory=list)

    @property
    def judging(self) -> list[list[int]]:
        """All sequences that are run on both models: first those that judge, last those that travel (these may be the same)."""
        return [*self.held, *self.public]

    def judges(self, number: int) -> bool:
        return number < len(self.held)

    def travels(self, number: int) -> bool:
        return number >= len(self.held) if self.public else number < NUM_STORED

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.rows, self.held]).encode()).hexdigest()


def read_data(
    path: Path | None,
    text: Text | None,
    *,
    vocab_size: int,
    num_samples: int,
    max_len: int,
    seed: int,
    pad_id: int | None = None,
    only_prompts: bool = False,
    is_private: bool = False,
    only_measures: bool = False,
) -> Data:
    """At most `num_samples` sequences of at most `max_len` tokens, an eighth of them held out. E164 for data that cannot be used.

    `only_measures`: half of them are held out, for a format that fits nothing on the rest.
    `only_prompts` leaves out what the rows say behind their prompts; with `is_private` no row of theirs travels."""
    warnings: list[str] = []
    num_cut = num_dropped = 0

    def sequence(raw: dict[str, Any], line: Line) -> list[int]:
        nonlocal num_cut, num_dropped
        ids = _ids(_prompt_alone(raw) if only_prompts else raw, text, line.where, add_generation_prompt=only_prompts)
        kept = _without_pads(ids, raw, pad_id)
        bad = next((i for i in kept if not 0 <= i < vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {bad}; the vocabulary has {vocab_size}")
        if not kept:
            raise ValueError("every token is padding" if ids else "it has no tokens")
        num_dropped += len(ids) - len(kept)
        num_cut += len(kept) > max_len
        return kept[:max_len]

    if path is None:
        own = _own_rows(num_samples, vocab_size, seed, text, 0 if only_prompts else max_len)
        found = _checked("--calib_data", own, sequence)
        what = BUILT_IN if text is not None else "random tokens: the checkpoint has no tokenizer"
        what = WITH_PROSE if any(name.startswith("text ") for name, _ in own) else what
        use = ("measured", "tells what your prompts lose") if only_measures else ("calibrated", "makes better scales")
        warnings.append(f"{use[0]} on {what}, not on prompts of yours; data of your own (--calib_data) {use[1]}")
    else:
        found, what = _rows(Path(path), sequence), "stdin" if path == STDIN else Path(path).name
    rows = found.all(warnings.append)
    num_rows = len(rows)
    order = list(range(num_rows))
    random.Random(f"calibrate {seed}").shuffle(order)
    rows = [rows[i] for i in order[:num_samples]]
    num_held = min(MAX_HELD, max(1, len(rows) // (2 if only_measures else 8))) if len(rows) > 1 else 0
    held = rows[len(rows) - num_held :] or rows
    if not num_held:
        warnings.append("one sequence is all there is: it calibrates, and it judges the result as well")
    elif len(rows) < 32 and path is not None and not only_measures:
        warnings.append(f"only {len(rows)} sequences: more of them make scales that hold for more prompts")
    if num_cut:
        warnings.append(f"{counted(num_cut, 'sequence')} cut to {counted(max_len, 'token')} (--calib_seq_len)")
    rows = rows[: len(rows) - num_held]
    facts = {
        "source": what,
        "is_generic": path is None,
        "only_measures": only_measures,
        "sha256": sha256_of(Path(path)) if path is not None and Path(path).is_file() else None,
        "num_rows": num_rows,
        "num_sequences": len(rows),
        "num_held_out": len(held) if num_held else 0,
        "num_tokens": sum(map(len, rows)),
        "num_cut": num_cut,
        "num_pads_dropped": num_dropped,
        "seed": seed,
        "max_len": max_len,
    }
    public = []
    if is_private:
        told = (_ids(raw, text, "--private_data", add_generation_prompt=False) for _, raw in _own_rows(NUM_STORED, vocab_size, seed, text))
        public = [ids[:max_len] for ids in told]
    data = Data(rows, held, facts, warnings, public)
    facts["tokens_sha256"] = data.digest
    return data


def _own_rows(num: int, vocab_size: int, seed: int, text: Text | None, prose_len: int = 0) -> list[tuple[str, Any]]:
    """`prose_len`: most tokens of a piece of prose; 0: tasks alone."""
    if text is None:
        return list(_random(num, vocab_size, seed))
    pieces = prose.rows(text, num - -(-num // OF_PROSE), prose_len, seed) if prose_len and prose.reads(text) else []
    told = [(f"text {place}", {"input_ids": ids}) for place, ids in enumerate(pieces)]
    return [*told, *_generated(num - len(told), seed)]


def _generated(num: int, seed: int) -> Iterator[tuple[str, Any]]:
    """Questions with their whole chains, spread over the tasks, all their sizes, and the lengths of a lookup's context."""
    names = sorted(TASKS)
    for place in range(num):
        task, turn = names[place % len(names)], place // len(names)
        size = 1 + turn % TASKS[task][1]
        words = {"num_words": CONTEXTS[turn % len(CONTEXTS)]} if task == "lookup" else {}
        item = draw(task, "validation", size=size, seed=seed * 100_003 + place, **words)
        told = thought([*item.steps, *item.rechecks(turn % min(3, len(item.steps) + 1))])  # models look back: their words belong here too
        yield f"item {place}", {"prompt": item.prompt, "thought": told, "answer": item.answer}


def _random(num: int, vocab_size: int, seed: int) -> Iterator[tuple[str, Any]]:
    rng = random.Random(f"random tokens {seed}")
    for place in range(num):
        yield f"item {place}", {"input_ids": [rng.randrange(vocab_size) for _ in range(rng.randint(16, 128))]}


def _checked(name: str, items: Iterable[tuple[str, Any]], make: Make) -> Rows[list[int]]:
    return collect(name, items, make, code="E164", columns=COLUMNS, fix=FIX, has_ids=False)


def _rows(path: Path, make: Make) -> Rows[list[int]]:
    """The sequences of a file or a saved data set."""
    if path.is_dir():
        return _checked(str(path), _saved(path), make)
    if path.suffix != ".txt":
        return read_rows(path, make, code="E164", columns=COLUMNS, fix=FIX, has_ids=False)
    try:
        parts = read_named(path, FILE_BYTES, code="E164").decode("utf-8").replace("\r\n", "\n").split("\n\n")
    except UnicodeDecodeError as error:
        raise _refused("the text is not UTF-8", str(path), f"byte {error.start} begins no UTF-8 character") from None
    return _checked(str(path), ((f"paragraph {number}", {"text": part}) for number, part in enumerate(parts, 1) if part.strip()), make)


def _saved(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        fix = 'pip install "trtllm-thoughtx[distill]", or give a JSONL file'
        raise ThoughtxError("E201", "a saved data set needs datasets", where=str(path), why="it is not installed", fix=fix) from None
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # it raises its own types and those of pyarrow
        why = shown(str(error))
        raise _refused("the directory is not a data set that `datasets` saved", str(path), why) from None
    rows = rows["train"] if isinstance(rows, dict) and "train" in rows else rows
    if isinstance(rows, dict):
        raise _refused("the data set has no split `train`", str(path), f"it has {shown(sorted(rows))}")
    return ((f"row {number}", row) for number, row in enumerate(rows))


def _prompt_alone(raw: dict[str, Any]) -> dict[str, Any]:
    """The row without the answer that it has; messages end with the user's last."""
    row = {key: value for key, value in raw.items() if key not in ("thought", "steps", "answer")}
    messages = row.get("messages")
    if isinstance(messages, list):
        while messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        row["messages"] = messages
    return row


def _ids(raw: dict[str, Any], text: Text | None, where: str, *, add_generation_prompt: bool) -> list[int]:
    forms = [form for form in FORMS if form in raw]
    if len(forms) != 1:
        raise ValueError(f"it needs one of {', '.join(FORMS)}, found {len(forms)}")
    form, value = forms[0], raw[forms[0]]
    if form == "input_ids":
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            raise ValueError("input_ids must be a list of token ids")
        return value
    if text is None:
        raise ValueError("a text needs a tokenizer, and the checkpoint has none; give input_ids")
    if form == "messages":
        return text.chat(text_messages(value, where), add_generation_prompt=add_generation_prompt)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{form} must be a text that is not empty")
    return text.encode(value) if form == "text" else _told(raw, text)


def _told(raw: dict[str, Any], text: Text) -> list[int]:
    """Prompt in the chat template, then thought between its tags, then the answer."""
    steps = raw.get("steps", steps_of(raw["thought"]) if isinstance(raw.get("thought"), str) else [])
    answer = raw.get("answer", "")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps) or not isinstance(answer, str):
        raise ValueError("steps must be a list of texts, thought and answer texts")
    return trace_ids(text, raw["prompt"], steps, answer)


def _without_pads(ids: list[int], raw: dict[str, Any], pad_id: int | None) -> list[int]:
    mask = raw.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
            raise ValueError("attention_mask must be a list of 0 and 1, as long as input_ids")
        return [i for i, seen in zip(ids, mask, strict=True) if seen]
    if "input_ids" in raw and pad_id is not None:
        begin, end = 0, len(ids)
        while begin < end and ids[begin] == pad_id:
            begin += 1
        while end > begin and ids[end - 1] == pad_id:
            end -= 1
        return ids[begin:end]
    return ids


def _refused(what: str, where: str, why: str) -> ThoughtxError:
    return ThoughtxError("E164", what, where=where, why=why, fix=FIX)
