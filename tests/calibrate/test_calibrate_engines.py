"""Calibration that runs engines: the model's own answers as data, right answers and speed in the report; and data that must stay home."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calib_data import SIZES, ids, lines, stored_bytes
from places import TINY as SAMPLE
from tiny import write_tiny

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from trtllm_thoughtx import Engine  # noqa: E402
from trtllm_thoughtx.build.build import build  # noqa: E402
from trtllm_thoughtx.calibrate import self_traces as traces  # noqa: E402
from trtllm_thoughtx.calibrate.data import read_data  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.job import calibrate  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.layers import Walk  # noqa: E402
from trtllm_thoughtx.cli.commands import calibrate as command  # noqa: E402
from trtllm_thoughtx.errors import ThoughtxError  # noqa: E402
from trtllm_thoughtx.evaluate.questions import from_file  # noqa: E402
from trtllm_thoughtx.evaluate.run import evaluate  # noqa: E402
from trtllm_thoughtx.evaluate.systems import EngineSystem  # noqa: E402
from trtllm_thoughtx.families.size import layer_parameters  # noqa: E402
from trtllm_thoughtx.tasks import draw  # noqa: E402
from trtllm_thoughtx.text.params import GenerationParams  # noqa: E402
from trtllm_thoughtx.text.text import Text  # noqa: E402
from trtllm_thoughtx.validate.validate import validate  # noqa: E402

CHAINS = [{"prompt": one.prompt, "answer": one.answer} for one in (draw("chain", "test", size=2, seed=seed) for seed in range(4))]


def calibrated_rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[int]]]:
    """Filled with what the next walk is given."""
    seen: dict[str, list[list[int]]] = {}
    real = Walk.__init__

    def watched(self: Walk, source: Any, data: Any, *rest: Any) -> None:
        seen.update(rows=data.rows, held=data.held, public=data.public)
        real(self, source, data, *rest)

    monkeypatch.setattr(Walk, "__init__", watched)
    return seen


# --- the model's own answers -------------------------------------------------------------------------------------------


def test_rows_are_the_prompts_and_what_the_model_says_to_them(tmp_path, monkeypatch):
    seen = calibrated_rows(monkeypatch)
    data = lines(tmp_path / "d.jsonl", [*CHAINS, {"text": "x1 = 2"}])
    found = calibrate(SAMPLE, tmp_path / "c", qformat="int8_wo", calib_data=data, self_traces=True, calib_seq_len=96)
    text = Text.load(SAMPLE)
    build(SAMPLE, tmp_path / "e", {"backend": ("onnxruntime",), "max_seq_len": 96})
    engine = Engine.load(tmp_path / "e")
    told = {tuple(row) for row in [*seen["rows"], *seen["held"]]}
    assert len(told) == 5
    for prompt in [*(text.chat(row["prompt"]) for row in CHAINS), text.encode("x1 = 2")]:
        one = engine.generate([prompt], text.default_params(max_new_tokens=96))[0]
        assert tuple([*prompt, *one.output_ids][:96]) in told
        assert one.stop_reason == "eos" or len(prompt) + len(one.output_ids) >= 96
    engine.close()
    assert found["data"]["source"] == "the model's own answers to d.jsonl"
    assert found["data"]["num_answer_tokens"] > 5 and found["data"]["prompts_sha256"] != found["data"]["tokens_sha256"]
    assert calibrate(SAMPLE, tmp_path / "c", qformat="int8_wo", calib_data=data, self_traces=True, calib_seq_len=96)["up_to_date"]


def test_what_the_data_answer_is_left_out(tmp_path):
    write_tiny(tmp_path / "m", **SIZES, tokenizer=True)
    text = Text.load(tmp_path / "m")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [{"prompt": "q", "steps": ["a"], "answer": "c"}, {"messages": talk}, {"messages": [*talk, {"role": "user", "content": "so"}]}]
    data = read_data(lines(tmp_path / "d.jsonl", rows), text, vocab_size=97, num_samples=9, max_len=99, seed=0, only_prompts=True)
    told = {text.decode(row, skip_special=False) for row in [*data.rows, *data.held]}
    assert told == {
        "[user] q<eos>[assistant] ",
        "[user] hi<eos>[assistant] ",
        "[user] hi<eos>[assistant] yes<eos>[user] so<eos>[assistant] ",
    }
    with pytest.raises(ThoughtxError) as caught:
        read_data(
            lines(tmp_path / "d.jsonl", [{"messages": talk[1:]}]), text, vocab_size=97, num_samples=9, max_len=99, seed=0, only_prompts=True
        )
    assert caught.value.code == "E164" and "line 1" in caught.value.why


def test_contents_in_parts_are_their_texts(tmp_path):
    write_tiny(tmp_path / "m", **SIZES, tokenizer=True)
    text = Text.load(tmp_path / "m")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    found = [
        read_data(
            lines(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": content}]}]),
            text,
            vocab_size=97,
            num_samples=9,
            max_len=99,
            seed=0,
        ).rows
        for content in (parts, "one\ntwo")
    ]
    assert found[0] == found[1] != []
    image = [{"messages": [{"role": "user", "content": [*parts, {"type": "image_url", "image_url": {}}]}]}]
    with pytest.raises(ThoughtxError, match="1 row cannot be used") as caught:
        read_data(lines(tmp_path / "d.jsonl", image), text, vocab_size=97, num_samples=9, max_len=99, seed=0)
    assert caught.value.code == "E164" and "line 1: message 0 has a part of type image_url" in caught.value.why


def test_own_answers_go_on_where_they_were_stopped_and_know_no_batch_size(tmp_path, monkeypatch):
    write_tiny(tmp_path / "m", **SIZES, tokenizer=True)
    options: dict[str, Any] = {
        **{"qformat": "int8_sq", "calib_data": lines(tmp_path / "d.jsonl", ids(20)), "self_traces": True},
        **{"calib_seq_len": 48},
    }
    calibrate(tmp_path / "m", tmp_path / "whole", **options, batch_size=3)
    monkeypatch.setitem(traces.OPTIONS, "max_batch_size", 3)
    real, asked = Engine.complete, []

    def until_ten(self: Engine, requests: Any) -> Any:
        asked.append([one.index for one in requests])
        for num, one in enumerate(real(self, requests)):
            if num == 10 and len(asked) == 1:
                raise KeyboardInterrupt
            asked[-1].remove(one[0])
            yield one

    monkeypatch.setattr(Engine, "complete", until_ten)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tmp_path / "m", tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()
    missing = asked[0].copy()
    found = calibrate(tmp_path / "m", tmp_path / "c", **options)
    assert len(missing) == 10 and asked == [missing, []]
    assert stored_bytes(tmp_path / "c") == stored_bytes(tmp_path / "whole")
    assert (tmp_path / "c" / "calibration.json").read_bytes() == (tmp_path / "whole" / "calibration.json").read_bytes()
    assert any("answers did not end within 48 tokens" in warning for warning in found["warnings"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d.jsonl", "m", "whole"]


def test_own_answers_need_no_tokenizer(tmp_path, monkeypatch):
    seen = calibrated_rows(monkeypatch)
    write_tiny(tmp_path / "m", **SIZES)
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", self_traces=True, calib_size=6, calib_seq_len=160)
    rows = [*seen["rows"], *seen["held"]]
    stop = json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"]
    assert len(rows) == 6 and all(len(row) == 160 or row[-1] == stop for row in rows)
    assert found["data"]["num_unfinished"] == sum(row[-1] != stop for row in rows) > 0


# --- data that must stay home ------------------------------------------------------------------------------------------


def test_private_data_judge_and_do_not_travel(tmp_path):
    """No row of the user's in any file, the same scales and the same loss; and the limits are those of the rows that do travel."""
    hf_models = pytest.importorskip("hf_models")
    hf = hf_models.save(tmp_path / "m", "qwen3", intermediate_size=64, head_dim=16)
    data = lines(tmp_path / "d.jsonl", ids(40))
    options: dict[str, Any] = {"qformat": "int8_sq", "calib_data": data, "accuracy_budget": 1e-2}
    with pytest.raises(ThoughtxError, match="cannot be held") as raised:  # the embedding and the head in 8 bits lose more
        calibrate(hf, tmp_path / "none", **{**options, "accuracy_budget": 1e-9})
    assert raised.value.code == "E001" and "kl=" in raised.value.fix and not (tmp_path / "none").exists()
    shown = calibrate(hf, tmp_path / "shown", **options)
    hidden = calibrate(hf, tmp_path / "hidden", **options, private_data=True)
    assert hidden["end_to_end"] == shown["end_to_end"] and hidden["size"] == shown["size"]
    assert stored_bytes(tmp_path / "hidden") == stored_bytes(tmp_path / "shown")
    rows = [row["input_ids"] for row in map(json.loads, data.read_text().splitlines())]
    build(tmp_path / "hidden", tmp_path / "e", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 96})
    for file in [*(tmp_path / "hidden").glob("*.json"), *(tmp_path / "e").rglob("*.json")]:
        numbers = re.sub(r"\s+", "", file.read_text())
        assert not [row for row in rows if ",".join(map(str, row)) in numbers], file
    assert [row for row in shown["validation"] if row in rows] == shown["validation"]
    assert len(hidden["validation"]) == 8 and hidden["limits"] != shown["limits"]
    assert validate(tmp_path / "e", reference=hf).ok


def test_public_rows_have_their_own_limits(tmp_path):
    """The limits of private data are measured on what travels: an engine shows the same numbers there."""
    write_tiny(tmp_path / "m", **SIZES, tokenizer=True)
    data = lines(tmp_path / "d.jsonl", ids(16))
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat="int4_wo", calib_data=data, private_data=True)
    for name, source in (("o", "m"), ("e", "c")):
        build(tmp_path / source, tmp_path / name, {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 256})
    original, engine = (Engine.load(tmp_path / name, num_threads=1, exact=True) for name in ("o", "e"))
    from trtllm_thoughtx.validate.divergence import Divergence, spread

    seen = Divergence()
    for row in found["validation"]:
        at = spread(len(row), 97)
        seen.add(original.forward([row])[0][at], engine.forward([row])[0][at])
    assert found["limits"]["max_kl"] == pytest.approx(1.5 * seen.summary().kl + 0.002, rel=1e-3)


# --- right answers and speed -------------------------------------------------------------------------------------------


def hard_to_round(path: Path) -> Path:
    """The sample with outlier channels behind its norms, taken back in the matrices that read them: the same function, exactly."""
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(SAMPLE, path)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        layer = name.rpartition(".")[0].rpartition(".")[0]
        readers = ("mlp.gate_proj", "mlp.up_proj") if "post_attention" in name else tuple(f"self_attn.{x}_proj" for x in "qkv")
        scale = np.ones_like(tensors[name])
        scale[::9] = 64
        tensors[name] = tensors[name] * scale
        for reader in readers:
            tensors[f"{layer}.{reader}.weight"] = tensors[f"{layer}.{reader}.weight"] / scale
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.slow
def test_the_report_counts_right_answers_of_both_engines(tmp_path):
    """A calibration that ruins the model says so, question by question as thoughtx-eval counts them."""
    dataset = lines(tmp_path / "q.jsonl", CHAINS)
    options: dict[str, Any] = {"qformat": "int4_wo", "calib_size": 8, "calib_seq_len": 64, "dataset": dataset, "max_new_tokens": 200}
    hard = hard_to_round(tmp_path / "m")
    found = calibrate(hard, tmp_path / "c", **options)
    build(tmp_path / "c", tmp_path / "e", {"backend": ("onnxruntime",), "max_seq_len": 300, "max_batch_size": 4})
    system = EngineSystem(tmp_path / "e", None, None, 4)
    records = evaluate(system, from_file(dataset), GenerationParams(max_new_tokens=200)).records
    system.close()
    answers, speed = found["answers"], found["speed"]
    [row] = answers["accuracy_percent"]
    assert row["second"] == 25.0 * sum(record.correct for record in records) and row["first"] == 100.0 and row["second"] < 100.0
    assert answers["num_items"] == 4 and answers["only_before_right"] - answers["only_after_right"] == (row["first"] - row["second"]) / 25
    for one in speed["tokens_per_second"].values():
        assert one["before"] > 0 and one["after"] > 0 and one["ratio"] > 0
    before, after = speed["engine_bytes"]
    assert after < 0.5 * before and not found["skipped"]
    page = (tmp_path / "c" / "report.html").read_text()
    assert "<h2>Answers</h2>" in page and f"<td class='n'>{row['difference']:.4g}</td>" in page and "Not measured" not in page
    assert json.loads((tmp_path / "c" / "calibration.json").read_text())["answers"] == json.loads(json.dumps(answers))
    again = calibrate(hard, tmp_path / "d", **{**options, "dataset": None})
    assert again["answers"] is None and "no questions were asked for" in again["skipped"][0]
    assert stored_bytes(tmp_path / "c") == stored_bytes(tmp_path / "d")
    assert "Not measured: right answers and speed" in (tmp_path / "d" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        ({"kv_cache_dtype": "fp8"}, "E001", "no engine can be asked"),
        ({"max_new_tokens": 4096}, "E122", "has 256 positions"),
        ({"rows": [{"prompt": "no answer"}]}, "E140", "cannot be used"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_before_any_work(tmp_path, options, code, word):
    write_tiny(tmp_path / "m", **SIZES, tokenizer=True)
    dataset = lines(tmp_path / "q.jsonl", options.pop("rows", CHAINS))
    with pytest.raises(ThoughtxError) as caught:
        calibrate(tmp_path / "m", tmp_path / "c", **{"qformat": "fp8", "dataset": dataset, "max_new_tokens": 16, **options})
    assert caught.value.code == code and word in caught.value.what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "q.jsonl"]


def test_questions_need_a_tokenizer(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    with pytest.raises(ThoughtxError) as caught:
        calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", eval_items=1)
    assert caught.value.code == "E112" and [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
def test_the_command_takes_the_flags(tmp_path, capsys):
    words = ["--model_dir", str(SAMPLE), "--output_dir", str(tmp_path / "c"), "--qformat", "int8_sq", "--calib_size", "8", "--json"]
    more = ["--dataset", str(lines(tmp_path / "q.jsonl", CHAINS)), "--max_new_tokens", "40", "--self_traces", "--private_data"]
    command([*words, *more], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["answers"]["num_items"] == 4 and found["data"]["source"].startswith("the model's own answers")
    with pytest.raises(ThoughtxError, match="--self_traces cannot be used here"):
        command(["--model_dir", str(SAMPLE), "--output_dir", str(tmp_path / "d"), "--chunk_report", "--self_traces"], standalone_mode=False)


# --- what an engine reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("qformat", "bits"), [("int8_wo", 8), ("int4_wo", 4), ("fp8", 8)])
def test_weight_bytes_are_those_of_the_stored_matrices(tmp_path, qformat, bits):
    write_tiny(tmp_path / "m", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, calib_data=lines(tmp_path / "d.jsonl", ids(4)), quant_lm_head=True)
    for name, source in (("o", "m"), ("e", "c")):
        build(tmp_path / source, tmp_path / name, {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64})
    read = []
    for name in ("o", "e"):
        engine = Engine.load(tmp_path / name, num_threads=1)
        engine.generate([[1, 2, 3]], GenerationParams(max_new_tokens=4, ignore_eos=True))
        read.append(engine.stats.work.weight_bytes / engine.stats.work.num_calls)
    config = engine.config
    numbers = config.num_layers * layer_parameters(config) + config.vocab_size * config.hidden_size
    assert read[0] == 4 * numbers
    names = ("weight", "scaling_factor", "per_channel_scale", "zero")
    from trtllm_thoughtx.checkpoint.weights import open_weights

    with open_weights(tmp_path / "c") as kept:
        of_file = sum(
            np.asarray(kept.read(name)).nbytes
            for name in kept.names()
            if name.endswith(names) and not re.search(r"norm|ln_f|embedding|cache", name)
        )
    assert read[1] == of_file and numbers * bits / 8 < of_file < numbers * bits / 8 * 1.5
