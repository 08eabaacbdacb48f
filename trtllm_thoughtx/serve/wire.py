"""What a client sent, read: a body becomes one or several prompts with their settings, or an error that names the field.

Nothing is ignored silently: what is not supported and would change the answer is refused (`text.body`).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.jsonl import Line
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.generation import check
from trtllm_thoughtx.runtime.row import STREAMS_APART
from trtllm_thoughtx.strictjson import parse_json
from trtllm_thoughtx.text.body import COMPLETIONS, EFFORTS, FieldError, own_row
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.prompts import Prompt, prompt_of_row
from trtllm_thoughtx.text.text import prompt_ids, prompt_settings

MAX_MARKS = 200_000  # commas and brackets of a body
MAX_PROMPTS = 1024  # of one request to completions
FEW = 16  # new tokens of a completion that does not say how many, as at OpenAI's
FIX = "see docs/serve.md for the fields that are read"
# Fields that say how an answer is sent, not what it is.
DELIVERY = {"stream": False, "include_reasoning": True, "separate_reasoning": True}


class BadRequest(ThoughtxError):
    """A body that cannot be followed. `param`: the field, where it is one."""

    def __init__(self, what: str, why: str, param: str | None = None, fix: str = FIX) -> None:
        super().__init__("E140", what, where="the request's body", why=why, fix=fix)
        self.param = param
        self.status = 400


class UnknownModel(BadRequest):
    """OpenAI's clients expect status 404."""

    def __init__(self, model: object, names: Sequence[str]) -> None:
        why = f"the model is {names[0]}" + (f", with adapters {', '.join(names[1:])}" if names[1:] else "")
        super().__init__(f"there is no model {shown(model, 80)} here", why, "model", f"write {' or '.join(names)}, or leave it out")
        self.status = 404


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted: `choice` is its place among those of the request, `prompt` its prompt's, `stream` its random stream."""

    ids: Sequence[int]
    params: GenerationParams
    chunk_size: int | str | None
    choice: int
    prompt: int
    stream: int


@dataclass(frozen=True)
class Wanted:
    """A request, read. `has_reasoning`: the reasoning is sent; `is_apart`: in a field of its own, not with tags in the content."""

    url: str
    asks: tuple[Ask, ...]
    is_streamed: bool = False
    has_usage: bool = False  # in a last chunk of a stream
    has_reasoning: bool = True
    is_apart: bool = True
    echo: bool = False
    priority: int = 0
    adapter: str | None = None  # that `model` picked

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counted once."""
        return sum({ask.prompt: len(ask.ids) for ask in self.asks}.values())


def object_of(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, read strictly; `BadRequest` for anything else."""
    try:
        value = parse_json(body, "the request's body", "E140", max_marks=MAX_MARKS)
    except ThoughtxError as error:
        raise BadRequest(error.what, error.why, fix="send one JSON object, as application/json") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body is no JSON object: {shown(value, 40)}", "a request is an object with named fields")
    return value


def read_request(
    body: Mapping[str, Any],
    url: str,
    engine: Engine,
    names: Sequence[str],
    efforts: Mapping[str, int | None] = EFFORTS,
    defaults: Mapping[str, Any] | None = None,
) -> Wanted:
    """The answers that a body for `url` asks for. `names`: of the model, as clients may write them; `defaults`: settings of requests that
    do not say otherwise."""
    rest = {name: value for name, value in body.items() if value is not None}
    model, adapters = rest.get("model", names[0]), list(engine.session.adapters)
    if model not in (*names, *adapters):
        raise UnknownModel(model, (names[0], *adapters))
    given = {name: _flag(rest, name, default) for name, default in DELIVERY.items()}
    echo = _flag(rest, "echo", False) if url == COMPLETIONS else False
    if echo and given["stream"]:
        raise BadRequest("echo and stream cannot be combined", "the prompt's part comes with the whole answer", "echo", "leave stream out")
    priority = rest.pop("priority", 0)
    if type(priority) is not int or not -100 <= priority <= 100:
        raise BadRequest(f"priority must be a whole number from -100 to 100, not {shown(priority, 40)}", "it orders the queue", "priority")
    options = rest.get("stream_options", {})
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation", "continuous_usage_stats"}:
        raise BadRequest(f"stream_options {shown(options, 60)} is not known", "it may hold include_usage", "stream_options")
    if options.get("continuous_usage_stats"):
        raise BadRequest("continuous_usage_stats is not supported", "usage comes once, at the end", "stream_options")
    reasoning = rest.get("reasoning")
    is_hidden = isinstance(reasoning, dict) and reasoning.get("exclude") is True
    try:
        prompts = enumerate(_prompts(rest, url, efforts))
        asks = tuple(ask for place, one in prompts for ask in _asks(one, place, engine, url, defaults or {}))
    except FieldError as error:
        raise BadRequest(str(error).removeprefix("body."), "no field is passed over in silence", error.field) from None
    except ValueError as error:
        raise BadRequest(str(error), "the field cannot be used", _named_in(str(error), rest)) from None
    asks = tuple(replace(ask, choice=choice) for choice, ask in enumerate(asks))
    if echo and any(ask.params.logprobs and ask.params.logprobs > 20 for ask in asks):
        raise BadRequest("logprobs above 20 with echo", "each prompt token would get so many", "logprobs", "ask for at most 20")
    return Wanted(
        url,
        asks,
        is_streamed=given["stream"],
        has_usage=options.get("include_usage") is True,
        has_reasoning=given["include_reasoning"] and not is_hidden,
        is_apart=given["separate_reasoning"],
        echo=echo,
        priority=priority,
        adapter=model if model in adapters else None,
    )


def _flag(rest: dict[str, Any], name: str, default: bool) -> bool:
    value = rest.pop(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false, not {shown(value, 40)}", "it is a switch", name)
    return value


def _prompts(rest: Mapping[str, Any], url: str, efforts: Mapping[str, int | None]) -> list[Prompt]:
    """The prompts of a body: one, but where `prompt` is a list of texts or of lists."""
    several: list[Any] = [rest.get("prompt")]
    if url == COMPLETIONS and isinstance(several[0], list) and several[0] and not isinstance(several[0][0], int):
        several = several[0]
    if len(several) > MAX_PROMPTS:
        raise FieldError("prompt", f"holds {len(several)} prompts; at most {MAX_PROMPTS} go into one request")
    found = []
    for place, prompt in enumerate(several):
        row, is_closed = own_row({**rest, "prompt": prompt}, url, efforts)
        if prompt == []:
            raise FieldError("prompt", "holds no token")
        line = Line("the request's body", f"prompt {place + 1}", str(place + 1))
        found.append(replace(prompt_of_row(row, line), is_raw=url == COMPLETIONS, is_closed=is_closed))
    return found


def _asks(prompt: Prompt, place: int, engine: Engine, url: str, defaults: Mapping[str, Any]) -> list[Ask]:
    """The answers to one prompt, checked against what the engine can do."""
    own = {**defaults, **prompt_settings(prompt, engine.text)}
    chunk_size = own.pop("chunk_size", None)
    ids = prompt_ids(prompt, engine.text)
    if (what := engine.session.problem(ids)) is not None:
        raise BadRequest(f"the prompt {what}", "it does not fit the engine", "prompt" if url == COMPLETIONS else "messages", "shorten it")
    room = engine.build.max_seq_len - len(ids)
    own.setdefault("max_new_tokens", max(1, min(room, FEW) if url == COMPLETIONS else room))
    own.setdefault("seed", secrets.randbits(63))
    params = engine.default_params(**own)
    if params.max_new_tokens > room:
        why = f"the prompt has {len(ids)} tokens, and the engine holds {engine.build.max_seq_len} in all"
        raise BadRequest(f"there is no room for {params.max_new_tokens} new tokens", why, "max_tokens", f"ask for at most {room}")
    check(engine.session, engine.text, params)
    engine.session.check_chunk_size(chunk_size)
    return [Ask(ids, params, chunk_size, 0, place, place + k * STREAMS_APART) for k in range(params.num_return_sequences)]


def _named_in(message: str, body: Mapping[str, Any]) -> str | None:
    """The field of the body that a message begins with."""
    first = message.split(" ", 1)[0].removeprefix("--")
    return first if first in body else None
