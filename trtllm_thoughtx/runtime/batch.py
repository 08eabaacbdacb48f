"""Ragged sequences over one static KV cache: which tokens go into a call, where they are written, what each slot holds.

Without a bound, slots equal positions. With one (`BuildConfig.is_bounded`), slots are used again:

    [ kept: sinks, then anchors ][ ring: (left + 1) chunks, chunk k in section k % (left + 1) ]

A call feeds no row beyond the end of its chunk. So what it writes lies in one section, which holds the chunk itself and a chunk that
no query sees any more. Before a row enters its next chunk, those tokens of this one that outlive it are fed once more into kept slots
(`upkeep`), in calls of that row alone: their queries still find all that they saw, so the values are the same, and no cache has to be
copied.

Neighbouring rows are a batch of their own (`view`): their part of the cache is contiguous, so a call takes them and leaves the others.
The rows of a call are fed equally many tokens, so nothing is padded: a prompt is read alone, and rows that decode are fed one each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np

from trtllm_thoughtx.config import BuildConfig

COLUMNS = ("slots", "used", "layer_tokens")  # numbers of each row
LIVE_STEP = 16  # live slots are counted in steps, so that not every token is a new shape


class Batch:
    """Token history of the rows of one KV cache, and where each token's keys and values are."""

    def __init__(self, num_rows: int, build: BuildConfig, chunk_size: np.ndarray | None) -> None:
        self.build = build
        self.first = 0  # its place in the KV cache
        self.chunk_size = chunk_size  # int64 [B], None without chunked attention
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.slots = np.full((num_rows, build.kv_capacity), -1, np.int64)  # the position that a slot holds, -1: none
        self.used = np.zeros(num_rows, np.int64)  # slots of a row from here on were never written
        self.layer_tokens = np.zeros(num_rows, np.int64)  # work done for each row: tokens times layers

    def view(self, start: int, end: int) -> Batch:
        """The rows `start` to `end` - 1, as a batch that shares all that is known of them; until `clear`, `copy` or `exchange`."""
        made = copy.copy(self)
        made.first, made.tokens = self.first + start, self.tokens[start:end]
        for name in (*COLUMNS, *(("chunk_size",) if self.chunk_size is not None else ())):
            setattr(made, name, getattr(self, name)[start:end])
        return made

    def clear(self, row: int, chunk_size: int | None) -> None:
        """A row for a new sequence."""
        self.tokens[row] = []
        self.slots[row], self.used[row], self.layer_tokens[row] = -1, 0, 0
        if self.chunk_size is not None:
            self.chunk_size[row] = chunk_size or self.build.chunk_size

    def copy(self, source: int, target: int, length: int) -> None:
        """Into a row that was cleared for it: the first `length` tokens of another one, whose KV is copied beside this."""
        self.tokens[target], self.slots[target], self.used[target] = self.tokens[source][:], self.slots[source], self.used[source]
        self.forget(target, length)

    def exchange(self, a: int, b: int) -> None:
        """Rows change places, as their KV does."""
        self.tokens[a], self.tokens[b] = self.tokens[b], self.tokens[a]
        for column in (*(getattr(self, name) for name in COLUMNS), *([] if self.chunk_size is None else [self.chunk_size])):
            column[[a, b]] = column[[b, a]]

    def can_forget(self, row: int, length: int) -> bool:
        """Whether the first `length` tokens of a row are all there, with what they need of the cache to go on."""
        if not self.build.is_bounded or length == len(self.tokens[row]):
            return True
        assert self.chunk_size is not None
        last, kept = (len(self.tokens[row]) - 1) // int(self.chunk_size[row]), (length - 1) // int(self.chunk_size[row])
        return last <= max(self.build.left_chunks, kept)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.tokens], np.int64)

    def section(self, row: int, position: int) -> tuple[int, int]:
        """First and end position of the run of slots that `position` is in."""
        if not self.build.is_bounded:
            return 0, self.build.kv_capacity
        assert self.chunk_size is not None
        size = int(self.chunk_size[row])
        first = position // size * size
        return first, min(first + size, self.build.max_seq_len)

    def slot(self, row: int, position: int) -> int:
        """Where `position` is written when its chunk is the current one."""
        if not self.build.is_bounded:
            return position
        assert self.chunk_size is not None
        return self.build.num_kept + position % ((self.build.left_chunks + 1) * int(self.chunk_size[row]))

    def forget(self, row: int, length: int) -> None:
        """Take back all but the first `length` tokens of a row. Bounded caches: only within the chunk that was fed last."""
        del self.tokens[row][length:]
        self.slots[row, self.slots[row] >= length] = -1

    def segment(self, num_tokens: int, most: int) -> int:
        """How many of `num_tokens` that wait one call of this row takes: in its section, at most `most`, and a single one only where it
        must be. (A call of one token may round otherwise than one of several: segments that begin elsewhere give the same bits.)"""
        length = len(self.tokens[0])
        room = min(num_tokens, self.section(0, length)[1] - length)
        num = min(room, most)
        return num - 1 if room - num == 1 and num > 2 else num

    def segments(self, num_tokens: int, most: int) -> Iterator[int]:
        """`num_tokens` of this row in segments; each must be fed before the next is taken."""
        while num_tokens > 0:
            num = self.segment(num_tokens, most)
            num_tokens -= num
            yield num

    def upkeep(self, row: int) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """Calls that must run before a row is fed: when it is at the end of a chunk, those of the tokens that outlive it."""
        build, length = self.build, len(self.tokens[row])
        if not build.is_bounded or not build.num_kept or not length:
            return
        assert self.chunk_size is not None
        size = int(self.chunk_size[row])
        if length % size:
            return
        first, most, alone = length - size, min(size, build.max_segment), self.view(row, row + 1)
        for start in range(first, min(build.sink_tokens, length), most):
            yield alone, alone._again(start, min(most, build.sink_tokens - start, length - start), start)
        if build.num_anchors and length > build.sink_tokens:  # a sink is kept already
            turn = first // size % (build.num_kept - build.sink_tokens)
            yield alone, alone._again(length - 1, 1, build.sink_tokens + turn)

    def feed(self, new: list[list[int]], logit_rows: list[list[int]]) -> dict[str, np.ndarray]:
        """Append `new` tokens to the rows, equally many to each (`segment` says how many fit), and return the inputs of one call.

        `logit_rows`: per row, which of its new tokens (0: the first) to project to logits; rows must ask for equally many, at least one.
        """
        width, starts, slots = len(new[0]), [], []
        for row, (history, extra) in enumerate(zip(self.tokens, new, strict=True)):
            start = len(history)
            history.extend(extra)
            assert len(extra) == width and 0 < len(history) <= self.build.max_seq_len, (len(extra), width, len(history))
            assert len(history) <= self.section(row, start)[1], "segment() was not asked"
            slot = self.slot(row, start)
            self.slots[row, slot : slot + width] = np.arange(start, len(history))
            starts.append(start)
            slots.append(slot)
        return self._feeds(width, starts, slots, logit_rows)

    def refeed(self, num: int) -> dict[str, np.ndarray]:
        """Inputs of a call that takes the last `num` tokens of the one row again, all of them projected to logits."""
        start = len(self.tokens[0]) - num
        return self._feeds(num, [start], [self.slot(0, start)], [list(range(num))])

    def _again(self, start: int, width: int, slot: int) -> dict[str, np.ndarray]:
        """Feed `width` tokens of the one row again, into another slot."""
        self.slots[0, slot : slot + width] = np.arange(start, start + width)
        return self._feeds(width, [start], [slot], [[0]])

    def _feeds(self, width: int, starts: list[int], slots: list[int], logit_rows: list[list[int]]) -> dict[str, np.ndarray]:
        ids, positions = [], []
        for history, start in zip(self.tokens, starts, strict=True):
            ids.append(history[start : start + width])
            positions.append(range(start, start + width))
        np.maximum(self.used, np.add(slots, width), out=self.used)
        live = min(self.build.kv_capacity, -(-int(self.used.max()) // LIVE_STEP) * LIVE_STEP)
        feeds = {
            "input_ids": np.array(ids, np.int64),
            "positions": np.array(positions, np.int64),
            "write_indices": np.array(slots, np.int64),
            "kv_positions": self._labels(live),
            "logit_indices": np.array(logit_rows, np.int64),
        }
        if self.chunk_size is not None:
            feeds["chunk_size"] = self.chunk_size
        return feeds

    def _labels(self, live: int) -> np.ndarray:
        """What each of the first `live` slots holds for the queries of this call, int64 [B, live]; nothing stands there twice."""
        labels = self.slots[:, :live].copy()
        if not self.build.is_bounded:
            return labels
        assert self.chunk_size is not None
        oldest = ((self.lengths - 1) // self.chunk_size - self.build.left_chunks)[:, None]
        is_old = labels // self.chunk_size[:, None] < oldest
        kept = np.arange(live) < self.build.num_kept
        return np.where(is_old == kept, labels, -1)
