"""Text to token ids and back: a tokenizer with its special ids, and how its model marks its thinking."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.text.chat import ChatTemplate
from trtllm_thoughtx.text.params import GenerationParams, token_ids
from trtllm_thoughtx.text.stream import StopStream, TextStream
from trtllm_thoughtx.text.tokenizer_files import guarded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How models mark the start and end of their thinking.
THINK_TAGS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))


class Tokens:
    """Fields: `bos_id`, `pad_id` (or None), `eos_ids` (rising, maybe empty), `special` (name -> text, as templates see it),
    `generation_config` (the raw object, {} when absent)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        where: str,
        *,
        special: dict[str, str] | None = None,
        templates: dict[str, ChatTemplate] | None = None,
        generation_config: dict[str, Any] | None = None,
        add_bos: bool = False,
    ) -> None:
        self._tokenizer, self._where, self._templates = tokenizer, where, templates or {}
        self.special, self.generation_config = special or {}, generation_config or {}
        stated = {key: token_ids(self.generation_config, f"{key}_token_id") for key in ("bos", "pad", "eos")}
        named = {key: self._id_of(self.special.get(f"{key}_token")) for key in stated}
        self.bos_id = next((i for i in (named["bos"], *stated["bos"]) if i is not None), None)
        self.pad_id = next((i for i in (named["pad"], *stated["pad"]) if i is not None), None)
        self.eos_ids = tuple(sorted({*stated["eos"], *(() if named["eos"] is None else (named["eos"],))}))
        self.template_kwargs: dict[str, Any] = {}  # what every chat is rendered with, as the user set it
        self._add_bos = add_bos and self.bos_id is not None
        added = tokenizer.get_added_tokens_decoder()
        self._hidden = frozenset(i for i, token in added.items() if token.special)
        has_bytes = tokenizer.decoder is not None and b'"ByteFallback"' in tokenizer.decoder.__getstate__()
        self._byte_ids = frozenset(i for b in range(256) if has_bytes and (i := self._id_of(f"<0x{b:02X}>")) is not None)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids. `add_special` adds what the tokenizer puts around a text (often a BOS); special tokens in the text count."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise bad_prompt("the text is not valid Unicode", f"half of a surrogate pair at character {error.start}") from None
        with guarded(self._where):
            ids = list(self._tokenizer.encode(text, add_special_tokens=add_special).ids)
        if add_special and self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)  # add_bos_token, where the tokenizer.json does not do it itself
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids, bytes that are no UTF-8 as U+FFFD. Ids that the tokenizer does not know (padding rows) give nothing."""
        with guarded(self._where):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stop_stream(self, params: GenerationParams) -> StopStream:
        """`stream` up to what stops the answer."""
        return StopStream(self.stream(), params.stop, params.stop_token_ids)

    def stream(self, skip_special: bool = True) -> TextStream:
        """For one answer that is shown as it grows."""
        decode = functools.partial(self.decode, skip_special=skip_special)
        hidden = self._hidden if skip_special else frozenset()
        return TextStream(decode, lambda i: i in hidden or self._tokenizer.id_to_token(i) is None, self._byte_ids)

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Of the special tokens, the thinking tags left out."""
        texts = (self._tokenizer.id_to_token(i) for i in self._hidden)
        return tuple(text for text in texts if text and text not in (self.think_tags or ()))

    @functools.cached_property
    def think_tags(self) -> tuple[str, str] | None:
        """The tags around the thinking, as text."""
        for tags in THINK_TAGS:
            if all(self._id_of(tag) is not None for tag in tags):
                return tags
        sources = [template.source for template in self._templates.values()]
        return next((tags for tags in THINK_TAGS if any(tag in source for tag in tags for source in sources)), None)

    @functools.cached_property
    def think_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Ids of the tags around the thinking, or None. Tags that are single tokens win; else the tags that the template writes,
        which may be several tokens long and may then be cut differently beside other text."""
        if self.think_tags is None:
            return None
        first, last = self.think_tags
        single = self._id_of(first), self._id_of(last)
        if single[0] is not None and single[1] is not None:
            return (single[0],), (single[1],)
        return tuple(self.encode(first, add_special=False)), tuple(self.encode(last, add_special=False))

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)


def bad_prompt(what: str, why: str) -> ThoughtxError:
    return ThoughtxError("E140", what, where="the prompt", why=why, fix="correct the prompt, or give token ids: thoughtx-run --input_ids")
