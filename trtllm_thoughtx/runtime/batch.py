"""Ragged sequences over one static KV cache: which tokens go into a call, where they are written, what each slot holds.

Without a bound, slots equal positions. With one (`BuildConfig.is_bounded`), slots are used again:

    [ kept: sinks, then anchors ][ ring: (left + 1) chunks, chunk k in section k % (left + 1) ]

A call feeds no row beyond the end of its chunk. So what it writes lies in one section, which holds the chunk itself and a chunk that
no query sees any more. Before a row enters its next chunk, those tokens of this one that outlive it are fed once more into kept slots
(`upkeep`): their queries still find all that they saw, so the values are the same, and no cache has to be copied.

A row's tokens are right-padded to the call's width. Padding is written to the slots behind the row's last token, where it is marked
empty until real tokens overwrite it. When a row is so near the end of its section that padding would not fit, the call starts
earlier and feeds the row's last tokens again: that writes the same values to the same slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trtllm_thoughtx.config import BuildConfig

LIVE_STEP = 16  # live slots are counted in steps, so that not every token is a new shape


class Batch:
    """Token history of the rows of one KV cache, and where each token's keys and values are."""

    def __init__(self, num_rows: int, build: BuildConfig, chunk_size: np.ndarray | None) -> None:
        self.build = build
        self.chunk_size = chunk_size  # int64 [B], None without chunked attention
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.slots = np.full((num_rows, build.kv_capacity), -1, np.int64)  # the position that a slot holds, -1: none
        self.used = 0  # slots from here on were never written
        self.layer_tokens = [0] * num_rows  # work done for each row: tokens times layers
        self.offsets = [0] * num_rows  # where in the last call of `feed` each row's new tokens begin
        self.exit_probs = np.zeros((num_rows, 2), np.float32)  # what an exit head said of each row's last token

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

    def cut(self, pending: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """The beginnings of `pending` tokens of each row that one call takes: within their sections, at most `most` of each."""
        widths, limit = [], self.build.kv_capacity
        for row, tokens in enumerate(pending):
            length = len(self.tokens[row])
            first, end = self.section(row, length if tokens else max(length - 1, 0))
            widths.append(min(len(tokens), most, end - length))
            limit = min(limit, end - first)
        return [list(tokens[: min(width, limit)]) for tokens, width in zip(pending, widths, strict=True)]

    def segments(self, pending: Sequence[Sequence[int]], most: int) -> Iterator[list[list[int]]]:
        """`pending` tokens of each row, cut to calls; each must be fed before the next is taken."""
        rest = [list(tokens) for tokens in pending]
        while any(rest):
            new = self.cut(rest, most)
            rest = [tokens[len(taken) :] for tokens, taken in zip(rest, new, strict=True)]
            yield new

    def forget(self, row: int, length: int) -> None:
        """Take back all but the first `length` tokens of a row. Bounded caches: only within the chunk that was fed last."""
        del self.tokens[row][length:]
        self.slots[row, self.slots[row] >= length] = -1

    def upkeep(self, new: Sequence[Sequence[int]]) -> Iterator[dict[str, np.ndarray]]:
        """Calls that must run before `new` tokens are fed: of rows at the end of a chunk, the tokens that outlive it."""
        build = self.build
        if not build.is_bounded or not build.num_kept:
            return
        assert self.chunk_size is not None
        keep: dict[int, list[tuple[int, int, int]]] = {}  # width -> (row, first position, slot)
        most = min(np.subtract(*self.section(row, max(len(tokens) - 1, 0))[::-1]) for row, tokens in enumerate(self.tokens))
        for row, tokens in enumerate(new):
            length, size = len(self.tokens[row]), int(self.chunk_size[row])
            if not tokens or not length or length % size:
                continue
            first = length - size
            for start in range(first, min(build.sink_tokens, length), most):
                keep.setdefault(min(most, build.sink_tokens - start, length - start), []).append((row, start, start))
            if build.num_anchors and length > build.sink_tokens:  # a sink is kept already
                turn = first // size % (build.num_kept - build.sink_tokens)
                keep.setdefault(1, []).append((row, length - 1, build.sink_tokens + turn))
        for width, jobs in keep.items():
            while jobs:  # a row may have two
                now = {row: (position, slot) for row, position, slot in reversed(jobs)}
                jobs = [job for job in jobs if now[job[0]] != job[1:]]
                yield self._again(width, now)

    def feed(self, new: list[list[int]], logit_rows: list[list[int]]) -> dict[str, np.ndarray]:
        """Append `new` tokens to the rows (`cut` says how many fit) and return the inputs of one call.

        `logit_rows`: per row, which of its new tokens (0: the first) to project to logits; rows must ask for equally many, at least
        one; a row without new tokens gets the logits of its last token again.
        """
        width = max(1, max(len(row) for row in new))
        starts, rows = [], []
        for row, (history, extra, wanted) in enumerate(zip(self.tokens, new, logit_rows, strict=True)):
            first = len(history)
            history.extend(extra)
            assert history and len(history) <= self.build.max_seq_len, (len(history), self.build.max_seq_len)
            start = self._start(row, width, first if extra else first - 1)
            assert first == len(history) or self.section(row, first) == self.section(row, len(history) - 1), "cut() was not asked"
            rows.append([first - start + i if extra else len(history) - 1 - start for i in wanted])
            starts.append(start)
            self.offsets[row] = first - start
            at = self.slot(row, start)
            self.slots[row, at : at + width] = -1
            self.slots[row, at : at + len(history) - start] = np.arange(start, len(history))
        return self._feeds(width, starts, [self.slot(row, start) for row, start in enumerate(starts)], rows)

    def _start(self, row: int, width: int, first: int) -> int:
        """The position from which a call of this width feeds the row: `first`, or earlier where padding would leave the section."""
        begin, end = self.section(row, first)
        assert end - begin >= width, (begin, end, width)
        return min(first, end - width)

    def refeed(self, counts: Sequence[int]) -> dict[str, np.ndarray]:
        """Inputs of a call that takes the last `counts` tokens of each row again, right-padded, all of them projected to logits.

        `logit_indices` is [B, widest]; past a row's count it repeats. A row of count 0 has ended: it gets any of its tokens.
        """
        width, starts, slots = max(counts), [], []
        for row, (history, count) in enumerate(zip(self.tokens, counts, strict=True)):
            starts.append(len(history) - count if count else self._start(row, width, len(history) - 1))
            slots.append(self.slot(row, starts[-1]))
            if count:
                self.slots[row, slots[-1] + count : slots[-1] + width] = -1  # padding is written there
        return self._feeds(width, starts, slots, [[min(i, max(count - 1, 0)) for i in range(width)] for count in counts])

    def _again(self, width: int, kept: dict[int, tuple[int, int]]) -> dict[str, np.ndarray]:
        """Feed `width` tokens of each row of `kept` again, into other slots; the last ones of all other rows, into their own."""
        starts, slots = [], []
        for row, history in enumerate(self.tokens):
            if row in kept:
                start, slot = kept[row]
                self.slots[row, slot : slot + width] = np.arange(start, start + width)
            else:
                start = self._start(row, width, len(history) - 1)
                slot = self.slot(row, start)
            starts.append(start)
            slots.append(slot)
        return self._feeds(width, starts, slots, [[0]] * len(starts))

    def _feeds(self, width: int, starts: list[int], slots: list[int], logit_rows: list[list[int]]) -> dict[str, np.ndarray]:
        ids, positions = [], []
        for history, start in zip(self.tokens, starts, strict=True):
            window = history[start : start + width]
            ids.append(window + [window[-1]] * (width - len(window)))
            positions.append([min(start + i, start + len(window) - 1) for i in range(width)])
        self.used = max(self.used, max(slots) + width)
        live = min(self.build.kv_capacity, -(-self.used // LIVE_STEP) * LIVE_STEP)
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
