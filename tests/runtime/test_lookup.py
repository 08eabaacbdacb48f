"""Prompt lookup: drafts from the request's own text change no token, and are made where they pay."""

from __future__ import annotations

import random

import numpy as np
import pytest
from shallow import shallow

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime import generation
from trtllm_thoughtx.runtime.lookup import FEW, LENGTHS, Lookup
from trtllm_thoughtx.runtime.pace import NUM_LOOKED_UP, Pace
from trtllm_thoughtx.text.params import GenerationParams

CHUNKS = {"use_chunked_attention": True, "sink_tokens": 4, "left_chunks": 1}
CACHES = {"full": {}, "bounded": {**CHUNKS, "chunk_size": 32}, "anchors": {**CHUNKS, "chunk_size": 16, "num_anchors": 2}}


class Always(Pace):
    def pays(self):
        return True


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
    looked = Lookup(text[:5])
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
    looked = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3])
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
        engine.paces["lookup"] = Always()
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
    engine.paces["lookup"] = Always()
    engine.generate([prompt], GenerationParams(**base, prompt_lookup=8))
    assert engine.stats.work.num_calls == plain - engine.stats.num_accepted < plain


def test_it_switches_itself_off_where_it_does_not_pay(engines, monkeypatch):
    """Where every draft is wrong, no more are made than are tried; where all of them hold, they go on."""
    engine, real = engines["full"], Lookup.drafts
    prompt = engine.text.chat("x1 = 38 x2 = 75 ?")
    params = GenerationParams(max_new_tokens=120, ignore_eos=True, exit_policy="off", prompt_lookup=4)
    right = engine.generate([prompt], GenerationParams(max_new_tokens=120, ignore_eos=True, exit_policy="off"))[0].output_ids
    monkeypatch.setattr(Lookup, "drafts", lambda self, most: [right[len(self.tokens) - len(prompt)] ^ 1] if most else real(self, most))
    pace = engine.paces["lookup"] = Pace(NUM_LOOKED_UP)
    ticks = iter(range(10**9))
    monkeypatch.setattr(generation, "clock", lambda: float(next(ticks)))
    engine.generate([prompt], params)
    assert engine.stats.num_accepted == 0 and pace.num_cycles[True] == NUM_LOOKED_UP == engine.stats.num_drafted
    monkeypatch.setattr(Lookup, "drafts", lambda self, most: right[len(self.tokens) - len(prompt) :][: min(most, 3)])
    engine.paces["lookup"] = Pace(NUM_LOOKED_UP)
    engine.generate([prompt], params)
    pace = engine.paces["lookup"]
    assert pace.num_cycles[False] <= NUM_LOOKED_UP + 1 and engine.stats.num_accepted >= 3 * (119 - pace.num_cycles[False]) // 4 - 3


def test_only_a_request_that_is_alone_looks_up(engines):
    engine = engines["full"]
    engine.paces["lookup"] = Always()
    prompts = [engine.text.chat(f"x1 = 38 x2 = 7{i} ?") for i in range(2)]
    engine.generate(prompts, GenerationParams(max_new_tokens=60, ignore_eos=True, exit_policy="off", prompt_lookup=8))
    assert engine.stats.num_drafted == 0


@pytest.mark.parametrize("value", [-1, 65, 1.5, True, None])
def test_what_is_no_number_of_drafts_is_refused(value):
    with pytest.raises(ThoughtxError, match="--prompt_lookup must be a whole number"):
        GenerationParams(prompt_lookup=value)
