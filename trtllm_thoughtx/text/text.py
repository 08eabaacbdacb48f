"""Text to token ids and back: the tokenizer of a checkpoint, its special ids and its chat template.

`Text.load` reads the files that Hugging Face writes and that checkpoints and engines of this project carry along:
tokenizer.json (the Rust `tokenizers` library does the work), tokenizer_config.json, special_tokens_map.json,
chat_template.jinja and generation_config.json. Their meaning follows transformers 5 with a tokenizer.json present: ids are the
same as from `apply_chat_template`. All of it is hostile input: sizes are bounded, names go through `files`, templates are
rendered in a process of their own (`chat`), and nothing is executed. Everything wrong in these files is E112, in
generation_config.json E102.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_thoughtx.checkpoint.generation_config import read_generation_config
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import read_inside
from trtllm_thoughtx.text.chat import ChatTemplate, plain_messages, template_settings
from trtllm_thoughtx.text.opening import BEFORE, SWITCH, ChatIds, marked_messages, state_behind_mark, state_of, state_of_text
from trtllm_thoughtx.text.params import GenerationParams, token_ids
from trtllm_thoughtx.text.prompts import Prompt, read_prompts
from trtllm_thoughtx.text.stream import StopStream, TextStream
from trtllm_thoughtx.text.tokenizer_files import (
    add_tokens,
    guarded,
    mark_special,
    read_object,
    read_templates,
    read_tokenizer,
    refuse,
    token_text,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Prompt", "Text", "TextStream", "prompt_ids", "read_generation_config", "read_prompts"]

TOKENIZER_BYTES = 64 << 20
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# How models mark the start and end of their thinking.
THINK_TAGS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))


class Text:
    """A tokenizer with its special ids. Fields: `bos_id`, `pad_id` (or None), `eos_ids` (rising, maybe empty),
    `special` (name -> text, as templates see it), `generation_config` (the raw object, {} when absent)."""

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

    @classmethod
    def load(cls, root: Path, config_json: Mapping[str, Any] | None = None) -> Text | None:
        """From a Hugging Face, TensorRT-LLM or engine directory, whose config.json may be read already; None without a tokenizer.json."""
        if not os.path.lexists(root / "tokenizer.json"):
            return None
        where = shown(str(root), 400)
        tokenizer = read_tokenizer(read_inside(root, "tokenizer.json", TOKENIZER_BYTES, code="E112"), f"{where}/tokenizer.json")
        config = read_object(root, "tokenizer_config.json")
        added = config.get("added_tokens_decoder")
        if added is None:  # otherwise transformers does not look at special_tokens_map.json either
            config = {**config, **read_object(root, "special_tokens_map.json")}
        else:
            add_tokens(tokenizer, added, where)
        special = {name: text for name in NAMED if (text := token_text(config.get(name), name, where)) is not None}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        texts = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else refuse("extra_special_tokens", where)
        mark_special(tokenizer, [*special.values(), *(token_text(text, "extra_special_tokens", where) or "" for text in texts)])
        return cls(
            tokenizer,
            where,
            special=special,
            templates=read_templates(root, config, where),
            generation_config=read_generation_config(root, config_json),
            add_bos=config.get("add_bos_token") is True,
        )

    # --- ids -----------------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids. `add_special` adds what the tokenizer puts around a text (often a BOS); special tokens in the text count."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _bad_prompt("the text is not valid Unicode", f"half of a surrogate pair at character {error.start}") from None
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

    def default_params(self, **overrides: Any) -> GenerationParams:
        """The checkpoint's sampling settings with `overrides` (None: keep); every EOS of the tokenizer stops too."""
        if overrides.get("stop_ids") is None:
            overrides["stop_ids"] = self.eos_ids
        return GenerationParams.from_generation_config(self.generation_config, **overrides)

    def check_vocab(self, vocab_size: int) -> None:
        """E112 when the tokenizer or generation_config.json can name a token that the model's embedding does not have."""
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        stated = max([*self.eos_ids, self.bos_id or 0, self.pad_id or 0])
        if max(highest, stated) >= vocab_size:
            what = f"the tokenizer's highest token id is {highest}" if highest >= vocab_size else f"a special token has the id {stated}"
            raise ThoughtxError(
                "E112",
                f"{what}, and the model has only {vocab_size} tokens",
                where=self._where,
                why="the tokenizer and the weights do not belong together: such an id has no embedding",
                fix="take tokenizer files and weights from the same checkpoint",
            )

    # --- chat ----------------------------------------------------------------------------------------------------------

    @property
    def has_template(self) -> bool:
        return bool(self._templates)

    def chat(
        self,
        prompt: str | Sequence[dict[str, Any]],
        *,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatIds:
        """Token ids of a chat, ready for generation. A text is one user message.

        `enable_thinking` reaches the template only when it is not None (Qwen3 reads it). A checkpoint without a template: a text
        is encoded as it is, messages are E140. E140 also for an empty result.
        """
        if not self._templates and isinstance(prompt, str):
            return self.raw(prompt)
        rendered = self.render(prompt, enable_thinking, add_generation_prompt, tools, template_kwargs)
        ids = self._some(self.encode(rendered, add_special=False))
        if self.think_tags is None:
            return ChatIds(ids, BEFORE)
        messages = marked_messages(_messages(prompt), self.think_tags)
        try:
            state = state_behind_mark(self, rendered, self.render(messages, enable_thinking, add_generation_prompt, tools, template_kwargs))
        except ThoughtxError:  # the template minds the mark
            state = None
        more: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": tools, "template_kwargs": template_kwargs}
        closed = functools.partial(self.chat, prompt, enable_thinking=False, **more)
        return ChatIds(ids, state or state_of(self, ids), closed if self.reads(SWITCH) else None)

    def raw(self, prompt: str) -> ChatIds:
        """Token ids of a text that goes in as it is."""
        return ChatIds(self._some(self.encode(prompt)), state_of_text(self, prompt))

    def set_template(self, enable_thinking: object = None, chat_template_kwargs: object = None) -> list[str]:
        """Render every chat from now on with what the two flags say; returns which of it no template reads. E001 for wrong values."""
        self.template_kwargs = template_settings(enable_thinking, chat_template_kwargs, "--enable_thinking, --chat_template_kwargs")
        why = "the chat template does not read it" if self._templates else "there is no chat template"
        return [f"{name} ({why})" for name in self.template_kwargs if not self.reads(name)]

    def reads(self, name: str) -> bool:
        """Whether a chat template mentions a variable."""
        return any(re.search(rf"\b{re.escape(name)}\b", template.source) for template in self._templates.values())

    def _some(self, ids: list[int]) -> list[int]:
        if not ids:
            raise _bad_prompt("the prompt has no tokens", "nothing is left of it after the chat template and the tokenizer")
        return ids

    def render(
        self,
        prompt: str | Sequence[dict[str, Any]],
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that `chat` tokenizes."""
        messages = _messages(prompt)
        switch = {} if enable_thinking is None else {SWITCH: enable_thinking}
        return self._template("tool_use" if tools and "tool_use" in self._templates else "default").render(
            **{**self.special, **self.template_kwargs, **(template_kwargs or {}), **switch},
            messages=messages,
            tools=None if tools is None else list(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )

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

    def _template(self, name: str) -> ChatTemplate:
        if name in self._templates:
            return self._templates[name]
        if not self._templates:
            raise _bad_prompt("messages need a chat template, and this checkpoint has none", "there is no chat_template in its files")
        raise ThoughtxError(
            "E112",
            f"there are several chat templates and none is the default: {shown(sorted(self._templates))}",
            where=self._where,
            why="which one to use is not written down",
            fix='name one of them "default" in tokenizer_config.json',
        )

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)


def _messages(prompt: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return plain_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "the prompt")


def prompt_ids(prompt: Prompt, text: Text | None, *, use_template: bool = True) -> list[int]:
    """Token ids of a prompt in any of its forms; `use_template` False: a text goes in as it is. E140 when it needs a tokenizer and there
    is none."""
    if prompt.input_ids is not None:
        return list(prompt.input_ids)
    if text is None:
        raise _bad_prompt("a text needs a tokenizer, and there is no tokenizer.json", "the engine was built from files without one")
    if prompt.prompt is not None and (prompt.is_raw or not use_template):
        return text.raw(prompt.prompt)
    return text.chat(prompt.prompt if prompt.prompt is not None else prompt.messages or (), template_kwargs=prompt.template_kwargs)


def _bad_prompt(what: str, why: str) -> ThoughtxError:
    return ThoughtxError("E140", what, where="the prompt", why=why, fix="correct the prompt, or give token ids: thoughtx-run --input_ids")
