"""Calibration: whose numbers enter, that they repeat, that the search beats plain rounding, and what bad data gets."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calib_data import SIZES, ids, lines, stored_bytes
from places import TINY
from tiny import write_tiny, write_tokenizer

torch = pytest.importorskip("torch")
torch.set_num_threads(1)


from trtllm_thoughtx import Engine  # noqa: E402
from trtllm_thoughtx.build.build import build  # noqa: E402
from trtllm_thoughtx.calibrate.data import read_data  # noqa: E402
from trtllm_thoughtx.calibrate.quantize import grid, page  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.job import calibrate  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.layers import Walk  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.model import Head, Layer, Rotary, read  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.result import limits_of  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.search import Inputs, Quantized, search  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.watch import Judge, picks_of  # noqa: E402
from trtllm_thoughtx.checkpoint.weights import open_weights  # noqa: E402
from trtllm_thoughtx.config import QuantConfig  # noqa: E402
from trtllm_thoughtx.errors import ThoughtxError  # noqa: E402
from trtllm_thoughtx.text.text import Text  # noqa: E402
from trtllm_thoughtx.validate.divergence import Divergence, Loss  # noqa: E402

# --- the walk is the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("rope", ["none", "yarn", "llama3"])
def test_layers_are_those_of_transformers(tmp_path, family, rope):
    import hf_models

    path = hf_models.save(tmp_path / "m", family, rope=rope)
    tokens = np.random.default_rng(0).integers(0, 97, 50).tolist()
    with torch.inference_mode():
        wanted = hf_models.transformers.AutoModelForCausalLM.from_pretrained(path)(torch.tensor([tokens])).logits[0]
        with open_weights(path) as source:
            x = read(source, "transformer.vocab_embedding.weight")[tokens]
            rotary = Rotary(source.config, len(tokens))
            for index in range(source.config.num_layers):
                x = Layer(source, index).forward(x, rotary)
            head = Head(source)
            torch.testing.assert_close(head.normed(x) @ head.weight.T, wanted, atol=2e-3, rtol=1e-4)


# --- whose numbers enter ---------------------------------------------------------------------------------------------


def test_batch_size_changes_no_bit(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    data = lines(tmp_path / "d.jsonl", ids(20))
    for size in (1, 3, 8):
        calibrate(tmp_path / "m", tmp_path / f"c{size}", qformat="int8_sq", calib_data=data, batch_size=size)
    assert stored_bytes(tmp_path / "c1") == stored_bytes(tmp_path / "c8") == stored_bytes(tmp_path / "c3")
    assert (tmp_path / "c1" / "calibration.json").read_bytes() == (tmp_path / "c8" / "calibration.json").read_bytes()


def test_pads_never_enter_the_statistics(tmp_path):
    """Rows with padding, hidden by the mask or by its id, on either side: the same bits as rows without."""
    write_tiny(tmp_path / "m", **SIZES, tokenizer=True)
    plain = ids(12)
    left = [{"input_ids": [96] * 9 + r["input_ids"]} for r in plain]
    masked = [
        {"input_ids": [5] * 4 + r["input_ids"] + [7] * 3, "attention_mask": [0] * 4 + [1] * len(r["input_ids"]) + [0] * 3} for r in plain
    ]
    for name, rows in (("plain", plain), ("left", left), ("masked", masked)):
        calibrate(tmp_path / "m", tmp_path / name, qformat="fp8", calib_data=lines(tmp_path / f"{name}.jsonl", rows))
    assert stored_bytes(tmp_path / "plain") == stored_bytes(tmp_path / "left") == stored_bytes(tmp_path / "masked")
    facts = json.loads((tmp_path / "left" / "calibration.json").read_text())["data"]
    assert facts["num_pads_dropped"] == 9 * 12


def test_the_chat_template_is_applied(tmp_path):
    write_tiny(tmp_path / "m", **SIZES, tokenizer=True)
    text = Text.load(tmp_path / "m")
    rows = [{"prompt": "2 + 2?", "answer": "4"}, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]
    rows += [{"text": "plain text"}, {"prompt": "q", "steps": ["a", "b"], "answer": "c"}]
    data = read_data(lines(tmp_path / "d.jsonl", rows), text, vocab_size=97, num_samples=9, max_len=99, seed=0)
    told = {text.decode(row, skip_special=False) for row in [*data.rows, *data.held]}
    assert told == {
        "[user] 2 + 2?<eos>[assistant] 4",
        "[user] hi<eos>[assistant] yes<eos>",
        "plain text",
        text.decode(text.encode("[user] q<eos>[assistant] a \n\nb \n\nc"), skip_special=False),
    }


def test_the_sample_is_the_seeds(tmp_path):
    path = lines(tmp_path / "d.jsonl", ids(50))
    one, same, other = (read_data(path, None, vocab_size=97, num_samples=16, max_len=20, seed=seed) for seed in (1, 1, 2))
    assert (one.rows, one.held) == (same.rows, same.held) and one.rows != other.rows
    assert len(one.rows) == 14 and len(one.held) == 2 and not [row for row in one.held if row in one.rows]
    assert one.facts["num_rows"] == 50 and max(map(len, one.rows)) == 20 and one.facts["num_cut"] > 0
    assert any("cut to 20 tokens" in warning for warning in one.warnings)


def test_own_data_is_better_is_said(tmp_path, capsys):
    write_tiny(tmp_path / "m", **SIZES, tokenizer=True)
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat="int8_wo", calib_size=8, calib_seq_len=32)
    assert found["data"]["source"] == "generated tasks" and "data of your own" in found["warnings"][0]


def test_texts_and_saved_data_sets_are_read(tmp_path):
    write_tokenizer(tmp_path)
    text = Text.load(tmp_path)
    (tmp_path / "d.txt").write_text("one paragraph\nof two lines\n\nanother\n")
    data = read_data(tmp_path / "d.txt", text, vocab_size=97, num_samples=9, max_len=99, seed=0)
    assert len(data.rows) + len(data.held) == 2
    datasets = pytest.importorskip("datasets", reason="the distill extra is not installed")
    datasets.Dataset.from_list([{"prompt": "a", "answer": "b"}] * 3).save_to_disk(tmp_path / "saved")
    data = read_data(tmp_path / "saved", text, vocab_size=97, num_samples=9, max_len=99, seed=0)
    assert text.decode(data.rows[0], skip_special=False) == "[user] a<eos>[assistant] b"


# --- bad data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "it is empty"),
        (b"\n\n", "it is empty"),
        (b'{"question": "x"}\n', "line 1: it needs one of"),
        (b'{"input_ids": [1, 2]}\n{"input_ids": []}\n', "line 2: it has no tokens"),
        (b'{"input_ids": [96, 96, 96]}\n', "line 1: every token is padding"),
        (b'{"input_ids": [1, 2], "attention_mask": [0, 0]}\n', "line 1: every token is padding"),
        (b'{"input_ids": [1, 2], "attention_mask": [1]}\n', "line 1: attention_mask"),
        (b'{"input_ids": [1, 97]}\n', "line 1: token id 97; the vocabulary has 97"),
        (b'{"text": "caf\xe9"}\n', "line 1: the JSON is not UTF-8"),
        (b'{"text": 5}\n', "line 1: text must be a text"),
        (b'{"text": "a", "prompt": "b"}\n', "line 1: it needs one of"),
        (b"[1]\n", "line 1: it must be an object"),
        (b'{"text": "a"\n', "line 1: "),
    ],
)
def test_bad_rows_are_refused_by_their_lines(tmp_path, content, word):
    write_tiny(tmp_path / "m", **SIZES, tokenizer=True)
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(ThoughtxError) as caught:
        calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_data=tmp_path / "d.jsonl")
    assert caught.value.code == "E164" and word in caught.value.why
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl", "m"]


def test_one_sample_is_said(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_data=lines(tmp_path / "d.jsonl", ids(1)))
    assert found["data"]["num_held_out"] == 0 and any("one sequence is all there is" in warning for warning in found["warnings"])


def test_activations_that_are_not_finite_name_their_layer(tmp_path):
    huge = {"model.layers.1.post_attention_layernorm.weight": np.full(64, 3e38, np.float32)}
    write_tiny(tmp_path / "m", **SIZES, tensors=huge)
    with pytest.raises(ThoughtxError) as caught:
        calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_data=lines(tmp_path / "d.jsonl", ids(4)))
    assert caught.value.code == "E165" and "transformer.layers.1.mlp" in caught.value.what
    assert not (tmp_path / "c").exists()


def test_a_layer_that_is_fed_zeros_stays_as_it_is_and_is_named(tmp_path):
    zero = {"model.layers.1.post_attention_layernorm.weight": np.zeros(64, np.float32)}
    write_tiny(tmp_path / "m", **SIZES, tensors=zero)
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_data=lines(tmp_path / "d.jsonl", ids(4)))
    kept = {f"transformer.layers.1.mlp.{name}" for name in ("fc", "gate", "proj")}
    assert kept | {"lm_head"} == set(found["quantization"]["exclude"])
    assert any("always zero inputs" in warning and "layers.1.mlp.fc" in warning for warning in found["warnings"])
    with open_weights(tmp_path / "c") as source:
        assert source.read("transformer.layers.1.mlp.fc.weight").dtype == np.float32


def test_float16_is_warned_of(tmp_path):
    wide = {"model.layers.0.post_attention_layernorm.weight": np.full(64, 5e4, np.float32)}
    write_tiny(tmp_path / "m", **SIZES, tensors=wide)
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat="int8_wo", calib_data=lines(tmp_path / "d.jsonl", ids(4)))
    assert any("beyond float16's range" in warning and "layers.0.mlp.fc" in warning for warning in found["warnings"])


# --- going on --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    write_tiny(tmp_path / "m", num_layers=3, **SIZES)
    data = lines(tmp_path / "d.jsonl", ids(8))
    calibrate(tmp_path / "m", tmp_path / "whole", qformat="int4_awq", calib_data=data)
    real, seen = Walk._layer, []

    def until_two(self: Walk, index: int) -> None:
        seen.append(index)
        if index == 2:
            raise KeyboardInterrupt
        real(self, index)

    monkeypatch.setattr(Walk, "_layer", until_two)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tmp_path / "m", tmp_path / "c", qformat="int4_awq", calib_data=data)
    assert not (tmp_path / "c").exists() and (tmp_path / ".c.calibration").is_dir()
    monkeypatch.setattr(Walk, "_layer", lambda self, index: (seen.append(index), real(self, index))[1])
    calibrate(tmp_path / "m", tmp_path / "c", qformat="int4_awq", calib_data=data)
    assert seen == [0, 1, 2, 2]
    assert stored_bytes(tmp_path / "c") == stored_bytes(tmp_path / "whole")
    assert not (tmp_path / ".c.calibration").exists()


def test_other_settings_start_anew(tmp_path, monkeypatch):
    write_tiny(tmp_path / "m", **SIZES)
    data = lines(tmp_path / "d.jsonl", ids(8))
    monkeypatch.setattr(Walk, "_head", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        calibrate(tmp_path / "m", tmp_path / "c", qformat="int8_wo", calib_data=data)
    monkeypatch.undo()
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_data=data)
    again = calibrate(tmp_path / "m", tmp_path / "d", qformat="fp8", calib_data=data)
    assert found["modules"] == again["modules"]
    assert calibrate(tmp_path / "m", tmp_path / "d", qformat="fp8", calib_data=data)["up_to_date"]


@pytest.mark.slow
def test_memory_holds_a_layer_and_not_the_model(tmp_path, monkeypatch):
    """At most one layer's weights are alive at a time."""
    import gc
    import weakref

    alive, most = weakref.WeakSet(), []
    real = Layer.__init__

    def counted(self: Layer, *args: Any) -> None:
        gc.collect()
        alive.add(self)
        most.append(len(alive))
        real(self, *args)

    monkeypatch.setattr(Layer, "__init__", counted)
    write_tiny(tmp_path / "m", num_layers=4, **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="int4_awq", calib_data=lines(tmp_path / "d.jsonl", ids(4)))
    assert len(most) == 4 + 1 and max(most) == 1  # the first once more, for the estimate of the time


# --- what the search is worth ----------------------------------------------------------------------------------------


def planted(path: Path, factor: float = 60.0, **sizes: Any) -> Path:
    """A model with outlier channels in front of its linear layers, compensated in the matrices: the same function, harder to round."""
    tensors = write_tiny(path, **{**SIZES, **sizes})
    rng = np.random.default_rng(3)
    changed: dict[str, np.ndarray] = {}
    num_layers = sizes.get("num_layers", 2)
    for layer in range(num_layers):
        p = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm.weight", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm.weight", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            channels = rng.choice(64, 3, replace=False)
            scale = np.ones(64, np.float32)
            scale[channels] = factor
            changed[p + norm] = tensors[p + norm] * scale
            for reader in readers:
                changed[f"{p}{reader}.weight"] = tensors[f"{p}{reader}.weight"] / scale
    write_tiny(path, **{**SIZES, **sizes}, tensors=changed)
    return path


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("qformat", ["int8_sq", "int4_awq"])
@pytest.mark.slow
def test_the_search_beats_plain_rounding_on_planted_outliers(tmp_path, family, qformat):
    planted(tmp_path / "m", family=family)
    data = lines(tmp_path / "d.jsonl", ids(32))
    kl = {}
    for plain in (True, False):
        found = calibrate(tmp_path / "m", tmp_path / f"c{plain}", qformat=qformat, calib_data=data, plain_rounding=plain)
        kl[plain] = found["end_to_end"]["kl"]
    assert kl[False] < (0.1 if qformat == "int8_sq" else 0.9) * kl[True], kl


@pytest.mark.parametrize("qformat", ["int8_sq", "int4_awq"])
def test_the_search_never_loses_on_its_own_rows(tmp_path, qformat):
    write_tiny(tmp_path / "m", **SIZES)
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, calib_data=lines(tmp_path / "d.jsonl", ids(16)))
    judged = [facts for facts in found["modules"].values() if facts["quantized"]]
    assert len(judged) == 10 and all(facts["search_error"] <= facts["search_error_nearest"] for facts in judged)
    assert any(facts["search_error"] < 0.95 * facts["search_error_nearest"] for facts in judged)


def seen_of(rows: torch.Tensor, num_sequences: int) -> Inputs:
    is_first = torch.arange(len(rows)) * num_sequences // len(rows) % 2 == 0
    halves = rows[is_first].abs().amax(0), rows[~is_first].abs().amax(0)
    return Inputs(rows.abs().amax(0), halves, is_first, rows.abs().mean(0), rows.square().mean(0), rows, num_sequences)


@pytest.mark.parametrize("algo", ["W8A8_SQ_PER_CHANNEL", "W4A16_AWQ"])
def test_a_channel_large_in_the_inputs_and_small_in_the_matrix_costs_nothing(algo):
    rng = np.random.default_rng(1)
    weight, rows = (torch.tensor(rng.normal(size=(n, 128)), dtype=torch.float32) for n in (64, 200))
    rows *= torch.tensor(np.exp(rng.normal(size=128)), dtype=torch.float32)  # sizes that ask for a middle exponent
    by = torch.ones(128)
    by[[5, 40, 99]] = 64.0
    quant = QuantConfig(algo=algo, group_size=32, prequant=True)
    plain, planted = (search(weight / p, seen_of(rows * p, 40), quant) for p in (torch.ones(128), by))
    assert planted.error_nearest > 2 * plain.error_nearest and planted.error < 1.1 * plain.error


def test_a_channel_that_was_quiet_in_few_sequences_keeps_its_headroom():
    """What twenty sequences of one kind never showed arrives in another: the search must not have scaled it up to the clipping point."""
    rng = np.random.default_rng(0)
    weight = torch.tensor(rng.normal(size=(64, 64)), dtype=torch.float32)
    size = np.where(np.arange(64) % 4 == 0, 1.0, 0.02)  # three channels of four rest
    errors = {}
    for num in (20, 40):
        rows = torch.tensor(rng.normal(size=(num * 5, 64)) * size, dtype=torch.float32)
        seen = seen_of(rows, num)
        found = search(weight, seen, QuantConfig(algo="W8A8_SQ_PER_CHANNEL", prequant=True))
        other = torch.tensor(rng.normal(size=(50, 64)) * 0.5, dtype=torch.float32)  # now all channels speak
        wanted = other @ weight.T
        got = found.inputs(other, "W8A8_SQ_PER_CHANNEL") @ found.matrix.T
        errors[num] = float((got - wanted).square().sum() / wanted.square().sum())
        known = found.inputs(rows, "W8A8_SQ_PER_CHANNEL") @ found.matrix.T - rows @ weight.T
        assert float(known.square().sum() / (rows @ weight.T).square().sum()) < 1e-3
    assert errors[20] < 1e-3 and errors[40] > 100 * errors[20], errors


def test_clipping_on_held_out_rows_is_counted():
    found = Quantized(torch.ones(1, 4), torch.ones(1), grid.input_scale(1.0, "FP8"), torch.tensor([1.0, 1.0, 1.0, 2.0]), None, 0.0, 0.0)
    judge = Judge(found, "FP8")
    judge.add(torch.tensor([[0.5, -0.9, 1.5, 0.4], [0.1, 0.2, -3.0, 0.9]]), torch.ones(2, 1), torch.full((2, 1), 1.1))
    facts = judge.facts()
    assert facts["clipped_share"] == 3 / 8  # 1.5, -3, and 0.9 times its factor
    assert facts["sqnr_db"] == pytest.approx(20, abs=1e-4)


# --- the KV cache ----------------------------------------------------------------------------------------------------


def with_key_outliers(path: Path, family: str, factor: float) -> Path:
    """Channels of the key's bias (Qwen2) made large: constants that the softmax hardly sees, and that a common scale has to hold."""
    tensors = write_tiny(path, **SIZES, family=family)
    bias = "model.layers.1.self_attn.k_proj.bias"
    large = tensors[bias].copy()
    large[[3, 19]] = factor
    write_tiny(path, **SIZES, family=family, tensors={bias: large})
    return path


def test_an_int8_cache_is_held_in_int8_and_keeps_the_answers(tmp_path):
    write_tiny(tmp_path / "m", family="qwen3", **SIZES)
    options: dict[str, Any] = {"qformat": "int8_wo", "calib_data": lines(tmp_path / "d.jsonl", ids(16))}
    calibrate(tmp_path / "m", tmp_path / "c", **options, kv_cache_dtype="int8")
    with open_weights(tmp_path / "c") as source:
        assert source.read("transformer.layers.0.attention.kv_cache_scaling_factor").shape == (1,)
        assert source.config.kv_bytes_per_token("float32") * 4 == replace(source.config, quantization=None).kv_bytes_per_token("float32")
    chunks = {"use_chunked_attention": True, "chunk_size": 16, "sink_tokens": 2, "left_chunks": 1, "num_anchors": 1}
    for name, extra in (("e", {}), ("k", chunks)):
        build(tmp_path / "c", tmp_path / name, {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64, **extra})
        calibrate(tmp_path / "m", tmp_path / "plain", **options, force=True)
        build(
            tmp_path / "plain",
            tmp_path / f"p{name}",
            {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64, **extra},
            force=True,
        )
        small, wide = (Engine.load(tmp_path / n, num_threads=1, exact=True) for n in (name, f"p{name}"))
        row = np.random.default_rng(1).integers(0, 97, 50).tolist()
        for mine, wanted in zip(small.decode_logits([row], [20]), wide.decode_logits([row], [20]), strict=True):
            assert 0 < np.sqrt(np.mean((mine - wanted) ** 2)) < 0.05 * wanted.std()
        assert {value.data_type() for value in small.runner.cache.values()} == {"tensor(int8)"}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_cache_that_key_outliers_would_ruin_is_refused_by_its_layer(tmp_path, kind):
    data = lines(tmp_path / "d.jsonl", ids(16))
    with_key_outliers(tmp_path / "m", "qwen2", 60.0 if kind == "int8" else 3000.0)
    with pytest.raises(ThoughtxError) as caught:
        calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_data=data, kv_cache_dtype=kind)
    assert caught.value.code == "E166" and "transformer.layers.1" in caught.value.what and "no norms" in caught.value.why
    assert not (tmp_path / "c").exists()
    write_tiny(tmp_path / "good", **SIZES)
    calibrate(tmp_path / "good", tmp_path / "c", qformat="fp8", calib_data=data, kv_cache_dtype=kind)


def test_backends_that_cannot_hold_the_cache_say_so(tmp_path):
    write_tiny(tmp_path / "m", family="qwen3", **SIZES)
    data = lines(tmp_path / "d.jsonl", ids(8))
    for kind, backends in (("int8", ("tensorrt-rtx", "onnxruntime")), ("fp8", ("onnxruntime",))):
        calibrate(tmp_path / "m", tmp_path / kind, qformat="fp8", calib_data=data, kv_cache_dtype=kind)
        with pytest.raises(ThoughtxError, match="KV cache") as caught:
            build(tmp_path / kind, tmp_path / "e", {"backend": backends, "max_seq_len": 64})
        assert caught.value.code == "E103" and not (tmp_path / "e").exists()
    section = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization"]
    assert section["kv_cache_quant_algo"] == "FP8"
    with open_weights(tmp_path / "fp8") as source:
        assert source.read("transformer.layers.1.attention.kv_cache_scaling_factor") >= 1


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_a_budget_holds_with_the_fewest_layers_kept(tmp_path):
    planted(tmp_path / "m", num_layers=3)
    data = lines(tmp_path / "d.jsonl", ids(24))
    options: dict[str, Any] = {"qformat": "int8_sq", "calib_data": data, "plain_rounding": True}
    free = calibrate(tmp_path / "m", tmp_path / "free", **options)
    goal = free["end_to_end"]["kl"] / 8
    found = calibrate(tmp_path / "m", tmp_path / "c", **options, accuracy_budget=goal)
    kept = {name for name, facts in found["modules"].items() if facts.get("kept")}
    assert kept and found["end_to_end"]["kl"] <= goal < free["end_to_end"]["kl"]
    # outliers were planted in front of qkv, fc and gate
    assert kept <= {f"transformer.layers.{i}.{module}" for i in range(3) for module in ("attention.qkv", "mlp.fc", "mlp.gate")}
    ranked = sorted((facts["sensitivity"], name) for name, facts in found["modules"].items() if facts["sensitivity"] is not None)
    assert {name for _, name in ranked[-len(kept) :]} == kept
    # the engine keeps the promise, not only the simulation
    for name, source in (("o", "m"), ("e", "c")):
        build(tmp_path / source, tmp_path / name, {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64})
    original, engine = (Engine.load(tmp_path / name, num_threads=1) for name in ("o", "e"))
    seen = Divergence()
    for row in found["validation"]:
        seen.add(original.forward([row])[0], engine.forward([row])[0])
    assert seen.summary().kl <= 1.2 * goal
    # one unit fewer breaks it: the head of the list is the shortest
    least = min(found["modules"][name]["sensitivity"] for name in kept)
    fewer = tuple(name for name in kept if found["modules"][name]["sensitivity"] > least)
    assert calibrate(tmp_path / "m", tmp_path / "d", **options, exclude=fewer)["end_to_end"]["kl"] > goal


def test_a_budget_that_holds_anyway_keeps_nothing(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    found = calibrate(
        tmp_path / "m", tmp_path / "c", qformat="int8_wo", calib_data=lines(tmp_path / "d.jsonl", ids(8)), accuracy_budget=5.0
    )
    assert not [name for name, facts in found["modules"].items() if facts.get("kept")]


def test_target_bits_are_used_where_they_help_most(tmp_path):
    planted(tmp_path / "m", num_layers=3)
    data = lines(tmp_path / "d.jsonl", ids(24))
    kls = []
    for bits in (None, 14.0, 24.0):
        goal = {} if bits is None else {"target_bits": bits}
        found = calibrate(tmp_path / "m", tmp_path / f"c{bits}", qformat="int8_sq", calib_data=data, plain_rounding=True, **goal)
        assert found["size"]["mean_bits"] <= (bits or 8.0)
        kls.append(found["end_to_end"]["kl"])
    assert kls[0] > kls[1] > kls[2]
    with pytest.raises(ThoughtxError, match="cannot be met"):
        calibrate(tmp_path / "m", tmp_path / "x", qformat="int8_sq", calib_data=data, target_bits=6.0)


# --- flags and sums --------------------------------------------------------------------------------------------------


def test_excluded_layers_stay_as_they_are(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    calibrate(
        tmp_path / "m",
        tmp_path / "c",
        qformat="int8_wo",
        calib_data=lines(tmp_path / "d.jsonl", ids(4)),
        exclude=("transformer.layers.0.*", "*.mlp.gate"),
    )
    with open_weights(tmp_path / "c") as source, open_weights(tmp_path / "m") as original:
        kinds = {name: source.read(name).dtype for name in source.names() if name.endswith("weight") and "norm" not in name}
        layers = {f"transformer.layers.1.{module}.weight" for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")}
        assert {name for name, kind in kinds.items() if kind == np.int8} == {
            *layers,
            "transformer.vocab_embedding.weight",
            "lm_head.weight",
        }
        name = "transformer.layers.1.mlp.gate.weight"
        assert np.array_equal(source.read(name), original.read(name))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"qformat": "int3"}, "unknown format"),
        ({"qformat": "fp8", "exclude": ("layers.0.mlp",)}, "names no layer"),
        ({"qformat": "fp8", "exclude": ("transformer.*",)}, "every layer is excluded"),
        ({"qformat": "int4_wo", "group_size": 48}, "groups of inputs do not fit"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, options, word):
    write_tiny(tmp_path / "m", **SIZES)
    with pytest.raises(ThoughtxError) as caught:
        calibrate(tmp_path / "m", tmp_path / "c", **options)
    assert caught.value.code == "E001" and word in caught.value.what
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_report_shows_every_layer_and_trusts_no_text(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    data = lines(tmp_path / "<b>d.jsonl", ids(8))
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_data=data, sensitivity=True)
    text = (tmp_path / "c" / "report.html").read_text()
    assert text.count("<svg") == 5 and "&lt;b&gt;d.jsonl" in text and "<b>" not in text
    for name, facts in found["modules"].items():
        assert f"<td>{name}</td>" in text
        if facts["quantized"]:
            assert f"{name}: {facts['sqnr_db']:.4g}</title>" in text and facts["sensitivity"] > 0
    assert f"{found['end_to_end']['kl']:.4g}" in text
    from xml.etree import ElementTree

    for picture in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + picture.split("</svg>")[0] + "</svg>")


def test_a_picture_of_nothing_says_so():
    assert page.bars({"a": 0.0}, is_log=True) == "<p>all zero</p>"
    assert page.bars({"a": 0.0, "b": 0.5}, is_log=True).count("<title>") == 1
    assert page.bars({"a": 0.0, "b": 0.0}, is_log=False).count("<title>") == 2


def test_divergence_is_what_it_says():
    seen = Divergence()
    p, q = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), np.log([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    seen.add(p.astype(np.float32) + 3, q.astype(np.float32), [0, -1])
    found = seen.summary()
    assert found.kl == pytest.approx(0.25 * np.log(2) / 2, rel=1e-5) and found.worst_kl == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert found.top1_agreement == 0.5 and found.perplexity_reference == pytest.approx(2) and found.perplexity_ratio == pytest.approx(2)


def test_the_sample_of_inputs_is_even():
    picks = picks_of([10, 0, 30, 60], 10)
    assert [len(p) for p in picks] == [1, 0, 3, 6] and picks[0] == [0] and picks[3][-1] == 59
    assert [len(p) for p in picks_of([3, 2], 100)] == [3, 2]


def test_nothing_is_left_behind_by_a_refusal(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("x")
    with pytest.raises(ThoughtxError) as caught:
        calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_data=lines(tmp_path / "d.jsonl", ids(4)))
    assert caught.value.code == "E130" and (tmp_path / "c" / "mine.txt").read_text() == "x"
    shutil.rmtree(tmp_path / "c")


def test_sequences_are_counted_where_the_sample_has_no_row_of_them(tmp_path, monkeypatch):
    """Short sequences beside a long one, which takes nearly the whole sample: each of them counts."""
    from trtllm_thoughtx.calibrate.quantize import estimate, layers, watch

    seen = []
    monkeypatch.setattr(estimate, "seconds", lambda walk: 1.0)  # it searches as well, with one sequence of noise
    real = watch.search
    monkeypatch.setattr(watch, "search", lambda weight, inputs, quant: (seen.append(inputs), real(weight, inputs, quant))[1])
    monkeypatch.setattr(layers, "picks_of", lambda lengths: picks_of(lengths, 16))
    write_tiny(tmp_path / "m", **SIZES)
    data = lines(tmp_path / "d.jsonl", [*ids(46, low=2, high=4), {"input_ids": list(range(1, 91)) * 2}])
    calibrate(tmp_path / "m", tmp_path / "c", qformat="int8_sq", calib_data=data)
    walked = [one for one in seen if one.num_sequences > 1]  # a trial of one sequence comes first: how long will it take?
    assert len(walked) == 8 and {one.num_sequences for one in walked} == {42} and all(len(one.rows) <= 16 for one in walked)


@pytest.mark.parametrize("flags", [[], ["--quiet"]])
def test_data_that_stand_for_the_users_are_named_before_the_walk(tmp_path, capsys, monkeypatch, flags):
    """Also with --quiet: what they are, and about how long it will take; and calibration.json keeps it."""
    from trtllm_thoughtx.cli.commands import calibrate as command

    sample, said = TINY, []
    real = Walk.run
    monkeypatch.setattr(Walk, "run", lambda walk, progress: (said.append(capsys.readouterr().err), real(walk, progress))[1])
    words = ["--model_dir", str(sample), "--output_dir", str(tmp_path / "c"), "--qformat", "fp8", "--calib_size", "8", "--json"]
    command([*words, *flags], standalone_mode=False)
    assert "generated tasks in place of your own prompts (--calib_data): 8 sequences" in said[0] and "fits the scales" in said[0]
    assert "on this machine, by one row" in said[0]
    found = json.loads((tmp_path / "c" / "calibration.json").read_text())
    assert found["data"]["is_generic"] and "not on prompts of yours" in found["warnings"][0]
    data = lines(tmp_path / "d.jsonl", [{"input_ids": [3, 4, 5, 6]}] * 8)
    words[3] = str(tmp_path / "own")
    command([*words, "--calib_data", str(data), "--quiet"], standalone_mode=False)
    assert capsys.readouterr().err == "" and not json.loads((tmp_path / "own" / "calibration.json").read_text())["data"]["is_generic"]


@pytest.mark.parametrize(
    ("options", "num", "held", "length"),
    [
        ({"qformat": "int4_wo", "plain_rounding": True}, 8, 8, 256),
        ({"qformat": "int4_wo", "calib_seq_len": 16}, 56, 8, 16),
        ({"qformat": "int4_wo", "rounding": "nearest", "calib_seq_len": 16}, 112, 16, 16),
        ({"qformat": "int8_wo", "group_size": 0, "calib_seq_len": 32}, 8, 8, 32),
        ({"qformat": "int8_wo", "group_size": 0, "calib_size": 24}, 21, 3, 512),
        ({"qformat": "int8_wo", "group_size": 0, "kv_cache_dtype": "int8", "calib_seq_len": 32}, 112, 16, 32),
        ({"qformat": "int8_wo", "calib_seq_len": 32}, 56, 8, 32),
        ({"qformat": "int4_awq", "calib_seq_len": 16}, 56, 8, 16),
    ],
)
def test_what_fits_nothing_measures_on_few_sequences(tmp_path, options, num, held, length):
    write_tiny(tmp_path / "m", **SIZES)
    found = calibrate(tmp_path / "m", tmp_path / "c", **options)["data"]
    assert (found["num_sequences"], found["num_held_out"], found["max_len"]) == (num, held, min(length, 256))


def test_limits_leave_room_for_the_standard_error_of_few_positions_only():
    """2 points of agreement and two binomial standard errors: 6.5 points for 96 positions at 0.885, a tenth of it for 9,600."""
    few, many = (limits_of(Loss(0.08, 0.5, 0.885, 10.0, 9.9, 0.99, num)) for num in (96, 9600))
    assert few["min_top1_agreement"] == pytest.approx(0.885 - 0.02 - 0.0651, abs=1e-3)
    assert many["min_top1_agreement"] == pytest.approx(0.885 - 0.02 - 0.0065, abs=1e-3)
    assert few["max_kl"] == many["max_kl"] == pytest.approx(0.122) and few["max_perplexity_ratio"] == pytest.approx(1.02)
