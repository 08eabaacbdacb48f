"""Tiny random models with a byte-level tokenizer and a chat template of a kind: what reasoning models differ in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import write_tiny
from tokenizer_kinds import CONFIG, byte_level

_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    # the thinking is always open behind the prompt
    "opens": _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n{% endif %}",
    # the model opens it itself, unless it is told not to think
    "hybrid": _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n\n</think>\n\n\n{% endif %}{% endif %}",
    # told in the system message, far from the end
    "early": "<|im_start|>system\nthink: {{ 'off' if enable_thinking is false else 'on' }}<|im_end|>\n\n"
    + _TURNS
    + "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% if enable_thinking is false %}</think>{% endif %}{% endif %}",
    # a model that never thinks; its template mentions the tags to take them out of earlier turns
    "instruct": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
    # nothing parts the user's text from the answer
    "bare": "{% for m in messages %}{{ m.content }}{% endfor %}",
}


def write_chat_model(root: Path, template: str | None, *, tags: bool = True, files: dict[str, Any] | None = None, **options: Any) -> Path:
    """`template`: a key of TEMPLATES. `tags`: the tags are tokens of their own, else several. `files`: name -> JSON value."""
    tokenizer = byte_level()
    if not tags:
        raw = json.loads(tokenizer.to_str())
        raw["added_tokens"] = [token for token in raw["added_tokens"] if "think" not in token["content"]]
        tokenizer = type(tokenizer).from_str(json.dumps(raw))
    size = tokenizer.get_vocab_size() + 3
    options = {"vocab_size": size, **options}
    write_tiny(root, config={"eos_token_id": tokenizer.token_to_id("<|im_end|>")}, **options)
    tokenizer.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"model_max_length": 512}))
    if template is not None:
        (root / "chat_template.jinja").write_text(TEMPLATES[template])
    for name, value in (files or {}).items():
        (root / name).write_text(json.dumps(value))
    return root
