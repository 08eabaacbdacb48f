"""Which requests run: who waits, who has which slot, and what a tick does. It knows no clock, no engine and no token.

A tick decodes one token of each running row, then takes at most one segment of one prompt, so that the time between two tokens of a
row is bounded by one step and one segment. Who came first is first; a request of priority p is as one that came p * `HEAD_START` ticks
earlier, so that whoever waits is overtaken only so long. A slot has room for a whole sequence: what was admitted can end, and nothing
is evicted.

    slots:  [ running rows 0 .. n-1 ][ the others: free ones, and at most one that is being filled ]

Running rows have the first slots, because rows that are neighbours are computed in one call, and no others are. When one of them ends,
the last one takes its slot; when a prompt is in, its row takes the slot behind them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

HEAD_START = 64  # ticks


@dataclass(frozen=True)
class Plan:
    """What the next tick does: `decode` are the running requests by slot, `fill` is the request whose prompt goes on."""

    decode: tuple[int, ...]
    fill: int | None


class Scheduler:
    """Requests are known by numbers of the caller. `fills_first`: nothing is decoded while a free slot can be filled, for lists whose
    end alone matters. `choose_slot` is asked with a request and the free slots where its prompt is to go (default: the first)."""

    def __init__(
        self, num_slots: int, *, fills_first: bool = False, choose_slot: Callable[[int, list[int]], int] = lambda request, free: free[0]
    ) -> None:
        self.num_slots, self.fills_first, self.choose_slot = num_slots, fills_first, choose_slot
        self.running: list[int] = []  # by slot
        self.filling: tuple[int, int] | None = None  # request and slot
        self.num_ticks = 0
        self._queue: list[tuple[int, int, int]] = []  # rank, number of its coming, request; sorted
        self._waiting: dict[int, tuple[int, int, int]] = {}
        self._num_come = 0

    @property
    def waiting(self) -> list[int]:
        """Those without a slot, first to last."""
        return [request for *_, request in self._queue]

    @property
    def is_idle(self) -> bool:
        return not (self._queue or self.running or self.filling)

    def add(self, request: int, priority: int = 0) -> None:
        entry = (self.num_ticks - priority * HEAD_START, self._num_come, request)
        bisect.insort(self._queue, entry)
        self._waiting[request] = entry
        self._num_come += 1

    def plan(self) -> Plan:
        """The next tick. A request that is admitted has its slot from now on."""
        self.num_ticks += 1
        if self.filling is None and self._queue and len(self.running) < self.num_slots:
            *_, request = self._queue.pop(0)
            del self._waiting[request]
            free = list(range(len(self.running), self.num_slots))
            self.filling = request, self.choose_slot(request, free)
            assert self.filling[1] in free, self.filling
        fill = None if self.filling is None else self.filling[0]
        decode = () if self.fills_first and fill is not None else tuple(self.running)
        return Plan(decode, fill)

    def filled(self) -> tuple[int, int]:
        """The prompt that was being filled is in: its row runs. The slots that exchange their contents (the same: none)."""
        assert self.filling is not None
        request, slot = self.filling
        self.filling = None
        self.running.append(request)
        return slot, len(self.running) - 1

    def end(self, request: int) -> tuple[int, int]:
        """A request has ended, or is wanted no more, wherever it is. The slots that exchange their contents (the same: none)."""
        if (entry := self._waiting.pop(request, None)) is not None:
            del self._queue[bisect.bisect_left(self._queue, entry)]
            return 0, 0
        if self.filling is not None and self.filling[0] == request:
            self.filling = None
            return 0, 0
        slot, last = self.running.index(request), len(self.running) - 1
        self.running[slot] = self.running[last]
        self.running.pop()
        return slot, last

    def slot_of(self, request: int) -> int | None:
        """None while it waits."""
        if self.filling is not None and self.filling[0] == request:
            return self.filling[1]
        return self.running.index(request) if request in self.running else None
