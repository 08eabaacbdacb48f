"""Sampling: the kept tokens and their probabilities are transformers', and a draw depends on seed, stream and step alone."""

from collections import Counter

import numpy as np
import pytest

from trtllm_thoughtx.errors import Exit, ThoughtxError
from trtllm_thoughtx.runtime.logits import log_probability, top_logprobs
from trtllm_thoughtx.runtime.sampling import Sampler, distribution, penalized, uniform
from trtllm_thoughtx.text.params import DEFAULTS, NEUTRAL, GenerationParams, token_ids, unused_settings

GRID = [
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.3, "top_k": 7, "top_p": 0.3},
    {"temperature": 2.0, "top_p": 1e-9},
    {"temperature": 0.3, "top_p": 0.999},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_k": 10_000, "top_p": 0.5},
    {"temperature": 1.2, "min_p": 0.1},
    {"temperature": 0.7, "min_p": 1.0},
    {"temperature": 2.0, "top_k": 40, "min_p": 0.3},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.99, "min_p": 0.2},
]


def rows(kind: str, size: int = 1000) -> np.ndarray:
    """float32[size] whose values are distinct, except for `ties`: halves from -4 to 4."""
    rng = np.random.default_rng(5)
    values = {
        "normal": rng.permutation(np.linspace(-9, 9, size)),
        "flat": rng.permutation(np.linspace(0, 1e-3, size)),
        "peaked": rng.permutation(np.concatenate([[60.0], np.linspace(-5, 5, size - 1)])),
        "ties": np.round(rng.uniform(-4, 4, size) * 2) / 2,
    }
    return values[kind].astype(np.float32)


def transformers_probs(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(float(temperature))(None, torch.tensor(logits[None].astype(np.float64)))
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("kind", ["normal", "flat", "peaked"])
@pytest.mark.parametrize("settings", GRID, ids=str)
def test_the_distribution_is_that_of_transformers(settings: dict, kind: str) -> None:
    logits = rows(kind)
    ids, probs = distribution(logits, GenerationParams(**settings))
    wanted = transformers_probs(logits, **settings)
    assert ids.tolist() == np.flatnonzero(wanted).tolist()
    np.testing.assert_allclose(probs, wanted[ids], rtol=1e-9)


def test_ties_with_the_kth_are_kept_as_in_transformers() -> None:
    logits = rows("ties")
    ids, probs = distribution(logits, GenerationParams(temperature=0.9, top_k=10))
    wanted = transformers_probs(logits, 0.9, 10)
    assert len(ids) > 10
    assert ids.tolist() == np.flatnonzero(wanted).tolist()
    np.testing.assert_allclose(probs, wanted[ids], rtol=1e-9)


def test_ties_at_the_edge_of_top_p_keep_the_lowest_ids_and_as_many_as_transformers() -> None:
    logits = rows("ties")
    ids, _ = distribution(logits, GenerationParams(temperature=0.9, top_p=0.4))
    assert len(ids) == np.count_nonzero(transformers_probs(logits, 0.9, 0, 0.4))
    edge = logits[ids].min()
    at_edge = np.flatnonzero(logits == edge)
    kept = [i for i in ids if logits[i] == edge]
    assert 0 < len(kept) < len(at_edge) and kept == at_edge[: len(kept)].tolist()


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = np.array([[0, 3, 3, 1], [5, 5, 5, 5], [-3e38, -3e38, -2e38, 0]], np.float32)
    picked = Sampler(GenerationParams(), 3).pick(logits)
    assert picked.tolist() == [1, 0, 3] and picked.dtype == np.int64


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-300}, {"temperature": 1e-300, "top_p": 0.9}, {"temperature": 1e-40, "top_p": 0.9, "top_k": 3}]
)
def test_extremes_neither_warn_nor_break(settings: dict) -> None:
    logits = np.array([[-3e38, 3e38, 1, 0, -1]], np.float32)
    assert Sampler(GenerationParams(**settings), 1).pick(logits).tolist() == [1]
    assert distribution(logits[0], GenerationParams(temperature=100, top_k=2))[0].tolist() == [1, 2]
    assert distribution(np.zeros(1, np.float32), GenerationParams(temperature=1, top_p=0.1))[1].tolist() == [1.0]


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))[None]
    sampler = Sampler(GenerationParams(temperature=1.0, seed=3), 1)
    num = 4000
    counts = np.bincount([int(sampler.pick(logits)[0]) for _ in range(num)], minlength=4)
    wanted = num * np.array([0.5, 0.3, 0.15, 0.05])
    assert ((counts - wanted) ** 2 / wanted).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def draw(batches: list[tuple[list[int], int]], settings: dict, seed: int = 9, steps: int = 12) -> dict[int, list[int]]:
    """stream -> tokens, with the streams in the given batches; the number is how many rows other than them each batch also has."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(steps, 8, 300)).astype(np.float32)
    found: dict[int, list[int]] = {}
    for streams, num_others in batches:
        every = [*range(100, 100 + num_others), *streams]
        sampler = Sampler(GenerationParams(seed=seed, **settings), len(every), streams=every)
        for step in range(steps):
            stack = np.concatenate([np.roll(logits[step, :num_others], step), logits[step, streams]])
            for stream, token in zip(streams, sampler.pick(stack)[num_others:], strict=True):
                found.setdefault(stream, []).append(int(token))
    return found


@pytest.mark.parametrize("settings", [{"temperature": 1.5}, {"temperature": 0.9, "top_k": 30, "top_p": 0.9}])
def test_a_row_does_not_depend_on_its_batch(settings: dict) -> None:
    together = draw([([0, 1, 2, 3], 0)], settings)
    assert draw([([0], 0), ([1], 3), ([2, 3], 1)], settings) == together
    assert draw([([3, 1, 0, 2], 0)], settings) == together
    assert draw([([0, 1, 2, 3], 0)], settings, seed=10) != together


def test_equal_rows_draw_apart_and_a_row_draws_anew_each_step() -> None:
    logits = np.zeros((40, 5000), np.float32)
    sampler = Sampler(GenerationParams(temperature=1.0), 40)
    first, second = sampler.pick(logits), sampler.pick(logits)
    assert len(set(first.tolist())) > 35 and (first != second).sum() > 35


def test_rows_may_be_picked_alone() -> None:
    logits = np.random.default_rng(1).normal(size=(3, 400)).astype(np.float32)
    whole, parts = (Sampler(GenerationParams(temperature=1.0), 3) for _ in range(2))
    wanted = [whole.pick(logits).tolist(), whole.pick(logits).tolist()]
    assert parts.pick(logits[[2]], rows=[2]).tolist() == [wanted[0][2]]
    assert parts.pick(logits[[2]], rows=[2]).tolist() == [wanted[1][2]]
    assert parts.pick(logits[:2], rows=[0, 1]).tolist() == wanted[0][:2]


def test_the_random_numbers_stay_what_they_are() -> None:
    """Answers with a seed must not change from one release to the next."""
    assert [uniform(0, 0, 0), uniform(7, 3, 11), uniform(2**64 - 1, 2**63, 2**40)] == PINNED
    sample = np.array([uniform(1, stream, step) for stream in range(20) for step in range(50)])
    assert sample.min() >= 0 and sample.max() < 1 and abs(sample.mean() - 0.5) < 0.03 and len(set(sample.tolist())) == 1000


PINNED = [0.011546754286331562, 0.8649091672632698, 0.8810178061039465]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_name_the_row(bad: float, temperature: float) -> None:
    logits = np.zeros((3, 10), np.float32)
    sampler = Sampler(GenerationParams(temperature=temperature), 3)
    sampler.pick(logits)
    logits[1, 4] = bad
    with pytest.raises(ThoughtxError) as caught:
        sampler.pick(logits)
    assert caught.value.code == "E123" and "row 1: 1 of 10" in caught.value.what and "new token 1" in caught.value.where


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1, 2**31, 1.5, "5", True, None]),
        ("temperature", [-0.1, float("nan"), float("inf"), 101, "1", True, None, 1j]),
        ("top_k", [-1, 2**31, 2.0, True, None]),
        ("top_p", [0, 0.0, -0.5, 1.0001, float("nan"), "1", True, None]),
        ("seed", [-1, 2**64, 0.5, True, None]),
        ("ignore_eos", [0, 1, "yes", None]),
        ("min_p", [-0.1, 1.1, "0", True, None]),
        ("repetition_penalty", [0, -1.0, float("nan"), float("inf"), 101, "1", True, None]),
        ("presence_penalty", [-2.1, 3, float("nan"), "1", None]),
        ("frequency_penalty", [-2.1, 3, float("nan"), "1", None]),
        ("stop", ["a", ("",), ("a", 3), ["a"], None, ("x" * 257,)]),
        ("stop_token_ids", [[1], (-1,), (True,), 3, None]),
        ("num_return_sequences", [0, -1, 2.0, True, None]),
        ("logprobs", [-1, 2.0, True, "3"]),
        ("stop_ids", [[1], (1.0,), (-1,), (True,), (2**31,), tuple(range(2000)), 3]),
    ],
)
def test_a_wrong_parameter_names_its_flag(name: str, values: list) -> None:
    for value in values:
        with pytest.raises(ThoughtxError) as caught:
            GenerationParams(**{name: value})
        assert caught.value.code == "E001" and caught.value.exit is Exit.USAGE
        assert caught.value.where == f"--{name}" and f"--{name} must be" in caught.value.what


def test_params_accept_their_limits() -> None:
    params = GenerationParams(max_new_tokens=1, temperature=1, top_k=2**31 - 1, top_p=1, seed=2**64 - 1, stop_ids=(0, 2**31 - 1))
    assert isinstance(params.temperature, float) and params.stops == {0, 2**31 - 1} and not params.is_greedy
    assert GenerationParams(stop_ids=(1,), ignore_eos=True).stops == frozenset()
    assert Sampler(params, 1).pick(np.zeros((1, 3), np.float32))[0] in range(3)


STOPS = (151645, 151643)
QWEN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": list(STOPS), "transformers_version": "4.51.0"}


@pytest.mark.parametrize(
    ("raw", "overrides", "wanted"),
    [
        ({}, {}, {"top_k": 50}),
        (QWEN, {}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "stop_ids": STOPS}),
        (QWEN, {"temperature": None, "seed": None}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "stop_ids": STOPS}),
        (QWEN, {"temperature": 0, "stop_ids": ()}, {"top_k": 20, "top_p": 0.95}),
        (QWEN, {"top_p": 0.5, "seed": 4}, {"temperature": 0.6, "top_k": 20, "top_p": 0.5, "seed": 4, "stop_ids": STOPS}),
        ({"do_sample": True}, {}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 7}, {}, {"top_k": 50, "top_p": 0.9, "stop_ids": (7,)}),
        ({"temperature": 0.6, "top_p": None}, {"temperature": 0.3}, {"temperature": 0.3, "top_k": 50}),
        ({"max_new_tokens": 2048, "eos_token_id": None}, {}, {"max_new_tokens": 2048, "top_k": 50}),
    ],
)
def test_defaults_come_from_the_checkpoint(raw: dict, overrides: dict, wanted: dict) -> None:
    assert GenerationParams.from_generation_config(raw, **overrides) == GenerationParams(**wanted)


ODD = [
    {"do_sample": 1},
    {"do_sample": "true"},
    {"temperature": "0.6"},
    {"temperature": -1},
    {"do_sample": True, "temperature": [0.6]},
    {"do_sample": True, "top_p": 0},
    {"top_p": True},
    {"top_k": 20.0},
    {"top_k": True},
    {"min_p": 2},
    {"repetition_penalty": 0},
    {"repetition_penalty": [1.1]},
    {"eos_token_id": "</s>"},
    {"eos_token_id": [1, [2]]},
    {"eos_token_id": [None, 7]},
    {"eos_token_id": -1},
    {"eos_token_id": True},
    {"pad_token_id": 2.5},
    {"bos_token_id": {}},
    {"max_new_tokens": 0},
    {"stop_strings": 3},
    {"stop_strings": ["a", ""]},
]


@pytest.mark.parametrize("raw", ODD, ids=str)
def test_an_odd_value_of_the_checkpoint_is_named_and_passed_over(raw: dict) -> None:
    """The rest counts, of a list of ids those that are ids, and a flag in its place is no reason to name it."""
    name = next(reversed(raw))
    kept = {key: value for key, value in raw.items() if key != name}
    stops = tuple(i for i in raw.get(name, ()) if type(i) is int) if name == "eos_token_id" and isinstance(raw[name], list) else ()
    rest = {"temperature": 0.5, "top_p": 0.7} if name == "top_k" else {"top_k": 9}
    params = GenerationParams.from_generation_config({**rest, **raw})
    assert params == GenerationParams.from_generation_config({**rest, **kept}, stop_ids=stops)
    assert unused_settings(raw) == (name,) and unused_settings({**raw, "num_beams": 4}) == (name, "num_beams")
    flag = {"stop_strings": "stop"}.get(name, name)
    assert unused_settings(raw, [flag]) == ()


def test_an_override_is_judged_as_a_flag() -> None:
    with pytest.raises(ThoughtxError, match="--top_p must be"):
        GenerationParams.from_generation_config(QWEN, top_p=0.0)


def test_defaults_agree_with_transformers() -> None:
    from transformers import GenerationConfig

    theirs = GenerationConfig._get_default_generation_params()
    ours = GenerationParams.from_generation_config({"do_sample": True})
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "num_return_sequences")
    assert {name: theirs[name] for name in names} == {name: getattr(ours, name) for name in names}
    assert theirs["do_sample"] is False


def test_settings_that_are_not_applied_are_named() -> None:
    assert unused_settings(QWEN) == ()
    raw = {**QWEN, "repetition_penalty": 1.05, "min_p": 0.0, "num_beams": 1, "no_repeat_ngram_size": 3, "typical_p": None}
    assert unused_settings(raw) == ("no_repeat_ngram_size",)
    for name, value in {
        "num_beams": 4,
        "penalty_alpha": 0.6,
        "bad_words_ids": [[5]],
        "suppress_tokens": [1],
        "presence_penalty": 1.5,
    }.items():
        assert unused_settings({name: value}) == (name,)


# What a GenerationConfig holds that changes no token of an answer by itself.
NO_EFFECT = {
    *("max_length", "stop_strings", "use_cache", "cache_implementation", "cache_config", "early_stopping", "length_penalty"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "renormalize_logits"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "is_assistant", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "use_mtp", "compile_config", "disable_compile"),
    *("continuous_batching_config", "low_memory", "prefill_chunk_size", "transformers_version", "max_cache_len"),
    *("speculation_type", "assistant_ensemble_weight"),
}


def test_every_setting_of_transformers_is_applied_or_named() -> None:
    """A setting that a new transformers brings must be put into one of the lists; its defaults are nothing to be named."""
    from transformers import GenerationConfig

    theirs = GenerationConfig()
    names = {name for name in vars(theirs) if not name.startswith("_")} | set(theirs.to_dict()) - {"_from_model_config"}
    assert names - NO_EFFECT - NEUTRAL.keys() - DEFAULTS.keys() - {"max_new_tokens"} == set()
    assert unused_settings(GenerationConfig._get_default_generation_params()) == ()


def test_token_ids() -> None:
    assert token_ids({"a": 5}, "a") == (5,) and token_ids({"a": [5, 6]}, "a") == (5, 6) and token_ids({}, "a") == ()


# --- penalties ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.05, 1.3, 0.5, 100.0])
def test_the_repetition_penalty_is_that_of_transformers_bit_for_bit(penalty: float) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(2)
    logits = rng.normal(size=500).astype(np.float32) * 7
    prompt, answer = rng.integers(0, 500, 40).tolist(), rng.integers(0, 500, 30).tolist()
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), torch.tensor(logits[None].copy()))[0].numpy()
    counts = {**dict.fromkeys(prompt, 0), **Counter(answer)}
    np.testing.assert_array_equal(penalized(logits, counts, GenerationParams(repetition_penalty=penalty)), wanted)
    assert (wanted != logits).sum() == len({*prompt, *answer})


def test_presence_and_frequency_are_those_of_vllm() -> None:
    """vLLM's formula over dense counts: of the answer alone, after the repetition penalty."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=300).astype(np.float32) * 7
    prompt, answer = rng.integers(0, 300, 40).tolist(), rng.integers(0, 20, 60).tolist()
    params = GenerationParams(repetition_penalty=1.2, presence_penalty=0.7, frequency_penalty=-0.3)
    counts, is_read = np.bincount(answer, minlength=300), np.bincount([*prompt, *answer], minlength=300) > 0
    wanted = np.where(is_read, np.where(logits > 0, logits / np.float32(1.2), logits * np.float32(1.2)), logits)
    wanted = wanted + 0.3 * counts - 0.7 * (counts > 0)
    found = penalized(logits, {**dict.fromkeys(prompt, 0), **Counter(answer)}, params)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert counts.max() > 2 and params.has_penalties and not GenerationParams().has_penalties


def test_penalties_follow_what_was_written_and_guess_what_is_drafted() -> None:
    """Tokens that were not picked count as well, and a guess behind drafts is the later pick; no guess changes a row."""
    logits = np.random.default_rng(4).normal(size=(6, 50)).astype(np.float32)
    for settings in ({}, {"temperature": 1.5}):
        params = GenerationParams(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5, **settings)
        sampler = Sampler([GenerationParams(), params], 2, prompts=[[1], [2, 3]])
        written = [7, 7, 9]
        guesses = [sampler.guess(1, written[:num], logits[num]) for num in range(4)]
        found = []
        for num in range(4):
            found.append(int(sampler.pick(logits[None, num], [1])[0]))
            sampler.note(1, written[num] if num < 3 else 0)
        assert found == guesses
        assert int(sampler.pick(logits[None, 0], [0])[0]) == logits[0].argmax()
    top = np.zeros(8, np.float32)
    top[[3, 5]] = 2.0, 1.5
    plain = Sampler(GenerationParams(presence_penalty=1.0), 1, prompts=[[3]])
    assert plain.guess(0, [], top) == 3 and plain.guess(0, [3], top) == 5


def test_top_logprobs() -> None:
    logits = np.array([1, 3, 3, -2, 0], np.float32)
    wanted = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    found = top_logprobs(logits, 3)
    assert [i for i, _ in found] == [1, 2, 0] and top_logprobs(logits, 0) == [] and len(top_logprobs(logits, 9)) == 5
    np.testing.assert_allclose([value for _, value in found], wanted[[1, 2, 0]], rtol=1e-12)
    assert found[0][1] == log_probability(logits, 1)


def test_several_answers_need_sampling() -> None:
    with pytest.raises(ThoughtxError, match="num_return_sequences 2 needs sampling"):
        GenerationParams(num_return_sequences=2)


@pytest.mark.parametrize("settings", [{"temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95}])
def test_a_pick_from_a_large_vocabulary_sorts_few_tokens(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting the vocabulary would take most of a step of a small model."""
    logits = (np.random.default_rng(0).normal(size=(1, 152_064)) * 3).astype(np.float32)
    sizes, inner = [0], np.sort
    monkeypatch.setattr(np, "sort", lambda values, *args, **kwargs: sizes.append(np.size(values)) or inner(values, *args, **kwargs))
    for name in ("argsort", "lexsort", "unique"):
        monkeypatch.setattr(np, name, lambda *_, **__: pytest.fail("sorts"))
    Sampler(GenerationParams(**settings), 1).pick(logits)
    assert max(sizes) < 20_000, sizes
