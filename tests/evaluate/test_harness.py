"""lm-eval's tasks on local files: the scores of a model whose answers are known, bad rows, missing data, an engine end to end."""

from __future__ import annotations

import json
import re
import socket
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import write_tiny

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: harness)")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402

from trtllm_thoughtx import report  # noqa: E402
from trtllm_thoughtx.build.build import build  # noqa: E402
from trtllm_thoughtx.errors import ThoughtxError  # noqa: E402
from trtllm_thoughtx.evaluate import harness  # noqa: E402
from trtllm_thoughtx.evaluate.benchmarks import CONFIGS, TASKS, qa_scores  # noqa: E402
from trtllm_thoughtx.evaluate.harness import run_harness  # noqa: E402

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"question": "A crate holds 6 jars. How many jars in 3 crates?", "answer": "6 * 3 = 18\n#### 18"},
        {"question": "Ida has 9 pens and loses 4. How many are left?", "answer": "9 - 4 = 5\n#### 5"},
        {"question": "A field gives 40 sacks on each of 30 days. How many sacks?", "answer": "40 * 30 = 1,200\n#### 1,200"},
        {"question": "Two hens lay 7 eggs each. How many eggs?", "answer": "2 * 7 = 14\n#### 14"},
    ],
    "boolq": [
        {"passage": "Slate splits into sheets.", "question": "does slate split", "label": 1},
        {"passage": "The lake is salt.", "question": "is the lake fresh", "answer": False},
        {"passage": "Owls hunt at night.", "question": "do owls hunt by day", "label": 0},
        {"passage": "Bronze holds tin.", "question": "is there tin in bronze", "answer": True},
    ],
    "commonsense_qa": [
        {
            "question": "Where does bread get its crust?",
            "choices": {"label": list("ABCDE"), "text": ["oven", "pond", "attic", "glove", "kite"]},
            "answerKey": "A",
        },
        {
            "question": "What keeps rain off?",
            "choices": {"label": list("ABCDE"), "text": ["fork", "drum", "roof", "seed", "song"]},
            "answerKey": "C",
        },
    ],
    "hotpotqa": [
        {
            "question": "In which valley was the maker of the Lind bridge born?",
            "answer": "the Orr Valley",
            "context": {
                "title": ["Lind bridge", "Ada Moss"],
                "sentences": [["It was made by Ada Moss.", " It is long."], ["Ada Moss was born in the Orr Valley."]],
            },
            "supporting_facts": {"title": ["Lind bridge", "Ada Moss"], "sent_id": [0, 0]},
        },
        {
            "question": "Is Moss older than Lind?",
            "answer": "yes",
            "context": {"title": ["Moss"], "sentences": [["Moss is 50.", " Lind is 40."]]},
        },
    ],
}
REPLIES = {  # by a piece of the question
    "6 jars": " 6 * 3 = 18\n#### 18",  # both filters
    "9 pens": " so 5 are left.",  # the last number alone
    "40 sacks": " #### 1200",  # the comma does not count
    "Two hens": " #### 15",  # wrong
    "Lind bridge born": " Orr valley, north.",
    "older than": " yes, older",
}


class Scripted(LM):
    """Knows answers by the question; of the choices it likes `likes` best."""

    def __init__(self, likes: dict[str, str]) -> None:
        super().__init__()
        self.likes, self.prompts = likes, list[str]()

    def _found(self, prompt: str, known: dict[str, str]) -> str:
        self.prompts.append(prompt)
        return known[next(piece for piece in known if piece in prompt.rpartition("Question:")[2])]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(0.0 if one.args[1] == f" {self._found(one.args[0], self.likes)}" else -3.0, False) for one in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("no task asks for it")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self._found(one.args[0], REPLIES) for one in requests]


LIKES = {"slate": "yes", "lake": "no", "owls": "yes", "tin in": "yes", "bread": "A", "rain": "D"}


def write_rows(folder: Path, name: str, rows: list[Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for task, rows in ROWS.items():
        write_rows(tmp_path / "data", f"{task}.jsonl", rows)
    return tmp_path / "data"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_scores_of_known_answers(data, no_network, capfd):
    model = Scripted(LIKES)
    made = run_harness(model, TASKS, data, num_fewshot=0, return_samples=True)
    values = {task: {name: one.value for name, one in found.metrics.items()} for task, found in made.tasks.items()}
    assert values["gsm8k"] == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.75}
    assert values["boolq"] == {"acc": 0.75}
    assert values["commonsense_qa"] == {"acc": 0.5}
    assert values["hotpotqa"] == {"exact_match": 0.0, "f1": pytest.approx((2 * 2 / 5 + 0) / 2)}
    assert {task: found.num_items for task, found in made.tasks.items()} == {task: len(rows) for task, rows in ROWS.items()}
    assert made.tasks["boolq"].metrics["acc"].stderr == pytest.approx(np.std([1, 1, 0, 1], ddof=1) / 2)
    assert made.versions["lm_eval"] and json.loads(report.to_json(made))["samples"]
    assert [sample.metrics["acc"] for sample in made.samples["boolq"]] == [1, 1, 0, 1]
    assert "Ada Moss: Ada Moss was born in the Orr Valley." in made.samples["hotpotqa"][0].prompt
    assert capfd.readouterr() == ("", "")


def test_limit_and_one_item(data):
    found = run_harness(Scripted(LIKES), "boolq", data, limit=1).tasks["boolq"]
    assert report.plain(found) == {
        "num_items": 1,
        "num_fewshot": 0,
        "num_truncated": None,
        "num_alike": None,
        "metrics": {"acc": {"value": 1.0, "stderr": None}},
    }


def test_few_shot_examples_come_from_their_own_file(data):
    write_rows(data, "gsm8k-train.jsonl", [{"question": f"How much is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(7)])
    model = Scripted(LIKES)
    found = run_harness(model, ["gsm8k"], data, limit=1).tasks["gsm8k"]
    assert found.num_fewshot == 5 and found.metrics["exact_match,strict-match"].value == 1
    examples = re.findall(r"Question: How much is (\d) \+ 1\?\nAnswer: #### (\d)\n\n", model.prompts[0])
    assert len(examples) == 5 and all(int(total) == int(one) + 1 for one, total in examples)
    with pytest.raises(ThoughtxError, match="8 few-shot examples") as caught:
        run_harness(model, "gsm8k", data, num_fewshot=8)
    assert caught.value.code == "E001"


def test_few_shot_examples_are_never_made_up(data):
    with pytest.raises(ThoughtxError) as caught:
        run_harness(Scripted(LIKES), "gsm8k", data)
    assert caught.value.code == "E101" and "gsm8k-train.jsonl" in caught.value.what


BAD = {
    "gsm8k": [("{", "not valid JSON"), ({"question": "q", "answer": "12"}, "#### "), ({"answer": "#### 1"}, "question")],
    "boolq": [
        ({"passage": "p", "question": "q", "label": 2}, "label"),
        ({"passage": "p", "question": "q", "label": 1, "answer": False}, "agree"),
        ("[1]", "object"),
    ],
    "commonsense_qa": [
        ({"question": "q", "choices": {"label": ["A", "B"], "text": ["x"]}, "answerKey": "A"}, "same length"),
        ({"question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": ""}, "answerKey"),
    ],
    "hotpotqa": [
        ({"question": "q", "answer": "a", "context": [["t", ["s"]]]}, "context"),
        ({"question": "q", "answer": "a", "context": {"title": ["t"], "sentences": [[1]]}}, "sentences"),
        (ROWS["hotpotqa"][1] | {"supporting_facts": {"title": ["elsewhere"], "sent_id": [0]}}, "supporting_facts"),
    ],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_bad_row_is_named_before_anything_runs(task, tmp_path):
    write_rows(tmp_path / "d", f"{task}.jsonl", [ROWS[task][0], *(row for row, _ in BAD[task]), "", ROWS[task][1]])
    with pytest.raises(ThoughtxError, match=f"{len(BAD[task])} rows") as caught:
        run_harness(tmp_path / "no such model", task, tmp_path / "d", num_fewshot=0)
    lines = caught.value.why.split("\n")
    assert caught.value.code == "E140" and len(lines) == len(BAD[task])
    for number, (line, (_, why)) in enumerate(zip(lines, BAD[task], strict=True), 2):
        assert f"line {number}: " in line and why in line


def test_an_empty_file_an_unknown_task_and_wrong_numbers(tmp_path, data):
    write_rows(tmp_path / "d", "boolq.jsonl", [])
    for code, arguments in (
        ("E140", {"task": "boolq", "data_dir": tmp_path / "d"}),
        ("E101", {"task": "hotpotqa", "data_dir": tmp_path / "d"}),
        ("E001", {"task": "mmlu", "data_dir": data}),
        ("E001", {"task": [], "data_dir": data}),
        ("E001", {"task": "boolq", "data_dir": data, "limit": 0}),
        ("E001", {"task": "boolq", "data_dir": data, "num_fewshot": -1}),
    ):
        with pytest.raises(ThoughtxError) as caught:
            run_harness(Scripted(LIKES), **arguments)
        assert caught.value.code == code, arguments


def test_without_lm_eval_and_without_the_hub(data, monkeypatch):
    import datasets
    from lm_eval.tasks import TaskManager

    def unreachable(**_: Any) -> None:
        raise ConnectionError("cannot reach the Hub")

    tasks = TaskManager(include_defaults=False, include_path=str(files("lm_eval") / "tasks" / "gsm8k"))  # its whole index takes seconds
    monkeypatch.setattr(harness, "_stock_tasks", lambda: tasks)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for task in ("gsm8k", "hotpotqa"):
        with pytest.raises(ThoughtxError, match=f"data of {task}") as caught:
            run_harness(Scripted(LIKES), task)
        assert caught.value.code == "E201" and "cannot reach the Hub" in caught.value.why
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ThoughtxError, match="needs lm-eval") as caught:
        run_harness(Scripted(LIKES), "boolq", data)
    assert caught.value.code == "E201"


@pytest.mark.parametrize(
    ("task", "path"),
    [("gsm8k", "gsm8k/gsm8k.yaml"), ("boolq", "super_glue/boolq/default.yaml"), ("commonsense_qa", "commonsense_qa/default.yaml")],
)
def test_prompts_and_metrics_are_those_of_lm_eval(task, path):
    from lm_eval.utils import apply_template

    stock, ours = yaml.safe_load((files("lm_eval") / "tasks" / path).read_text(encoding="utf-8")), CONFIGS[task]
    for row in ROWS[task]:
        row = row | ({"label": int(row["answer"])} if task == "boolq" and "answer" in row else {})
        assert ours["doc_to_text"](row) == apply_template(stock["doc_to_text"], row)
    assert ours["output_type"] == stock["output_type"] and ours.get("num_fewshot", 0) == stock.get("num_fewshot", 0)
    for name in ("filter_list", "generation_kwargs"):
        assert ours.get(name) == stock.get(name)
    for mine, theirs in zip(ours["metric_list"], stock["metric_list"], strict=True):
        assert mine == theirs | {"aggregation": "mean", "higher_is_better": True}
    if "doc_to_choice" in stock:
        assert ours["doc_to_choice"](ROWS[task][0]) == stock["doc_to_choice"]


@pytest.mark.parametrize(
    ("answer", "expected", "exact", "f1"),
    [
        ("The  Orr Valley.", "orr valley", 1, 1),
        ("Orr", "Orr Valley", 0, 2 / 3),
        ("yes it is", "yes", 0, 0),
        ("no", "no", 1, 1),
        ("the", "Orr", 0, 0),
        ("a b b", "b b c", 0, 0.8),
    ],
)
def test_answers_as_hotpotqa_scores_them(answer, expected, exact, f1):
    assert qa_scores(answer, expected) == {"exact_match": exact, "f1": pytest.approx(f1)}


@pytest.mark.parametrize("chat", [False, True])
def test_an_engine_through_all_tasks(tmp_path, data, chat, no_network):
    write_tiny(tmp_path / "m", max_position=64, tokenizer=True)
    build(tmp_path / "m", tmp_path / "e", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64, "max_batch_size": 3})
    found = run_harness(
        tmp_path / "e", ["boolq", "hotpotqa", "commonsense_qa"], data, 0, use_chat_template=chat, max_new_tokens=6, return_samples=True
    )
    assert set(found.tasks) == {"boolq", "hotpotqa", "commonsense_qa"}
    assert found.tasks["hotpotqa"].num_truncated == 2  # 64 positions do not hold the passages
    prompts = [sample.prompt for sample in found.samples["boolq"]]
    assert all(prompt.startswith("[user] ") == chat and prompt.endswith("[assistant] ") == chat for prompt in prompts)
