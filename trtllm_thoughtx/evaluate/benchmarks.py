"""GSM8K, BoolQ, CommonsenseQA and HotpotQA as lm-eval tasks on local files: their rows, prompts and metrics.

A file holds one object a line with the data set's own fields, and every row of it is checked before anything runs. Prompts,
filters and metrics of the first three are those of lm-eval's own tasks, so that scores compare. HotpotQA is the distractor
setting: all passages are in the prompt, exact match and token F1 after SQuAD's normalisation. No benchmark package is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtllm_thoughtx import jsonl
from trtllm_thoughtx.errors import shown
from trtllm_thoughtx.evaluate.matching import normalized
from trtllm_thoughtx.evaluate.statistics import word_f1
from trtllm_thoughtx.jsonl import text_of, texts_of

NO_ANSWERS = ("yes", "no", "noanswer")  # HotpotQA gives no partial credit for these


# --- rows ----------------------------------------------------------------------------------------------------------------
# Each check returns the fields that are used, or raises ValueError saying what is wrong with the row.


def _gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    answer = text_of(row, "answer")
    if not re.search(r"#### -?[0-9][0-9.,]*\s*$", answer):
        raise ValueError("answer must end with '#### ' and a number")
    return {"question": text_of(row, "question"), "answer": answer}


def _boolq(row: dict[str, Any]) -> dict[str, Any]:
    labels = {row[name] for name in ("label", "answer") if isinstance(row.get(name), int)}  # bool is an int: true is 1
    if len(labels) != 1 or not labels <= {0, 1}:
        raise ValueError("one of label (0 or 1) and answer (true or false) is needed, and they must agree")
    return {"passage": text_of(row, "passage"), "question": text_of(row, "question"), "label": int(labels.pop())}


def _commonsense_qa(row: dict[str, Any]) -> dict[str, Any]:
    choices = row.get("choices")
    labels, texts = (texts_of(choices, name) for name in ("label", "text")) if isinstance(choices, dict) else ([], [])
    if not 2 <= len(labels) == len(texts) == len(set(labels)):
        raise ValueError("choices must hold label and text, two lists of the same length, labels all different")
    if row.get("answerKey") not in labels:
        raise ValueError(f"answerKey must be one of the labels, not {shown(row.get('answerKey'), 40)}")
    return {"question": text_of(row, "question"), "choices": {"label": labels, "text": texts}, "answerKey": row["answerKey"]}


def _hotpotqa(row: dict[str, Any]) -> dict[str, Any]:
    context, facts = row.get("context"), row.get("supporting_facts")
    titles = texts_of(context, "title") if isinstance(context, dict) else []
    sentences = context.get("sentences") if isinstance(context, dict) else None
    if not titles or not isinstance(sentences, list) or len(sentences) != len(titles):
        raise ValueError("context must hold title and sentences, two lists of the same length")
    if not all(isinstance(some, list) and all(isinstance(one, str) for one in some) for some in sentences):
        raise ValueError("context.sentences must be a list of texts for each title")
    if facts is not None and not (isinstance(facts, dict) and set(texts_of(facts, "title")) <= set(titles)):
        raise ValueError("supporting_facts must name titles of the context")
    return {"question": text_of(row, "question"), "answer": text_of(row, "answer"), "context": {"title": titles, "sentences": sentences}}


def read_rows(data_dir: Path, name: str, task: str, note: Callable[[str], object] | None = None) -> list[dict[str, Any]]:
    """The rows of `data_dir/name`, checked for `task`. E101 when it is missing; E140 naming the lines that cannot be used."""
    check, fix = CHECKS[task], "correct these lines; the fields are those of the data set on the Hugging Face Hub, one JSON object a line"
    rows = jsonl.read_rows(
        Path(name), lambda row, line: check(row), code="E140", columns=COLUMNS[task], fix=fix, root=data_dir, has_ids=False
    )
    return rows.all(note)


# --- tasks ---------------------------------------------------------------------------------------------------------------


def _choices_text(doc: dict[str, Any]) -> str:
    pairs = zip(doc["choices"]["label"], doc["choices"]["text"], strict=True)
    return "\n".join([f"Question: {doc['question'].strip()}", *(f"{label}. {text}" for label, text in pairs), "Answer:"])


def _passages_text(doc: dict[str, Any]) -> str:
    passages = zip(doc["context"]["title"], doc["context"]["sentences"], strict=True)
    shown_passages = "\n".join(f"{title}: {''.join(sentences).strip()}" for title, sentences in passages)
    return f"Answer with a few words from these passages.\n\n{shown_passages}\n\nQuestion: {doc['question'].strip()}\nAnswer:"


def qa_scores(answer: str, expected: str) -> dict[str, float]:
    """Exact match and token F1, 0 to 1, as HotpotQA's own evaluation computes them."""
    mine, theirs = normalized(answer), normalized(expected)
    all_or_nothing = mine in NO_ANSWERS or theirs in NO_ANSWERS
    f1 = float(mine == theirs) if all_or_nothing else word_f1(mine.split(), theirs.split())
    return {"exact_match": float(mine == theirs), "f1": f1}


MEAN: dict[str, Any] = {"aggregation": "mean", "higher_is_better": True}
CHECKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "gsm8k": _gsm8k,
    "hotpotqa": _hotpotqa,
    "boolq": _boolq,
    "commonsense_qa": _commonsense_qa,
}
COLUMNS = {
    "gsm8k": ("question", "answer"),
    "hotpotqa": ("question", "answer", "context", "supporting_facts"),
    "boolq": ("passage", "question", "label", "answer"),
    "commonsense_qa": ("question", "choices", "answerKey"),
}
TASKS = tuple(CHECKS)
NUMBERS: dict[str, dict[str, Any]] = {
    "strict-match": {"regex_pattern": r"#### (\-?[0-9\.\,]+)"},
    "flexible-extract": {"regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "output_type": "generate_until",
        "num_fewshot": 5,
        "doc_to_text": lambda doc: f"Question: {doc['question']}\nAnswer:",
        "doc_to_target": lambda doc: doc["answer"],
        "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "temperature": 0.0},
        "metric_list": [
            {"metric": "exact_match", "ignore_case": True, "ignore_punctuation": False, **MEAN}
            | {"regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}
        ],
        "filter_list": [
            {"name": name, "filter": [{"function": "regex", **options}, {"function": "take_first"}]} for name, options in NUMBERS.items()
        ],
    },
    "boolq": {
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:",
        "doc_to_target": lambda doc: doc["label"],
        "doc_to_choice": lambda doc: ["no", "yes"],
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "commonsense_qa": {
        "output_type": "multiple_choice",
        "doc_to_text": _choices_text,
        "doc_to_target": lambda doc: doc["answerKey"],
        "doc_to_choice": lambda doc: list(doc["choices"]["label"]),
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "hotpotqa": {
        "output_type": "generate_until",
        "doc_to_text": _passages_text,
        "doc_to_target": lambda doc: doc["answer"],
        "process_results": lambda doc, replies: qa_scores(replies[0], doc["answer"]),
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match", **MEAN}, {"metric": "f1", **MEAN}],
    },
}
HUB_HOTPOTQA = {"dataset_path": "hotpotqa/hotpot_qa", "dataset_name": "distractor", "test_split": "validation", "fewshot_split": "train"}
