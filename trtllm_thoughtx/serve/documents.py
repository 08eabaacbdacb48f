"""The JSON documents that answer a request to chat or completions: whole, and chunk by chunk.

The reasoning goes out under both names in use (`reasoning_content`, `reasoning`). `usage.thoughtx` says of each choice what only this
project knows: why the thinking ended, its steps, the chunk size and the prompt's entropy.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.serve.answering import Piece
from trtllm_thoughtx.serve.wire import Wanted
from trtllm_thoughtx.text.body import CHAT
from trtllm_thoughtx.text.reply_stream import ANSWER, REASONING
from trtllm_thoughtx.text.text import Text
from trtllm_thoughtx.text.thinking import CUT

DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """One answer as it comes in."""

    index: int
    num_prompt_tokens: int
    reasoning: str = ""
    answer: str = ""
    done: Completion | None = None
    prompt_ids: Sequence[int] = ()

    def add(self, part: str, piece: str) -> None:
        if part == REASONING:
            self.reasoning += piece
        else:
            self.answer += piece


@dataclass
class Documents:
    """Of one request. `text` writes its tokens, None: the engine has no tokenizer."""

    wanted: Wanted
    model: str
    text: Text
    id: str = ""
    created: int = 0
    _inside: set[int] = field(default_factory=set)  # choices whose reasoning is open in their content

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = self.created or int(time.time())

    @property
    def is_chat(self) -> bool:
        return self.wanted.url == CHAT

    def choices(self) -> list[Choice]:
        return [Choice(ask.choice, len(ask.ids), prompt_ids=ask.ids) for ask in self.wanted.asks]

    def shown(self, piece: Piece) -> list[tuple[int, str, str]]:
        """What of a piece the client gets: (choice, part, text). Reasoning that is not to stand apart becomes content, between its tags."""
        found = [(piece.index, part, said) for part, said in piece.parts]
        if not self.wanted.has_reasoning:
            found = [one for one in found if one[1] == ANSWER]
        if self.wanted.is_apart or not self.is_chat:
            return found
        return list(self._inline(piece, found))

    def _inline(self, piece: Piece, found: list[tuple[int, str, str]]) -> Iterator[tuple[int, str, str]]:
        opening, closing = self.text.think_tags or ("", "")
        for index, part, said in found:
            if (part == REASONING) != (index in self._inside):
                said = (closing if index in self._inside else opening) + said
                self._inside ^= {index}
            yield index, ANSWER, said
        if piece.done is not None and piece.index in self._inside and piece.done.thinking_stop != CUT:
            self._inside.remove(piece.index)
            yield piece.index, ANSWER, closing

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        found = [self._choice(choice) for choice in choices]
        return {**self._head(kind), "choices": found, "usage": self.usage(choices)}

    def first(self, index: int) -> dict[str, Any]:
        """The chunk that opens a choice of a chat."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, part: str, piece: str) -> dict[str, Any]:
        if not self.is_chat:
            return self._chunk(index, piece)
        if part == ANSWER or not self.wanted.is_apart:
            return self._chunk(index, {"content": piece})
        return self._chunk(index, {"reasoning_content": piece, "reasoning": piece})

    def last(self, choice: Choice) -> dict[str, Any]:
        chunk = self._chunk(choice.index, {} if self.is_chat else "")
        chunk["choices"][0] |= self._end(choice)
        return chunk

    def totals(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk with the usage, which has no choices."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        done = [choice.done for choice in choices if choice.done is not None]
        num_new, num_prompt = sum(len(one.output_ids) for one in done), self.wanted.num_prompt_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": sum(one.num_reused_tokens for one in done)},
            "completion_tokens_details": {"reasoning_tokens": sum(one.num_thinking_tokens for one in done)},
            "thoughtx": [
                {
                    "stop_reason": one.stop_reason,
                    "thinking_stop": one.thinking_stop,
                    "num_steps": one.num_steps,
                    "num_thinking_tokens": one.num_thinking_tokens,
                    "chunk_size": one.chunk_size,
                    "prompt_entropy": one.prompt_entropy,
                    "single_step": one.single_step,
                    "num_layer_tokens": one.num_layer_tokens,
                    "seed": self.wanted.asks[choice.index].params.seed,
                }
                for choice in choices
                if (one := choice.done) is not None
            ],
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, index: int, said: Any) -> dict[str, Any]:
        body = {"delta": said} if self.is_chat else {"text": said}
        chunk = {**self._head(self._chunk_kind), "choices": [{"index": index, **body, "logprobs": None, "finish_reason": None}]}
        return {**chunk, "usage": None} if self.wanted.has_usage else chunk

    def _choice(self, choice: Choice) -> dict[str, Any]:
        if not self.is_chat:
            assert choice.done is not None
            said = self.text.decode(choice.done.output_ids)[: choice.done.text_end]
            before = self.text.decode(list(choice.prompt_ids)) if self.wanted.echo else ""
            return {"index": choice.index, "text": before + said, **self._end(choice)}
        message: dict[str, Any] = {"role": "assistant", "content": choice.answer}
        if choice.reasoning:
            message |= {"reasoning_content": choice.reasoning, "reasoning": choice.reasoning}
        return {"index": choice.index, "message": message, **self._end(choice)}

    def _end(self, choice: Choice) -> dict[str, Any]:
        done = choice.done
        assert done is not None
        reason = {"finish_reason": done.finish_reason, "stop_reason": done.stop_string}
        return {"logprobs": self._chat_logprobs(done) if self.is_chat else self._logprobs(choice, done), **reason}

    def _chat_logprobs(self, done: Completion) -> dict[str, Any] | None:
        if done.top_logprobs is None or done.logprobs is None:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            said = self.text.decode([token], skip_special=False)
            return {"token": said, "logprob": logprob, "bytes": list(said.encode()), "id": token}

        rows = zip(done.output_ids, done.logprobs, done.top_logprobs, strict=True)
        return {"content": [{**entry(token, value), "top_logprobs": [entry(*one) for one in top]} for token, value, top in rows]}

    def _logprobs(self, choice: Choice, done: Completion) -> dict[str, Any] | None:
        """As completions have it: lists by token; a prompt that is echoed comes first, its first token without a value."""
        if done.top_logprobs is None or done.logprobs is None:
            return None
        ids: list[int] = list(done.output_ids)
        values: list[float | None] = list(done.logprobs)
        tops: list[list[tuple[int, float]] | None] = list(done.top_logprobs)
        if self.wanted.echo and done.prompt_logprobs is not None and done.prompt_top_logprobs is not None:
            ids, values, tops = [*choice.prompt_ids, *ids], [None, *done.prompt_logprobs, *values], [None, *done.prompt_top_logprobs, *tops]
        said = [self.text.decode([token], skip_special=False) for token in ids]
        growing, offsets = self.text.stream(), [0]
        for token in ids[:-1]:
            offsets.append(offsets[-1] + len(growing.push(token)))
        named = [None if top is None else {self.text.decode([token], skip_special=False): value for token, value in top} for top in tops]
        return {"tokens": said, "token_logprobs": values, "top_logprobs": named, "text_offset": offsets}


def event(document: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
