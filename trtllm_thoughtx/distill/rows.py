"""Training rows: token ids, and what each of them teaches.

A row is a question, a thought and an answer. Its tokens belong to one of three parts, after the distillation's loss weights:
the answer, the chain of thought, and efficiency: the token behind each step, which goes on or closes the thought.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trtllm_thoughtx.tasks.item import BOUNDARY
from trtllm_thoughtx.text.text import Text
from trtllm_thoughtx.text.tokens import THINK_TAGS

GIVEN, ANSWER, THOUGHT, EFFICIENCY = range(4)  # parts; GIVEN has no loss


Encoder = Callable[[str], list[int]]


@dataclass
class Row:
    """`parts[i]` says what predicting `ids[i]` teaches."""

    ids: list[int]
    parts: list[int]

    def add(self, ids: Sequence[int], part: int) -> None:
        self.ids += ids
        self.parts += [part] * len(ids)

    def add_thought(self, pieces: Sequence[Sequence[int]], end: Sequence[int]) -> None:
        """Steps and the tag that ends them; behind the first step each piece begins with a decision to go on or to stop."""
        for i, piece in enumerate([*pieces, end]):
            if i:
                self.add(piece[:1], EFFICIENCY)
                self.add(piece[1:], THOUGHT)
            else:
                self.add(piece, THOUGHT)


def encoder(text: Text) -> Encoder:
    """Text to ids with nothing put around them."""
    return functools.partial(text.encode, add_special=False)


def tags_of(text: Text) -> tuple[str, str]:
    """The tags around the student's thinking; R1's where its tokenizer and template have none."""
    return text.think_tags or THINK_TAGS[0]


def prompt_text(text: Text, prompt: str) -> str:
    """The rendered chat up to where the thought begins."""
    rendered, begin = text.render(prompt), tags_of(text)[0]
    return rendered if rendered.rstrip().endswith(begin) else f"{rendered}{begin}\n"


def from_text(text: Text, prompt: str, steps: Sequence[str], answer: str) -> Row:
    """A row of a real model's text: blank lines between the steps, the answer behind the closed thought."""
    encode, row = encoder(text), Row([], [])
    row.add(encode(prompt_text(text, prompt)), GIVEN)
    row.add_thought([encode(f"{step}{BOUNDARY}") for step in steps], encode(f"{tags_of(text)[1]}{BOUNDARY}"))
    row.add([*encode(answer), *encode(text.special.get("eos_token", ""))], ANSWER)
    return row


def collate(rows: Sequence[Row], pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ids and parts, both int64 [B, T], padded on the right: under a causal mask that needs no attention mask."""
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    parts = np.full((len(rows), width), GIVEN, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], parts[i, : len(row.ids)] = row.ids, row.parts
    return ids, parts
