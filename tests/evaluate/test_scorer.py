"""Log-likelihoods and answers of real engines: equal to what `Engine.forward` says, the same alone and in a batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_tiny

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.scorer import Scorer
from trtllm_thoughtx.evaluate.systems import EngineSystem, Written
from trtllm_thoughtx.text.params import GenerationParams

LENGTH = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness")
    write_tiny(path / "m", max_position=LENGTH, tokenizer=True)
    build(path / "m", path / "e", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": LENGTH, "max_batch_size": 3})
    return path


@pytest.fixture(scope="module")
def engine(made: Path) -> Engine:
    return Engine.load(made / "e", num_threads=1)


@pytest.fixture
def model(engine: Engine) -> Any:
    """The engine as lm-eval sees it."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: harness)")
    from trtllm_thoughtx.evaluate.harness import lm_class

    return lm_class()(Scorer(opened(engine)))


def opened(engine: Engine) -> EngineSystem:
    return EngineSystem(engine, batch_size=engine.build.max_batch_size)


def asked(*pairs: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


def expected_score(engine: Engine, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """From `Engine.forward` alone, one row at a time."""
    ids = (context + continuation)[-LENGTH - 1 :]
    logits = engine.forward([ids[:-1]])[0].astype(np.float64)[-len(continuation) :]
    log_probs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    return sum(log_probs[i, token] for i, token in enumerate(continuation)), logits.argmax(1).tolist() == continuation


PAIRS = (
    ("Is slate a stone?", " yes"),
    ("Is slate a stone?", " no"),
    ("x", " a longer one"),
    ("Two ", "words"),
    ("", "alone"),
    ("c" * 90, " cut"),
    ("p", "q" * 50),  # longer than what is fed token by token
    ("Is slate a stone?", "!"),
    ("Is slate a stone?", "?"),
)


def test_log_likelihood_is_the_sum_of_log_softmax_of_forward(engine, model):
    found = model.loglikelihood(asked(*PAIRS))
    for (context, continuation), (score, is_greedy) in zip(PAIRS, found, strict=True):
        before = engine.text.encode(context.rstrip()) or [95]
        after = context[len(context.rstrip()) :] + continuation  # lm-eval counts spaces at the end to what follows
        wanted, greedy = expected_score(engine, before, engine.text.encode(after))
        assert score == pytest.approx(wanted, abs=1e-4) and is_greedy == greedy, context
    assert model.scorer.num_truncated == 1
    assert len({round(score, 3) for score, _ in found}) == len(PAIRS)


def test_what_greedy_decoding_writes_is_greedy(engine):
    prompt = engine.text.encode("Is slate a stone?")
    ids = engine.generate([prompt], GenerationParams(max_new_tokens=4, ignore_eos=True))[0].output_ids
    other = [*ids[:-1], (ids[-1] + 1) % 97]
    found = Scorer(opened(engine)).score([(prompt, ids), (prompt, other)])
    assert [is_greedy for _, is_greedy in found] == [True, False] and found[0][0] > found[1][0]


def test_a_context_that_choices_share_is_read_once(engine):
    """Whatever stands between them; choices that differ in their last token are one row of logits."""
    engine.generate([], GenerationParams())
    context, other = list(range(40)), list(range(20, 60))
    pairs = [(context, [1, 2, 3]), (other, [5]), (context, [7, 8]), (other, [6]), (context, [9]), (context, [1, 2, 4])]
    found = Scorer(opened(engine)).score(pairs)
    for (before, after), (score, is_greedy) in zip(pairs, found, strict=True):
        wanted, greedy = expected_score(engine, before, after)
        assert score == pytest.approx(wanted, abs=1e-6) and is_greedy == greedy
    Scorer(opened(engine)).score(pairs)
    assert engine.stats.num_reused == 2 * 38 and engine.stats.work.num_head_rows == 3 + 1 + 2 + 1
    assert engine.stats.work.num_layer_tokens == engine.config.num_layers * (42 + 3 + 2 + 40)


def test_a_bounded_cache_scores_the_same_with_what_it_can_keep(made, tmp_path):
    sizes = {"max_seq_len": LENGTH, "max_batch_size": 2, "use_chunked_attention": True, "chunk_size": 24, "sink_tokens": 2}
    build(made / "m", tmp_path / "e", {"backend": ("onnxruntime",), "dtype": "float32", "max_input_len": 9, "left_chunks": 1, **sizes})
    engine = Engine.load(tmp_path / "e", num_threads=1)
    context = list(range(LENGTH - 8))
    pairs = [(context[:num], list(range(num, num + more))) for num in (20, 30, LENGTH - 8) for more in (1, 2, 5)]
    for (before, after), (score, is_greedy) in zip(pairs, Scorer(opened(engine)).score(pairs), strict=True):
        wanted, greedy = expected_score(engine, before, after)
        assert score == pytest.approx(wanted, abs=1e-6) and is_greedy == greedy
    assert engine.stats.num_reused > 0
    engine.close()


def test_rows_of_a_batch_do_not_disturb_each_other(model):
    together = model.loglikelihood(asked(*PAIRS))
    for pair, (score, is_greedy) in zip(PAIRS, together, strict=True):
        (alone,) = model.loglikelihood(asked(pair))
        assert alone == (pytest.approx(score, abs=1e-4), is_greedy)
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    prompts = [
        ("one", settings),
        ("a much longer prompt here", settings),
        ("two", settings),
        ("x" * 80, settings),
        ("y", {"max_gen_toks": 3}),
    ]
    answers = model.generate_until(asked(*prompts))
    assert answers == [model.generate_until(asked(prompt))[0] for prompt in prompts]
    assert len(set(answers)) == len(answers)


def test_a_row_that_is_done_writes_no_more(engine):
    ends = {0: 2, 1: 6, 2: 4, 3: 3}
    params = GenerationParams(max_new_tokens=9, ignore_eos=True)
    new = opened(engine).write([[5], [6], [7], [8]], [params] * 4, range(4), lambda row, ids: len(ids) >= ends[row])
    assert {row: len(one.ids) for row, one in new} == ends


def test_long_prompts_keep_their_end(engine):
    scorer, prompt = Scorer(opened(engine)), "".join(chr(33 + i) for i in range(90))
    (answer,) = scorer.complete([(prompt, {"max_gen_toks": 4})])
    assert scorer.num_truncated == 1
    assert [answer] == scorer.complete([(prompt[-60:], {"max_gen_toks": 4})]) != scorer.complete([(prompt[:60], {"max_gen_toks": 4})])
    assert scorer.num_truncated == 1


def test_choices_that_the_tokenizer_cannot_tell_apart_are_counted(engine):
    scorer = Scorer(opened(engine))
    scorer.score([([1], [2]), ([1], [3]), ([1], [2]), ([4], [2])])
    assert scorer.num_alike == 1


def test_sampling_does_not_depend_on_the_batch_size(engine):
    small = opened(engine)
    small.batch_size = 1
    prompts = [(text, {"do_sample": True, "temperature": 0.8, "max_gen_toks": 10}) for text in ("one", "two words", "three", "four")]
    drawn = Scorer(opened(engine)).complete(prompts)
    assert drawn == Scorer(small).complete(prompts)
    assert drawn != Scorer(opened(engine)).complete([(text, {"max_gen_toks": 10}) for text, _ in prompts])


def test_rolling_counts_every_token_once(engine, model):
    text = "the quick brown fox " * 8
    ids, total = engine.text.encode(text), 0.0
    assert len(ids) > 2 * LENGTH
    for start in range(0, len(ids), LENGTH):
        part = ids[start : start + LENGTH]
        first = start + len(part) - LENGTH  # the last window looks back as far as it can
        before = [95] if start == 0 else ids[start - 1 : start] if first == start else ids[first - 1 : start]
        total += expected_score(engine, before, part)[0]
    assert model.loglikelihood_rolling(asked((text,))) == [pytest.approx(total, abs=1e-3)]


def test_the_reference_gives_the_same(engine, made):
    pytest.importorskip("torch", reason="the reference needs torch")
    pytest.importorskip("transformers", reason="the reference needs transformers")
    from trtllm_thoughtx.evaluate.models import ModelSystem

    source, ours = ModelSystem(made / "m", batch_size=3), Scorer(opened(engine))
    theirs = Scorer(source)
    assert source.max_length == LENGTH
    pairs = [(engine.text.encode(a), engine.text.encode(b)) for a, b in PAIRS if a]
    for (mine, mine_greedy), (other, other_greedy) in zip(ours.score(pairs), theirs.score(pairs), strict=True):
        assert mine == pytest.approx(other, abs=1e-3) and mine_greedy == other_greedy
    prompts = [("one", {"max_gen_toks": 5}), ("two words", {"max_gen_toks": 5})]
    assert ours.complete(prompts) == theirs.complete(prompts)


def test_what_does_not_fit_is_refused(engine):
    scorer = Scorer(opened(engine))
    for code, call in (
        ("E122", lambda: scorer.complete([("x", {"max_gen_toks": LENGTH})])),
        ("E122", lambda: scorer.score([([1], [2] * (LENGTH + 1))])),
        ("E140", lambda: scorer.score([([1], [])])),
    ):
        with pytest.raises(ThoughtxError) as caught:
            call()
        assert caught.value.code == code


# --- answers -------------------------------------------------------------------------------------------------------------


class Writes:
    """A source that writes given texts, character by character, whatever is asked."""

    max_length, batch_size, is_grouped = LENGTH, 2, True

    def __init__(self, text: Any, replies: dict[str, str]) -> None:
        self.text, self.replies, self.num_written = text, replies, 0

    def score(self, jobs: Any) -> Any:
        raise AssertionError("answers are asked for")

    def write(self, rows: Any, params: list[GenerationParams], streams: Any, is_done: Any) -> Iterable[tuple[int, Written]]:
        done = []
        for index, row in enumerate(rows):
            ids = list[int]()
            for token in self.text.encode(self.replies[self.text.decode(row)])[: params[index].max_new_tokens]:
                ids.append(token)
                if is_done(index, ids):
                    break
            self.num_written += len(ids)
            done.append(Written(ids, [], "stop", 0.0))
        return enumerate(done)


TAGS = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("prompt", "reply", "tags", "answer"),
    [
        ("q", "plain text", TAGS, "plain text"),
        ("q", "one#two", TAGS, "one"),
        ("q", "<think>no#not this</think>  yes#rest", TAGS, "yes"),
        ("q", "<think>a</think>b<think>c</think> d", TAGS, "d"),
        ("q <think>", "no 7#still</think> 9", TAGS, "9"),
        ("q <think>", "it never ends 7", TAGS, ""),
        ("q", "<think>nor this 7", TAGS, ""),
        ("q", "<think>a</think>b<think>c", TAGS, ""),
        ("q", "<think>a</think>b", None, "<think>a</think>b"),
        ("q", "[[x]]y", ("[[", "]]"), "y"),
        ("q", "<think>kept", ("[[", "]]"), "<think>kept"),
    ],
)
def test_thoughts_are_cut_off_before_stop_strings(engine, prompt, reply, tags, answer):
    scorer = Scorer(Writes(engine.text, {prompt: reply}), think_tags=tags)
    assert scorer.complete([(prompt, {"until": ["never", "#"], "max_gen_toks": 50})]) == [answer]


def test_a_row_ends_soon_after_its_stop_string_and_the_order_is_kept(engine):
    source = Writes(engine.text, {"a": "no", "bb": "yes#" + "x" * 40, "ccc": "maybe so", "d <think>": "z</think>w"})
    answers = Scorer(source, think_tags=TAGS).complete([(prompt, {"until": "#", "max_gen_toks": 44}) for prompt in source.replies])
    assert answers == ["no", "yes", "maybe so", "w"] and source.num_written == 2 + 8 + 8 + 10


def test_an_engine_without_a_tokenizer_is_refused(engine, monkeypatch):
    monkeypatch.setattr(engine, "text", None)
    with pytest.raises(ThoughtxError) as caught:
        opened(engine)
    assert caught.value.code == "E112"
