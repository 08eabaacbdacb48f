"""Whether a prompt leaves the thinking open, and how it is opened or closed there. Everything that asks or changes this does it here.

Only what a chat template writes behind the last user message counts, not a tag in anybody's text: so `Text.chat` renders the messages a
second time, without their tags and with a mark behind the last user message, and looks at what follows the mark (`ChatIds.state`).
Ids that come from elsewhere speak for themselves: an opening tag opens unless a closing tag or another special token follows it, which
ends a message in every chat format. Of a text that goes in raw only a tag at its end counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trtllm_thoughtx.text.answer import num_tokens_until
from trtllm_thoughtx.text.tokens import Tokens

BEFORE, INSIDE, BEHIND = "before", "inside", "behind"
SWITCH = "enable_thinking"  # what templates call their own way of not thinking
MARK = "\ue000\ue001\ue000"


class ChatIds(list[int]):
    """Token ids of a prompt. `state`: the thinking has not begun at its end, is open, or was closed. `closed` makes the same prompt as
    the template writes it for an answer without thinking; None where the template has no way of its own."""

    def __init__(self, ids: Iterable[int], state: str, closed: Callable[[], ChatIds] | None = None) -> None:
        super().__init__(ids)
        self.state, self._closed = state, closed

    def closed(self) -> ChatIds | None:
        return None if self._closed is None else self._closed()


def state_of(text: Tokens | None, ids: Sequence[int]) -> str:
    """Where the thinking stands behind a prompt."""
    if isinstance(ids, ChatIds):
        return ids.state
    if text is None or text.think_ids is None or text.think_tags is None:
        return BEFORE
    first, last = text.think_ids
    if len(first) == len(last) == 1:
        at = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in (first[0], last[0])), None)
        return BEFORE if at is None else _judged(ids[at] == first[0], text.decode(ids[at + 1 :], skip_special=False), text)
    said = text.decode(ids, skip_special=False)
    at = max((said.rfind(tag) + len(tag) for tag in text.think_tags if tag in said), default=-1)
    if at < 0:
        return BEFORE
    return _judged(said[:at].endswith(text.think_tags[0]), text.decode(ids[num_tokens_until(text, ids, at) :], skip_special=False), text)


def state_of_text(text: Tokens, said: str) -> str:
    """Of a text that goes in raw."""
    if text.think_tags is None:
        return BEFORE
    return INSIDE if said.rstrip().endswith(text.think_tags[0]) else BEHIND if said.rstrip().endswith(text.think_tags[1]) else BEFORE


def state_behind_mark(text: Tokens, rendered: str, marked: str) -> str | None:
    """Of a rendered chat, by its rendering with `marked_messages`; None when the two do not end alike."""
    tail = marked.rpartition(MARK)[2]
    if text.think_tags is None or not _without(rendered, text.think_tags).endswith(_without(tail, text.think_tags)):
        return None
    found = list(re.finditer("|".join(map(re.escape, text.think_tags)), tail))
    return BEFORE if not found else _judged(found[-1][0] == text.think_tags[0], tail[found[-1].end() :], text)


def marked_messages(messages: Sequence[dict[str, Any]], tags: tuple[str, str]) -> list[dict[str, Any]]:
    """The messages without tags, and a mark at the end of the last one of the user."""
    marked = [_without(message, tags) for message in messages]
    user = next((message for message in reversed(marked) if message["role"] == "user"), None)
    if user is not None:
        content = user.get("content")
        parts = [*content, {"type": "text", "text": MARK}] if isinstance(content, list) else None
        user["content"] = f"{content or ''}{MARK}" if parts is None else parts
    return marked


def opened(text: Tokens, ids: Sequence[int]) -> list[int]:
    """The prompt with the thinking open behind it."""
    assert text.think_ids is not None
    return [*ids, *(() if state_of(text, ids) == INSIDE else text.think_ids[0])]


def closed(text: Tokens, ids: Sequence[int]) -> Sequence[int]:
    """The prompt for an answer without thinking: in the template's own way, else with the thinking closed before it begins."""
    assert text.think_ids is not None
    state = state_of(text, ids)
    if state == BEHIND:
        return ids
    if isinstance(ids, ChatIds) and (own := ids.closed()) is not None and own.state != INSIDE:
        return own
    return ChatIds([*opened(text, ids), *text.think_ids[1]], BEHIND)


def _judged(opens: bool, rest: str, text: Tokens) -> str:
    """What the last tag means, by the text behind it."""
    if not opens:
        return BEFORE if rest.strip() else BEHIND
    return BEFORE if any(token in rest for token in text.special_texts) else INSIDE


def _without(value: Any, tags: tuple[str, str]) -> Any:
    if isinstance(value, str):
        return value.replace(tags[0], "").replace(tags[1], "")
    if isinstance(value, list):
        return [_without(one, tags) for one in value]
    return {key: _without(one, tags) for key, one in value.items()} if isinstance(value, dict) else value
