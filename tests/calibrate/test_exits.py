"""Early exits of the thinking: the head in the graph, what fits it, answer probes, and what is refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from click.testing import CliRunner
from exit_models import checkpoint, some_exits
from places import LONGCOT

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.exits import fit, rule
from trtllm_thoughtx.calibrate.exits.calibrate import calibrate_exits
from trtllm_thoughtx.calibrate.exits.traces import Stop, Trace, normed
from trtllm_thoughtx.checkpoint.exits import ExitHead, read_exits
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.cli.commands import thoughtx
from trtllm_thoughtx.config import BuildConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.questions import Question
from trtllm_thoughtx.runtime import probe
from trtllm_thoughtx.text.params import GenerationParams

SAMPLE = str(LONGCOT)


# --- files ----------------------------------------------------------------------------------------------------------------


def test_exits_are_read_as_they_were_written(tmp_path):
    made = some_exits(64, (1, 3))
    path = checkpoint(tmp_path, made, num_layers=4)
    with open_weights(path) as source:
        read = read_exits(path, source.config)
    assert (read.head.threshold, read.report) == (0.75, {"made": "up"})
    assert read.tensors().keys() == made.tensors().keys()
    for name, array in made.tensors().items():
        np.testing.assert_array_equal(read.tensors()[name], array)


def _edit(path, change):
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda body: body["head"].update(threshold=float("1.5")), "threshold"),
        (lambda body: body["head"].update(threshold=0), "threshold"),
        (lambda body: body["head"].update(threshold="0.5"), "threshold"),
        (lambda body: body["adapters"][0].update(layer=0), "layer"),
        (lambda body: body["adapters"][0].update(layer=4), "layer"),
        (lambda body: body["adapters"].reverse(), "rise"),
        (lambda body: body["adapters"].append(body["adapters"][1]), "rise"),
        (lambda body: body.update(hidden_size=65), "hidden_size"),
        (lambda body: body.update(more=1), "object with schema"),
        (lambda body: body.update(schema="thoughtx.exits/2"), "schema"),
        (lambda body: body.update(report=[]), "report"),
        (lambda body: body["adapters"][0].update(rank=5), "exit_adapter.1.down.weight"),
        (lambda body: body.update(head=None), "exit_head.weight"),
    ],
)
def test_a_description_that_cannot_be_is_refused_by_name(tmp_path, change, what):
    path = checkpoint(tmp_path, some_exits(64, (1, 3)), num_layers=4)
    _edit(path / "exits.json", change)
    with pytest.raises(ThoughtxError) as raised:
        build(path, tmp_path / "e", {"backend": ("onnxruntime",), "max_seq_len": 64})
    assert raised.value.code in ("E102", "E107") and what in raised.value.why and not (tmp_path / "e").exists()


def test_nan_in_a_description_and_in_a_tensor(tmp_path):
    path = checkpoint(tmp_path, some_exits(64), num_layers=2)
    text = (path / "exits.json").read_text()
    (path / "exits.json").write_text(text.replace("0.75", "NaN"))
    options = {"backend": ("onnxruntime",), "max_seq_len": 64}
    with pytest.raises(ThoughtxError) as raised:
        build(path, tmp_path / "e", options)
    assert raised.value.code == "E102"
    (path / "exits.json").write_text(text)
    data = bytearray((path / "exits.safetensors").read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    (path / "exits.safetensors").write_bytes(data)
    with pytest.raises(ThoughtxError) as raised:
        build(path, tmp_path / "e", options)
    assert raised.value.code == "E108"
    (path / "exits.safetensors").unlink()
    with pytest.raises(ThoughtxError, match="one of the two files"):
        build(path, tmp_path / "e", options)


# --- the graph ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stages", [(), (1, 3)])
def test_the_head_and_the_drafts_compute_what_they_say(tmp_path, dtype, stages):
    """Against NumPy, on hidden states tapped from the same engine; in bfloat16 within its rounding."""
    made = some_exits(64, (1, 3))
    path = checkpoint(tmp_path, made, num_layers=4)
    options = {"backend": ("onnxruntime",), "max_seq_len": 64, "dtype": dtype, "early_exit_layers": stages or None}
    build(path, tmp_path / "e", options)
    engine = Engine.load(tmp_path / "e", num_threads=1, tap_layers=True)
    assert engine.build.exit_head and engine.build.exit_threshold == 0.75 and engine.build.draft_layers == stages
    ids = [[5, 9, 3, 77, 20]]
    engine.forward(ids)
    tapped = {layer: value.astype(np.float64) for layer, value in engine.runner.tapped.items()}
    with open_weights(path) as source:
        gain = source.read("transformer.ln_f.weight", "float32")
    final = normed(tapped[3], gain, engine.config.norm_eps)
    wanted = 1 / (1 + np.exp(-(final @ made.head.weight.T + made.head.bias)))
    tight = 1e-5 if dtype == "float32" else 2e-2
    everything = {
        "input_ids": np.array(ids),
        "positions": np.arange(5)[None],
        "kv_positions": np.where(np.arange(16) < 5, np.arange(16), -1)[None],
        "write_indices": np.zeros(1, np.int64),
        "logit_indices": np.arange(5)[None],
    }
    np.testing.assert_allclose(engine.runner.run(everything, 0, len(engine.directory.parts))["exit"][0], wanted, atol=tight)
    for number, (layer, one) in enumerate(zip(stages, made.adapters, strict=False)):
        feeds = {
            "input_ids": np.array(ids),
            "positions": np.arange(5)[None],
            "kv_positions": np.where(np.arange(16) < 5, np.arange(16), -1)[None],
        }
        feeds |= {"write_indices": np.zeros(1, np.int64)}
        out = engine.runner.run(feeds, 0, number + 1)
        n = normed(tapped[layer - 1], one.norm, engine.config.norm_eps)
        draft = tapped[layer - 1] + n @ one.down.T @ one.up.T
        np.testing.assert_allclose(out["draft_states"][0], draft, atol=tight * np.abs(draft).max(), rtol=tight)
        sure = 1 / (1 + np.exp(-(n @ one.confidence.T + one.bias)))[:, 0]
        np.testing.assert_allclose(out["draft_confidence"][0], sure, atol=tight)
    engine.close()


def test_an_engine_without_exits_is_the_same_as_ever(tmp_path):
    path = checkpoint(tmp_path, some_exits(64, (1,)), num_layers=2)
    options = {"backend": ("onnxruntime",), "max_seq_len": 64, "early_exit_layers": (1,)}
    build(path, tmp_path / "with", options)
    build(tmp_path / "hf", tmp_path / "without", options)
    engines = [Engine.load(tmp_path / name, num_threads=1) for name in ("with", "without")]
    rows = [[1, 2, 3], [4, 5, 6, 7]]
    for one, other in zip(*(engine.forward(rows) for engine in engines), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not engines[1].build.exit_head
    with pytest.raises(ThoughtxError, match="this engine has none"):
        with_tags = engines[1]
        object.__setattr__(with_tags, "text", Engine.load(sample(tmp_path), num_threads=1).text)
        with_tags.generate([[1]], GenerationParams(exit_threshold=0.5))


def sample(root):
    if not (root / "sample").exists():
        build(SAMPLE, root / "sample", {"backend": ("onnxruntime",), "max_seq_len": 512, "max_batch_size": 8})
    return root / "sample"


# --- fitting --------------------------------------------------------------------------------------------------------------


def test_logistic_regression_finds_the_model_that_made_the_data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, 3)) * [1, 5, 0.2] + [0, 10, -3]
    true = 1 / (1 + np.exp(-(x @ [1.0, -0.5, 4.0] + 17)))
    w, b = fit.logistic(x, rng.random(20_000) < true, ridge=1e-6)
    np.testing.assert_allclose(w, [1.0, -0.5, 4.0], rtol=0.08)
    assert abs(float(np.mean(1 / (1 + np.exp(-(x @ w + b)))) - true.mean())) < 0.01
    for label in (True, False):
        w, b = fit.logistic(x, np.full(20_000, label))
        assert not w.any() and (b > 0) == label


def test_a_low_rank_map_is_the_best_of_its_rank():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2000, 12))
    true = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 12))
    down, up = fit.low_rank(x, x @ true, 3, ridge=1e-9)
    np.testing.assert_allclose(x @ down.T @ up.T, x @ true, atol=1e-4)
    errors = [np.linalg.norm(x @ true - x @ d.T @ u.T) for d, u in (fit.low_rank(x, x @ true, rank, ridge=1e-9) for rank in (1, 2, 3))]
    values = np.linalg.svd(x @ true, compute_uv=False)
    np.testing.assert_allclose(errors[0], np.sqrt((values[1:] ** 2).sum()), rtol=1e-5)  # Eckart and Young


def a_trace(readiness: list[float], answers: list[str], answer: str, expected: str) -> Trace:
    stops = [
        Stop(10 * i, 10 * i + 1, said, 1, np.array([np.log(p / (1 - p))], np.float32))
        for i, (p, said) in enumerate(zip(readiness, answers, strict=True))
    ]
    return Trace(Question(id="1", task="t", prompt="", expected=expected), [0] * 5, 5, 100, answer, 1, stops)


def test_a_rule_is_priced_and_a_threshold_is_chosen():
    head = ExitHead(np.array([[1.0], [0.0]], np.float32), np.zeros(2, np.float32), 1.0)
    traces = [a_trace([0.2, 0.6, 0.97], ["?", "7", "7"], "7", "7")] * 9 + [a_trace([0.55, 0.8, 0.99], ["?", "8", "9"], "9", "9")]
    found = rule.apply(traces, rule.by_head(head, 0.58))
    assert found.accuracy_full == 1.0 and found.accuracy == 0.9 and found.only_full_right == 1
    assert found.saved_of_generated_tokens == pytest.approx(1 - (9 * 13 + 13) / (10 * 102))
    assert found.saved_of_all_tokens == pytest.approx(1 - (9 * 18 + 18) / (10 * 107))
    assert rule.choose_threshold(head, traces, 0.0) > 0.8  # the last trace is wrong at its second stop
    assert rule.choose_threshold(head, traces, 0.1) < 0.6
    assert rule.choose_threshold(head, [a_trace([0.99999] * 3, ["?"] * 3, "7", "7")], 0.0) == 1.0
    assert rule.apply(traces, rule.oracle).accuracy == 1.0


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The sample with a head and an adapter from a few questions, as an engine in two stages."""
    root = tmp_path_factory.mktemp("calibrated")
    found = calibrate_exits(
        SAMPLE,
        root / "ckpt",
        fit_exit_head=True,
        exit_layers=(4,),
        tasks=("chain", "loan"),
        num_items=16,
        max_new_tokens=300,
        num_threads=1,
    )
    build(root / "ckpt", root / "e", {"backend": ("onnxruntime",), "max_seq_len": 512, "max_batch_size": 8, "early_exit_layers": (4,)})
    return root, found


@pytest.mark.slow
def test_the_head_ends_the_thinking_where_the_answer_is_known(calibrated):
    root, found = calibrated
    assert found["head"]["reported_on"]["saved_of_generated_tokens"] > 0.2 and found["head"]["boundary_accuracy"] > 0.99
    assert found["adapters"][0]["agreement"] > 0.5
    engine = Engine.load(root / "e", num_threads=1)
    rng = random.Random(3)
    texts = [" ".join(f"x{i + 1} = {rng.randrange(100):02d}" for i in range(size)) + " ?" for size in (3, 4, 5, 6, 7)]
    prompts = [engine.text.chat(text) for text in texts]
    free = engine.generate(prompts, GenerationParams(max_new_tokens=250, stop_ids=engine.text.eos_ids, exit_policy="off"))
    work = engine.stats.work.num_layer_tokens
    params = GenerationParams(max_new_tokens=250, stop_ids=engine.text.eos_ids, exit_policy="off", exit_threshold="auto")
    done = engine.generate(prompts, params)
    assert engine.stats.work.num_layer_tokens < 0.9 * work
    for prompt, one, other in zip(prompts, done, free, strict=True):
        assert one.output_ids.count(engine.text.think_ids[1][0]) == 1
        assert one.thinking_stop in ("head", "end") and one.num_thinking_tokens <= other.num_thinking_tokens
        assert one.output_ids[: one.num_thinking_tokens] == other.output_ids[: one.num_thinking_tokens]
        assert engine.generate([prompt], params)[0].output_ids == one.output_ids
    assert any(one.thinking_stop == "head" for one in done)
    never = engine.generate(
        prompts, GenerationParams(max_new_tokens=250, stop_ids=engine.text.eos_ids, exit_policy="off", exit_threshold=1.0)
    )
    assert [one.output_ids for one in never] == [one.output_ids for one in free]
    engine.close()


@pytest.mark.slow
def test_calibration_is_written_whole_and_repeats(calibrated, tmp_path):
    """The second run starts from the first one's checkpoint; it keeps an adapter that it does not fit anew."""
    root, found = calibrated
    args = {"tasks": ("chain",), "num_items": 3, "max_new_tokens": 80, "num_threads": 1}
    calibrate_exits(SAMPLE, tmp_path / "one", fit_exit_head=True, exit_layers=(4,), **args)
    calibrate_exits(tmp_path / "one", tmp_path / "two", fit_exit_head=True, **args)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir()) and "tokenizer.json" in names
    for name in set(names) - {"manifest.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    ran = CliRunner().invoke(thoughtx, ["inspect", str(root / "ckpt"), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["exit_head"] == {"threshold": found["head"]["threshold"]}
    assert json.loads(ran.stdout)["exit_adapters"][0].startswith("before layer 4 (rank 64")
    ran = CliRunner().invoke(thoughtx, ["build", "--checkpoint_dir", str(root / "ckpt"), "--output_dir", str(tmp_path / "e"), "--dry_run"])
    assert "exit head" in ran.stdout and ran.exit_code == 0


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ({}, "--fit_exit_head"),
        ({"exit_layers": (0,)}, "--exit_layers"),
        ({"exit_layers": (8,)}, "--exit_layers"),
        ({"exit_layers": (4, 4)}, "--exit_layers"),
        ({"exit_layers": (5, 4)}, "--exit_layers"),
        ({"exit_layers": (4,), "adapter_rank": 129}, "--adapter_rank"),
        ({"fit_exit_head": True, "max_accuracy_loss": float("nan")}, "--max_accuracy_loss"),
    ],
)
def test_calibrations_that_cannot_be_are_refused_by_name(tmp_path, args, what):
    with pytest.raises(ThoughtxError, match=what) as raised:
        calibrate_exits(SAMPLE, tmp_path / "out", **args)
    assert raised.value.code == "E001" and not (tmp_path / "out").exists()


# --- answer probes --------------------------------------------------------------------------------------------------------

CACHES = {
    "full": {},
    "unbounded": {"use_chunked_attention": True, "chunk_size": 64, "max_chunk_size": 256, "sink_tokens": 4, "left_chunks": 1},
    "bounded": {"use_chunked_attention": True, "chunk_size": 48, "sink_tokens": 4, "left_chunks": 2},
    "anchors": {"use_chunked_attention": True, "chunk_size": 32, "sink_tokens": 4, "left_chunks": 2, "num_anchors": 2},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.slow
def test_trials_leave_no_trace(tmp_path, cache):
    """With a threshold that no trial meets, tokens and logits are those without trials, in a batch whose rows try at different times."""
    options = {"backend": ("onnxruntime",), "max_seq_len": 384, "max_batch_size": 4, "dtype": "float32"}
    build(SAMPLE, tmp_path / "e", {**options, **CACHES[cache]})
    engine = Engine.load(tmp_path / "e", num_threads=1)
    prompts = [engine.text.chat(text) for text in ("x1 = 38 x2 = 75 x3 = 21 ?", "x1 = 08 x2 = 55 ?", "x1 = 10 x2 = 20 x3 = 30 x4 = 40 ?")]
    base = {"max_new_tokens": 120, "stop_ids": engine.text.eos_ids}
    free = engine.generate(prompts, GenerationParams(**base), return_logits=True)
    work = engine.stats.work.num_layer_tokens
    tried = engine.generate(prompts, GenerationParams(**base, exit_probe=1.0, probe_agree=1000, probe_tokens=6), return_logits=True)
    assert engine.stats.work.num_layer_tokens > work
    for one, other in zip(tried, free, strict=True):
        assert one.output_ids == other.output_ids and one.num_probes > 0
        assert (one.num_probes_skipped > 0) <= (cache in ("bounded", "anchors"))
        np.testing.assert_allclose(one.logits, other.logits, atol=2e-4)
        assert one.num_layer_tokens > other.num_layer_tokens
    engine.close()


def test_trials_that_agree_end_the_thinking(tmp_path):
    engine = Engine.load(sample(tmp_path), num_threads=1)
    prompts = [engine.text.chat(text) for text in ("x1 = 38 x2 = 75 x3 = 21 ?", "x1 = 10 x2 = 20 x3 = 30 x4 = 40 ?")]
    base = {"max_new_tokens": 200, "stop_ids": engine.text.eos_ids}
    free = engine.generate(prompts, GenerationParams(**base))
    for agree, num_steps in ((1, (3, 4)), (2, (4, 5))):
        done = engine.generate(prompts, GenerationParams(**base, exit_probe=0.8, probe_agree=agree))
        assert all(one.output_ids.count(engine.text.think_ids[1][0]) == 1 for one in done)
        assert [one.thinking_stop for one in done] == ["probe", "probe"]
        assert tuple(one.num_steps for one in done) == num_steps  # known after all operands, once or twice in a row
        assert [engine.text.decode(one.output_ids).split("</think>")[1] for one in done] == [
            engine.text.decode(one.output_ids).split("</think>")[1] for one in free
        ]
    engine.close()


def test_trials_that_could_never_be_taken_back_are_refused(tmp_path):
    options = {"backend": ("onnxruntime",), "max_seq_len": 384, "use_chunked_attention": True, "chunk_size": 16}
    build(SAMPLE, tmp_path / "e", options)
    engine = Engine.load(tmp_path / "e", num_threads=1)
    with pytest.raises(ThoughtxError, match="--exit_probe cannot be used") as raised:
        engine.generate([[5, 6]], GenerationParams(exit_probe=0.5, probe_tokens=16))
    assert raised.value.code == "E122"
    engine.close()


def test_the_rule_of_trials():
    trials = probe.ProbeAnswers()
    settings = {"threshold": 0.9, "num_agreeing": 2}
    assert not trials.settles((7,), 0.95, "7", **settings)
    assert not trials.settles((7,), 0.5, "7", **settings)  # not sure: what came before no longer counts
    assert not trials.settles((7,), 0.95, "7", **settings)
    assert not trials.settles((8,), 0.95, "8", **settings)
    assert trials.settles((8,), 0.9, "8", **settings)
    assert not any(probe.ProbeAnswers().settles((6,), 1.0, "?", threshold=0.0, num_agreeing=1) for _ in range(3))


@pytest.mark.parametrize("flag", ["exit_threshold", "exit_probe"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), True, "often"])
def test_thresholds_that_cannot_be_are_refused_by_name(flag, value):
    with pytest.raises(ThoughtxError, match=f"--{flag}"):
        GenerationParams(**{flag: value})
    ran = CliRunner().invoke(thoughtx, ["run", "--engine_dir", "none", "--input_ids", "1", f"--{flag}", str(value)])
    assert ran.exit_code == 2


def test_an_engine_whose_exits_contradict_each_other_is_malformed(tmp_path):
    from trtllm_thoughtx.build.engine_dir import EngineDir

    path = checkpoint(tmp_path, some_exits(64, (1,)), num_layers=2)
    build(path, tmp_path / "e", {"backend": ("onnxruntime",), "max_seq_len": 64, "early_exit_layers": (1,)})
    good = (tmp_path / "e" / "config.json").read_text()
    for change in (
        {"exit_threshold": 0.0},
        {"exit_threshold": 2.0},
        {"draft_layers": []},
        {"draft_layers": [0]},
        {"draft_thresholds": [2.0]},
    ):
        body = json.loads(good)
        assert set(change) <= set(BuildConfig().as_dict())
        body["thoughtx"]["build"].update(change)
        (tmp_path / "e" / "config.json").write_text(json.dumps(body))
        with pytest.raises(ThoughtxError) as raised:
            EngineDir.open(tmp_path / "e")
        assert raised.value.code == "E121", change


@pytest.mark.rtx
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.slow
def test_plans_with_exits_build(tmp_path, dtype):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    path = checkpoint(tmp_path, some_exits(64, (1,)), num_layers=2, dtype="bfloat16")
    options = {"backend": ("tensorrt-rtx",), "dtype": dtype, "max_seq_len": 64, "max_input_len": 16, "early_exit_layers": (1,)}
    made = build(path, tmp_path / "e", options | {"compute_capabilities": ("8.9",)})
    assert [part["name"] for part in made["parts"]] == ["rank0.stage0", "rank0.stage1", "rank0.head"]
    assert made["build"]["exit_head"] and made["build"]["draft_layers"] == [1]
