"""What a model's tokenizer files will not do, said where a checkpoint or an engine is made or looked at, not first where it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.text.text import Text


def text_notes(root: Path, vocab_size: int, config_json: Mapping[str, Any] | None = None) -> list[str]:
    """A sentence for each; a tokenizer is optional, so none of this is refused here."""
    try:
        text = Text.load(root, config_json)
        if text is None:
            return ["there is no tokenizer.json: an engine takes and gives token ids only (thoughtx-run --input_ids)"]
        text.check_vocab(vocab_size)
    except ThoughtxError as error:
        return [f"no engine will load with this tokenizer: {error.what}"]
    if not text.has_template:
        return ["there is no chat template: prompts go in as they are, and messages are refused"]
    try:
        text.chat("Hello")
    except ThoughtxError as error:
        return [] if error.code == "E140" else [f"prompts cannot be put into the chat template: {error.what}"]
    return []
