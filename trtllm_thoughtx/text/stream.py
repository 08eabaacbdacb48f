"""Text as it is generated: the pieces joined are `decode` of all ids, and no piece holds half a character.

Each push decodes the last few tokens again and emits what is new, because what a token adds depends on its neighbours: bytes
of one character, a space between words, a space that is dropped at the start. Two things are held back: one U+FFFD at
the end, which may be a character that is not complete yet, and a run of byte tokens (`<0xE6>`), which SentencePiece
decoders accept or reject as a whole. The tail that is decoded stays short, so a long answer costs no more per token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

STREAM_TOKENS = 24  # a push decodes at most about this many tokens ...
STREAM_CONTEXT = 8  # ... of which this many, already emitted, are kept when the tail is cut


class TextStream:
    """Decodes a growing answer. Ids that are `hidden` show nothing; `byte_ids` are tokens that each stand for one byte."""

    def __init__(self, decode: Callable[[Sequence[int]], str], hidden: Callable[[int], bool], byte_ids: frozenset[int]) -> None:
        self._decode, self._hidden, self._byte_ids = decode, hidden, byte_ids
        self._ids: list[int] = []  # the tail of the answer, as far back as it may still matter
        self._num_emitted = 0  # characters of the tail's text that were emitted

    def push(self, token: int) -> str:
        """What `token` adds to the text that is certain: often a word, sometimes nothing yet."""
        token = int(token)
        if self._hidden(token):
            return ""
        self._ids.append(token)
        if token in self._byte_ids:  # a run of byte tokens is valid or not as a whole
            return ""
        piece = self._emit(is_last=False)
        if len(self._ids) > STREAM_TOKENS:
            start = len(self._ids) - STREAM_CONTEXT
            while start and self._ids[start] in self._byte_ids:
                start -= 1
            self._ids = self._ids[start:]
            self._num_emitted = len(self._certain())
        return piece

    def pending(self) -> str:
        """What `end` would give."""
        return self._decode(self._ids)[self._num_emitted :]

    def end(self) -> str:
        """The rest: a character that never became complete shows as U+FFFD."""
        return self._emit(is_last=True)

    def _emit(self, is_last: bool) -> str:
        text = self._decode(self._ids) if is_last else self._certain()
        piece = text[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(text))
        return piece

    def _certain(self) -> str:
        return self._decode(self._ids).removesuffix("\ufffd")  # one at the end may be the start of a character


class StopStream:
    """A `TextStream` that ends before the first of `stops`, and before a token of `stop_ids`.

    What may be the beginning of a stop string is held back until it is known. Several that end with the same token: the one that begins
    first counts.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str], stop_ids: Collection[int] = ()) -> None:
        self._stream, self._stops, self._stop_ids = stream, stops, stop_ids
        self._held = ""
        self.num_chars = 0  # of the text so far
        self.is_done = False
        self.found: str | None = None  # the stop string, when it was one

    def push(self, token: int) -> str:
        if self.is_done:
            return ""
        if token in self._stop_ids:
            text = self.end()
            self.is_done = True
            return text
        self._held += self._stream.push(token)
        if not self._stops:
            return self._give(len(self._held))
        seen = self._held + self._stream.pending()
        places = [(at, -len(stop), stop) for stop in self._stops if (at := seen.find(stop)) >= 0]
        if places:
            at, _, self.found = min(places)
            self.is_done, self._held = True, seen[:at]
            return self._give(at)
        held = (num for num in range(len(self._held), 0, -1) if any(stop.startswith(self._held[-num:]) for stop in self._stops))
        return self._give(len(self._held) - next(held, 0))

    def end(self) -> str:
        """The rest of a text that nothing stopped."""
        if not self.is_done:
            self._held += self._stream.end()
        return self._give(len(self._held))

    def _give(self, num: int) -> str:
        piece, self._held = self._held[:num], self._held[num:]
        self.num_chars += len(piece)
        return piece
