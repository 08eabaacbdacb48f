"""Prompt lookup: drafts from the request's own text change no token, and are made where they pay."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from shallow import shallow

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.config import QuantConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.lookup import ALLOWED, FEW, FREE, LENGTHS, Lookup, cost_of
from trtllm_thoughtx.text.params import GenerationParams

CHUNKS = {"use_chunked_attention": True, "sink_tokens": 4, "left_chunks": 1}
CACHES = {"full": {}, "bounded": {**CHUNKS, "chunk_size": 32}, "anchors": {**CHUNKS, "chunk_size": 16, "num_anchors": 2}}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("lookup"), {}
    shallow(root / "model", 2)
    for name, options in CACHES.items():
        build(root / "model", root / name, {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 256, **options})
        made[name] = Engine.load(root / name, num_threads=1)
    yield made
    for engine in made.values():
        engine.close()


@pytest.mark.parametrize("seed", range(20))
def test_drafts_are_what_stood_behind_the_last_tokens_most_recently(seed):
    """Against a search of the whole text, the longest agreement first."""
    rng = random.Random(seed)
    text = [rng.randrange(3) for _ in range(rng.randint(1, 60))]
    looked = Lookup(text[:5], 0.1)
    looked.width = 10
    for place in range(5, len(text) + 1):
        seen, wanted = text[:place], []
        for length in LENGTHS:
            places = [i for i in range(length, place) if seen[i - length : i] == seen[-length:]]
            if place > length and places:
                wanted = seen[places[-1] : places[-1] + 4]
                break
        assert looked.drafts(4) == wanted and looked.drafts(0) == []
        if place < len(text):
            looked.push(text[place])


def test_more_are_drafted_while_they_hold():
    looked = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], 0.1)
    assert looked.drafts(9) == [4, 5][:FEW]
    looked.judge(FEW, FEW)
    assert looked.drafts(9) == [4, 5, 6, 7]
    looked.judge(4, 0)
    assert looked.drafts(9) == [4]


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_answer_is_what_it_is_without(engines, cache, temperature):
    """Chains whose steps repeat the question, and noise that repeats itself; with budgets, probes and stop strings."""
    engine, rng = engines[cache], random.Random(1)
    num_accepted = num_drafted = 0
    for seed in range(8):
        text = " ".join(f"x{i + 1} = {rng.randrange(10, 100)}" for i in range(rng.randint(2, 6))) + " ?"
        prompt = engine.text.chat(text) if seed % 2 else [rng.randrange(4, 12) for _ in range(40)]
        more = {3: {"max_thinking_tokens": 30}, 5: {"exit_probe": 0.7, "probe_tokens": 4}, 7: {"stop": ("3 =",)}}.get(seed, {})
        base = {"max_new_tokens": 120, "temperature": temperature, "seed": seed, "ignore_eos": True, "exit_policy": "off", **more}
        without = engine.generate([prompt], GenerationParams(**base), return_logits=True)[0]
        assert engine.stats.num_drafted == 0
        found = engine.generate([prompt], GenerationParams(**base, prompt_lookup=6), return_logits=True)[0]
        num_drafted, num_accepted = num_drafted + engine.stats.num_drafted, num_accepted + engine.stats.num_accepted
        assert found.output_ids == without.output_ids and found.stop_reason == without.stop_reason
        assert (found.num_steps, found.thinking_stop, found.num_probes) == (without.num_steps, without.thinking_stop, without.num_probes)
        np.testing.assert_allclose(found.logits, without.logits, atol=5e-3, rtol=1e-3)
        assert engine.stats.num_decoded == len(found.output_ids) - 1
    assert num_drafted > num_accepted > 0


def test_a_text_that_repeats_itself_takes_fewer_calls(engines):
    engine = engines["full"]
    prompt = engine.text.chat("x1 = 38 x2 = 75 x3 = 21 x4 = 38 ?")
    base = {"max_new_tokens": 150, "ignore_eos": True, "exit_policy": "off"}
    engine.generate([prompt], GenerationParams(**base))
    plain = engine.stats.work.num_calls
    engine.generate([prompt], GenerationParams(**base, prompt_lookup=8))
    assert engine.stats.work.num_calls == plain - engine.stats.num_accepted < plain


def written(text: list[int], num_prompt: int, cost: float, most: int = 8) -> tuple[float, int]:
    """Steps that `text` takes behind its prompt, drafts counted by what they cost, and tokens that are written."""
    looked, steps, place = Lookup(text[:num_prompt], cost), 0.0, num_prompt
    while place < len(text):
        drafts = looked.drafts(min(most, len(text) - place - 1))
        held = next((i for i, token in enumerate(drafts) if text[place + i] != token), len(drafts))
        for token in text[place : place + held + 1]:
            looked.push(token)
        looked.judge(len(drafts), held)
        steps, place = steps + 1 + cost * len(drafts), place + held + 1
        assert looked.saved >= 0
    return steps, len(text) - num_prompt


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("cost", [0.085, 0.16, 0.26, 0.6])
def test_no_text_is_slower_by_more_than_it_may_lose(seed, cost):
    """Also where every run of tokens stood there before, and something else follows each time."""
    rng = random.Random(seed)
    kinds = (
        lambda place: rng.randrange(2),
        lambda place: rng.randrange(5),
        lambda place: (1, 2, 3, 4, 5, 1000 + place)[place % 6],
        lambda place: (1, 2, 3, 4, 5, 6, 7, rng.randrange(3))[place % 8],
    )
    text = [kinds[seed % 4](place) for place in range(rng.randint(60, 800))]
    steps, num_new = written(text, 40, cost)
    assert steps <= (1 + ALLOWED) * num_new + FREE


@pytest.mark.parametrize(("cost", "gain"), [(0.085, 4.0), (0.26, 2.0)])
def test_a_text_that_repeats_its_prompt_is_faster(cost, gain):
    prompt = list(range(100))
    steps, num_new = written([*prompt, *prompt[20:90]], 100, cost)
    assert num_new / steps > gain


def test_bits_make_drafts_dear(engines):
    plain = engines["full"].config
    quantized = [dataclasses.replace(plain, quantization=QuantConfig(algo=algo)) for algo in ("W8A16", "W4A16")]
    assert [round(cost_of(config), 3) for config in (plain, *quantized)] == [0.085, 0.16, 0.26]


def test_it_switches_itself_off_where_it_does_not_pay(engines, monkeypatch):
    """By counts, the same each time: where every draft is wrong, what may be lost is lost; where all of them hold, they go on."""
    engine, prompt = engines["full"], engines["full"].text.chat("x1 = 38 x2 = 75 ?")
    base = {"max_new_tokens": 120, "ignore_eos": True, "exit_policy": "off"}
    right = engine.generate([prompt], GenerationParams(**base))[0].output_ids
    plain, params = engine.stats.work.num_calls, GenerationParams(**base, prompt_lookup=4)

    def drafted(wrong):
        def drafts(self, most):
            place = len(self.tokens) - len(prompt)
            return [token ^ wrong for token in right[place : place + max(0, self.room(most))]]

        return drafts

    monkeypatch.setattr(Lookup, "drafts", drafted(wrong=1))
    done = [(engine.generate([prompt], params)[0].output_ids, engine.stats.num_drafted, engine.stats.work.num_calls) for _ in range(2)]
    cost = cost_of(engine.config)
    assert done[0] == done[1] and done[0][0] == right and done[0][2] == plain
    assert 2 <= done[0][1] <= (FREE + ALLOWED * 120) / cost
    monkeypatch.setattr(Lookup, "drafts", drafted(wrong=0))
    assert engine.generate([prompt], params)[0].output_ids == right
    assert engine.stats.num_accepted == engine.stats.num_drafted >= 90 and engine.stats.work.num_calls == plain - engine.stats.num_accepted


def test_only_a_request_that_is_alone_looks_up(engines):
    engine = engines["full"]
    prompts = [engine.text.chat(f"x1 = 38 x2 = 7{i} ?") for i in range(2)]
    engine.generate(prompts, GenerationParams(max_new_tokens=60, ignore_eos=True, exit_policy="off", prompt_lookup=8))
    assert engine.stats.num_drafted == 0


@pytest.mark.parametrize("value", [-1, 65, 1.5, True, None])
def test_what_is_no_number_of_drafts_is_refused(value):
    with pytest.raises(ThoughtxError, match="--prompt_lookup must be a whole number"):
        GenerationParams(prompt_lookup=value)
