"""A checkpoint's own settings of generation: generation_config.json, and where there is none those that config.json holds.

As in transformers (`GenerationConfig.from_model_config`): the file, where it is there, counts alone; else every setting of config.json that
is not null. Checkpoints and engines have another config.json, so they carry such settings as a generation_config.json of their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import read_json

NAME = "generation_config.json"
LIMIT_BYTES = 16 << 20
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The others that change tokens.
SETTINGS = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"),
    *(
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "stop_strings",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
    ),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    *("exponential_decay_length_penalty", "guidance_scale", "watermarking_config"),
)


def read_generation_config(root: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings as they are written, {} when there are none; E102 unless they are a JSON object. `config`: config.json, once read."""
    root = Path(root)
    if os.path.lexists(root / NAME):
        raw = read_json(root, NAME, limit=LIMIT_BYTES)
        if not isinstance(raw, dict):
            where = shown(str(root / NAME), 400)
            raise ThoughtxError(
                "E102",
                "the file must hold a JSON object",
                where=where,
                why=f"it is {shown(raw, 40)}",
                fix="correct it there, or remove the file: it is optional",
            )
        return raw
    raw = config
    if raw is None:
        raw = read_json(root, "config.json") if os.path.lexists(root / "config.json") else {}
    if not isinstance(raw, Mapping) or not {"model_type", "architectures"} & raw.keys():
        return {}
    return {key: raw[key] for key in (*IDS, *SETTINGS) if raw.get(key) is not None and not (key in IDS and raw[key] == -1)}
