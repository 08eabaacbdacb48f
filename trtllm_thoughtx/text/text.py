"""Text to token ids and back: the tokenizer of a checkpoint, its special ids and its chat template.

`Text.load` reads the files that Hugging Face writes and that checkpoints and engines of this project carry along:
tokenizer.json (the Rust `tokenizers` library does the work), tokenizer_config.json, special_tokens_map.json,
chat_template.jinja and generation_config.json. Their meaning follows transformers 5 with a tokenizer.json present: ids are the
same as from `apply_chat_template`. All of it is hostile input: sizes are bounded, names go through `files`, templates are
rendered in a process of their own (`chat`), and nothing is executed. Everything wrong in these files is E112, in
generation_config.json E102.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from trtllm_thoughtx.checkpoint.generation_config import read_generation_config
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import read_inside
from trtllm_thoughtx.tasks.item import BOUNDARY
from trtllm_thoughtx.text.chat import ChatTemplate, plain_messages, template_settings
from trtllm_thoughtx.text.opening import BEFORE, SWITCH, ChatIds, marked_messages, opened, state_behind_mark, state_of, state_of_text
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.prompts import Prompt
from trtllm_thoughtx.text.tokenizer_files import (
    add_tokens,
    mark_special,
    read_object,
    read_templates,
    read_tokenizer,
    refuse,
    token_text,
)
from trtllm_thoughtx.text.tokens import Tokens, bad_prompt

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11

TOKENIZER_BYTES = 64 << 20
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatOptions(TypedDict, total=False):
    """What a chat template is told beside the messages."""

    enable_thinking: bool | None  # reaches the template only when it is not None (Qwen3 reads it)
    add_generation_prompt: bool  # default True
    tools: Sequence[dict[str, Any]] | None
    template_kwargs: Mapping[str, Any] | None


class Text(Tokens):
    """The tokenizer, chat template and settings of a checkpoint or an engine."""

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

    @property
    def has_template(self) -> bool:
        return bool(self._templates)

    @property
    def template_source(self) -> str | None:
        """The chat template itself, where there is a default one."""
        template = self._templates.get("default")
        return None if template is None else template.source

    def chat(self, prompt: str | Sequence[dict[str, Any]], **options: Unpack[ChatOptions]) -> ChatIds:
        """Token ids of a chat, ready for generation. A text is one user message.

        A checkpoint without a template: a text is encoded as it is, messages are E140. E140 also for an empty result.
        """
        if not self._templates and isinstance(prompt, str):
            return self.raw(prompt)
        rendered = self.render(prompt, **options)
        ids = self._some(self.encode(rendered, add_special=False))
        if self.think_tags is None:
            return ChatIds(ids, BEFORE)
        try:
            state = state_behind_mark(self, rendered, self.render(marked_messages(_messages(prompt), self.think_tags), **options))
        except ThoughtxError:  # the template minds the mark
            state = None
        without: ChatOptions = {**options, "enable_thinking": False}
        return ChatIds(ids, state or state_of(self, ids), (lambda: self.chat(prompt, **without)) if self.reads(SWITCH) else None)

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
            raise bad_prompt("the prompt has no tokens", "nothing is left of it after the chat template and the tokenizer")
        return ids

    def render(self, prompt: str | Sequence[dict[str, Any]], **options: Unpack[ChatOptions]) -> str:
        """The text that `chat` tokenizes."""
        tools, switch = options.get("tools"), options.get("enable_thinking")
        given = {} if switch is None else {SWITCH: switch}
        return self._template("tool_use" if tools and "tool_use" in self._templates else "default").render(
            **{**self.special, **self.template_kwargs, **(options.get("template_kwargs") or {}), **given},
            messages=_messages(prompt),
            tools=None if tools is None else list(tools),
            documents=None,
            add_generation_prompt=options.get("add_generation_prompt", True),
        )

    def _template(self, name: str) -> ChatTemplate:
        if name in self._templates:
            return self._templates[name]
        if not self._templates:
            raise bad_prompt("messages need a chat template, and this checkpoint has none", "there is no chat_template in its files")
        raise ThoughtxError(
            "E112",
            f"there are several chat templates and none is the default: {shown(sorted(self._templates))}",
            where=self._where,
            why="which one to use is not written down",
            fix='name one of them "default" in tokenizer_config.json',
        )


def _messages(prompt: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return plain_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "the prompt")


def prompt_ids(prompt: Prompt, text: Text | None, *, use_template: bool = True) -> list[int]:
    """Token ids of a prompt in any of its forms; `use_template` False: a text goes in as it is. E140 when it needs a tokenizer and there
    is none."""
    if prompt.input_ids is not None:
        return list(prompt.input_ids)
    if text is None:
        raise bad_prompt("a text needs a tokenizer, and there is no tokenizer.json", "the engine was built from files without one")
    if prompt.prompt is not None and (prompt.is_raw or not use_template):
        return text.raw(prompt.prompt)
    return text.chat(prompt.prompt if prompt.prompt is not None else prompt.messages or (), template_kwargs=prompt.template_kwargs)


def prompt_settings(prompt: Prompt, text: Text | None) -> dict[str, Any]:
    """What a prompt sets itself: fields of `GenerationParams`, and chunk_size."""
    is_cut = prompt.is_closed and text is not None and text.think_ids is not None
    return {**prompt.settings, **({"max_thinking_tokens": 0} if is_cut else {})}


def trace_ids(text: Text, prompt: str, steps: Sequence[str], answer: str) -> list[int]:
    """Ids of a whole trace: the prompt in its chat template, the steps between the thinking tags (without, where there are none), and
    the answer."""
    ids: list[int] = text.chat(prompt)
    tagged = bool(steps) and text.think_ids is not None
    ids = opened(text, ids) if tagged else list(ids)
    for step in steps:
        ids += text.encode(f"{step} {BOUNDARY}", add_special=False)
    end = text.think_ids[1] if tagged and text.think_ids else ()
    return [*ids, *end, *(text.encode(answer, add_special=False) if answer else ())]
