"""What a checkpoint must hold, tensor by tensor, compared with what it does hold: names, shapes and types, before a value is read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trtllm_thoughtx.checkpoint.directory import TensorInfo
from trtllm_thoughtx.checkpoint.members import QUANT_FILE
from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, counted, listed, shown
from trtllm_thoughtx.families import Tensor
from trtllm_thoughtx.families.hf_config import IMPORT

STORED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOATS = (*STORED_DTYPES, "F64")  # float64 is read and rounded; nothing is written in it
MATRICES = ("weight", "scales", "qzeros")
EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head.weight"
_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


def refuse_unexplained(stored: Mapping[str, TensorInfo], path: Path) -> None:
    """E103 when matrices are no floating-point numbers and config.json does not say how they are quantized."""
    others = [f"{shown(name)}: {info.dtype}" for name, info in stored.items() if info.dtype not in FLOATS and name.endswith(MATRICES)]
    if others and os.path.lexists(path / QUANT_FILE):
        why = f"{QUANT_FILE} says so, and weights must be F64, F32, F16 or BF16"
        raise ThoughtxError("E103", "the checkpoint is already quantized (modelopt)", where=str(path), why=why, fix=IMPORT)
    if others:
        raise ThoughtxError(
            "E103",
            f"weights are quantized, and config.json does not say how ({counted(len(others), 'tensor')})",
            where=str(path),
            why=f"weights are read as F64, F32, F16 or BF16:\n           {listed(others)}",
            fix="use the config.json that was saved with these weights and has their quantization_config, or the original, "
            "unquantized checkpoint",
        )


def check_tensors(table: Sequence[Tensor], stored: Mapping[str, TensorInfo], config: ModelConfig, path: Path) -> None:
    """E107 with every tensor that is missing, extra, misshapen or of the wrong type."""
    rows: dict[str, int] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    fixed = {tensor.name: tensor.stored for tensor in table if tensor.stored}
    for tensor in table:
        for part in tensor.parts:
            rows[part.source] = max(rows.get(part.source, 0), part.first_row + part.shape[0])
            wanted[part.source] = tensor.shape if part.source == tensor.name else (rows[part.source], *part.shape[1:])
    if config.tied and not config.has_head and HEAD in stored:
        wanted[HEAD] = (config.vocab_size, config.hidden_size)
    problems = [f"{name}: missing, wanted {list(shape)}" for name, shape in wanted.items() if name not in stored]
    for name, info in stored.items():
        if name not in wanted:
            if not _HARMLESS.fullmatch(name):
                problems.append(f"{shown(name)}: not a tensor of this model")
        elif fixed.get(name, info.dtype) != info.dtype:
            problems.append(f"{shown(name)}: has type {info.dtype}, wanted {fixed[name]}")
        elif info.dtype not in FLOATS and name not in fixed:
            problems.append(f"{shown(name)}: has type {info.dtype}, wanted {', '.join(FLOATS)}")
        elif info.shape != wanted[name]:
            problems.append(f"{shown(name)}: has shape {list(info.shape)}, wanted {list(wanted[name])}")
    if not problems:
        return
    what, why, fix = (
        f"tensors do not fit the configuration: {counted(len(problems), 'problem')}",
        listed(problems),
        "use the config.json that belongs to these weights",
    )
    if "model.embed_tokens.weight" in wanted and "embed_tokens.weight" in stored:
        what, why = "the tensors are those of a base model, without a language-model head", "names lack the prefix `model.`"
        fix = "use the checkpoint of the causal language model: no head can be made of these weights"
        if config.tied:
            fix = "transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR), and copy the tokenizer's files"
    elif len(problems) == 1 and HEAD in wanted and HEAD not in stored:
        fix = (
            "set tie_word_embeddings to true in config.json if the head is the embedding; else download the checkpoint again, with its head"
        )
    raise ThoughtxError("E107", what, where=str(path), why=why, fix=fix)
