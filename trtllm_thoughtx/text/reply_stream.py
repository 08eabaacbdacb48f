"""An answer as it grows, its reasoning and the rest told apart: what `answer.split_ids` says of the whole, piece by piece.

Tags of one token are known by their id, others by their text, of which anything that may be the beginning of a tag is held back. Text
before an opened thought and behind a closed one is the answer's. A stop string ends the answer, or the reasoning, that it stands in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.stream import StopStream

if TYPE_CHECKING:
    from trtllm_thoughtx.text.text import Text

REASONING, ANSWER = "reasoning", "answer"
Piece = tuple[str, str]  # which of the two, and its text


class ReplyStream:
    """`push` each generated id, then `end`; the pieces of each part joined are its text. `is_open`: the prompt ends inside the thinking."""

    def __init__(self, text: Text, params: GenerationParams, *, is_open: bool) -> None:
        self._text, self._params = text, params
        self._tags, self._ids = text.think_tags, text.think_ids
        self._by_id = self._ids is not None and len(self._ids[0]) == len(self._ids[1]) == 1
        self._part = REASONING if is_open and self._tags is not None else ANSWER
        self._stream: StopStream = text.stop_stream(params)
        self._held = ""  # text that may begin a tag
        self._is_fresh = self._part == REASONING  # where the model opens again what the prompt has opened

    @property
    def is_done(self) -> bool:
        """A stop was met."""
        return self._stream.is_done

    def push(self, token: int) -> list[Piece]:
        if self._by_id and self._ids is not None and not self.is_done:
            opens, closes = self._ids[0][0], self._ids[1][0]
            if token in (opens, closes) and (token == opens) != (self._part == REASONING):
                rest = self._piece(self._stream.end())
                self._part = REASONING if token == opens else ANSWER
                self._stream = self._text.stop_stream(self._params)
                return rest
        return self._pieces(self._stream.push(token))

    def end(self) -> list[Piece]:
        """What was held back."""
        found = self._pieces(self._stream.end())
        held, self._held = self._held, ""
        return [*found, *self._piece(held)]

    def _piece(self, said: str) -> list[Piece]:
        return [(self._part, said)] if said else []

    def _pieces(self, said: str) -> list[Piece]:
        return self._piece(said) if self._by_id or self._tags is None else list(self._by_text(said))

    def _by_text(self, said: str) -> Iterator[Piece]:
        assert self._tags is not None
        said = self._held + said
        if self._is_fresh and said:
            if self._tags[0].startswith(said):
                self._held = said
                return
            self._is_fresh, said = False, said.removeprefix(self._tags[0])
        while said:
            tag = self._tags[self._part == REASONING]
            before, found, behind = said.partition(tag)
            if not found:
                break
            yield from self._piece(before)
            self._part, said = (ANSWER if self._part == REASONING else REASONING), behind
        tag = self._tags[self._part == REASONING]
        num_held = next((num for num in range(min(len(tag) - 1, len(said)), 0, -1) if tag.startswith(said[-num:])), 0)
        sure = said[: len(said) - num_held]
        self._held = said[len(sure) :]
        yield from self._piece(sure)
