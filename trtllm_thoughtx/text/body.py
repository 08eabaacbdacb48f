"""Bodies of requests as clients of OpenAI's API write them: the lines of a batch, and what `thoughtx-serve` receives.

`own_row` turns a body into a row with the names of this project (`prompts`). A field that would change the answer and is not supported is
refused by name; `QUIET` ones change none. The dialects in which clients limit the reasoning all become `max_thinking_tokens`:

    max_thinking_tokens, thinking_token_budget (vLLM), thinking_budget (Qwen)       the number
    reasoning_effort, reasoning.effort (OpenAI, OpenRouter)                         by the table `EFFORTS`, or the server's own
    reasoning.max_tokens, thinking.budget_tokens (OpenRouter, Anthropic, DeepSeek)  the number
    reasoning.enabled, thinking.type, enable_thinking, chat_template_kwargs         false: none at all; the chat template is told as well

Two that disagree are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from trtllm_thoughtx.errors import shown
from trtllm_thoughtx.text.params import GenerationParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEMPLATE = ("enable_thinking", "chat_template_kwargs")
SETTINGS = frozenset({one.name for one in fields(GenerationParams)} - {"stop_ids"} | {"chunk_size"})
ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
# Fields that change no answer, and values of others that change none.
QUIET = (
    *("model", "user", "metadata", "store", "stream", "stream_options", "service_tier", "safety_identifier", "request_id", "verbosity"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
# Thinking tokens of each reasoning effort; None: no limit.
EFFORTS: dict[str, int | None] = {"none": 0, "minimal": 128, "low": 512, "medium": 2048, "high": 8192, "xhigh": None, "max": None}
BUDGETS = ("max_thinking_tokens", "thinking_token_budget", "thinking_budget")
NUMBERS = (*BUDGETS, "reasoning.max_tokens", "thinking.budget_tokens")
OBJECTS = {"reasoning": ("effort", "max_tokens", "enabled", "exclude", "summary"), "thinking": ("type", "budget_tokens")}
THINKING = (*BUDGETS, "reasoning_effort", *OBJECTS)


class FieldError(ValueError):
    """A field of a body that cannot be followed."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"body.{shown(field, 60)} {what}")
        self.field = field


@dataclass(frozen=True)
class Control:
    """A field that allows so many thinking tokens at most; None: any number."""

    field: str
    budget: int | None


def own_row(body: Mapping[str, Any], url: str, efforts: Mapping[str, int | None] = EFFORTS) -> tuple[dict[str, Any], bool]:
    """The same request as a row of ours, null fields left out, and whether it wants no thinking at all (which a model that never thinks
    can follow, and no budget); ValueError names the field that cannot be followed."""
    row = {name: value for name, value in body.items() if value is not None and name not in QUIET}
    if "n" in row:
        row["num_return_sequences"] = row.pop("n")
    row = {name: value for name, value in row.items() if not _is_neutral(name, value)}
    if url == CHAT and ("logprobs" in row or "top_logprobs" in row):
        row = _chat_logprobs(row)
    row, is_off = _thinking(row, efforts)
    own = "messages" if url == CHAT else "prompt"
    for name in sorted(row):
        if name != own and name not in TEMPLATE and ALIASES.get(name, name) not in SETTINGS:
            raise FieldError(name, "would change the answer and is not supported")
    if isinstance(row.get("prompt"), list):
        row["input_ids"] = row.pop("prompt")
    return row, is_off


def _is_neutral(name: str, value: Any) -> bool:
    return any(type(value) is type(one) and value == one for one in NEUTRAL.get(name, ()))


def _chat_logprobs(row: dict[str, Any]) -> dict[str, Any]:
    """Chat has a switch and a number, completions and rows of ours a number alone."""
    row, num, is_wanted = dict(row), row.get("top_logprobs", 0), row.get("logprobs", False)
    row.pop("top_logprobs", None)
    if not isinstance(is_wanted, bool):
        raise FieldError("logprobs", f"must be true or false, not {shown(is_wanted, 40)}")
    if num and not is_wanted:
        raise FieldError("top_logprobs", "needs logprobs true")
    row.pop("logprobs", None)
    return {**row, "logprobs": num} if is_wanted else row


def _thinking(row: dict[str, Any], efforts: Mapping[str, int | None]) -> tuple[dict[str, Any], bool]:
    """The row with its controls of the thinking as max_thinking_tokens and what the chat template is told; whether it is switched off."""
    controls, switches = list(_controls(row, efforts)), dict(_switches(row))
    rest = {name: value for name, value in row.items() if name not in THINKING}
    limits = {one.budget: one.field for one in controls if one.budget is not None}
    off = next((name for name, says in switches.items() if not says), None)
    on = next((name for name, says in switches.items() if says), None)
    if off is not None:
        limits.setdefault(0, off)
    if len(limits) > 1:
        (few, first), (many, second) = sorted(limits.items())[:2]
        raise FieldError(second, f"allows {many} thinking tokens, and {first} {few}")
    if on is not None and 0 in limits:
        raise FieldError(on, f"switches the thinking on, and {limits[0]} switches it off")
    is_off = 0 in limits and limits[0] not in NUMBERS
    if limits and not is_off:
        rest["max_thinking_tokens"] = min(limits)
    told = "enable_thinking" in rest or "enable_thinking" in (rest.get("chat_template_kwargs") or {})
    if not told and (is_off or switches):
        rest["enable_thinking"] = not is_off
    return rest, is_off


def _controls(row: Mapping[str, Any], efforts: Mapping[str, int | None]) -> Iterator[Control]:
    for name, keys in OBJECTS.items():
        value = row.get(name, {})
        if not isinstance(value, dict):
            raise FieldError(name, f"must be an object, not {shown(value, 40)}")
        for key in value:
            if key not in keys:
                raise FieldError(f"{name}.{key}", "is not known")
    reasoning, thinking = row.get("reasoning", {}), row.get("thinking", {})
    numbers = [(name, row.get(name)) for name in BUDGETS]
    numbers += [("reasoning.max_tokens", reasoning.get("max_tokens")), ("thinking.budget_tokens", thinking.get("budget_tokens"))]
    for name, value in numbers:
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < 2**31:
            raise FieldError(name, f"must be a whole number from 0, not {shown(value, 40)}")
        yield Control(name, value)
    for name, value in (("reasoning_effort", row.get("reasoning_effort")), ("reasoning.effort", reasoning.get("effort"))):
        if value is None:
            continue
        if not isinstance(value, str) or value not in efforts:
            raise FieldError(name, f"must be one of {', '.join(efforts)}, not {shown(value, 40)}")
        yield Control(name, efforts[value])


def _switches(row: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """The fields that say whether there is thinking, and what they say."""
    reasoning, thinking = row.get("reasoning", {}), row.get("thinking", {})
    kwargs = row.get("chat_template_kwargs", {})
    given = [
        ("enable_thinking", row.get("enable_thinking")),
        ("chat_template_kwargs", kwargs.get("enable_thinking") if isinstance(kwargs, dict) else None),
        ("reasoning.enabled", reasoning.get("enabled")),
    ]
    for name, value in given:
        if value is None:
            continue
        if not isinstance(value, bool):
            raise FieldError(name, f"must be true or false, not {shown(value, 40)}")
        yield name, value
    if (kind := thinking.get("type")) is not None:
        if kind not in ("enabled", "disabled", "auto"):
            raise FieldError("thinking.type", f"must be enabled, disabled or auto, not {shown(kind, 40)}")
        if kind != "auto":
            yield "thinking.type", kind == "enabled"
