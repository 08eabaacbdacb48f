"""`/v1/responses`, as far as a server without memory can: text in, text out, nothing stored.

A body becomes one of chat (`read`), whose answer is written as a response object or as its events. Items that are no text, tools and
`previous_response_id` are refused by name.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trtllm_thoughtx.errors import shown
from trtllm_thoughtx.serve.documents import Choice, Documents
from trtllm_thoughtx.serve.wire import BadRequest
from trtllm_thoughtx.text.reply_stream import ANSWER, REASONING

URL = "/v1/responses"
SAME = (  # fields that mean the same to chat
    *("model", "temperature", "top_p", "user", "metadata", "stream", "seed", "stop", "reasoning", "top_k", "min_p", "service_tier"),
    *(
        "max_reasoning_depth",
        "max_thinking_tokens",
        "exit_threshold",
        "exit_probe",
        "chunk_size",
        "chat_template_kwargs",
        "enable_thinking",
    ),
    *("safety_identifier", "prompt_cache_key", "priority"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False),
    "store": (False, True),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([],),
    "text": ({"format": {"type": "text"}}, {}),
}
KINDS = ("input_text", "output_text", "text")


def read(body: Mapping[str, Any]) -> tuple[dict[str, Any], Reply]:
    """The body for chat, and what writes the reply."""
    chat: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or any(value == one for one in NEUTRAL.get(name, ())):
            continue
        if name in SAME:
            chat[name] = value
        elif name == "max_output_tokens":
            chat["max_tokens"] = value
        elif name not in ("input", "instructions"):
            raise BadRequest(f"{shown(name, 60)} is not supported", "this server keeps nothing and calls no tools", name)
    if isinstance(summary := chat.get("reasoning"), dict):
        chat["reasoning"] = {key: value for key, value in summary.items() if key != "summary"}
    instructions = body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise BadRequest("instructions must be a text", "it is the system message", "instructions")
    first = [] if instructions is None else [{"role": "system", "content": instructions}]
    return {**chat, "messages": [*first, *_messages(body.get("input"))]}, Reply(body)


def _messages(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str) and given:
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise BadRequest("input must be a text or a list of messages", "there is nothing to answer", "input")
    found = []
    for place, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "reasoning":  # of an earlier turn; templates drop it
            continue
        if kind != "message" or not isinstance(item.get("role"), str):
            raise BadRequest(f"item {place} of input is no message", "only messages of text are read", "input")
        content = item.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") in KINDS and isinstance(part.get("text"), str) for part in content):
                raise BadRequest(f"item {place} of input holds a part that is no text", "only text is read", "input")
            content = "\n".join(part["text"] for part in content)
        role = "system" if item["role"] == "developer" else item["role"]
        found.append({"role": role, "content": content})
    return found


@dataclass
class Reply:
    """The response to one body. Its events are numbered."""

    body: Mapping[str, Any]
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    message_id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    reasoning_id: str = field(default_factory=lambda: f"rs_{uuid.uuid4().hex}")
    num_events: int = 0
    _open: str | None = None  # the part that is being written
    _said: dict[str, str] = field(default_factory=lambda: {REASONING: "", ANSWER: ""})
    _place: dict[str, int] = field(default_factory=dict)  # of each part's item in the output

    def whole(self, made: Documents, choice: Choice) -> dict[str, Any]:
        items = [self._item(REASONING, choice.reasoning)] if choice.reasoning else []
        return self._response(made, choice, [*items, self._item(ANSWER, choice.answer)])

    def begin(self, made: Documents) -> Iterator[dict[str, Any]]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(made, None, []))

    def delta(self, part: str, piece: str) -> Iterator[dict[str, Any]]:
        if part != self._open:
            yield from self._closed()
            yield from self._opened(part)
        self._said[part] += piece
        kind = "response.output_text.delta" if part == ANSWER else "response.reasoning_text.delta"
        yield self._event(kind, **self._at(part), delta=piece, **({"logprobs": []} if part == ANSWER else {}))

    def end(self, made: Documents, choice: Choice) -> Iterator[dict[str, Any]]:
        if ANSWER not in self._place:
            yield from self._closed()
            yield from self._opened(ANSWER)
        yield from self._closed()
        items = [self._item(part, self._said[part]) for part, _ in sorted(self._place.items(), key=lambda one: one[1])]
        response = self._response(made, choice, items)
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, made: Documents, error: Mapping[str, Any]) -> dict[str, Any]:
        response = {**self._response(made, None, []), "status": "failed", "error": {"code": error["code"], "message": error["message"]}}
        return self._event("response.failed", response=response)

    def _opened(self, part: str) -> Iterator[dict[str, Any]]:
        self._open = part
        self._place.setdefault(part, len(self._place))
        item = {**self._item(part, ""), "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=self._place[part], item=item)
        yield self._event("response.content_part.added", **self._at(part), part=self._item(part, "")["content"][0])

    def _closed(self) -> Iterator[dict[str, Any]]:
        part, self._open = self._open, None
        if part is None:
            return
        item = self._item(part, self._said[part])
        kind = "response.output_text.done" if part == ANSWER else "response.reasoning_text.done"
        yield self._event(kind, **self._at(part), text=self._said[part], **({"logprobs": []} if part == ANSWER else {}))
        yield self._event("response.content_part.done", **self._at(part), part=item["content"][0])
        yield self._event("response.output_item.done", output_index=self._place[part], item=item)

    def _at(self, part: str) -> dict[str, Any]:
        item = self.message_id if part == ANSWER else self.reasoning_id
        return {"item_id": item, "output_index": self._place[part], "content_index": 0}

    def _item(self, part: str, said: str) -> dict[str, Any]:
        if part == REASONING:
            content: list[dict[str, Any]] = [{"type": "reasoning_text", "text": said}]
            return {"id": self.reasoning_id, "type": "reasoning", "summary": [], "content": content, "status": "completed"}
        content = [{"type": "output_text", "text": said, "annotations": [], "logprobs": []}]
        return {"id": self.message_id, "type": "message", "role": "assistant", "content": content, "status": "completed"}

    def _response(self, made: Documents, choice: Choice | None, output: list[dict[str, Any]]) -> dict[str, Any]:
        done = None if choice is None else choice.done
        is_cut = done is not None and done.finish_reason == "length"
        status = "in_progress" if done is None else "incomplete" if is_cut else "completed"
        params, usage = made.wanted.asks[0].params, None
        if choice is not None and done is not None:
            totals = made.usage([choice])
            usage = {
                "input_tokens": totals["prompt_tokens"],
                "input_tokens_details": totals["prompt_tokens_details"],
                "output_tokens": totals["completion_tokens"],
                "output_tokens_details": totals["completion_tokens_details"],
                "total_tokens": totals["total_tokens"],
                "thoughtx": totals["thoughtx"],
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": made.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": self.body.get("instructions"),
            "max_output_tokens": self.body.get("max_output_tokens"),
            "metadata": self.body.get("metadata") or {},
            "model": made.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": self.body.get("reasoning") or {"effort": None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": usage,
        }

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self.num_events += 1
        return {"type": kind, "sequence_number": self.num_events - 1, **more}


def event(document: Mapping[str, Any]) -> bytes:
    """A server-sent event that carries its name."""
    said = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return f"event: {document['type']}\ndata: {said}\n\n".encode()
