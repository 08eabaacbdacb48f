"""Evaluation: a system whose answers are known gets the numbers it deserves, and two systems are compared on the same questions."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_thoughtx import plot
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli import params as console
from trtllm_thoughtx.errors import CODES, ThoughtxError
from trtllm_thoughtx.evaluate import record, statistics
from trtllm_thoughtx.evaluate.questions import from_file, generated
from trtllm_thoughtx.evaluate.run import evaluate, prompt_of
from trtllm_thoughtx.evaluate.summary import compare, comparison_tables, result_tables, summarize
from trtllm_thoughtx.evaluate.systems import Written
from trtllm_thoughtx.tasks import TASKS, item
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.text import Text

vocabulary = pytest.importorskip("trtllm_thoughtx.distill.vocabulary")
PARAMS = GenerationParams(max_new_tokens=200)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("words")
    vocabulary.build().save(str(root / "tokenizer.json"))
    config = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": vocabulary.CHAT_TEMPLATE}
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    return Text.load(root)


class Scripted:
    """Writes what `reply` says to each question, in order; every token has probability `sure`."""

    batch_size, max_length, is_grouped = 4, 4096, False

    def __init__(self, text, questions, reply, sure=0.9, name="scripted"):
        self.text, self.sure = text, sure
        self.replies = {tuple(prompt_of(asked, text)): reply(place, asked) for place, asked in enumerate(questions)}
        self.description = {"name": name, "path": f"/{name}", "kind": "model", "backend": "script", "dtype": "none"}

    def check(self, params):
        pass

    def write(self, prompts, params, streams):
        done = []
        for prompt, own in zip(prompts, params, strict=True):
            ids = self.text.encode(self.replies[tuple(prompt)], add_special=False)
            cut = ids[: own.max_new_tokens]
            reason = "eos" if len(cut) == len(ids) else "length"
            done.append(Written(cut, [math.log(self.sure)] * len(cut), reason, 0.001 * len(cut)))
        return enumerate(done)

    def close(self):
        pass


def solution(_place, asked, num_checks=0):
    if asked.thought is not None:
        return f"{asked.expected} <eos>"
    steps = [*asked.item.steps, *asked.item.rechecks(num_checks)]
    return f"{item.thought(steps)} </think> {asked.expected} <eos>"


def test_a_perfect_system_is_perfect(text):
    questions = generated(list(TASKS), "test", num_items=12, seed=3, cut_share=0.5)
    result = evaluate(Scripted(text, questions, solution), questions, PARAMS)
    found = summarize(result)
    assert [r.id for r in result.records] == [asked.id for asked in questions]
    for task in TASKS:
        free = [asked for asked in questions if asked.task == task and asked.thought is None]
        numbers = found.tasks[task]
        assert (numbers.num_items, numbers.accuracy, numbers.f1, numbers.coherence) == (12, 1.0, 1.0, 1.0)
        assert numbers.steps == sum(len(asked.item.steps) for asked in free) / 12
        assert numbers.redundant_steps == numbers.num_truncated == 0
        assert found.tasks[task].cut.accuracy == 1.0
    assert {r.expected for r in result.of(mode="cut")} > {"?"}
    chain = [r for r in result.of("chain") if r.size == 2]
    assert chain and all(r.num_tokens == 2 * 10 + 4 and abs(r.confidence - 0.9**2) < 1e-9 for r in chain)


def test_faults_are_counted_where_they_are(text):
    questions = generated(["chain"], "test", num_items=24, seed=5, sizes=[4])

    def reply(place, asked):
        kinds = (
            solution(place, asked),
            solution(place, asked, 2),
            f"{item.thought(asked.item.steps)} </think> x1 <eos>",
            item.thought(asked.item.steps),
        )
        return kinds[place % 4]

    found = summarize(evaluate(Scripted(text, questions, reply), questions, PARAMS)).tasks["chain"]
    assert (found.num_items, found.num_correct, found.accuracy) == (24, 12, 0.5)
    assert found.redundant_steps == 0.5 and found.steps == 4.5
    short = evaluate(Scripted(text, questions, solution), questions, GenerationParams(max_new_tokens=10))
    assert all(r.truncated and r.answer is None and not r.correct for r in short.records)


def test_a_comparison_is_paired(text):
    questions = generated(["chain", "lookup"], "test", num_items=40, seed=1)
    ours = evaluate(Scripted(text, questions, solution, name="ours"), questions, PARAMS)

    def longer(place, asked):
        return solution(place, asked, 1) if place % 8 else f"{item.thought(asked.item.steps)} </think> ? <eos>"

    other = evaluate(Scripted(text, questions, longer, name="other"), questions, PARAMS)
    found = compare(ours, other)
    rows = {(row.measure, row.task): row for row in found.rows}
    assert rows["accuracy", "all"].difference == -12.5
    low, high = rows["accuracy", "all"].interval
    assert low < -12.5 < high < 0
    assert rows["redundant steps", "all"].difference == 0.875
    assert (found.only_first_right, found.only_second_right) == (10, 0)
    assert found.p_accuracy == pytest.approx(2 * 0.5**10)
    assert {"accuracy", "F1"} == {measure for measure, task in rows if task == "chain"}
    for made in (*comparison_tables(found), *result_tables(summarize(ours))):
        assert isinstance(made, str) or made.row_count
    assert comparison_tables(found)[1].startswith("80 questions; ")
    alone = (record.Result(system=one.system, conditions=one.conditions, records=one.records[:1]) for one in (ours, other))
    assert comparison_tables(compare(*alone))[1].startswith("1 question; ")
    fewer = record.Result(system=other.system, conditions=other.conditions, records=other.records[:-1])
    with pytest.raises(ThoughtxError, match="not asked the same"):
        compare(ours, fewer)


def test_a_result_survives_its_file(text, tmp_path):
    questions = generated(["loan"], "test", num_items=4, seed=2, cut_share=0.5)
    made = evaluate(Scripted(text, questions, solution), questions, PARAMS)
    record.save(made, tmp_path / "r.json")
    assert record.load(tmp_path / "r.json").records == made.records
    whole = json.loads((tmp_path / "r.json").read_text())
    for change in (
        {"schema": "thoughtx.result/2"},
        {"records": []},
        {"records": [{**whole["records"][0], "num_tokens": -1}]},
        {"records": [{**whole["records"][0], "correct": 1}]},
        {"records": [{**whole["records"][0], "confidence": 1.5}]},
        {"records": [{**whole["records"][0], "mode": "other"}]},
        {"records": [{"id": "x"}]},
        {"system": None},
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(ThoughtxError) as caught:
            record.load(tmp_path / "bad.json")
        assert caught.value.code == "E160"


def test_questions_are_the_same_every_time_and_held_out():
    one, two = (generated(["chain", "story"], "test", num_items=30, seed=4, cut_share=0.3) for _ in range(2))
    assert one == two and len({asked.id for asked in one}) == len(one) == 78
    assert all(asked.item.split == "test" for asked in one)
    assert generated(["lookup"], "test", num_items=8, seed=0, lengths=[256, 512])[-1].item.traits["num_words"] > 480
    with pytest.raises(ThoughtxError, match="of size"):
        generated(["loan"], "test", num_items=1, seed=0, sizes=[9])


def test_bad_rows_of_a_file_are_named(tmp_path):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": ""}, {"prompt": "c", "answer": "d", "id": "1"}, ["no"]]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ThoughtxError) as caught:
        from_file(tmp_path / "q.jsonl")
    assert all(f"line {number}" in caught.value.why for number in (2, 3, 4)) and "line 1:" not in caught.value.why
    (tmp_path / "q.jsonl").write_text(json.dumps(rows[0]) + "\n\n" + json.dumps({"prompt": "e", "answer": "f", "task": "t"}))
    assert [(asked.id, asked.task) for asked in from_file(tmp_path / "q.jsonl")] == [("1", "q"), ("3", "t")]


# --- statistics ----------------------------------------------------------------------------------------------------------


def test_wilson_covers_as_often_as_it_says():
    """Exact coverage over the binomial: near 95 % on average, never absurd; the normal interval fails at the edges."""
    shares, covered = np.linspace(0.02, 0.98, 25), []
    for share in shares:
        chances = [math.comb(50, k) * share**k * (1 - share) ** (50 - k) for k in range(51)]
        covered.append(sum(p for k, p in enumerate(chances) if statistics.wilson(k, 50)[0] <= share <= statistics.wilson(k, 50)[1]))
    assert 0.94 < np.mean(covered) < 0.97 and min(covered) > 0.9
    assert statistics.wilson(50, 50)[1] == 1.0 and statistics.wilson(0, 50)[0] == 0.0


def test_bootstrap_agrees_with_theory():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = statistics.mean_interval(values)
    half = 1.96 * values.std() / 20
    assert abs(low - (values.mean() - half)) < 0.05 and abs(high - (values.mean() + half)) < 0.05
    assert statistics.mean_interval([2.0, 2.0]) == (2.0, 2.0)


def test_mcnemar_counts_the_binomial():
    assert statistics.mcnemar(0, 0) == 1.0
    assert statistics.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert statistics.mcnemar(9, 1) == statistics.mcnemar(1, 9)
    assert statistics.mcnemar(5, 5) == 1.0


def test_calibration_error_by_hand():
    assert statistics.calibration_error([0.85] * 4, [True, True, True, False]) == pytest.approx(0.1)
    assert statistics.calibration_error([0.95, 0.15], [True, False]) == pytest.approx((0.05 + 0.15) / 2)
    assert statistics.calibration_error([1.0], [True]) == 0.0


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
@settings(deadline=None)
def test_word_f1_is_symmetric_and_one_for_the_same_words(first, second):
    score = statistics.word_f1(first, second)
    assert 0 <= score <= 1 and score == statistics.word_f1(second, first)
    assert (score == 1) == (sorted(first) == sorted(second))


# --- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """A random Qwen2 that knows the words, and the engine built from it."""
    models = pytest.importorskip("trtllm_thoughtx.distill.models", reason="torch is not installed")
    from trtllm_thoughtx.build.build import build

    root = tmp_path_factory.mktemp("systems")
    models.new_model(root / "model", num_layers=2, hidden_size=64, intermediate_size=64, max_positions=2304, seed=1)
    build(root / "model", root / "engine", {"backend": ("onnxruntime",), "max_seq_len": 512, "max_batch_size": 4, "dtype": "float32"})
    return root / "model", root / "engine"


def run(*args):
    return console.run(cli.COMMANDS["eval"], "thoughtx-eval", [str(arg) for arg in args])


@pytest.mark.slow
def test_an_engine_and_its_model_answer_alike(systems, tmp_path, capsys):
    """Same tokens from transformers and from the engine, in batches and alone, greedy and sampled: difference 0."""
    model, engine = systems
    asked = ("--task", "chain,loan", "--num_items", 6, "--cut_share", 0.5, "--max_new_tokens", 24, "-q", "--json")
    for extra in (("--batch_size", 4), ("--temperature", 0.7, "--seed", 3)):
        out = tmp_path / "model.json"
        assert run("--model_dir", model, "--output", out, *asked, *extra) == 0
        capsys.readouterr()
        assert run("--engine_dir", engine, "--compare", out, "--output", tmp_path / "engine.json", *asked, *extra) == 0
        found = json.loads(capsys.readouterr().out)
        rows = {(row["measure"], row["task"]): row for row in found["comparison"]["rows"]}
        assert rows["tokens", "all"]["difference"] == 0 and rows["tokens", "all"]["first"] > 1
        one, two = (record.load(tmp_path / name).records for name in ("model.json", "engine.json"))
        assert [(r.id, r.answer, r.num_tokens, r.num_steps) for r in one] == [(r.id, r.answer, r.num_tokens, r.num_steps) for r in two]
        assert all(a.confidence == b.confidence or abs(a.confidence - b.confidence) < 1e-4 for a, b in zip(one, two, strict=True))
        assert any(a.confidence is not None for a in one)


@pytest.mark.slow
def test_memory_is_measured_where_it_fits(systems, capsys):
    model, engine = systems
    asked = ("--task", "chain", "--num_items", 2, "--sizes", "1,2", "--max_new_tokens", 4, "-q", "--json")
    assert run("--engine_dir", engine, "--compare", model, "--memory_context", 600, *asked) == 0
    first, second = json.loads(capsys.readouterr().out)["comparison"]["memory"]
    assert "512 tokens" in first["skipped"]
    assert second["peak_bytes"] >= second["loaded_bytes"] > 1 << 20


@pytest.mark.slow
def test_a_picture_is_drawn(systems, tmp_path, capsys):
    _, engine = systems
    asked = ("--task", "chain,lookup", "--num_items", 4, "--sizes", "1,2", "--max_new_tokens", 4, "-q")
    assert run("--engine_dir", engine, "--plot", tmp_path / "a.png", *asked) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    plot.curves_plot(tmp_path / "c.svg", {"supervised": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0}], "scored": []})
    assert b"<svg" in (tmp_path / "c.svg").read_bytes()
    assert "accuracy" in capsys.readouterr().out


def test_a_benchmark_from_local_files(systems, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: harness)")
    rows = [{"passage": f"rule {i} yes", "question": "is 1 the answer", "label": i % 2} for i in range(4)]
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--engine_dir", systems[1], "--harness", "boolq", "--data_dir", tmp_path, "--limit", 3, "-q", "--json") == 0
    task = json.loads(capsys.readouterr().out)["harness"]["tasks"]["boolq"]
    assert task["num_items"] == 3 and 0 <= task["metrics"]["acc"]["value"] <= 1
    assert run("--engine_dir", systems[1], "--harness", "gsm8k", "--data_dir", tmp_path, "-q") == CODES["E101"][0]


REFUSED = [
    ("E001", ()),
    ("E001", ("--task", "chain")),
    ("E001", ("--engine_dir", "ENGINE", "--task", "chain", "--dataset", "x.jsonl")),
    ("E001", ("--engine_dir", "ENGINE", "--task", "chess")),
    ("E001", ("--engine_dir", "ENGINE", "--task", "chain", "--plot", "p.jpeg")),
    ("E001", ("--engine_dir", "ENGINE", "--task", "chain", "--data_dir", ".")),
    ("E001", ("--engine_dir", "ENGINE", "--harness", "gsm8k", "--compare", "ENGINE")),
    ("E001", ("--engine_dir", "ENGINE", "--harness", "gsm8k", "--backend", "onnxruntime")),
    ("E001", ("--engine_dir", "ENGINE", "--harness", "gsm8k", "--num_items", "120")),
    ("E001", ("--engine_dir", "ENGINE", "--dataset", "missing.jsonl", "--num_items", "20")),
    ("E001", ("--engine_dir", "ENGINE", "--task", "chain", "--match", "exact")),
    ("E122", ("--engine_dir", "ENGINE", "--task", "lookup", "--lengths", "1024")),
    ("E122", ("--engine_dir", "ENGINE", "--task", "chain", "--batch_size", "5")),
    ("E130", ("--engine_dir", "ENGINE", "--task", "chain", "--output", "none/r.json")),
    ("E101", ("--engine_dir", "missing", "--task", "chain")),
    ("E101", ("--engine_dir", "ENGINE", "--dataset", "missing.jsonl")),
]


@pytest.mark.parametrize(("code", "args"), REFUSED, ids=itertools.count())
def test_what_is_refused_is_refused_by_name(systems, tmp_path, monkeypatch, capsys, code, args):
    monkeypatch.chdir(tmp_path)
    assert run(*(str(systems[1]) if arg == "ENGINE" else arg for arg in args), "-q") == CODES[code][0]
    assert f"error[{code}]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
