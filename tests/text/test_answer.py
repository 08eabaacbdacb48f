"""Reasoning and answer of what was written, by ids and by text, with tags of one token and of several."""

from __future__ import annotations

import pytest
from tokenizer_kinds import one_token_text, several_token_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trtllm_thoughtx.text.answer import split_ids, split_text
from trtllm_thoughtx.text.text import Text

TAGS = ("<think>", "</think>")


SPLITS = [
    ("ab", False, None, "ab"),
    ("ab", True, "ab", None),
    ("<think>a</think>b", False, "a", "b"),
    ("a</think>b", True, "a", "b"),
    ("a</think>b", False, None, "a</think>b"),
    ("<think>a</think>b", True, "a", "b"),
    ("</think>b", True, "", "b"),
    ("<think>ab", False, "ab", None),
    ("a<think>b</think>", False, "b", ""),
    ("<think>a</think>b<think>a", False, "a</think>b<think>a", None),
    ("", False, None, ""),
    ("", True, "", None),
]


@pytest.mark.parametrize(("said", "is_open", "reasoning", "answer"), SPLITS)
@pytest.mark.parametrize("kind", ["text", "one", "several"])
def test_reasoning_and_answer(said, is_open, reasoning, answer, kind):
    if kind == "text":
        assert split_text(said, TAGS, is_open=is_open) == (reasoning, answer)
        return
    text = one_token_text() if kind == "one" else several_token_text()
    ids = text.encode(said)
    reply = split_ids(text, ids, is_open=is_open)
    if kind == "one" and reasoning:
        reasoning = reasoning.replace("<think>", "").replace("</think>", "")  # special tokens are not shown
    assert reply.answer_ids == (None if answer is None else text.encode(answer))
    if kind == "one" and answer:
        answer = answer.replace("</think>", "")
    assert (reply.reasoning, reply.answer) == (reasoning, answer)


def test_the_last_answer_counts():
    assert split_text("<think>a</think>b<think>c</think>d", TAGS, is_open=False) == ("a</think>b<think>c", "d")


def test_a_token_that_ends_the_tag_and_begins_the_answer_keeps_its_text():
    text = several_token_text()
    ids = [text._id_of(piece) for piece in ("a", ".</", "think", ">\n", "b")]
    reply = split_ids(text, ids, is_open=True)
    assert (reply.reasoning, reply.answer, reply.answer_ids) == ("a.", "\nb", ids[4:])


def test_special_tokens_are_not_shown():
    text = one_token_text()
    reply = split_ids(text, text.encode("<think>a</think>b<eos>"), is_open=False)
    assert (reply.reasoning, reply.answer) == ("a", "b") and len(reply.answer_ids or ()) == 2


def test_without_tags_or_tokenizer_everything_is_the_answer():
    assert split_ids(None, [4, 5], is_open=False).answer_ids == [4, 5]
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    reply = split_ids(Text(words, "test"), [1, 0], is_open=False)
    assert (reply.reasoning, reply.answer, reply.answer_ids) == (None, "ba", [1, 0])
