"""What a model wrote, split into reasoning and answer. Everything that reads answers does it here.

The reasoning stands between the thinking tags. It is open from the start where the prompt ends inside it (`is_open`), else once the
model writes the opening tag; a text in which nothing opens it is an answer from end to end, whatever closing tags it holds. The answer
is what follows the last reasoning. None for the answer: the reasoning did not end. None for the reasoning: there was none.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trtllm_thoughtx.text.tokens import Tokens

Mark = tuple[int, int, int]  # begin and end of a tag, and which: 0 opens, 1 closes


@dataclass(frozen=True)
class Reply:
    """Texts without tags and special tokens; `answer_ids` are the tokens behind the last closing tag."""

    reasoning: str | None
    answer: str | None
    answer_ids: list[int] | None


def split_ids(text: Tokens | None, ids: Sequence[int], *, is_open: bool, text_end: int | None = None) -> Reply:
    """Split generated ids by the tags of their tokenizer. Without a tokenizer there are no texts, and all ids are the answer's.

    `text_end`: the characters behind it do not count (`Completion.text_end`)."""
    reply = _split_ids(text, ids, is_open=is_open)
    num_behind = 0 if text is None or text_end is None else len(text.decode(ids)) - text_end
    if num_behind <= 0:
        return reply
    if reply.answer is None:
        return replace(reply, reasoning=_cut_off(reply.reasoning or "", num_behind))
    return replace(reply, answer=_cut_off(reply.answer, num_behind))


def _cut_off(said: str, num_behind: int) -> str:
    return said[: max(0, len(said) - num_behind)]


def _split_ids(text: Tokens | None, ids: Sequence[int], *, is_open: bool) -> Reply:
    ids = list(ids)
    if text is None:
        return Reply(None, None, ids)
    if text.think_ids is None or text.think_tags is None:
        return Reply(None, text.decode(ids), ids)
    first, last = text.think_ids
    if len(first) == len(last) == 1:
        marks = [(i, i + 1, int(token == last[0])) for i, token in enumerate(ids) if token in (first[0], last[0])]
        thought, at = _cut(marks, len(ids), is_open)
        answer_ids = None if at is None else ids[at:]
        reasoning = None if thought is None else text.decode(ids[thought])
        return Reply(reasoning, None if answer_ids is None else text.decode(answer_ids), answer_ids)
    said = text.decode(ids)
    thought, at = _cut(_marks(said, text.think_tags), len(said), is_open)
    if at is not None:  # a token may hold the end of a tag and what follows it: its text counts, it does not
        answer_ids = ids[num_tokens_until(text, ids, at, skip_special=True) :]
    return Reply(None if thought is None else said[thought], None if at is None else said[at:], None if at is None else answer_ids)


def split_text(said: str, tags: tuple[str, str], *, is_open: bool) -> tuple[str | None, str | None]:
    """(reasoning, answer) of a text."""
    thought, at = _cut(_marks(said, tags), len(said), is_open)
    return None if thought is None else said[thought], None if at is None else said[at:]


def num_tokens_until(text: Tokens, ids: Sequence[int], at: int, *, skip_special: bool = False) -> int:
    """How many ids it takes to write the first `at` characters."""
    return bisect.bisect_left(range(len(ids)), at, key=lambda num: len(text.decode(ids[:num], skip_special=skip_special)))


def _marks(said: str, tags: tuple[str, str]) -> list[Mark]:
    found = re.finditer("|".join(map(re.escape, tags)), said)
    return [(match.start(), match.end(), int(match[0] == tags[1])) for match in found]


def _cut(marks: Sequence[Mark], size: int, is_open: bool) -> tuple[slice | None, int | None]:
    """Where the reasoning stands, and where the answer begins."""
    begin, last = 0 if is_open else None, None
    for start, stop, closes in marks:
        if not closes:
            is_open, begin = True, stop if begin in (None, start) else begin
        elif is_open:
            is_open, last = False, (start, stop)
    if begin is None:
        return None, 0
    if is_open or last is None:
        return slice(begin, size), None
    return slice(begin, last[0]), last[1]
