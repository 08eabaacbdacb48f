"""Requests beside each other: each gets the tokens that it gets alone, to the bit, whatever comes, goes and is reused.

Bits: on one thread, onnxruntime's CPU kernels compute a row of a batch as they compute it alone, and a segment of a prompt as any other
segment of two tokens or more. One token a call is computed by other kernels, and differs by rounding; so no token is fed alone unless
it always is. `test_segments_of_two_or_more_give_the_same_bits` shows that this holds here.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shallow import shallow

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.generation import CANCELLED, Generation
from trtllm_thoughtx.runtime.row import Request
from trtllm_thoughtx.runtime.slots import Slots
from trtllm_thoughtx.text.params import GenerationParams

BASE = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 224, "max_batch_size": 4}
CHUNKS = {"use_chunked_attention": True}
CACHES = {
    "full": {},
    "unbounded": {**CHUNKS, "chunk_size": 48, "max_chunk_size": 224, "sink_tokens": 4, "left_chunks": 1},
    "bounded": {**CHUNKS, "chunk_size": 32, "max_chunk_size": 32, "sink_tokens": 4, "left_chunks": 1, "base_size": 30.0},
    "anchors": {**CHUNKS, "chunk_size": 16, "sink_tokens": 3, "left_chunks": 2, "num_anchors": 2},
}
SAME = (
    *("stop_reason", "stop_string", "text_end", "logprobs", "top_logprobs", "chunk_size", "prompt_entropy", "single_step", "num_steps"),
    *("num_thinking_tokens", "thinking_stop", "num_probes", "num_probes_skipped"),
)
POISON = 1e4  # finite, as whatever a slot may hold


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("slots"), {}
    shallow(root / "model", 2)
    for name, options in CACHES.items():
        build(root / "model", root / name, {**BASE, **options})
        made[name] = Engine.load(root / name, num_threads=1)
    yield made
    for engine in made.values():
        engine.close()


def poisoned(generation: Generation, slot: int) -> None:
    """Whatever the slot holds is gone: nothing may depend on it, and nothing of it is reused."""
    for value in generation.session.runner.cache.values():
        value.numpy()[slot] = POISON
    generation.slots.empty(slot, None)


def alone(engine: Engine, request: Request, segment: int) -> object:
    generation = Generation(engine.session, engine.text, engine.eos_ids, 1, prefill_segment=segment)
    generation.add(request)
    ended: list = []
    while not generation.is_idle:
        ended += generation.tick()
    return ended[0][1]


SETTINGS = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 70),
        "temperature": st.sampled_from([0.0, 0.0, 0.8, 1.5]),
        "seed": st.integers(0, 3),
        "max_reasoning_depth": st.sampled_from([None, None, 0, 1, 3]),
        "max_thinking_tokens": st.sampled_from([None, None, 0, 9, 25]),
        "exit_probe": st.sampled_from([None, None, 0.7]),
        "probe_tokens": st.just(5),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "stop": st.sampled_from([(), (), ("0",), ("1 =",)]),
        "logprobs": st.sampled_from([None, 2]),
    }
)


@st.composite
def requests(draw, cache):
    """Prompts with beginnings in common, lengths over chunk boundaries, and settings of every kind."""
    rng = random.Random(draw(st.integers(0, 10_000)))
    stem = [rng.randrange(4, 200) for _ in range(150)]
    made = []
    for index in range(draw(st.integers(1, 7))):
        shared, own = draw(st.integers(0, 110)), draw(st.integers(1, 40))
        prompt = [*stem[:shared], *(rng.randrange(4, 200) for _ in range(own))]
        sizes = {"full": [None], "unbounded": [None, 16, 33, 100], "bounded": [None, 8, 17, "auto"], "anchors": [None, 5, 16]}[cache]
        size, priority = draw(st.sampled_from(sizes)), draw(st.integers(0, 2))
        params = GenerationParams(**draw(SETTINGS))
        made.append(Request(prompt, params, index, draw(st.integers(0, 3)), True, True, size, priority))
    return made


@pytest.mark.parametrize("cache", CACHES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
@pytest.mark.slow
def test_each_request_gets_what_it_gets_alone(engines, cache, data):
    """Any arrivals, cancellations, lengths, budgets, seeds, chunk sizes, neighbours and reuse; slots are poisoned as they become free."""
    engine, asked = engines[cache], data.draw(requests(cache))
    segment = data.draw(st.sampled_from([1, 4, 7, 16, 40, 512]))
    arrivals = [data.draw(st.integers(0, 30)) for _ in asked]
    cancelled = {data.draw(st.integers(0, len(asked) - 1)): data.draw(st.integers(0, 60)) for _ in range(data.draw(st.integers(0, 2)))}
    poisons, rng = data.draw(st.booleans()), random.Random(0)
    generation = Generation(
        engine.session,
        engine.text,
        engine.eos_ids,
        data.draw(st.integers(1, 4)),
        prefill_segment=segment,
        fills_first=data.draw(st.booleans()),
    )
    done, tick = {}, 0
    while len(done) < len(asked):
        for request, arrival in zip(asked, arrivals, strict=True):
            if arrival == tick:
                generation.add(request)
        for index, when in cancelled.items():
            if when == tick and (partly := generation.cancel(index)) is not None:
                done[index] = partly
        ended = generation.tick()
        done |= dict(ended)
        if poisons and ended and generation.scheduler.filling is None:
            poisoned(generation, rng.randrange(len(generation.scheduler.running), generation.slots.num_slots))
        tick += 1
    assert generation.is_idle and not generation.rows
    for request in asked:
        wanted, found = alone(engine, request, segment), done[request.index]
        if found.stop_reason == CANCELLED:
            num = len(found.output_ids)
            assert found.output_ids == wanted.output_ids[:num]
            assert num == 0 or np.array_equal(found.logits, wanted.logits[:num])
            continue
        assert found.output_ids == wanted.output_ids
        assert np.array_equal(found.logits, wanted.logits), "tokens agree, and the last bits do not"
        for name in (
            "stop_reason",
            "chunk_size",
            "prompt_entropy",
            "single_step",
            "num_steps",
            "num_thinking_tokens",
            "thinking_stop",
            "logprobs",
        ):
            assert getattr(found, name) == getattr(wanted, name), name
        assert (found.top_logprobs, found.stop_string, found.text_end) == (wanted.top_logprobs, wanted.stop_string, wanted.text_end)
        assert (found.num_probes, found.num_probes_skipped) == (wanted.num_probes, wanted.num_probes_skipped)


@pytest.mark.parametrize("length", [150, 37, 16, 2])
def test_segments_of_two_or_more_give_the_same_bits(engines, length):
    """What prefix reuse and segments of prompts rest on, on this machine."""
    engine, rng = engines["full"], random.Random(length)
    row = [rng.randrange(4, 200) for _ in range(length)]
    whole = engine.forward([row])[0]
    for segment in (2, 3, 5, 16, 17, 64):
        if length % segment != 1:
            assert np.array_equal(engine.forward([row], segment=segment)[0], whole), segment
    together = engine.forward([row, [5, 6, 7], row[::-1]])[0]
    assert np.array_equal(together, whole)


@pytest.mark.parametrize("cache", CACHES)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    shared=st.integers(0, 150),
    tails=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    new=st.integers(1, 30),
    size=st.sampled_from([None, 9, 16]),
)
@pytest.mark.slow
def test_a_reused_beginning_gives_the_same_bits(engines, cache, shared, tails, new, size):
    """Pairs that share a beginning: with and without reuse, while the first one runs and when it has ended."""
    engine, rng = engines[cache], random.Random(shared)
    size = None if cache == "full" else size
    stem = [rng.randrange(4, 200) for _ in range(shared)]
    prompts = [[*stem, *(rng.randrange(4, 200) for _ in range(num))] for num in tails]
    params = GenerationParams(max_new_tokens=new, ignore_eos=True, exit_policy="off")
    found = {}
    for reuses, num_slots in ((False, 1), (True, 1), (True, 2)):
        generation = Generation(engine.session, engine.text, engine.eos_ids, num_slots, prefill_segment=64, reuses=reuses)
        for index, prompt in enumerate(prompts):
            generation.add(Request(prompt, params, index, 0, True, chunk_size=size))
        ended: dict = {}
        while not generation.is_idle:
            ended |= dict(generation.tick())
        found[reuses, num_slots] = [ended[0], ended[1]]
    plain = found.pop((False, 1))
    assert plain[1].num_reused_tokens == 0
    for answers in found.values():
        for one, other in zip(plain, answers, strict=True):
            assert one.output_ids == other.output_ids and np.array_equal(one.logits, other.logits)
        reused = answers[1].num_reused_tokens
        assert reused <= shared or prompts[0][:reused] == prompts[1][:reused]
        if cache in ("full", "unbounded") and shared >= 17:
            assert reused >= min(shared, len(prompts[1]) - 1) - 1


def test_a_bounded_cache_reuses_within_its_last_chunk_and_not_beyond(engines):
    engine = engines["bounded"]
    stem = [5 + i % 90 for i in range(150)]
    params = GenerationParams(max_new_tokens=2, ignore_eos=True)
    last_chunk = engine.generate([[*stem, 7], [*stem[:140], 9, 9]], params)  # chunk 128 .. 159 is the last of both
    assert last_chunk[1].num_reused_tokens == 140
    gone = engine.generate([[*stem, 7], [*stem[:100], 9, 9]], params)
    assert gone[1].num_reused_tokens == 0
    other_chunks = engine.generate([[*stem, 7], [*stem, 8]], params, chunk_size=16)
    assert other_chunks[1].num_reused_tokens == 149  # the last two tokens are fed in one segment, as they are without reuse
    assert engine.generate([[*stem, 7], [*stem, 8]], params, chunk_size="auto")[1].num_reused_tokens == 0


def test_a_conversation_goes_on_in_its_slot(engines):
    """A second turn reads what is new, also when other requests ran in between; counted in tokens."""
    engine = engines["full"]
    generation = Generation(engine.session, engine.text, engine.eos_ids, 3)
    params = GenerationParams(max_new_tokens=6, ignore_eos=True)
    first = [10 + i % 80 for i in range(90)]

    def run(*prompts):
        for prompt in prompts:
            run.index += 1
            generation.add(Request(prompt, params, run.index, 0))
        ended = {}
        while not generation.is_idle:
            ended |= dict(generation.tick())
        return [one for _, one in sorted(ended.items())]

    run.index = 0
    answer = run(first)[0].output_ids
    run([100] * 20, [101] * 20)
    second = [*first, *answer, 3, 4, 5, 6]
    (done,) = run(second)
    assert done.num_reused_tokens == len(first)
    work = engine.session.stats.work.num_layer_tokens
    (again,) = run([*second, 8, 9])
    assert again.num_reused_tokens == len(second)
    assert engine.session.stats.work.num_layer_tokens - work == (2 + 5) * engine.config.num_layers == again.num_layer_tokens


def test_answers_of_one_prompt_read_it_once(engines):
    engine = engines["full"]
    prompt = [10 + i % 80 for i in range(64)]
    params = GenerationParams(max_new_tokens=5, ignore_eos=True, temperature=1.3, num_return_sequences=6)
    done = engine.generate([prompt], params)
    assert [one.num_reused_tokens for one in done] == [0, *[62] * 5] and engine.stats.num_reused == 5 * 62
    fed = sum(one.num_layer_tokens for one in done) // engine.config.num_layers
    assert fed == 64 + 5 * 2 + 6 * 4


def test_a_token_that_is_not_finite_ends_one_request(engines, monkeypatch):
    engine = engines["full"]
    prompts = [[7, 8, 9], [10, 11], [12, 13, 14]]
    params = GenerationParams(max_new_tokens=8, ignore_eos=True)
    wanted = engine.generate(prompts, params)
    call = engine.session.call

    def damaged(batch, new, rows):
        logits, exits = call(batch, new, rows)
        for row, tokens in enumerate(batch.tokens):
            if tokens[:2] == [10, 11] and len(tokens) == 5:
                logits[row, :, 3] = np.nan
        return logits, exits

    monkeypatch.setattr(engine.session, "call", damaged)
    found = dict(engine.complete([Request(prompt, params, i, i) for i, prompt in enumerate(prompts)]))
    assert isinstance(found[1], ThoughtxError) and found[1].code == "E123" and found[1].where == "row 1, new token 3"
    assert [found[i].output_ids for i in (0, 2)] == [wanted[i].output_ids for i in (0, 2)]
    with pytest.raises(ThoughtxError, match="E123"):
        engine.generate(prompts, params)


def test_a_true_result_of_on_token_ends_that_request(engines):
    engine = engines["full"]
    params, seen = GenerationParams(max_new_tokens=20, ignore_eos=True), []
    prompts = [[7, 8, 9], [10, 11]]
    done = engine.generate(prompts, params, lambda row, token: seen.append(row) or (row == 1 and seen.count(1) == 4))
    assert [len(one.output_ids) for one in done] == [20, 4] and done[1].stop_reason == CANCELLED


def test_slots_that_are_too_small_a_piece_reuse_nothing(engines):
    """Segments of three tokens and fewer cannot be kept from ending in a single one."""
    session = engines["full"].session
    assert Slots(session, 2, 4, reuses=True).reuses and not Slots(session, 2, 3, reuses=True).reuses


def test_every_call_of_a_generation_is_of_rows_in_use(engines, monkeypatch):
    """No padding, and no call of more rows than run: a prompt is fed alone, rows are decoded together."""
    engine, shapes = engines["full"], []
    run = engine.runner.run
    monkeypatch.setattr(
        engine.runner, "run", lambda feeds, first, last, row=0: (shapes.append((row, feeds["positions"])), run(feeds, first, last, row))[1]
    )
    lengths = (5, 90, 30, 61, 2)
    prompts = [[10 + i] * num for i, num in enumerate(lengths)]
    each = [GenerationParams(max_new_tokens=num, ignore_eos=True) for num in (9, 3, 14, 1, 6)]
    engine.generate(prompts, each)
    assert all(len(positions) == 1 for _, positions in shapes if positions.shape[1] > 1)
    assert sum(positions.size for _, positions in shapes) == sum(lengths) + sum(one.max_new_tokens - 1 for one in each)
    assert max(row + len(positions) for row, positions in shapes) <= 4 and max(len(positions) for _, positions in shapes) == 4
    assert Path(engine.directory.root).exists()
