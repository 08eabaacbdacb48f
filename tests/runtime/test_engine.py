"""The engine as its users see it: batches, segments, decoding, limits, hashes. Everything runs on onnxruntime."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import write_tiny

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.text.params import GenerationParams

ROWS = [[5, 9, 2, 44, 7], [1] * 3, list(range(40)), [90, 3]]


def made(path, **options):
    write_tiny(path / "m", num_layers=3, max_position=256)
    options = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64, "max_input_len": 16, **options}
    build(path / "m", path / "e", options)
    return path / "e"


CHUNKED = {"use_chunked_attention": True, "chunk_size": 8, "sink_tokens": 2, "left_chunks": 1, "max_chunk_size": 64}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return Engine.load(made(tmp_path_factory.mktemp("full")), num_threads=1)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    return Engine.load(made(tmp_path_factory.mktemp("chunked"), **CHUNKED), num_threads=1)


def test_chunk_as_long_as_the_text_is_full_attention_bit_for_bit(full, chunked):
    for size in (40, 41, 64):
        for mine, reference in zip(chunked.forward(ROWS, chunk_size=size), full.forward(ROWS), strict=True):
            assert np.array_equal(mine, reference)
    assert not np.array_equal(chunked.forward(ROWS, chunk_size=8)[2], full.forward(ROWS)[2])


def test_rows_do_not_see_each_other(chunked):
    together = chunked.forward(ROWS)
    for row, logits in zip(ROWS, together, strict=True):
        np.testing.assert_array_equal(chunked.forward([row])[0], logits)


@pytest.mark.parametrize("segment", [1, 3, 7, 8, 16])
def test_segments_of_prefill_change_nothing(chunked, segment):
    for mine, whole in zip(chunked.forward(ROWS, segment=segment), chunked.forward(ROWS), strict=True):
        np.testing.assert_allclose(mine, whole, atol=1e-5)


def test_decoding_gives_the_logits_of_prefill(full, chunked):
    for engine in (full, chunked):
        for mine, row, n, logits in zip(engine.decode_logits(ROWS, [2, 3, 17, 1]), ROWS, [2, 3, 17, 1], engine.forward(ROWS), strict=True):
            assert len(mine) == len(row) - n + 1
            np.testing.assert_allclose(mine, logits[n - 1 :], atol=1e-5)


def test_nothing_is_padded(full, monkeypatch):
    """Each token is fed once, whatever stands beside it."""
    fed, run = [], full.runner.run
    monkeypatch.setattr(full.runner, "run", lambda feeds, *rest: fed.append(feeds["input_ids"].shape) or run(feeds, *rest))
    ragged, half = sum(map(len, ROWS)), [-(-len(row) // 2) for row in ROWS]
    full.forward(ROWS)
    assert sum(rows * width for rows, width in fed) == ragged and {rows for rows, _ in fed} == {1}
    fed.clear()
    full.decode_logits(ROWS, half)
    assert sum(rows * width for rows, width in fed) == ragged and max(rows for rows, width in fed if width == 1) == len(ROWS)


def test_stages_equal_one_graph(full, tmp_path):
    staged = Engine.load(made(tmp_path, early_exit_layers=(1, 2)), num_threads=1)
    assert len(staged.directory.parts) == 4
    for mine, reference in zip(staged.forward(ROWS), full.forward(ROWS), strict=True):
        assert np.array_equal(mine, reference)


def test_every_slot_can_be_used_in_a_ragged_batch(full):
    """A row that fills the cache beside short ones, and a short one that decodes to the end beside it."""
    rows = [list(range(64)), [7, 8, 9], [3] * 60]
    for mine, row in zip(full.forward(rows), rows, strict=True):
        np.testing.assert_allclose(mine, full.forward([row])[0], atol=1e-5)
    done = full.generate([[3] * 60, [1, 2]], GenerationParams(max_new_tokens=100))
    assert [c.stop_reason for c in done] == ["capacity", "capacity"]
    assert [len(c.output_ids) for c in done] == [4, 62]


def test_greedy_generation_repeats_the_argmax_of_the_logits(chunked):
    done = chunked.generate(ROWS, GenerationParams(max_new_tokens=9), return_logits=True)
    for row, completion in zip(ROWS, done, strict=True):
        whole = row + completion.output_ids
        logits = chunked.forward([whole])[0]
        assert completion.output_ids == logits[len(row) - 1 : -1].argmax(-1).tolist()
        assert completion.logits.shape == (9, 97) and completion.logits.dtype == np.float32
        np.testing.assert_allclose(completion.logits, logits[len(row) - 1 : -1], atol=1e-5)
        assert completion.stop_reason == "length" and completion.num_prompt_tokens == len(row)


def test_sampling_does_not_depend_on_the_batch(full):
    params = GenerationParams(max_new_tokens=8, temperature=1.5, seed=3)
    prompts = [[i, i + 1] for i in range(10)]  # more than max_batch_size
    together = full.generate(prompts, params)
    assert [c.output_ids for c in together] == [c.output_ids for c in full.generate(prompts, params)]
    assert len({tuple(c.output_ids) for c in together}) > 5
    assert full.generate(prompts[:1], params)[0].output_ids == together[0].output_ids
    seen: dict[int, list[int]] = {}
    full.generate(prompts, params, on_token=lambda row, token: seen.setdefault(row, []).append(token))
    assert [seen[i] for i in range(10)] == [c.output_ids for c in together]


def test_stop_ids_end_a_row(full):
    free = full.generate([[5, 6]], GenerationParams(max_new_tokens=12))[0].output_ids
    stop = free[5]
    params = GenerationParams(max_new_tokens=12, stop_ids=(stop,))
    done = full.generate([[5, 6]], params)[0]
    assert done.output_ids == free[: free.index(stop) + 1] and done.stop_reason == "stop"
    assert len(full.generate([[5, 6]], GenerationParams(max_new_tokens=12, stop_ids=(stop,), ignore_eos=True))[0].output_ids) == 12


def test_a_forward_pass_is_work_like_any_other(chunked):
    """Its tokens, its rows of logits and the calls that keep sinks for later chunks, on top of those of the last `generate`."""
    chunked.generate([], GenerationParams())
    chunked.forward(ROWS, segment=8)
    work, num_tokens = chunked.stats.work, sum(map(len, ROWS))
    assert work.num_head_rows == num_tokens and work.num_layer_tokens >= num_tokens * chunked.config.num_layers
    assert work.num_layer_tokens < 2 * num_tokens * chunked.config.num_layers and work.num_calls >= max(map(len, ROWS)) // 8
    assert work.weight_bytes == work.num_calls * sum(chunked.session.part_bytes)


def test_layers_are_tapped_for_every_position(full, tmp_path):
    tapped = Engine.load(full.directory.root, num_threads=1, tap_layers=True)
    logits, layers = tapped.forward_layers(ROWS)
    assert len(layers) == 4
    for row, b in zip(ROWS, range(4), strict=True):
        assert all(depth[b].shape == (len(row), 64) for depth in layers)
    embedding = tapped.forward_layers([[5]])[1][0][0]
    np.testing.assert_array_equal(layers[0][0][0], embedding[0])
    for mine, reference in zip(logits, full.forward(ROWS), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-6)


@pytest.mark.parametrize(
    "rows, kwargs",
    [
        ([[]], {}),
        ([[97]], {}),
        ([[-1]], {}),
        ([[1] * 65], {}),
        ([], {}),
        ([[1]] * 5, {}),
        ([[1]], {"chunk_size": 8}),
    ],
)
def test_requests_beyond_the_limits_are_refused(full, rows, kwargs):
    with pytest.raises(ThoughtxError) as caught:
        full.forward(rows, **kwargs)
    assert caught.value.code == "E122"


def test_nothing_is_loaded_unless_its_hash_fits(tmp_path):
    root = made(tmp_path)
    for name in ("rank0.onnx", "rank0.data", "config.json"):
        data = bytearray((root / name).read_bytes())
        data[len(data) // 2] ^= 1
        original = (root / name).read_bytes()
        (root / name).write_bytes(data)
        with pytest.raises(ThoughtxError) as caught:
            Engine.load(root)
        assert caught.value.code in ("E120", "E121", "E102"), name
        (root / name).write_bytes(original)
    Engine.load(root)
    (root / "manifest.json").unlink()
    with pytest.raises(ThoughtxError) as caught:
        Engine.load(root)
    assert caught.value.code == "E121"


def test_an_engine_without_any_backend_is_malformed(tmp_path):
    root = made(tmp_path)
    config = json.loads((root / "config.json").read_text())
    config["thoughtx"]["parts"][0]["data"] = None
    (root / "config.json").write_text(json.dumps(config))
    with pytest.raises(ThoughtxError) as caught:
        Engine.load(root)
    assert caught.value.code == "E121"


def test_build_twice_does_nothing_and_force_gives_the_same_bytes(tmp_path):
    root = made(tmp_path, **CHUNKED)
    before = {p.name: p.read_bytes() for p in root.iterdir()}
    options = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64, "max_input_len": 16, **CHUNKED}
    assert build(tmp_path / "m", root, options)["up_to_date"]
    again = build(tmp_path / "m", root, options, force=True)
    assert not again["up_to_date"]
    after = {p.name: p.read_bytes() for p in root.iterdir()}
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if name != "manifest.json")
    first, second = (json.loads(files["manifest.json"]) for files in (before, after))
    first.pop("created"), second.pop("created")
    assert first == second
    with pytest.raises(ThoughtxError) as caught:
        build(tmp_path / "m", root, {**options, "max_seq_len": 128})
    assert caught.value.code == "E130" and {p.name: p.read_bytes() for p in root.iterdir()} == after
    (root / "rank0.data").write_bytes(b"damaged")
    with pytest.raises(ThoughtxError):
        build(tmp_path / "m", root, options)


def test_a_converted_checkpoint_builds_the_same_engine(tmp_path):
    from trtllm_thoughtx.checkpoint.convert import convert

    root = made(tmp_path)
    convert(tmp_path / "m", tmp_path / "c")
    build(tmp_path / "c", tmp_path / "e2", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64, "max_input_len": 16})
    for name in ("rank0.onnx", "rank0.data"):
        assert (root / name).read_bytes() == (tmp_path / "e2" / name).read_bytes()


def test_dry_run_writes_nothing(tmp_path):
    write_tiny(tmp_path / "m")
    plan = build(tmp_path / "m", tmp_path / "e", {"backend": ("onnxruntime",)}, dry_run=True)
    assert plan["dry_run"] and plan["weights_bytes"] > 0 and not (tmp_path / "e").exists()
