"""What counts as a right answer."""

from __future__ import annotations

import json

import pytest
from places import ROOT

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.matching import MATCHES, boxed, judge, match_for
from trtllm_thoughtx.evaluate.questions import from_file

REAL = ROOT / "bench" / "real" / "questions.jsonl"


@pytest.mark.parametrize(
    ("match", "said", "accepted", "right", "f1"),
    [
        ("contains", "The capital of France is Paris.", "Paris", True, 2 / 6),
        ("contains", "The capital of France is Lyon.", "Paris", False, 0),
        ("contains", "Parisian food", "Paris", False, 0),
        ("contains", "It is CARBON  dioxide!", "carbon dioxide", True, 4 / 6),
        ("contains", "carbon and dioxide", "carbon dioxide", False, 4 / 5),
        ("contains", "No, it is not. One could say yes.", "no", True, 2 / 9),
        ("contains", "No, it is not. One could say yes.", "yes", False, 2 / 9),
        ("normalized", "the  Eiffel-Tower!", "Eiffeltower", True, 1),
        ("normalized", "It is Paris", "Paris", False, 1 / 2),
        ("exact", " Paris\n", "Paris", True, 1),
        ("exact", "paris", "Paris", False, 0),
        ("exact", "Paris.", "Paris", False, 0),
        ("exact", r"so \boxed{Paris}", "Paris", True, 1),
        ("last_number", "3 dogs with 4 legs: 12 legs.", "12", True, 1),
        ("last_number", "It costs $1,234.50", "1234.5", True, 1),
        ("last_number", "17-5 = 12.0", "12", True, 1),
        ("last_number", "That is -7", "7", False, 0),
        ("last_number", "None of them", "7", False, 0),
        ("last_number", "12, or as I said before, 13", "12", False, 0),
        ("last_number", r"24 \boxed{12} is it, in 3 steps", "12", True, 1),
        ("choice", "B", "B", True, 1),
        ("choice", "b.", "B", True, 1),
        ("choice", "B. banana", "B", True, 1),
        ("choice", "(B) banana, not (C)", "B", True, 1),
        ("choice", "A banana is a fruit, so the answer is B.", "B", True, 1),
        ("choice", "A banana is a fruit.", "A", False, 0),
        ("choice", "A is wrong. Option: **C**", "C", True, 1),
        ("choice", "**D**", "D", True, 1),
        ("boxed", r"We get \boxed{\frac{1}{2}} at last", r"\frac{1}{2}", True, 1),
        ("boxed", r"\boxed{3} no, \boxed{ 4.0 }", r"$\boxed{4}$", True, 1),
        ("boxed", "4", "4", False, 0),
    ],
)
def test_each_way_of_comparing(match, said, accepted, right, f1):
    assert judge(match, said, (accepted,)) == (right, pytest.approx(f1))


@pytest.mark.parametrize(
    ("prompt", "said", "letter"),
    [
        ("Which one?\nA. Lyon\nB. Paris\nC. Rome", "It is Paris.", "B"),
        ("Which one?\nA. Lyon\nB. Paris\nC. Rome", "Paris", "B"),
        ("Which one?\nA. Lyon\nB. Paris\nC. Rome", "C", "C"),
        ("Which one?\nA. Lyon\nB. Paris\nC. Rome", "Not Paris: the answer is (C)", "C"),
        ("Which one?\nA. Lyon\nB. Paris\nC. Rome", "Paris or Rome", None),
        ("Which one?\nA. Lyon\nB. Paris\nC. Rome", "Parisian", None),
        ("(A) vitamin C (B) vitamin A", "The answer is vitamin C.", "A"),
        ("(A) vitamin C (B) vitamin A", "(B)", "B"),
        ("A) wine B) red wine", "red wine", "B"),
        ("A: 3\nB: 4", "4", "B"),
        ("Q: x?\nA. one\nB. two\n\nQ: y?\nA. two\nB. one", "one", "B"),
        ("No options here", "Paris", None),
    ],
)
def test_the_text_of_an_option_stands_for_its_letter(prompt, said, letter):
    right = [one for one in "ABC" if judge("choice", said, (one,), prompt)[0]]
    assert right == ([] if letter is None else [letter])


def test_any_of_several_answers_counts():
    assert judge("contains", "Holland, they say", ("Netherlands", "Holland")) == (True, pytest.approx(2 / 4))
    assert judge("last_number", "8", ("7", "8"))[0] and not judge("last_number", "9", ("7", "8"))[0]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ("12", "last_number"),
        ("-1,250.5", "last_number"),
        ("1e3", "last_number"),
        ("B", "choice"),
        ("(C)", "choice"),
        ("(c)", "contains"),
        ("Paris", "contains"),
        ("12 apples", "contains"),
        (r"\boxed{x}", "boxed"),
        ("?", "exact"),
        ("the", "exact"),
    ],
)
def test_the_form_of_the_answer_decides(answer, match):
    assert match_for((answer,)) == match


def test_boxes_that_do_not_close():
    assert boxed(r"\boxed{a \boxed{b} c") == "b" and boxed(r"\boxed{a") is None and boxed("{a}") is None


def test_real_questions_are_read_with_numbers():
    asked = from_file(REAL)
    count = {match: sum(one.match == match for one in asked) for match in MATCHES}
    assert len(asked) == 50 and (count["last_number"], count["choice"], count["contains"]) == (17, 10, 23)
    assert next(one for one in asked if one.id == "number-1").expected == "12"


def test_a_row_and_the_flag_say_how(tmp_path):
    rows = [{"prompt": "q", "answer": 5, "match": "exact"}, {"prompt": "q", "answer": ["x", 2.5]}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, other = from_file(tmp_path / "q.jsonl", match="normalized")
    assert (one.match, one.accepted, other.match, other.accepted) == ("exact", ("5",), "normalized", ("x", "2.5"))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"answer": True}, "a text, a number or a list"),
        ({"answer": []}, "empty list"),
        ({"answer": " "}, "none empty"),
        ({"answer": {"text": ["x"]}}, "a text, a number or a list"),
        ({"answer": "Paris", "match": "fuzzy"}, "match must be one of"),
        ({"answer": "Paris", "match": "last_number"}, "needs a number"),
        ({"answer": "Paris", "match": "choice"}, "needs the letter"),
        ({"answer": "the", "match": "normalized"}, "needs a word"),
    ],
)
def test_answers_that_cannot_be_compared_so(tmp_path, row, why):
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "q", "id": "n1"} | row))
    with pytest.raises(ThoughtxError) as caught:
        from_file(tmp_path / "q.jsonl")
    assert caught.value.code == "E140" and why in caught.value.why and "line 1 (id n1)" in caught.value.where


def test_the_command_line_names_what_there_is():
    from trtllm_thoughtx.cli import evaluate as command
    from trtllm_thoughtx.evaluate import benchmarks

    assert (command.MATCHES, command.BENCHMARKS) == (MATCHES, benchmarks.TASKS)
