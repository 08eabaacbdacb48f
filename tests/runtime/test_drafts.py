"""Self-speculative decoding: whatever the thresholds, caches, neighbours and sampling, `verify` writes what the whole model writes."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from exit_models import checkpoint, some_exits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import LONGCOT as SAMPLE

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.exits.calibrate import calibrate_exits
from trtllm_thoughtx.config import BuildConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.drafts import Drafter
from trtllm_thoughtx.runtime.pace import NUM_TRIED, Pace
from trtllm_thoughtx.runtime.sampling import penalized
from trtllm_thoughtx.text.params import GenerationParams

BASE = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 384, "max_batch_size": 8}
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}
CACHES = {
    "full": {},
    "unbounded": {"use_chunked_attention": True, "chunk_size": 96, "max_chunk_size": 384, "sink_tokens": 4, "left_chunks": 1},
    "bounded": {"use_chunked_attention": True, "chunk_size": 32, "sink_tokens": 4, "left_chunks": 2},
    "anchors": {"use_chunked_attention": True, "chunk_size": 16, "sink_tokens": 3, "left_chunks": 3, "num_anchors": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The sample with adapters before layers 3 and 5."""
    root = tmp_path_factory.mktemp("drafts")
    calibrate_exits(SAMPLE, root / "ckpt", exit_layers=(3, 5), fit_exit_head=True, tasks=("chain",), num_items=10, max_new_tokens=120)
    return root


@pytest.fixture(scope="module")
def engines(trained):
    made = {}
    for name, options in CACHES.items():
        build(trained / "ckpt", trained / name, {**BASE, **options, "early_exit_layers": (3, 6) if name == "full" else (5,)})
        made[name] = Engine.load(trained / name, num_threads=1)
    yield made
    for engine in made.values():
        engine.close()


def chains(engine, rng, num):
    texts = [" ".join(f"x{i + 1} = {rng.randrange(100):02d}" for i in range(rng.randint(1, 6))) + " ?" for _ in range(num)]
    return [engine.text.chat(text) for text in texts]


def one_by_one(engine, prompts, params):
    """Completions of prompts that run alone, as those that draft must, and how often they did and were right."""
    done, counts = [], np.zeros(2, int)
    for stream, prompt in enumerate(prompts):
        done += engine.generate([prompt], params, streams=[stream], return_logits=True)
        counts += engine.stats.num_drafted, engine.stats.num_accepted
    return done, *counts.tolist()


def both(engine, prompts, base, **changes):
    """Completions of all prompts without drafts, and of each alone with `verify`; how many drafts there were, and how many held."""
    off = engine.generate(prompts, GenerationParams(**base, exit_policy="off"), return_logits=True)
    assert engine.stats.num_drafted == 0
    return off, *one_by_one(engine, prompts, GenerationParams(**base, exit_policy="verify", **changes))


def same(off, verified):
    for one, other in zip(off, verified, strict=True):
        assert one.output_ids == other.output_ids and one.stop_reason == other.stop_reason
        assert (one.num_steps, one.num_thinking_tokens, one.thinking_stop) == (
            other.num_steps,
            other.num_thinking_tokens,
            other.thinking_stop,
        )
        np.testing.assert_allclose(one.logits, other.logits, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("cache", CACHES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([None, 0.0, 0.2, 0.5, 0.8, 0.95, 1.0]),
    num_rows=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    max_new_tokens=st.integers(1, 150),
    depth=st.sampled_from([None, None, 0, 2, 3]),
    thinking_tokens=st.sampled_from([None, None, 9, 25]),
    exit_threshold=st.sampled_from([None, None, "auto", 0.99]),
    exit_probe=st.sampled_from([None, None, 0.9]),
    extras=st.sampled_from([{}, {}, PENALTIES, PENALTIES | {"min_p": 0.05}, {"stop": ("0", "1 =")}]),
)
@pytest.mark.slow
def test_verify_is_lossless(
    engines, cache, seed, threshold, num_rows, temperature, max_new_tokens, depth, thinking_tokens, exit_threshold, exit_probe, extras
):
    """Token for token, greedy and sampled, with every way of ending the thinking, penalties and stop strings switched on and off."""
    engine = engines[cache]
    base = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "stop_ids": engine.text.eos_ids}
    base |= {"max_reasoning_depth": depth, "max_thinking_tokens": thinking_tokens, "exit_threshold": exit_threshold}
    base |= {"exit_probe": exit_probe, "probe_tokens": 5, **extras}
    prompts = chains(engine, random.Random(seed), num_rows)
    same(*both(engine, prompts, base, draft_threshold=threshold)[:2])


@pytest.mark.slow
def test_drafts_hold_and_save_layers(engines):
    """On the trained sample drafts are mostly right: fewer weights are read for the same tokens, in one pass each."""
    engine = engines["full"]
    prompts = chains(engine, random.Random(5), 1)
    base = {"max_new_tokens": 120, "stop_ids": engine.text.eos_ids}
    engine.generate(prompts, GenerationParams(**base, exit_policy="off"))
    plain = engine.stats.work
    done = engine.generate(prompts, GenerationParams(**base, exit_policy="verify"))
    stats = engine.stats
    assert stats.num_accepted > 0.6 * stats.num_drafted > 0
    assert stats.work.weight_bytes < 0.85 * plain.weight_bytes
    assert stats.num_decoded == len(done[0].output_ids) - 1
    assert done[0].num_layer_tokens == stats.work.num_layer_tokens >= plain.num_layer_tokens


@pytest.mark.slow
def test_work_of_drafts_is_counted_in_full(engines):
    """A threshold of 0 drafts all it may, 1 nothing; layer-tokens follow from the counts."""
    engine = engines["full"]
    prompts = chains(engine, random.Random(6), 1)
    base = {"max_new_tokens": 40, "ignore_eos": True}
    engine.generate(prompts, GenerationParams(**base, exit_policy="verify", draft_threshold=1.0))
    none = engine.stats
    assert none.num_drafted == 0 and none.work.num_layer_tokens == (len(prompts[0]) + 39) * 8
    engine.generate(prompts, GenerationParams(**base, exit_policy="verify", draft_threshold=0.0))
    all_of_them = engine.stats
    num_fed = len(prompts[0]) * 8 + (all_of_them.num_cycles + all_of_them.num_drafted) * 8
    assert all_of_them.work.num_layer_tokens == num_fed
    assert all_of_them.num_cycles + all_of_them.num_accepted in (39, 40)
    assert all_of_them.work.num_head_rows == 1 + all_of_them.num_cycles + 2 * all_of_them.num_drafted


@pytest.mark.parametrize("seed", range(6))
def test_drafts_that_are_noise_change_nothing(tmp_path, seed):
    """Random weights and random adapters: nearly every draft is wrong, in all caches."""
    rng = random.Random(seed)
    path = checkpoint(tmp_path, some_exits(64, (1, 2), seed=seed), num_layers=4, seed=seed)
    cache = rng.choice(list(CACHES.values()))
    build(path, tmp_path / "e", {**BASE, **cache, "early_exit_layers": rng.choice([(1,), (2,), (1, 2), (2, 3)])})
    engine = Engine.load(tmp_path / "e", num_threads=1)
    prompts = [[rng.randrange(97) for _ in range(rng.randint(1, 60))] for _ in range(rng.randint(2, 7))]
    base = {
        "max_new_tokens": 60,
        "temperature": rng.choice([0.0, 1.0]),
        "stop_token_ids": tuple(range(3)),
        "ignore_eos": True,
        "seed": seed,
    }
    off, verified, num_drafted, num_accepted = both(engine, prompts, base, draft_threshold=rng.choice([0.0, 0.3, 0.6]))
    assert num_drafted > num_accepted
    for one, other in zip(off, verified, strict=True):
        assert one.output_ids == other.output_ids
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
    engine.close()


@pytest.mark.slow
def test_rows_end_at_the_last_slot(engines):
    """Drafts stop where the cache does: rows that fill max_seq_len."""
    engine = engines["full"]
    prompts = [[7] * 376, [8] * 380, [9] * 300]
    for base in ({"max_new_tokens": 50}, {"max_new_tokens": 7}):
        off, verified, *_ = both(engine, prompts, base | {"ignore_eos": True}, draft_threshold=0.0)
        same(off, verified)
        assert off[0].stop_reason == ("capacity" if base["max_new_tokens"] == 50 else "length")


@pytest.mark.slow
def test_sampling_with_drafts_follows_the_models_distribution(engines):
    """The first drafted token against the model's own probabilities: 2000 draws, chi-square at the 0.1 % level.

    Its power is computed too: a sampler that is off by a total variation of 0.12 would be found in more than 95 % of cases.
    """
    engine = engines["full"]
    prompt = engine.text.chat("x1 = 38 x2 = 75 ?")
    base = {"max_new_tokens": 3, "temperature": 3.0, "ignore_eos": True}
    first = engine.forward([prompt])[0][-1]
    counts: dict[int, int] = {}
    num, num_drafted = 2000, 0
    for stream in range(num):
        one = engine.generate([prompt], GenerationParams(**base, exit_policy="verify", draft_threshold=0.0), streams=[stream])[0]
        counts[one.output_ids[1]] = counts.get(one.output_ids[1], 0) + 1
        num_drafted += engine.stats.num_drafted
    # P(second) = sum over the first token of P(first) P(second | first), exact.
    weights = np.exp((first - first.max()) / 3.0)
    weights /= weights.sum()
    expected = np.zeros_like(weights)
    for start in range(0, len(weights), 8):
        tokens = range(start, min(start + 8, len(weights)))
        for token, logits in zip(tokens, engine.forward([[*prompt, token] for token in tokens]), strict=True):
            chances = np.exp((logits[-1] - logits[-1].max()) / 3.0)
            expected += weights[token] * chances / chances.sum()
    big = [token for token in range(len(expected)) if num * expected[token] >= 10]
    observed = np.array([counts.get(token, 0) for token in big] + [num - sum(counts.get(token, 0) for token in big)])
    wanted = num * np.append(expected[big], 1 - expected[big].sum())
    chi = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty, 0.1 %
    assert num_drafted >= num and chi < limit, (chi, limit)
    rng = np.random.default_rng(0)
    share = wanted / num
    is_up = rng.random(len(share)) < 0.5
    wrong = share * np.where(is_up, 1 + 0.12 / share[is_up].sum(), 1 - 0.12 / share[~is_up].sum())
    found = [float(((rng.multinomial(num, wrong) - wanted) ** 2 / wanted).sum()) > limit for _ in range(400)]
    assert np.mean(found) > 0.95


@pytest.mark.slow
def test_trust_writes_confident_drafts_and_catches_up(engines):
    """What is trusted may differ from the model, but all that follows is the model's own, given what was written."""
    engine = engines["full"]
    prompts = chains(engine, random.Random(9), 3)
    base = {"max_new_tokens": 60, "stop_ids": engine.text.eos_ids}
    trust = GenerationParams(**base, exit_policy="trust", draft_threshold=0.3)
    done = engine.generate(prompts, trust, return_logits=True)
    stats = engine.stats
    assert stats.num_accepted == stats.num_drafted > 0 or stats.num_drafted - stats.num_accepted <= 6 * len(prompts)
    same(done, one_by_one(engine, prompts, trust)[0])  # what is drafted, and so what is written, does not depend on the neighbours
    for prompt, one in zip(prompts, done, strict=True):
        seen = engine.decode_logits([[*prompt, *one.output_ids[:-1]]], [len(prompt)])[0]
        np.testing.assert_allclose(one.logits, seen, atol=5e-3, rtol=1e-3)
    strict = engine.generate(prompts, GenerationParams(**base, exit_policy="trust", draft_threshold=1.0))
    off = engine.generate(prompts, GenerationParams(**base, exit_policy="off"))
    assert [one.output_ids for one in strict] == [one.output_ids for one in off]


@pytest.mark.parametrize("policy", ["verify", "trust"])
def test_a_policy_needs_an_adapter(tmp_path, policy):
    path = checkpoint(tmp_path, some_exits(64, (1,)), num_layers=2)
    build(path, tmp_path / "e", {**BASE, "max_seq_len": 64})
    engine = Engine.load(tmp_path / "e", num_threads=1)
    with pytest.raises(ThoughtxError, match=f"--exit_policy {policy} needs drafts") as raised:
        engine.generate([[1, 2]], GenerationParams(exit_policy=policy))
    assert raised.value.code == "E122"
    assert engine.generate([[1, 2]], GenerationParams(max_new_tokens=3))[0].output_ids  # auto: off
    engine.close()


def test_auto_tries_both_and_keeps_what_pays():
    fast, slow = Pace(), Pace()
    for pace, seconds in ((fast, 0.5), (slow, 4.0)):
        for _ in range(2 * NUM_TRIED):
            drafts = pace.pays()
            pace.note(drafts, seconds if drafts else 1.0, 3 if drafts else 1)
    assert fast.num_cycles == slow.num_cycles == {True: NUM_TRIED, False: NUM_TRIED}
    assert fast.pays() and not slow.pays()


@pytest.mark.slow
def test_rows_beside_others_do_not_draft(engines):
    """Several rows share the weights that a step reads: only the last one, alone, drafts."""
    engine = engines["full"]
    prompts = chains(engine, random.Random(4), 3)
    params = GenerationParams(max_new_tokens=30, ignore_eos=True, exit_policy="verify", draft_threshold=0.0)
    engine.generate(prompts, params)
    assert engine.stats.num_drafted == 0 and engine.stats.num_decoded == 3 * 29
    lengths = [GenerationParams(max_new_tokens=num, ignore_eos=True, exit_policy="verify", draft_threshold=0.0) for num in (30, 30, 60)]
    engine.generate(prompts, lengths)
    assert engine.stats.num_drafted > 0


@pytest.mark.slow
def test_auto_is_lossless_and_times_itself(engines):
    engine = engines["full"]
    prompts = chains(engine, random.Random(11), 1)
    base = {"max_new_tokens": 150, "ignore_eos": True}
    pace = engine.pace = Pace()
    auto = engine.generate(prompts, GenerationParams(**base, exit_policy="auto"))
    assert min(pace.num_cycles.values()) >= NUM_TRIED
    off = engine.generate(prompts, GenerationParams(**base, exit_policy="off"))
    assert [one.output_ids for one in auto] == [one.output_ids for one in off]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "much"])
def test_draft_thresholds_that_cannot_be_are_refused_by_name(value):
    with pytest.raises(ThoughtxError, match="--draft_threshold"):
        GenerationParams(draft_threshold=value)
    with pytest.raises(ThoughtxError, match="--exit_policy"):
        GenerationParams(exit_policy=str(value))
    assert BuildConfig().draft_layers == ()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.slow
def test_each_prompt_of_a_batch_may_have_its_own_settings(engines, cache):
    """Sampling, budgets, probes and draft policies side by side: every row is what it is alone, whichever way it drafts."""
    engine = engines[cache]
    base = {"max_new_tokens": 60, "stop_ids": engine.text.eos_ids}
    settings = [
        GenerationParams(**base, exit_policy="off"),
        GenerationParams(**base, exit_policy="verify", draft_threshold=0.0, temperature=1.2, seed=4),
        GenerationParams(**base, exit_policy="verify", exit_probe=0.5, probe_tokens=3),
        GenerationParams(**base, exit_policy="verify", draft_threshold=0.3, exit_probe=0.5, probe_tokens=5, max_reasoning_depth=3),
        GenerationParams(max_new_tokens=17, ignore_eos=True, exit_policy="auto", max_thinking_tokens=9),
        GenerationParams(**base, temperature=0.8, top_k=5, exit_threshold=0.9, exit_policy="off"),
    ]
    prompts = chains(engine, random.Random(3), len(settings))
    together = engine.generate(prompts, settings, return_logits=True)
    alone = [engine.generate([prompts[i]], [settings[i]], streams=[i], return_logits=True)[0] for i in range(len(settings))]
    same(together, alone)
    assert len({len(one.output_ids) for one in together}) > 2
    with pytest.raises(ValueError, match="2 settings for 6 prompts"):
        engine.generate(prompts, settings[:2])


@pytest.mark.slow
def test_drafts_are_guessed_with_the_penalties(engines):
    """Each guess is the likeliest token once prompt, answer and the drafts before it are penalized: all that the cache holds."""
    engine = engines["full"]
    prompts = chains(engine, random.Random(8), 1)
    params = GenerationParams(max_new_tokens=40, ignore_eos=True, exit_policy="verify", draft_threshold=0.0, **PENALTIES)
    cycle, guesses = Drafter.cycle, []

    def watched(self, batch, token, most, threshold, guess):
        def watch(ahead, logits):
            held, num_prompt = batch.tokens[0], len(prompts[0])
            counts = {token: held[num_prompt:].count(token) for token in held}
            guesses.append((guess(ahead, logits), int(penalized(logits, counts, params).argmax()), int(logits.argmax()), len(ahead)))
            return guesses[-1][0]

        return cycle(self, batch, token, most, threshold, watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "cycle", watched)
        engine.generate(prompts, params)
    assert guesses and all(guess == wanted for guess, wanted, _, _ in guesses)
    assert any(guess != plain for guess, _, plain, _ in guesses) and max(num for *_, num in guesses) > 2
