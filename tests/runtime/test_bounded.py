"""Slots that are used again: a cache of the window's size gives what a cache of every position gives, to the last rounding."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tiny import write_tiny

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.config import BuildConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.graph.chunked_attention import visible
from trtllm_thoughtx.runtime.batch import Batch
from trtllm_thoughtx.text.params import GenerationParams

LENGTH = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("bounded") / "model"
    write_tiny(path, num_layers=2, max_position=4096)
    return path


def load(model, out, **options):
    common = {"backend": ("onnxruntime",), "dtype": "float32", "max_batch_size": 4, "max_seq_len": LENGTH, "use_chunked_attention": True}
    build(model, out, {**common, **options})
    return Engine.load(out, num_threads=1)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.slow
def test_a_bounded_cache_changes_nothing(model, tmp_path, seed):
    """Random settings; ragged batches, segments and decoding across many chunks, at the largest chunk and at a smaller one."""
    rng = random.Random(seed)
    settings = {
        "chunk_size": rng.choice([1, 2, 3, 4, 8, 16]),
        "left_chunks": rng.randint(0, 2),
        "sink_tokens": rng.choice([0, 1, 3, 5, 9]),
        "num_anchors": rng.choice([0, 0, 1, 2, 3]),
        "max_input_len": rng.choice([1, 5, 16, 64]),
    }
    bounded, whole = load(model, tmp_path / "b", **settings), load(model, tmp_path / "w", max_chunk_size=LENGTH, **settings)
    assert bounded.build.is_bounded and not whole.build.is_bounded
    rows = [[rng.randrange(50) for _ in range(num)] for num in (LENGTH, rng.randint(1, LENGTH), rng.randint(1, 20), rng.randint(1, LENGTH))]
    num_prompt = [rng.randint(1, len(row)) for row in rows]
    for size in {settings["chunk_size"], rng.randint(1, settings["chunk_size"])}:
        wanted = whole.forward(rows, chunk_size=size)
        decoded = bounded.decode_logits(rows, num_prompt, chunk_size=size)
        for mine, logits, other, first in zip(bounded.forward(rows, chunk_size=size), wanted, decoded, num_prompt, strict=True):
            np.testing.assert_allclose(mine, logits, atol=1e-5)
            np.testing.assert_allclose(other, logits[first - 1 :], atol=1e-5)
    params = GenerationParams(max_new_tokens=60, ignore_eos=True)
    prompts = [row[:20] for row in rows]
    assert [done.output_ids for done in bounded.generate(prompts, params)] == [done.output_ids for done in whole.generate(prompts, params)]


@pytest.mark.parametrize("seed", range(40))
def test_every_call_finds_exactly_what_is_visible(seed):
    """The slots' labels, over random histories: each visible position once, nothing that is not visible can be seen."""
    rng = random.Random(seed)
    size, left = rng.randint(1, 9), rng.randint(0, 2)
    build = BuildConfig(
        use_chunked_attention=True, chunk_size=size, max_chunk_size=size + rng.randint(0, 3), left_chunks=left,
        sink_tokens=rng.randint(0, 12), num_anchors=rng.randint(0, 3), max_seq_len=400, max_batch_size=3,
    )  # fmt: skip
    sizes = np.array([rng.randint(1, size) for _ in range(3)])
    batch = Batch(3, build, sizes)
    pending = [[0] * rng.randint(1, 120) for _ in range(3)]

    def check(feeds, rows=range(3)):
        for place, row in enumerate(rows):
            p = feeds["positions"][place]
            labels = feeds["kv_positions"][place]
            rule = (sizes[row], build.sink_tokens, left, build.num_anchors)
            seen = visible(p, labels, *rule)
            everything = np.arange(p.max() + 1)
            wanted = visible(p, everything, *rule)
            for i in range(len(p)):
                assert sorted(labels[seen[i]]) == everything[wanted[i]].tolist()
            written = np.arange(feeds["write_indices"][place], feeds["write_indices"][place] + len(p))
            assert written[-1] < build.kv_capacity

    def fed(first, end, widths):
        for row in range(first, end):
            for alone, feeds in batch.upkeep(row):
                assert alone.first == row
                check(feeds, [row])
        new = [[0] * width for width in widths]
        check(batch.view(first, end).feed(new, [[0]] * len(new)), range(first, end))

    for row in rng.sample(range(3), 3):  # prompts alone, then steps of neighbours
        alone = batch.view(row, row + 1)
        for num in alone.segments(len(pending[row]), rng.randint(1, 20)):
            fed(row, row + 1, [num])
    for _ in range(rng.randint(1, 60)):
        first = rng.randrange(3)
        end = rng.randint(first + 1, 3)
        fed(first, end, [1] * (end - first))
    assert [len(row) for row in batch.tokens] >= [len(row) for row in pending]


def test_the_cache_has_the_size_of_the_window(model, tmp_path):
    engine = load(model, tmp_path / "e", chunk_size=16, sink_tokens=4, left_chunks=1, num_anchors=2, max_seq_len=4096)
    assert engine.build.kv_capacity == 4 + (2 + 1 + 1) + 2 * 16
    engine.generate([[1] * 3000], GenerationParams(max_new_tokens=4, ignore_eos=True))
    assert engine.runner.cache["key_0"].shape()[2] == 40
    with pytest.raises(ThoughtxError, match="E122") as caught:
        engine.forward([[1, 2, 3]], chunk_size=17)
    assert "--max_chunk_size" in caught.value.why
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        {"max_chunk_size": 7},
        {"max_chunk_size": LENGTH + 1},
        {"num_anchors": -1},
        {"chunk_size": 0},
        {"left_chunks": -1},
        {"sink_tokens": LENGTH},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_by_name(model, tmp_path, options):
    with pytest.raises(ThoughtxError, match="E001") as caught:
        load(model, tmp_path / "e", **{"chunk_size": 8, **options})
    assert next(iter(options)) in caught.value.what and not (tmp_path / "e").exists()


def test_anchors_without_chunks_are_refused(model, tmp_path):
    with pytest.raises(ThoughtxError, match="E001"):
        build(model, tmp_path / "e", {"backend": ("onnxruntime",), "num_anchors": 2})


@pytest.mark.rtx
@pytest.mark.slow
def test_a_plan_of_a_bounded_cache_with_anchors_builds(model, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    options = {"dtype": "float16", "chunk_size": 32, "sink_tokens": 4, "left_chunks": 1, "num_anchors": 2, "max_seq_len": 1024}
    chunked = {"backend": ("tensorrt-rtx",), "use_chunked_attention": True, "compute_capabilities": ("8.9",), **options}
    made = build(model, tmp_path / "e", chunked)
    assert (tmp_path / "e" / "rank0.engine").stat().st_size > 0
    assert made["kv_bytes"] < build(model, tmp_path / "f", {**chunked, "backend": ("onnxruntime",), "max_chunk_size": 1024})["kv_bytes"] / 8
