"""Reasoning and answer piece by piece: joined, they are what `split_ids` says of the whole."""

from __future__ import annotations

import random

import pytest
from tokenizer_kinds import one_token_text, several_token_text

from trtllm_thoughtx.text.answer import split_ids
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.reply_stream import ANSWER, REASONING, ReplyStream

SAID = [
    ("ab", False),
    ("ab", True),
    ("<think>a</think>b", False),
    ("a</think>b", True),
    ("a</think>b", False),
    ("<think>ab", False),
    ("</think>b", True),
    ("<think>a</think>b", True),
    ("", True),
]


def joined(text, ids, params=None, *, is_open):
    stream, parts = ReplyStream(text, params or GenerationParams(), is_open=is_open), {REASONING: "", ANSWER: ""}
    for token in ids:
        for part, piece in stream.push(token):
            assert piece
            parts[part] += piece
    for part, piece in stream.end():
        parts[part] += piece
    return parts


@pytest.mark.parametrize(("said", "is_open"), SAID)
@pytest.mark.parametrize("kind", [one_token_text, several_token_text])
def test_pieces_are_the_reply(said, is_open, kind):
    text = kind()
    ids = text.encode(said)
    reply = split_ids(text, ids, is_open=is_open)
    assert joined(text, ids, is_open=is_open) == {REASONING: reply.reasoning or "", ANSWER: reply.answer or ""}


@pytest.mark.parametrize("kind", [one_token_text, several_token_text])
def test_a_stop_string_cut_across_tokens_ends_the_part_that_it_stands_in(kind):
    text, params = kind(), GenerationParams(stop=("ba",))
    ids = text.encode("<think>a</think>abab")
    assert joined(text, ids, params, is_open=False) == {REASONING: "a", ANSWER: "a"}
    ids = text.encode("aba</think>a")
    stream = ReplyStream(text, params, is_open=True)
    assert "".join(piece for token in ids for _, piece in stream.push(token)) == "a" and stream.is_done


def test_half_a_tag_is_held_back_and_then_given():
    text = several_token_text()
    stream = ReplyStream(text, GenerationParams(), is_open=False)
    given = [stream.push(token) for token in text.encode("a</think")]
    assert [piece for pieces in given for _, piece in pieces] == ["a", "</", "think"]  # nothing opened it: it is text
    stream = ReplyStream(text, GenerationParams(), is_open=True)
    given = [stream.push(token) for token in text.encode("a</think")]
    assert [piece for pieces in given for _, piece in pieces] == ["a"] and stream.end() == [(REASONING, "</think")]


def test_random_texts_of_several_token_tags_lose_no_character():
    text, rng = several_token_text(), random.Random(3)
    for _ in range(200):
        ids = text.encode(
            "".join(rng.choice(["a", "b", "<", "/", ">", "think", "<think>", "</think>"]) for _ in range(rng.randrange(1, 12)))
        )
        whole, parts = text.decode(ids), joined(text, ids, is_open=False)
        num_tags = whole.count("<think>")
        if not num_tags:
            assert parts == {REASONING: "", ANSWER: whole}
        elif num_tags == 1:
            before, _, behind = whole.partition("<think>")
            reasoning, _, rest = behind.partition("</think>")
            assert parts == {REASONING: reasoning, ANSWER: before + rest}
