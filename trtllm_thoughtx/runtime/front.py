"""`Front`: requests from any thread, or from asyncio, to one engine that one thread owns. What a server stands on.

    front = Front(engine, num_slots=8)
    ticket = front.submit(ids, engine.default_params(max_new_tokens=64))
    for event in ticket:                    # or: async for event in ticket
        match event:
            case Token(token): ...          # one that was written, in order
            case Done(completion): ...      # the last event of a request that ended: by itself, or cancelled
            case Failed(error): ...         # the last event of one that did not: E123 is its own, any other error is the engine's
    ticket.cancel()                         # at any time, from any thread; its slot is free at the next tick
    front.close()                           # or front.close(drain=True): those that are there end first

`submit` refuses what the engine cannot follow (E122) and what the queue has no room for (`Full`) at once, before anything is queued.
An error of the runner ends all requests and leaves the front unhealthy: `problem` says why, and `submit` raises it from then on.
Requests and cancellations are taken between two ticks, events are handed out during one: what reads them must not wait for the engine.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.completion import Completion, Stats
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.generation import PREFILL_SEGMENT, Generation, check_request
from trtllm_thoughtx.runtime.row import Request
from trtllm_thoughtx.text.params import GenerationParams


@dataclass(frozen=True)
class Token:
    token: int


@dataclass(frozen=True)
class Done:
    completion: Completion


@dataclass(frozen=True)
class Failed:
    error: ThoughtxError


Event = Token | Done | Failed


class Full(Exception):
    """The queue has no room for a request now."""


@dataclass(frozen=True)
class Load:
    """Of one moment. `num_waiting_tokens`: of the prompts that wait."""

    num_waiting: int
    num_waiting_tokens: int
    num_running: int  # prompts that are being read among them
    num_slots: int


class Ticket:
    """A request that was submitted. Its events are read once, by one reader."""

    def __init__(self, front: Front, request: Request, on_event: Callable[[Event], None] | None) -> None:
        self.request, self.is_done = request, False
        self._front, self._on_event = front, on_event
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._wake: Callable[[], object] | None = None  # of an asyncio reader

    def cancel(self) -> None:
        """Its last event is then `Done` with what there is, unless it has ended already."""
        self._front._cancel(self.request.index)

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if not isinstance(event, Token):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._wake = functools.partial(loop.call_soon_threadsafe, ready.set)
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                ready.clear()
                if self._events.empty():
                    await ready.wait()
                continue
            yield event
            if not isinstance(event, Token):
                return

    def _put(self, event: Event) -> None:
        self.is_done = not isinstance(event, Token)
        if self._on_event is None:
            self._events.put(event)
        with self._lock:
            wake = self._wake if self._on_event is None else functools.partial(self._on_event, event)
        try:
            if wake is not None:
                wake()
        except Exception:  # the reader has failed, or its loop has ended: nobody reads any more, and the engine has others
            self._on_event = None
            self.cancel()


class Front:
    """Owns `engine`, in a thread of its own, until `close`. `num_slots`: requests at a time (None: as many as the engine takes);
    `most_waiting` requests with `most_waiting_tokens` tokens of prompts in all may wait for a slot (None: any number)."""

    def __init__(
        self,
        engine: Engine,
        num_slots: int | None = None,
        *,
        prefill_segment: int = PREFILL_SEGMENT,
        most_waiting: int | None = None,
        most_waiting_tokens: int | None = None,
    ) -> None:
        self.engine = engine
        self.num_slots = min(num_slots or engine.build.max_batch_size, engine.build.max_batch_size)
        self.most_waiting, self.most_waiting_tokens = most_waiting, most_waiting_tokens
        self.problem: ThoughtxError | None = None
        engine.session.stats = Stats()
        self._generation = Generation(
            engine.session, engine.text, engine.eos_ids, self.num_slots, self._on_token, prefill_segment=prefill_segment
        )
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards all below
        self._tickets: dict[int, Ticket] = {}  # of all that have not ended
        self._new: list[int] = []
        self._cancelled: set[int] = set()
        self._begun: set[int] = set()  # those that the scheduler has given a slot
        self._is_closing = self._is_draining = False
        self.kv_usage = 0.0  # part of the KV cache that requests use, as of the last tick
        self._thread = threading.Thread(target=self._run, name="thoughtx-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> Stats:
        """Of all since the front began; the engine's thread writes it."""
        return self.engine.stats

    def load(self) -> Load:
        with self._changed:
            waiting = [ticket for index, ticket in self._tickets.items() if index not in self._begun]
            waiting = waiting[self.num_slots - len(self._begun) :]  # the others begin with the next ticks
            num_tokens = sum(len(ticket.request.prompt) for ticket in waiting)
            return Load(len(waiting), num_tokens, len(self._tickets) - len(waiting), self.num_slots)

    def submit(
        self,
        prompt: Sequence[int],
        params: GenerationParams,
        *,
        stream: int = 0,
        chunk_size: int | str | None = None,
        priority: int = 0,
        keeps_logprobs: bool = False,
        keeps_prompt_logprobs: bool = False,
        adapter: str | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Ticket:
        """Queue a request. `stream`: of its random numbers. `on_event` gets each event, in the engine's thread, and the ticket then gives
        none. E122 for a request that does not fit, `Full`, and the `problem` of an unhealthy front."""
        request = Request(
            prompt,
            params,
            next(self._numbers),
            stream,
            keeps_logprobs=keeps_logprobs,
            chunk_size=chunk_size,
            priority=priority,
            keeps_prompt_logprobs=keeps_prompt_logprobs,
            adapter=adapter,
        )
        check_request(self.engine.session, self.engine.text, request)
        with self._changed:
            load = self.load()
            if self.problem is not None:
                raise self.problem
            if self._is_closing:
                raise Full("the engine is being closed")
            must_wait = len(self._tickets) >= self.num_slots
            if must_wait and self.most_waiting is not None and load.num_waiting >= self.most_waiting:
                raise Full(f"{load.num_waiting} requests wait")
            if must_wait and self.most_waiting_tokens is not None and load.num_waiting_tokens + len(prompt) > self.most_waiting_tokens:
                raise Full(f"{load.num_waiting_tokens} tokens wait")
            ticket = self._tickets[request.index] = Ticket(self, request, on_event)
            self._new.append(request.index)
            self._changed.notify()
        return ticket

    def close(self, *, drain: bool = False) -> None:
        """Take nothing more, and end: what is there is cancelled, with `drain` finished first. The engine stays open."""
        with self._changed:
            self._is_closing, self._is_draining = True, drain
            self._changed.notify()
        self._thread.join()

    def _cancel(self, index: int) -> None:
        with self._changed:
            if index in self._tickets:
                self._cancelled.add(index)
                self._changed.notify()

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while self._take():
                for index, outcome in self._generation.tick():
                    self._end(index, Failed(outcome) if isinstance(outcome, ThoughtxError) else Done(outcome))
                with self._changed:
                    self._begun = {index for index in self._tickets if self._generation.has_begun(index)}
        except Exception as error:  # whatever it is, waiting for tokens that never come would be worse
            self._fail(error)

    def _take(self) -> bool:
        """What came since the last tick; waits while there is nothing to do. False: the end."""
        self.kv_usage = self._generation.kv_usage
        with self._changed:
            while not (self._new or self._cancelled or self._is_closing) and self._generation.is_idle:
                self._changed.wait()
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, set()
            requests = [self._tickets[index].request for index in new]
            if self._is_closing and not self._is_draining:
                cancelled = set(self._tickets)
        for request in requests:
            self._generation.add(request)
        for index in cancelled:
            if (done := self._generation.cancel(index)) is not None:
                self._end(index, Done(done))
        return not (self._is_closing and self._generation.is_idle and not self._new)

    def _on_token(self, index: int, token: int) -> bool:
        """True for a request that was cancelled meanwhile: that token is its last."""
        with self._changed:
            ticket, is_cancelled = self._tickets[index], index in self._cancelled
        ticket._put(Token(token))
        return is_cancelled

    def _end(self, index: int, event: Event) -> None:
        with self._changed:
            ticket = self._tickets.pop(index)
            self._cancelled.discard(index)
        ticket._put(event)

    def _fail(self, error: Exception) -> None:
        """The engine is of no use any more."""
        if isinstance(error, ThoughtxError):
            problem = error
        else:
            why, where = f"{type(error).__name__}: {str(error)[:300]}", str(self.engine.directory.root)
            fix = "load the engine again; if it happens again, check it with thoughtx-validate"
            problem = ThoughtxError("E205", "the engine failed in the middle of a step", where=where, why=why, fix=fix)
        with self._changed:
            self.problem, tickets = problem, list(self._tickets.values())
            self._tickets.clear()
            self._new, self._cancelled = [], set()
        for ticket in tickets:
            ticket._put(Failed(problem))
