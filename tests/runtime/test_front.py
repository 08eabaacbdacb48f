"""One engine, many readers: events, cancellation, limits and faults of the front that a server stands on."""

from __future__ import annotations

import asyncio
import random
import threading

import numpy as np
import pytest
from tiny import write_tiny

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.front import Done, Failed, Front, Full, Token
from trtllm_thoughtx.text.params import GenerationParams


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("front")
    write_tiny(root / "m", num_layers=2, max_position=256)
    build(root / "m", root / "e", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 128, "max_batch_size": 4})
    engine = Engine.load(root / "e", num_threads=1)
    yield engine
    engine.close()


@pytest.fixture
def front(engine):
    front = Front(engine, prefill_segment=16)
    yield front
    front.close()


def params(num, **more):
    return GenerationParams(max_new_tokens=num, ignore_eos=True, **more)


def read(ticket):
    """Its tokens, and its last event."""
    *tokens, last = list(ticket)
    assert all(isinstance(one, Token) for one in tokens)
    return [one.token for one in tokens], last


class Held:
    """The engine's thread stands still in its next call, until told."""

    def __init__(self, engine, monkeypatch):
        self.reached, self.go, call = threading.Event(), threading.Event(), engine.session.call

        def held(*args):
            self.reached.set()
            assert self.go.wait(60)
            return call(*args)

        monkeypatch.setattr(engine.session, "call", held)


def test_streams_of_many_threads_are_what_each_gets_alone(engine):
    rng = random.Random(0)
    jobs = [
        ([rng.randrange(97) for _ in range(rng.randint(1, 60))], params(rng.randint(1, 30), temperature=1.0, seed=i)) for i in range(24)
    ]
    wanted = [engine.generate([prompt], [own])[0].output_ids for prompt, own in jobs]
    front, found = Front(engine, 3, prefill_segment=16), dict[int, list[int]]()

    def client(numbers):
        for i in numbers:
            tokens, last = read(front.submit(*jobs[i], priority=i % 2))
            assert isinstance(last, Done) and last.completion.output_ids == tokens
            found[i] = tokens

    threads = [threading.Thread(target=client, args=(range(i, 24, 8),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(24)] == wanted
    load = front.load()
    assert (load.num_waiting, load.num_running, load.num_slots) == (0, 0, 3) and not front._begun and not front._generation.rows
    front.close()


def test_asyncio_readers(front):
    async def client(seed):
        ticket = front.submit([seed, 2, 3], params(20, seed=seed))
        return [event async for event in ticket]

    async def main():
        return await asyncio.gather(*(client(seed) for seed in range(9)))

    for events in asyncio.run(main()):
        assert len(events) == 21 and isinstance(events[-1], Done)
        assert [one.token for one in events[:-1]] == events[-1].completion.output_ids


def test_a_listener_gets_every_event_and_one_that_fails_costs_only_itself(front):
    got, ended = [], threading.Event()

    def listen(event):
        got.append(event)
        if not isinstance(event, Token):
            ended.set()

    def fails(event):
        raise RuntimeError("gone")

    front.submit([9, 9], params(100), on_event=fails)
    front.submit([5, 6], params(4), on_event=listen)
    assert ended.wait(60) and len(got) == 5 and isinstance(got[-1], Done)
    assert read(front.submit([5, 6], params(4)))[0] == [one.token for one in got[:-1]] and front.problem is None


def test_cancelled_wherever_it_is(engine, monkeypatch):
    """While it waits, while its prompt is read, and in the middle of its answer; the slot is free, the others go on."""
    with monkeypatch.context() as patch:
        held = Held(engine, patch)
        front = Front(engine, 1, prefill_segment=4)
        reading, waiting, last = front.submit([1] * 40, params(9)), front.submit([2] * 4, params(9)), front.submit([3] * 4, params(30))
        assert held.reached.wait(60)
        waiting.cancel()
        reading.cancel()
        held.go.set()
        for ticket in (reading, waiting):
            tokens, end = read(ticket)
            assert tokens == [] and end.completion.stop_reason == "cancelled"
    events = iter(last)
    first = next(events)
    last.cancel()
    *rest, end = list(events)
    assert isinstance(end, Done) and end.completion.output_ids == [first.token, *(one.token for one in rest)]
    assert end.completion.stop_reason in ("cancelled", "length")
    last.cancel()
    assert len(read(front.submit([4], params(5)))[0]) == 5
    front.close()


def test_what_does_not_fit_is_refused_at_the_door(front):
    for prompt, own, chunk_size in (
        ([], params(3), None),
        ([97], params(3), None),
        ([1], params(3, exit_threshold=0.5), None),
        ([1], params(3), 8),
    ):
        with pytest.raises(ThoughtxError, match="E122"):
            front.submit(prompt, own, chunk_size=chunk_size)
    assert front.load().num_running == 0


def test_the_queue_has_limits_by_requests_and_by_tokens(engine, monkeypatch):
    held = Held(engine, monkeypatch)
    front = Front(engine, 1, most_waiting=2, most_waiting_tokens=50)
    tickets = [front.submit([1] * 100, params(2))]  # it need not wait: no limit is its
    assert held.reached.wait(60)
    tickets.append(front.submit([2] * 30, params(2)))
    with pytest.raises(Full, match="30 tokens wait"):
        front.submit([3] * 21, params(2))
    tickets.append(front.submit([3] * 20, params(2)))
    with pytest.raises(Full, match="2 requests wait"):
        front.submit([4], params(2))
    held.go.set()
    assert all(len(read(ticket)[0]) == 2 for ticket in tickets)
    assert len(read(front.submit([4], params(2)))[0]) == 2
    front.close()
    with pytest.raises(Full, match="closed"):
        front.submit([4], params(2))


def test_numbers_that_are_not_finite_end_one_request(engine, monkeypatch):
    call = engine.session.call

    def damaged(batch, new, rows):
        logits, exits = call(batch, new, rows)
        for row, tokens in enumerate(batch.tokens):
            if tokens[0] == 13 and len(tokens) > 5:
                logits[row, :, 3] = np.nan
        return logits, exits

    monkeypatch.setattr(engine.session, "call", damaged)
    front = Front(engine)
    bad, good = front.submit([13, 1], params(20)), front.submit([12, 1], params(20))
    tokens, last = read(bad)
    assert isinstance(last, Failed) and last.error.code == "E123" and len(tokens) == 4
    assert isinstance(read(good)[1], Done) and front.problem is None
    front.close()


@pytest.mark.parametrize("fault", [RuntimeError("device lost"), ThoughtxError("E202", "cudaMemcpy failed", where="CUDA", why="x", fix="y")])
def test_a_fault_of_the_runner_ends_all_and_is_remembered(engine, monkeypatch, fault):
    run, calls = engine.runner.run, []

    def fails(*args):
        calls.append(1)
        if len(calls) > 9:
            raise fault
        return run(*args)

    monkeypatch.setattr(engine.runner, "run", fails)
    front = Front(engine, 2)
    tickets = [front.submit([i, 2], params(30)) for i in range(5)]
    for ticket in tickets:
        last = read(ticket)[1]
        assert isinstance(last, Failed) and last.error is front.problem
    assert front.problem.code == ("E205" if isinstance(fault, RuntimeError) else "E202")
    with pytest.raises(ThoughtxError) as caught:
        front.submit([1], params(2))
    assert caught.value is front.problem and front.load().num_running == 0
    front.close()


@pytest.mark.parametrize("drain", [True, False])
def test_closing_finishes_or_cancels_what_is_there(engine, drain, monkeypatch):
    with monkeypatch.context() as patch:
        held = Held(engine, patch)
        front = Front(engine, 1)
        tickets = [front.submit([i, 2], params(6)) for i in range(4)]
        assert held.reached.wait(60)
        closer = threading.Thread(target=front.close, kwargs={"drain": drain})
        closer.start()
        while not front._is_closing:
            pass
        held.go.set()
        closer.join()
    reasons = [read(ticket)[1].completion.stop_reason for ticket in tickets]
    assert reasons == ["length"] * 4 if drain else set(reasons) == {"cancelled"}
    assert not front._thread.is_alive()
