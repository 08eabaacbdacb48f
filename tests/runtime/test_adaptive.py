"""Chunk sizes that the engine chooses: the rule, its measure, and that a chosen chunk gives what the same chunk gives when it is named."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from click.testing import CliRunner
from places import TINY as SAMPLE
from tiny import write_tiny

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.config import BuildConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime import chunks
from trtllm_thoughtx.runtime.logits import entropy
from trtllm_thoughtx.text.params import GenerationParams

BASE = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 192, "use_chunked_attention": True, "chunk_size": "auto"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("adaptive") / "model"
    write_tiny(path, num_layers=2, max_position=4096)
    return path


def load(model, out, **options):
    build(model, out, {**BASE, **options})
    return Engine.load(out, num_threads=1)


def prompts_of(rng, vocab, lengths):
    return [[rng.randrange(vocab) for _ in range(num)] for num in lengths]


def test_entropy_of_known_distributions():
    even = np.zeros((2, 8), np.float32)
    sure = np.where(np.arange(8) == 3, 1e4, 0.0).astype(np.float32)
    np.testing.assert_allclose(entropy(even), np.log(8))
    assert entropy(sure) == 0
    np.testing.assert_allclose(entropy(np.log(np.array([0.5, 0.25, 0.25])) + 1000), 1.5 * np.log(2), rtol=1e-9)


@pytest.mark.parametrize(
    ("nats", "size", "single"),
    [(0.0, 16, True), (0.19, 16, True), (0.5, 32, False), (0.62, 48, False), (2.0, 128, False), (9.0, 128, False)],
)
def test_the_rule(nats, size, single):
    settings = BuildConfig(use_chunked_attention=True, chunk_size=128, max_chunk_size=128, base_size=70.0, threshold_low=0.2)
    assert chunks.choose(nats, settings) == chunks.Choice(size, nats, single)


def test_places_are_spread_evenly_and_end_at_the_last_token():
    assert chunks.spread(8, 4) == [1, 3, 5, 7]
    assert chunks.spread(3, 3) == [0, 1, 2]
    assert sorted(set(chunks.spread(2, 5))) == [0, 1] and chunks.spread(100, 7)[-1] == 99


@pytest.mark.parametrize("seed", range(6))
def test_a_chosen_chunk_gives_what_a_named_one_gives(model, tmp_path, seed):
    """Ragged batches, whose rows get different chunks, over bounded and whole caches, with sinks, chunks behind and anchors."""
    rng = random.Random(seed)
    options = {
        "max_chunk_size": rng.choice([32, 48, 64, 192]),
        "left_chunks": rng.randint(0, 2),
        "sink_tokens": rng.choice([0, 3]),
        "num_anchors": rng.choice([0, 2]),
        "max_input_len": rng.choice([7, 40, 192]),
        "base_size": 10.0,
    }
    whole = load(model, tmp_path / "whole", **{**options, "max_chunk_size": 192})
    rows = prompts_of(rng, whole.config.vocab_size, (rng.randint(1, 20), 16, rng.randint(17, 60), rng.randint(61, 150)))
    heads = [row[: options["max_chunk_size"]] for row in rows]
    measured = [float(entropy(logits).mean()) for logits in whole.forward(heads, chunk_size=192)]
    whole.close()
    engine = load(model, tmp_path / "e", **{**options, "base_size": 40.0 / float(np.median(measured))})
    params = GenerationParams(max_new_tokens=30, ignore_eos=True)
    chosen = engine.generate(rows, params)
    read_again = engine.stats.num_read_again
    assert all(16 <= one.chunk_size <= engine.build.max_chunk_size and one.chunk_size % 16 == 0 for one in chosen)
    assert 0 < read_again <= sum(min(len(row), engine.build.max_chunk_size) for row in rows)
    for row, one, nats in zip(rows, chosen, measured, strict=True):
        if len(row) <= min(chunks.NUM_ROWS, engine.build.max_input_len):
            assert one.prompt_entropy == pytest.approx(nats, abs=1e-5)
        named = engine.generate([row], params, chunk_size=one.chunk_size, return_logits=True)[0]
        assert named.output_ids == one.output_ids and named.prompt_entropy is None
    engine.close()


def test_rows_of_a_batch_get_chunks_of_their_own(model, tmp_path):
    engine = load(model, tmp_path / "e", max_chunk_size=64, base_size=8.0)
    rng = random.Random(0)
    rows = prompts_of(rng, engine.config.vocab_size, (90, 90, 90, 90))
    together = engine.generate(rows, GenerationParams(max_new_tokens=4, ignore_eos=True))
    alone = [engine.generate([row], GenerationParams(max_new_tokens=4, ignore_eos=True))[0] for row in rows]
    assert [one.output_ids for one in together] == [one.output_ids for one in alone]
    np.testing.assert_allclose([one.prompt_entropy for one in together], [one.prompt_entropy for one in alone], rtol=1e-6)
    engine.close()


def test_an_easy_prompt_is_answered_in_a_single_step(tmp_path):
    from trtllm_thoughtx.cli.commands import thoughtx

    build(SAMPLE, tmp_path / "e", {**BASE, "max_seq_len": 256, "max_chunk_size": 64, "base_size": 40.0, "threshold_low": 19.0})
    engine = Engine.load(tmp_path / "e", num_threads=1)
    prompt = engine.text.chat("x1 = 38 x2 = 75 ?")
    single = engine.generate([prompt])[0]
    closed = engine.generate([[*prompt, *engine.text.think_ids[1]]], chunk_size=single.chunk_size)[0]
    thought = engine.generate([prompt], chunk_size=single.chunk_size)[0]
    assert single.single_step and single.output_ids == closed.output_ids and single.num_prompt_tokens == len(prompt)
    assert len(single.output_ids) < len(thought.output_ids) and not thought.single_step
    engine.close()
    ran = CliRunner().invoke(thoughtx, ["run", "--engine_dir", str(tmp_path / "e"), "--prompt", "x1 = 38 x2 = 75 ?", "--json"])
    row = json.loads(ran.stdout)["results"][0]
    assert row["single_step"] and row["complexity"] == pytest.approx(single.prompt_entropy) and row["output_ids"] == single.output_ids
    assert "a single step" in ran.stderr


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({}, "chunk_size"),
        ({"base_size": 0.0}, "base_size"),
        ({"base_size": float("nan")}, "base_size"),
        ({"base_size": -1.0}, "base_size"),
        ({"base_size": 8.0, "max_chunk_size": 40}, "max_chunk_size"),
        ({"base_size": 8.0, "max_chunk_size": 8}, "max_chunk_size"),
        ({"base_size": 8.0, "max_chunk_size": 208}, "max_chunk_size"),
        ({"base_size": 8.0, "threshold_low": float("nan")}, "threshold_low"),
        ({"base_size": 8.0, "threshold_low": float("inf")}, "threshold_low"),
        ({"chunk_size": 32, "threshold_low": 1.0}, "threshold_low"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(model, tmp_path, options, flag):
    with pytest.raises(ThoughtxError) as caught:
        build(model, tmp_path / "e", {**BASE, **options})
    assert caught.value.code == "E001" and caught.value.where == f"--{flag}" and not (tmp_path / "e").exists()


def test_an_engine_without_a_base_size_cannot_choose(model, tmp_path):
    engine = load(model, tmp_path / "e", chunk_size=32)
    with pytest.raises(ThoughtxError) as caught:
        engine.generate([[1, 2, 3]], chunk_size="auto")
    assert caught.value.code == "E122" and "--base_size" in caught.value.why
    engine.close()


def test_the_manifest_names_a_command_that_makes_the_same_engine(model, tmp_path):
    from trtllm_thoughtx.cli.commands import thoughtx

    options = {"max_chunk_size": 64, "base_size": 12.5, "threshold_low": 0.25}
    build(model, tmp_path / "a", {**BASE, **options})
    words = json.loads((tmp_path / "a" / "manifest.json").read_text())["command"].split()[1:]
    words = [str(model) if word == model.name else str(tmp_path / "b") if word == "a" else word for word in words]
    assert CliRunner().invoke(thoughtx, ["build", *words]).exit_code == 0
    first, second = (json.loads((tmp_path / name / "config.json").read_text())["thoughtx"]["build"] for name in "ab")
    assert first == second and first["adaptive_chunks"] and first["threshold_low"] == 0.25
