"""Ragged sequences over one static KV cache: which tokens go into a call, where they are written, what each slot holds.

A row's tokens are right-padded to the call's width. Padding is written to the slots behind the row's last token, where it is marked
empty until real tokens overwrite it. When a row is so near the end of its cache that padding would not fit, the call starts
earlier and feeds the row's last tokens again: that writes the same values to the same slots.
"""

from __future__ import annotations

import numpy as np

LIVE_STEP = 16  # live slots are counted in steps, so that not every token is a new shape


class Batch:
    """Token history of the rows of one KV cache. Slots equal positions; `capacity` is in positions."""

    def __init__(self, num_rows: int, capacity: int, chunk_size: np.ndarray | None) -> None:
        self.capacity = capacity
        self.chunk_size = chunk_size  # int64 [B], None without chunked attention
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.tokens], np.int64)

    def feed(self, new: list[list[int]], logit_rows: list[list[int]]) -> dict[str, np.ndarray]:
        """Append `new` tokens to the rows and return the inputs of one call.

        `logit_rows`: per row, which of its new tokens (0: the first) to project to logits; rows must ask for equally many, at least
        one; a row without new tokens gets the logits of its last token again.
        """
        width = max(1, max(len(row) for row in new))
        starts, ids, positions, rows = [], [], [], []
        for history, extra, wanted in zip(self.tokens, new, logit_rows, strict=True):
            first = len(history)
            history.extend(extra)
            assert history and len(history) <= self.capacity, (len(history), self.capacity)
            start = min(first, self.capacity - width)
            if not extra:  # nothing new: feed the last token again, so that the call's first row is a real one
                start = min(start, first - 1)
            window = history[start : start + width]
            last = start + len(window) - 1
            ids.append(window + [window[-1]] * (width - len(window)))
            positions.append([min(start + i, last) for i in range(width)])
            rows.append([first - start + i if extra else last - start for i in wanted])
            starts.append(start)
        live = min(self.capacity, -(-int(max(s + width for s in starts)) // LIVE_STEP) * LIVE_STEP)
        slots = np.arange(live, dtype=np.int64)[None, :]
        feeds = {
            "input_ids": np.array(ids, np.int64),
            "positions": np.array(positions, np.int64),
            "write_indices": np.array(starts, np.int64),
            "kv_positions": np.where(slots < self.lengths[:, None], slots, -1),
            "logit_indices": np.array(rows, np.int64),
        }
        if self.chunk_size is not None:
            feeds["chunk_size"] = self.chunk_size
        return feeds
