"""Bodies of OpenAI's API: every dialect of thinking control becomes one budget, and nothing that changes an answer is passed over."""

from __future__ import annotations

import pytest

from trtllm_thoughtx.text.body import CHAT, COMPLETIONS, EFFORTS, NEUTRAL, QUIET, FieldError, own_row

MESSAGES = [{"role": "user", "content": "Hello"}]


def row(**fields):
    return own_row({"messages": MESSAGES, **fields}, CHAT)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_thinking_tokens": 64},
        {"thinking_token_budget": 64},
        {"thinking_budget": 64},
        {"reasoning": {"max_tokens": 64}},
        {"thinking": {"type": "enabled", "budget_tokens": 64}},
        {"thinking_budget": 64, "reasoning": {"max_tokens": 64, "enabled": True}},
    ],
)
def test_a_number_of_thinking_tokens_in_any_dialect(fields):
    found, is_off = row(**fields)
    assert (found["max_thinking_tokens"], is_off) == (64, False)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("nested", [False, True])
def test_effort_follows_the_table(effort, nested):
    found, is_off = row(**({"reasoning": {"effort": effort}} if nested else {"reasoning_effort": effort}))
    assert is_off == (effort == "none")
    if effort == "none":
        assert "max_thinking_tokens" not in found and found["enable_thinking"] is False
    else:
        assert found.get("max_thinking_tokens") == EFFORTS[effort]
    own, _ = own_row({"messages": MESSAGES, "reasoning_effort": "low"}, CHAT, {"low": 7})
    assert own["max_thinking_tokens"] == 7


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning": {"enabled": False}},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none", "thinking_budget": 0},
    ],
)
def test_thinking_that_is_switched_off_is_off_and_the_template_knows(fields):
    found, is_off = row(**fields)
    told = found.get("enable_thinking", (found.get("chat_template_kwargs") or {}).get("enable_thinking"))
    assert told is False or found["max_thinking_tokens"] == 0
    assert is_off or found["max_thinking_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"thinking_budget": 4, "max_thinking_tokens": 5}, "thinking_budget"),
        ({"reasoning_effort": "low", "thinking_budget": 5}, "thinking_budget"),
        ({"enable_thinking": True, "reasoning_effort": "none"}, "enable_thinking"),
        ({"enable_thinking": False, "thinking_budget": 9}, "enable_thinking"),
        ({"thinking_budget": "9"}, "thinking_budget"),
        ({"thinking_budget": True}, "thinking_budget"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning": {"effort": ["low"]}}, "reasoning.effort"),
        ({"reasoning": "low"}, "reasoning"),
        ({"reasoning": {"depth": 3}}, "reasoning.depth"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type"),
        ({"enable_thinking": "no"}, "enable_thinking"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"stop_ids": [3]}, "stop_ids"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(fields, named):
    with pytest.raises(FieldError) as caught:
        row(**fields)
    assert named in str(caught.value)


def test_fields_that_change_no_answer_are_left_out():
    quiet = dict.fromkeys(QUIET, "x")
    neutral = {name: values[0] for name, values in NEUTRAL.items()}
    assert row(**quiet, **neutral, n=1, seed=None) == ({"messages": MESSAGES, "num_return_sequences": 1}, False)


def test_logprobs_of_chat_and_of_completions():
    assert row(logprobs=True, top_logprobs=4)[0]["logprobs"] == 4
    assert row(logprobs=True)[0]["logprobs"] == 0
    assert "logprobs" not in row(logprobs=False)[0]
    assert own_row({"prompt": [1, 2], "logprobs": 3}, COMPLETIONS)[0] == {"input_ids": [1, 2], "logprobs": 3}
