"""Training rows: token ids, and what each of them teaches.

A row is a question, a thought and an answer. Its tokens belong to one of three parts, after the distillation's loss weights:
the answer, the chain of thought, and efficiency: the token behind each step, which goes on or closes the thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trtllm_thoughtx.tasks.item import BOUNDARY

GIVEN, ANSWER, THOUGHT, EFFICIENCY = range(4)  # parts; GIVEN has no loss


class Encoder(Protocol):
    def __call__(self, text: str) -> list[int]: ...


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


def encoder(tokenizer: Any) -> Encoder:
    """Text to ids with nothing put around them."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    return encode


def prompt_text(tokenizer: Any, prompt: str, think: str = "<think>") -> str:
    """The rendered chat up to where the thought begins."""
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return text if text.rstrip().endswith(think) else f"{text}{think}\n"


def from_text(tokenizer: Any, prompt: str, steps: Sequence[str], answer: str, end: str = "</think>") -> Row:
    """A row of a real model's text: blank lines between the steps, the answer behind the closed thought."""
    encode, row = encoder(tokenizer), Row([], [])
    row.add(encode(prompt_text(tokenizer, prompt)), GIVEN)
    row.add_thought([encode(f"{step}{BOUNDARY}") for step in steps], encode(f"{end}{BOUNDARY}"))
    row.add([*encode(answer), tokenizer.eos_token_id], ANSWER)
    return row


def collate(rows: Sequence[Row], pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ids and parts, both int64 [B, T], padded on the right: under a causal mask that needs no attention mask."""
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    parts = np.full((len(rows), width), GIVEN, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], parts[i, : len(row.ids)] = row.ids, row.parts
    return ids, parts
