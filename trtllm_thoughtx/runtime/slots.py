"""Slots: rows of one KV cache that requests come to and leave. What an ended request left in its slot is kept until the slot is needed,
and a prompt that begins like another sequence, ended or running, has the KV of that beginning copied instead of computed again.

Only what gives the same bits is copied: tokens that were fed as a prompt (a step of one token may round otherwise), under the same chunk
size and adapter, and of a bounded cache only as far as the ring still holds all that the next token sees. Else the prompt is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trtllm_thoughtx.runtime.batch import Batch
from trtllm_thoughtx.runtime.session import Session

LEAST_REUSED = 16  # tokens: fewer are not worth a copy
LEAST_SEGMENT = 4  # tokens of a segment, so that none has to be a single one


class Slots:
    """`most`: tokens of a segment of a prompt."""

    def __init__(self, session: Session, num_slots: int, most: int, *, reuses: bool) -> None:
        self.session, self.num_slots, self.reuses = session, num_slots, reuses and most >= LEAST_SEGMENT
        self.batch: Batch = session.begin(num_slots)
        self.num_filled = [0] * num_slots  # leading tokens of a slot that were fed as a prompt, and may be copied
        self.last_used = [0] * num_slots  # when, in turns
        self.adapters: list[str | None] = [None] * num_slots  # with which its tokens were fed

    def view(self, first: int, end: int) -> Batch:
        return self.batch.view(first, end)

    def exchange(self, a: int, b: int) -> None:
        if a == b:
            return
        self.session.runner.exchange(a, b, int(max(self.batch.used[a], self.batch.used[b])))
        self.batch.exchange(a, b)
        columns: tuple[list[Any], ...] = (self.num_filled, self.last_used, self.adapters)
        for column in columns:
            column[a], column[b] = column[b], column[a]

    def choose(self, prompt: Sequence[int], chunk_size: int | None, free: Sequence[int], adapter: str | None = None) -> int:
        """Where a prompt goes: to the slot that holds most of what it is, unless more of it belongs to another; else to the one that was
        left alone longest."""
        source, length = self.best(prompt, chunk_size, adapter)
        if source in free and 2 * length >= len(self.batch.tokens[source]):
            return source
        return min((slot for slot in free if len(free) == 1 or slot != source or not length), key=self.last_used.__getitem__)

    def begin(self, slot: int, prompt: Sequence[int], chunk_size: int | None, adapter: str | None = None) -> int:
        """Make the slot ready for a prompt, with the KV of its first tokens where that is there already: how many they are."""
        source, length = self.best(prompt, chunk_size, adapter)
        if source == slot and length:
            self.batch.forget(slot, length)
            self.batch.layer_tokens[slot] = 0
        else:
            self.batch.clear(slot, chunk_size)
            if length:
                self.batch.copy(source, slot, length)
                self.session.runner.copy(source, slot, int(self.batch.used[source]))
        self.num_filled[slot] = length
        self._wear(slot, adapter)
        self.touch(slot)
        self.session.stats.num_reused += length
        return length

    def empty(self, slot: int, chunk_size: int | None, adapter: str | None = None) -> None:
        """Make the slot ready for a prompt of which nothing is to be reused, now or later."""
        self.batch.clear(slot, chunk_size)
        self.num_filled[slot] = 0
        self._wear(slot, adapter)
        self.touch(slot)

    def _wear(self, slot: int, adapter: str | None) -> None:
        self.session.wear(slot, adapter)
        self.adapters[slot] = adapter

    def touch(self, slot: int) -> None:
        """It is used now: begun or left."""
        self.last_used[slot] = 1 + max(self.last_used)

    def best(self, prompt: Sequence[int], chunk_size: int | None, adapter: str | None = None) -> tuple[int, int]:
        """The slot that holds most of the beginning of a prompt, and how many tokens of it can be had (0: none)."""
        found = [self._shared(slot, prompt, chunk_size, adapter) for slot in range(self.num_slots)] if self.reuses else [0]
        length = max(found)
        return found.index(length), length

    def _shared(self, slot: int, prompt: Sequence[int], chunk_size: int | None, adapter: str | None) -> int:
        if self.adapters[slot] != adapter:
            return 0
        batch, most = self.batch, min(self.num_filled[slot], len(prompt) - 1)
        if batch.chunk_size is not None and int(batch.chunk_size[slot]) != (chunk_size or batch.build.chunk_size):
            return 0
        held = batch.tokens[slot]
        length = next((i for i in range(most) if held[i] != prompt[i]), most)
        first, end = batch.section(slot, length)
        if min(end, len(prompt)) - length == 1 and length > first:
            length -= 1  # a segment of one token is left where it would not have been
        return length if length >= LEAST_REUSED and batch.can_forget(slot, length) else 0
