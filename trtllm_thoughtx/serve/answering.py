"""Between the event loop and the thread that owns the engine: answers are begun, arrive piece by piece, and are given up.

Everything here runs in the event loop; the engine's thread only hands over tokens (`call_soon_threadsafe`). A request that may not be
answered in full is not begun: it gets all of its answers into the queue, or `Full`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.front import Done, Event, Failed, Front, Full, Ticket, Token
from trtllm_thoughtx.serve.metrics import Metrics
from trtllm_thoughtx.serve.wire import Ask, Wanted
from trtllm_thoughtx.text.body import CHAT
from trtllm_thoughtx.text.opening import INSIDE, state_of
from trtllm_thoughtx.text.reply_stream import ANSWER, ReplyStream


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`num_queued` and `num_queued_tokens` (of prompts) count answers that have no slot yet. Seconds: of a body to arrive, of a wait for
    the first token, and of a whole request."""

    num_queued: int = 64
    num_queued_tokens: int = 1 << 20
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    queue_seconds: float = 600.0
    answer_seconds: float = 3600.0


@dataclass(frozen=True)
class Piece:
    """What came of one answer: texts with the part that each belongs to, and at its end the completion."""

    index: int
    parts: list[tuple[str, str]] = field(default_factory=list)
    done: Completion | None = None


@dataclass(frozen=True)
class Load:
    num_running: int
    num_waiting: int
    kv_usage: float
    kv_bytes: int


class Answering:
    """One engine, its thread, and what waits for it. Use inside a running event loop."""

    def __init__(self, engine: Engine, front: Front) -> None:
        self.engine, self.front = engine, front
        self.num_slots: int = front.num_slots

    @property
    def problem(self) -> str | None:
        problem = self.front.problem
        return None if problem is None else f"{problem.what}: {problem.why}"

    def begin(self, wanted: Wanted, limits: Limits, metrics: Metrics) -> Answers:
        num, num_tokens = len(wanted.asks), sum(len(ask.ids) for ask in wanted.asks)
        load = self.front.load()
        free = load.num_slots - load.num_running
        if load.num_waiting + num - free > limits.num_queued:
            raise Full(f"{load.num_waiting} answers wait, and at most {limits.num_queued} may")
        if num > free and load.num_waiting_tokens + num_tokens > limits.num_queued_tokens:
            raise Full(f"prompts of {load.num_waiting_tokens} tokens wait, and at most {limits.num_queued_tokens} may")
        return Answers(self, wanted, limits, metrics)

    def load(self) -> Load:
        config, build = self.engine.config, self.engine.build
        kv_bytes = self.num_slots * build.kv_capacity * config.kv_bytes_per_token(build.cache_dtype)
        load = self.front.load()
        return Load(load.num_running, load.num_waiting, self.front.kv_usage, kv_bytes)


class Answers:
    """The answers of one request. Iterate `pieces` once; `close` at the end, however it comes."""

    def __init__(self, owner: Answering, wanted: Wanted, limits: Limits, metrics: Metrics) -> None:
        self.owner, self.wanted, self.limits, self.metrics = owner, wanted, limits, metrics
        self.completions: list[Completion | None] = [None] * len(wanted.asks)
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._began = time.monotonic()
        self._last_token: list[float | None] = [None] * len(wanted.asks)
        self._is_over = [False] * len(wanted.asks)
        self._streams = [self._stream(ask) for ask in wanted.asks]
        self._tickets: list[Ticket] = [self._submit(index, ask) for index, ask in enumerate(wanted.asks)]

    def _submit(self, index: int, ask: Ask) -> Ticket:
        def hand_over(event: Event) -> None:  # in the engine's thread
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return self.owner.front.submit(
            ask.ids,
            ask.params,
            chunk_size=ask.chunk_size,
            stream=ask.stream,
            priority=self.wanted.priority,
            keeps_prompt_logprobs=self.wanted.echo and ask.params.logprobs is not None,
            adapter=self.wanted.adapter,
            on_event=hand_over,
        )

    def _stream(self, ask: Ask) -> Any:
        text = self.owner.engine.text
        assert text is not None
        if self.wanted.url != CHAT:
            return text.stop_stream(ask.params)
        is_open = state_of(text, ask.ids) == INSIDE and not ask.params.thinks_nothing
        return ReplyStream(text, ask.params, is_open=is_open)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until all answers have ended; the error of the first that fails."""
        while not all(self._is_over):
            index, event = await self._next()
            if isinstance(event, Token):
                self._timed(index)
                parts = self._parts(index, self._streams[index].push(event.token))
                if parts:
                    yield Piece(index, parts)
                continue
            self._is_over[index] = True
            if isinstance(event, Failed):
                self.metrics.failed.labels(event.error.code).inc()
                raise event.error
            assert isinstance(event, Done)
            self.completions[index] = event.completion
            self.metrics.ended(event.completion)
            self.metrics.end_to_end.observe(time.monotonic() - self._began)
            yield Piece(index, self._parts(index, self._streams[index].end()), event.completion)

    def _parts(self, index: int, given: Any) -> list[tuple[str, str]]:
        if isinstance(given, str):
            return [(ANSWER, given)] if given else []
        return list(given)

    async def _next(self) -> tuple[int, Event]:
        limits, now = self.limits, time.monotonic()
        is_waiting = all(at is None for at in self._last_token)
        most = min(limits.answer_seconds, limits.queue_seconds if is_waiting else limits.answer_seconds)
        try:
            return await asyncio.wait_for(self._queue.get(), max(0.0, self._began + most - now))
        except asyncio.TimeoutError:
            self.metrics.failed.labels("deadline").inc()
            what = f"the answer took more than {most:g} s{' to begin' if is_waiting else ''}"
            fix = "ask for fewer tokens, or start the server with longer limits"
            raise ThoughtxError("E207", what, where="the server", why="its limit on the time of a request", fix=fix) from None

    def _timed(self, index: int) -> None:
        now, before = time.monotonic(), self._last_token[index]
        if before is None:
            self.metrics.first_token.observe(now - self._began)
        else:
            self.metrics.inter_token.observe(now - before)
        self._last_token[index] = now

    def close(self) -> None:
        for index, ticket in enumerate(self._tickets):
            if not self._is_over[index]:
                ticket.cancel()
                self._is_over[index] = True
                self.metrics.failed.labels("gone").inc()
