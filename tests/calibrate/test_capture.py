"""What windows keep: recalls against their definition, thresholds against cases made by hand, the command on a sample."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from places import LONGCOT, TESTS

from trtllm_thoughtx.calibrate.chunks import adaptive
from trtllm_thoughtx.calibrate.chunks.recall import NUM_BINS, Recall, masks_of
from trtllm_thoughtx.calibrate.chunks.windows import NUM_SINKS, candidates, num_slots
from trtllm_thoughtx.validate.golden import ChunkSpec

SAMPLE = str(LONGCOT)


def attention_of(rng, heads, length):
    scores = np.where(np.tri(length, dtype=bool), rng.standard_normal((heads, length, length)) * 3, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_recall_equals_its_definition_query_by_query():
    rng = np.random.default_rng(0)
    windows = [ChunkSpec(4, 2, 0), ChunkSpec(3, 0, 1), ChunkSpec(5, 1, 1, 2), ChunkSpec(64, 0, 0)]
    recall, wanted = Recall(windows, 2), {}
    for length in (7, 40):
        masks = masks_of(windows, length)
        for layer in range(2):
            weights = attention_of(rng, 3, length)
            recall.add(layer, weights, masks)
            for w, window in enumerate(windows):
                for head in range(3):
                    for p in range(length):
                        near = {
                            j for j in range(p + 1) if j < window.sink or j // window.chunk_size >= p // window.chunk_size - window.left
                        }
                        older = p // window.chunk_size - window.left - 1
                        near |= {(k + 1) * window.chunk_size - 1 for k in range(max(0, older + 1 - window.anchors), older + 1)}
                        kept = sum(weights[head, p, j] for j in near)
                        beyond = weights[head, p, NUM_SINKS : p + 1].sum()
                        rest = sum(weights[head, p, j] for j in near if j >= NUM_SINKS)
                        hides = len(near) <= p
                        for population in ("everywhere", "where_hidden") if hides else ("everywhere",):
                            wanted.setdefault((w, layer, population, "with_sinks"), []).append(kept)
                            if beyond > 1e-6:
                                wanted.setdefault((w, layer, population, "beyond_sinks"), []).append(rest / beyond)
    for w in range(len(windows)):
        found = recall.summary(w)
        for population in ("everywhere", "where_hidden"):
            for kind in ("with_sinks", "beyond_sinks"):
                for layer in range(2):
                    values, numbers = wanted.get((w, layer, population, kind), []), found[population][kind]["layers"][layer]
                    assert numbers["num"] == len(values)
                    if values:
                        assert numbers["mean"] == pytest.approx(np.mean(values), abs=1e-6)
                        assert numbers["min"] == pytest.approx(min(values), abs=1e-6)
                        assert numbers["p5"] == pytest.approx(np.percentile(values, 5, method="inverted_cdf"), abs=2 / NUM_BINS)
    assert (
        recall.summary(3)["everywhere"]["with_sinks"]["min"] == pytest.approx(1)
        and recall.summary(3)["where_hidden"]["with_sinks"]["num"] == 0
    )


def test_candidates_are_smaller_than_the_context_and_rise():
    slots = [num_slots(window, 512) for window in candidates(512)]
    assert slots == sorted(slots) and min(slots) > 0 and max(slots) < 512 and len(set(candidates(512))) == len(slots)


def test_the_reference_hands_out_the_softmax_of_every_layer():
    pytest.importorskip("torch")
    from pathlib import Path

    from trtllm_thoughtx.validate.reference import Reference

    seen = {}
    reference = Reference(Path(SAMPLE), "float32")
    reference.attention([4, 214, 8, 20, 25, 6, 2], lambda layer, weights: seen.setdefault(layer, weights))
    assert sorted(seen) == list(range(8))
    for weights in seen.values():
        assert weights.shape == (4, 7, 7)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        assert not np.triu(weights, 1).any()


# Eight questions: the unsure half needs chunks of 64, the sure half 16.
NATS = [0.5, 0.5, 0.5, 0.5, 2.0, 2.0, 2.0, 2.0]
RIGHT = {16: [True] * 4 + [False] * 4, 32: [True] * 4 + [False] * 4, 64: [True] * 8}
WINDOW = ChunkSpec(64, 4, 1)


def test_the_base_is_the_smallest_that_loses_no_more_than_allowed():
    base = adaptive.fit_base(NATS, RIGHT, WINDOW, 0.0)
    assert adaptive.sizes_of(NATS, adaptive.Thresholds(base, 0.0), WINDOW) == [16] * 4 + [64] * 4
    careless = adaptive.fit_base(NATS, RIGHT, WINDOW, 0.5)
    assert careless < base and set(adaptive.sizes_of(NATS, adaptive.Thresholds(careless, 0.0), WINDOW)) == {16}


def test_the_curve_shows_that_choosing_pays_where_it_does_and_not_where_it_does_not():
    def best(nats):
        return max((point for point in adaptive.curve(nats, RIGHT, WINDOW) if point.mean_slots <= 4 + 2 * 40), key=lambda p: p.chosen)

    good = best(NATS)
    assert good.chosen == 1.0 and good.random == 0.75 and good.fixed < 0.7
    bad = best(NATS[::-1])
    assert bad.chosen <= 0.5


def test_the_threshold_lies_between_those_that_a_single_step_answers_and_the_rest():
    nats, thought = [0.1, 0.2, 0.3, 0.4], [True] * 4
    assert 0.2 < adaptive.fit_threshold(nats, thought, [True, True, False, False], 0.0) < 0.3
    assert adaptive.fit_threshold(nats, thought, [False, True, True, True], 0.0) == 0.0
    assert adaptive.fit_threshold(nats, thought, [True, True, True, True], 0.0) > 0.4
    assert adaptive.fit_threshold([0.1, 0.2, 0.2, 0.4], thought, [True, True, False, False], 0.0) == 0.0, "equals lie on both sides"
    assert adaptive.fit_threshold(nats, thought, [False, True, True, True], 0.25) > 0.4


def test_rank_correlation_with_ties():
    assert adaptive.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert adaptive.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert adaptive.rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert adaptive.rank_correlation([1, 2, 3], [5, 5, 5]) is None


def command(*words):
    from trtllm_thoughtx.cli.commands import thoughtx

    return CliRunner().invoke(thoughtx, ["calibrate", *map(str, words)])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("capture") / "chunks"
    flags = ["--calib_size", 4, "--context", 256, "--eval_items", 4, "--target_capture", 0.6, "--max_task_loss", 0.5]
    ran = command("--model_dir", SAMPLE, "--output_dir", out, "--chunk_report", *flags, "--json")
    assert ran.exit_code == 0, ran.output
    return out, json.loads(ran.stdout)


@pytest.mark.slow
def test_the_report_picks_the_smallest_window_that_keeps_enough(report):
    out, found = report
    kept = [row["everywhere"]["with_sinks"]["mean"] for row in found["windows"]]
    chosen = found["chosen"]
    assert kept[chosen] >= 0.6
    tried = found["tasks"]["windows"]
    assert tried[str(chosen)]["loss"] <= 0.5
    assert all(kept[i] < 0.6 or tried[str(i)]["loss"] > 0.5 for i in range(chosen))
    assert json.loads((out / "chunks.json").read_text())["chosen"] == chosen and (out / "chunks.png").read_bytes()[:4] == b"\x89PNG"
    assert 0 <= found["output_error"]["top1_agreement"] <= 1 and len(found["output_error"]["relative_error_by_layer"]) == 8
    assert found["tasks"]["full"]["loss"] == 0 and found["tasks"]["full"]["by_distance"]
    assert {row["system"] for row in found["adaptive"]["systems"]} >= {"largest", "chosen", "fixed", "random"}
    assert found["skipped"] == []


def test_questions_that_leave_no_room_for_an_answer_are_left_out():
    from pathlib import Path

    from trtllm_thoughtx.calibrate.chunks.asking import Asker
    from trtllm_thoughtx.evaluate.questions import generated
    from trtllm_thoughtx.progress import SILENT

    questions = generated(("lookup",), "validation", num_items=8, seed=0, lengths=(0, 400))
    with Asker(Path(SAMPLE), 256, SILENT) as asker:
        root = asker.root
        assert asker.fits(questions) == [asked for asked in questions if asked.traits["asked_words"] == 0]
        assert root.exists()
    assert not root.exists()


@pytest.mark.slow
def test_the_recipe_it_writes_builds_an_engine_that_chooses(report, tmp_path):
    from trtllm_thoughtx.cli.commands import thoughtx

    out, found = report
    flags = yaml.safe_load((out / "build.yaml").read_text())
    assert flags["base_size"] == pytest.approx(found["adaptive"]["base_size"])
    words = [
        "build",
        "--config",
        out / "build.yaml",
        "--checkpoint_dir",
        SAMPLE,
        "--output_dir",
        tmp_path / "e",
        "--backend",
        "onnxruntime",
    ]
    ran = CliRunner().invoke(thoughtx, [*map(str, words), "--chunk_size", "auto", "--json"])
    assert ran.exit_code == 0, ran.output
    built = json.loads(ran.stdout)["build"]
    assert built["adaptive_chunks"] and built["base_size"] == flags["base_size"] and built["sink_tokens"] == flags["sink_tokens"]


def test_rows_of_a_file_take_the_place_of_generated_ones(tmp_path):
    pytest.importorskip("torch")
    rows = [{"prompt": f"x1 = {i} 1 x2 = 75 ?", "thought": f"x1 00 + {i}1 = {i}1 \n\n ok", "answer": f"{i}6"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--calib_data", tmp_path / "rows.jsonl", "--context", 64, "--eval_items", 0, "--target_capture", 0]
    ran = command("--model_dir", SAMPLE, "--output_dir", tmp_path / "out", "--chunk_report", *flags, "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["num_sequences"] == 3 and found["tasks"] is None and found["chosen"] == 0 and "--eval_items 0" in found["skipped"][0]


def test_a_target_that_no_window_reaches_writes_no_recipe_and_says_so(tmp_path):
    pytest.importorskip("torch")
    flags = ["--calib_size", 4, "--context", 128, "--eval_items", 0, "--target_capture", 1]
    ran = command("--model_dir", SAMPLE, "--output_dir", tmp_path / "out", "--chunk_report", *flags)
    assert ran.exit_code == 0 and "no window below 128 tokens reaches the targets" in ran.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["chunks.json", "chunks.png", "manifest.json"]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--model_dir", SAMPLE], 2, "one of --qformat, --chunk_report"),
        (["--model_dir", SAMPLE, "--chunk_report", "--qformat", "fp8"], 2, "given: --qformat; --chunk_report"),
        (["--model_dir", SAMPLE, "--chunk_report", "--exclude", "x"], 2, "--exclude cannot be used here"),
        (["--model_dir", SAMPLE, "--qformat", "fp8", "--context", "64"], 2, "--context cannot be used here"),
        (["--model_dir", SAMPLE, "--chunk_report", "--context", "8192"], 2, "use at most 4096"),
        (["--model_dir", SAMPLE, "--chunk_report", "--target_capture", "nan"], 2, "--target_capture"),
        (["--model_dir", str(TESTS), "--chunk_report"], 3, "E101"),
        (["--model_dir", SAMPLE, "--chunk_report", "--calib_data", "BAD"], 3, "line 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_nothing_is_written(tmp_path, capsys, words, status, text):
    pytest.importorskip("torch")
    (tmp_path / "BAD").write_text('{"prompt": "a", "thought": "b", "answer": "c"}\n{"prompt": ""}\n')
    words = [str(tmp_path / word) if word == "BAD" else word for word in words]
    from trtllm_thoughtx.cli.commands import calibrate
    from trtllm_thoughtx.cli.params import run

    assert run(calibrate, "thoughtx-calibrate", [*words, "--output_dir", str(tmp_path / "out")]) == status
    assert text in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_existing_report_is_kept(tmp_path, capsys):
    from trtllm_thoughtx.cli.commands import calibrate
    from trtllm_thoughtx.cli.params import run

    shutil.copytree(SAMPLE, tmp_path / "out")
    assert run(calibrate, "thoughtx-calibrate", ["--model_dir", SAMPLE, "--chunk_report", "--output_dir", str(tmp_path / "out")]) == 3
    assert "E130" in capsys.readouterr().err and (tmp_path / "out" / "config.json").exists()
