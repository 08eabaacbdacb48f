"""What the user gives beside an engine: prompts to check it on (`--prompts`), since real text moves other numbers than random ids, and the
reference, which must be of the same model.

A line is what `thoughtx-run --prompts` reads, and is made into token ids in the same way. Long ones are cut, since the reference runs each
of them whole, twice.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.errors import ThoughtxError, counted, listed, shown
from trtllm_thoughtx.text.prompts import FIX, prompt_rows
from trtllm_thoughtx.text.text import Text, prompt_ids
from trtllm_thoughtx.validate.divergence import spread
from trtllm_thoughtx.validate.golden import GIVEN, Prompt
from trtllm_thoughtx.validate.quality import mask_of

MAX_PROMPTS, MAX_LENGTH = 64, 1024


def given_prompts(path: Path, directory: EngineDir) -> tuple[Prompt, ...]:
    """The prompts of a JSONL file under the engine's own mask, each cut to `MAX_LENGTH` tokens and to what the engine takes. E140 for a
    line that cannot be used, a token id that the model does not have, or too many lines."""
    rows = prompt_rows(path).all()
    if len(rows) > MAX_PROMPTS:
        why = f"each is run twice by the reference, and its logits are kept; there are {counted(len(rows), 'prompt')}"
        raise ThoughtxError("E140", f"at most {MAX_PROMPTS} prompts are compared", where=str(path), why=why, fix="choose some of them")
    text, (size, mask) = Text.load(directory.root), mask_of(directory.build)
    vocab, found = directory.config.vocab_size, []
    for i, row in enumerate(rows, 1):
        try:
            ids = tuple(prompt_ids(row, text)[: min(MAX_LENGTH, directory.build.max_seq_len)])
        except ThoughtxError as error:
            raise error.at(row.where) from None
        if wrong := next((one for one in ids if one >= vocab), None):
            why = f"{wrong} is not below the vocabulary of {vocab}"
            raise ThoughtxError("E140", "a token id is not the model's", where=row.where, why=why, fix=FIX)
        found.append(Prompt(f"{GIVEN}{i}", ids, tuple(spread(len(ids), vocab)), size, mask, layers=i == 1))
    return tuple(found)


def check_same_model(directory: EngineDir, reference: Checkpoint) -> None:
    """E101 for a reference of other sizes than the engine's."""
    with open_weights(reference, allow_nonfinite=True) as source:
        theirs, ours = (dataclasses.asdict(config) | {"dtype": None, "quantization": None} for config in (source.config, directory.config))
    differ = [f"{key}: reference {shown(theirs[key])}, engine {shown(ours[key])}" for key in ours if theirs[key] != ours[key]]
    if differ:
        raise ThoughtxError(
            "E101",
            "the reference is not the model that this engine was built from",
            where=shown(str(reference.path)),
            why=listed(differ),
            fix="give the Hugging Face directory, and the adapter (--lora_dir), that the engine, or its checkpoint, was made from",
        )
