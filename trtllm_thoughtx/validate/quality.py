"""Is a quantized engine as good as its calibration said? KL, top-1 agreement and perplexity against the unquantized reference.

So are 16-bit engines of mixtures of experts judged: rounding sends a token to another expert where two are nearly as likely, in the engine
and in the reference at different places. Their limits follow from what 16 bits do to the reference's own logits.

Rounding bands do not fit here: the grid moves every number on purpose. What an engine must keep are the limits that calibration.json
records, on the held-out sequences that it carries; beyond that its own runs must agree with each other: decoding, rows that share a
batch, and prompts prefilled in segments, against the same prompts prefilled alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtllm_thoughtx import report
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.config import BuildConfig
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.families.fields import Fields
from trtllm_thoughtx.files import read_json
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.validate.divergence import Divergence, Loss, spread
from trtllm_thoughtx.validate.golden import ChunkSpec, Expected, Prompt
from trtllm_thoughtx.validate.runs import Run, decoded, longest, prefilled

FILE = "calibration.json"
# Ways to run a quantized engine: its graph as it stands, as plans do; or onnxruntime's operators on a CPU, where they round more.
EXACT, ORT = "exact", "onnxruntime"
OLD = "calibration.json, which states the exact graph's loss alone: calibrate again, or run with --exact"
NUM_DECODED = 24  # tokens of a prompt that are decoded one at a time
MAX_STORED, MAX_LENGTH = 64, 4096
# Experts in 16 bits, measured on 20 random models: right engines lose at most 0.34 of the KL that these allow; gates exchanged with ups,
# another normalization and another rotary theta (one model each of four kinds) lose 1.4 to 57 times as much as they allow.
OWN_FACTOR, ROOM_KL, ROOM_AGREEMENT = 4.0, 0.02, 0.9


@dataclass(frozen=True)
class Limits:
    """What the answers of an engine may lose; `source` says who set them."""

    max_kl: float = 0.1
    min_top1_agreement: float = 0.9
    max_perplexity_ratio: float = 1.1
    source: str = "defaults, for a checkpoint that was quantized elsewhere"

    def broken(self, seen: Loss) -> str:
        """The limits that a summary of `Divergence` passes, in words; empty when it keeps them all."""
        wrong = []
        if not seen.kl <= self.max_kl:
            wrong.append(f"KL {seen.kl:.4g} nats, at most {self.max_kl:.4g}")
        if not seen.top1_agreement >= self.min_top1_agreement:
            wrong.append(f"same top token at {seen.top1_agreement:.4g} of the positions, at least {self.min_top1_agreement:.4g}")
        if not seen.perplexity_ratio <= self.max_perplexity_ratio:
            wrong.append(f"perplexity {seen.perplexity_ratio:.4g} times the reference's, at most {self.max_perplexity_ratio:.4g}")
        return "; ".join(wrong)


def applies(directory: EngineDir) -> bool:
    """True for engines that are judged by their answers: quantized ones, and experts in 16 bits."""
    config = directory.config
    return config.quantization is not None or (config.experts is not None and directory.build.dtype != "float32")


def limits_of(directory: EngineDir, expected: Expected, *, is_exact: bool = True) -> Limits:
    """Those of the calibration, or of the reference's own rounding: logits that are off by e nats have a KL of about e^2 / 2."""
    if directory.config.quantization is not None:
        return read_limits(directory, EXACT if is_exact else ORT)[0]
    num = sum(len(truth.logits) for truth in expected.truths.values())
    own = sum(len(truth.logits) * truth.logits_band.rms**2 for truth in expected.truths.values()) / 2 / num
    source = f"the reference in {directory.build.dtype}, which is off by a KL of about {own:.2g}"
    return Limits(ROOM_KL + OWN_FACTOR * own, ROOM_AGREEMENT - OWN_FACTOR * own, 1.05 + OWN_FACTOR * own, source)


def read_limits(directory: EngineDir, way: str = EXACT) -> tuple[Limits, list[list[int]]]:
    """The limits of a way to run, and the sequences that came with the checkpoint; defaults and no sequences where there is no
    calibration.json. Files that state one way alone are read as well."""
    if not os.path.lexists(directory.root / FILE):
        return Limits(), []
    where = str(directory.root / FILE)
    fields = Fields(read_json(directory.root, FILE), where)
    ways, rows = fields.table("backends"), fields.get("validation", [])
    stated = ways.table(way) if ways is not None else None
    table = fields.table("limits") if ways is None else stated.table("limits") if stated is not None else None
    vocab = directory.config.vocab_size
    if table is None or not isinstance(rows, list) or len(rows) > MAX_STORED or not all(_is_row(row, vocab) for row in rows):
        raise ThoughtxError(
            "E102",
            "calibration.json has no limits, or sequences that are no token ids of this model",
            where=shown(where),
            why="the file was changed, or belongs to another checkpoint",
            fix="calibrate and build again",
        )
    names = ("max_kl", "min_top1_agreement", "max_perplexity_ratio")
    kl, agreement, ratio = (table.number(name, 0.0, 1e6) for name in names)
    source = f"calibration.json, {way}" if ways is not None else "calibration.json" if way == EXACT else OLD
    return Limits(kl, agreement, ratio, source), rows


def _is_row(row: object, vocab: int) -> bool:
    return isinstance(row, list) and 0 < len(row) <= MAX_LENGTH and all(type(i) is int and 0 <= i < vocab for i in row)


def prompts_of(rows: Sequence[Sequence[int]], build: BuildConfig, vocab_size: int) -> tuple[Prompt, ...]:
    """The stored sequences as prompts, cut to what the engine takes, each under the engine's own mask."""
    size, mask = mask_of(build)
    cut = [tuple(row[: build.max_seq_len]) for row in rows]
    return tuple(Prompt(f"held_out_{i}", ids, tuple(spread(len(ids), vocab_size)), size, mask) for i, ids in enumerate(cut))


def mask_of(build: BuildConfig) -> tuple[int | None, ChunkSpec | None]:
    """(chunk size, mask) of an engine as it was built; None twice for full attention."""
    if not build.use_chunked_attention:
        return None, None
    return build.chunk_size, ChunkSpec(build.chunk_size, build.sink_tokens, build.left_chunks, build.num_anchors)


def checks(engine: Engine, backend: str, expected: Expected, limits: Limits) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, what is wrong or nothing, evidence) of each check on an engine that is loaded."""
    alone: dict[str, np.ndarray] = {}
    seen = {False: Divergence(), True: Divergence()}  # of the plan's prompts, and of those that the user gave
    for prompt in expected.prompts:
        alone[prompt.name] = engine.forward([prompt.ids], chunk_size=prompt.chunk_size)[0]
        rows = list(prompt.rows)
        targets = [prompt.ids[p + 1] if p + 1 < len(prompt.ids) else -1 for p in rows]
        seen[prompt.is_given].add(expected.truths[prompt.name].logits, alone[prompt.name][rows], targets)
    told = {"limits": limits.source, "max_kl": limits.max_kl, "min_top1_agreement": limits.min_top1_agreement}
    for is_given in sorted({prompt.is_given for prompt in expected.prompts}):
        found, name = seen[is_given].summary(), "answers to --prompts" if is_given else "answers"
        yield f"{backend}: {name} within the limits", limits.broken(found), {**report.plain(found), **told}
    for name, run in _other_runs(engine, expected.prompts):
        same = Divergence()
        for prompt, first, logits in run:
            same.add(alone[prompt.name][first:], logits)
        found = same.summary()
        wrong = "" if found.kl <= limits.max_kl else f"KL {found.kl:.4g} nats from the same prompts prefilled alone"
        yield f"{backend}: {name}", wrong, {"kl": found.kl, "worst_kl": found.worst_kl, "num_positions": found.num_positions}


def _other_runs(engine: Engine, prompts: Sequence[Prompt]) -> Iterator[tuple[str, Run]]:
    """Other ways to run the prompts, whose logits must agree with those of each alone."""
    prompts = [p for p in prompts if p.chunk_size == prompts[0].chunk_size]
    some = [p for p in prompts if len(p.ids) > 1][: engine.build.max_batch_size]
    if some:
        yield "ragged decode equals prefill", decoded(engine, some, [max(1, len(p.ids) - NUM_DECODED) for p in some])
    if len(some) > 1:
        yield "ragged prefill equals alone", prefilled(engine, some)
    prompt, sizes = longest(engine, prompts)
    for size in sizes:
        yield f"pieces of {size} equal the whole", prefilled(engine, [prompt], size)
