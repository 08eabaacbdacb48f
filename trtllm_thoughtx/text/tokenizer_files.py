"""The files of a tokenizer as Hugging Face writes them, read as hostile input. What is wrong in them is E112."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import read_inside
from trtllm_thoughtx.strictjson import parse_json
from trtllm_thoughtx.text.chat import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG_BYTES = 16 << 20
TEMPLATE_BYTES = 1 << 20
NO_LIMIT = b"1000000000000000019884624838656"  # int(1e30), which transformers writes as model_max_length; no JSON integer of ours


def read_tokenizer(data: bytes, where: str) -> Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise ThoughtxError(
            "E201",
            "tokenizers is not installed",
            where=where,
            why="texts need it",
            fix="pip install tokenizers; token ids need none: thoughtx-run --input_ids",
        ) from None
    with guarded(where):
        try:
            tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}") from None
        if getattr(tokenizer.model, "dropout", None):
            raise ValueError("the model has dropout, so that equal texts get different ids")
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def read_object(root: Path, name: str) -> dict[str, Any]:
    """A JSON object, {} when the file is absent."""
    if not os.path.lexists(root / name):
        return {}
    where = shown(str(root / name), 400)
    raw = parse_json(read_inside(root, name, CONFIG_BYTES, code="E112").replace(NO_LIMIT, b"0"), where, "E112")
    return raw if isinstance(raw, dict) else refuse("the whole file", where)


def token_text(value: object, name: str, where: str) -> str | None:
    """A token as config files write it: a text, or an object with its content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if text is None or (isinstance(text, str) and len(text) <= 1000) else refuse(name, where)


def add_tokens(tokenizer: Tokenizer, added: object, where: str) -> None:
    """Tokens that only tokenizer_config.json lists. Their ids must come out as written there."""
    from tokenizers import AddedToken

    if not isinstance(added, dict) or not all(i.isascii() and i.isdigit() and len(i) < 10 for i in added):
        refuse("added_tokens_decoder", where)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for i, entry in sorted(added.items(), key=lambda item: int(item[0])):
        content = token_text(entry, f"added_tokens_decoder.{i}", where)
        if not content or not isinstance(entry, dict):
            refuse(f"added_tokens_decoder.{i}", where)
        if content not in known:
            flags = {key: entry.get(key) is True for key in ("special", "lstrip", "rstrip", "single_word", "normalized")}
            tokenizer.add_tokens([AddedToken(content, **flags)])
        if tokenizer.token_to_id(content) != int(i):
            raise ThoughtxError(
                "E112",
                f"the id of {shown(content)!r} is {i} in tokenizer_config.json and {tokenizer.token_to_id(content)} in tokenizer.json",
                where=where,
                why="the two files do not belong together",
                fix="take both from the same checkpoint",
            )


def mark_special(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Tokens that the config names as special and the vocabulary holds as plain ones become special, as in transformers."""
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    plain = [text for text in dict.fromkeys(texts) if text and text not in known and tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in plain])


def read_templates(root: Path, config: dict[str, Any], where: str) -> dict[str, ChatTemplate]:
    """Name -> template: chat_template.jinja, or tokenizer_config.json's text or list of named ones."""
    if os.path.lexists(root / "chat_template.jinja"):
        path = f"{where}/chat_template.jinja"
        try:
            text = read_inside(root, "chat_template.jinja", TEMPLATE_BYTES, code="E112").decode()
        except UnicodeDecodeError:
            refuse("chat_template.jinja", path)
        return {"default": ChatTemplate(text.replace("\r\n", "\n").replace("\r", "\n"), path)}
    raw = config.get("chat_template")
    named = raw if isinstance(raw, list) else [] if raw is None else [{"name": "default", "template": raw}]
    found: dict[str, ChatTemplate] = {}
    for entry in named:
        name, source = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str) or len(source) > TEMPLATE_BYTES or len(found) == 64:
            refuse("chat_template", where)
        found[name] = ChatTemplate(source, f"{where}/tokenizer_config.json")
    return found


@contextlib.contextmanager
def guarded(where: str) -> Iterator[None]:
    """The tokenizer library says what is wrong in plain exceptions, and in panics, which are no `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, ThoughtxError):
        raise
    except BaseException as error:
        raise ThoughtxError(
            "E112",
            f"the tokenizer does not work: {shown(str(error))}",
            where=where,
            why="tokenizer.json is malformed, or of a kind that the tokenizers library does not know",
            fix="download tokenizer.json again; if it is as published, write it anew with a current transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        ) from None


def refuse(field: str, where: str) -> NoReturn:
    raise ThoughtxError(
        "E112",
        f"{shown(field)} has a wrong type or size",
        where=where,
        why="the tokenizer's configuration is not what Hugging Face writes",
        fix="download the tokenizer files again",
    )
