"""What a calibration found: the document that calibration.json holds, and the numbers in it that follow from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from trtllm_thoughtx import report
from trtllm_thoughtx.backends.ort_product import OPERATORS
from trtllm_thoughtx.calibrate.quantize.cost import Answers, Speed
from trtllm_thoughtx.config import ModelConfig, QuantConfig
from trtllm_thoughtx.families.formats import FORMATS, INT8
from trtllm_thoughtx.families.quantization import embedding_of, stored_as, wide_of
from trtllm_thoughtx.validate.divergence import Loss
from trtllm_thoughtx.validate.quality import EXACT, ORT

GRAPH = "the graph as it stands"
SAME, OF_HEAD = f"{GRAPH}: the same numbers", f"{GRAPH}, but the head's inputs, which are rounded to 16 bits"
SCHEMA = "trtllm-thoughtx/calibration/1"


@dataclass(frozen=True)
class Calibration:
    """`end_to_end`: loss on the held-out sequences; `limits` and `backends`: what engines are judged by. `answers` and `speed` are those
    of engines of both checkpoints, None where none were asked. `validation`: sequences that travel."""

    qformat: str
    quantization: QuantConfig
    data: Mapping[str, Any]
    end_to_end: Loss
    limits: Mapping[str, float]
    backends: Mapping[str, Any]
    size: Mapping[str, float]
    modules: Mapping[str, Mapping[str, Any]]
    warnings: Sequence[str]
    answers: Answers | None
    speed: Speed | None
    skipped: Sequence[str]
    validation: Sequence[Sequence[int]]

    def as_dict(self) -> dict[str, Any]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        objects = ("quantization", "end_to_end", "answers", "speed")
        return {"schema": SCHEMA, **found, **{name: report.plain(found[name]) for name in objects}}


def limits_of(seen: Loss) -> dict[str, float]:
    """What an engine of this checkpoint must keep on the stored sequences: what was measured, with room for another engine's rounding.
    The share of equal top tokens varies between two roundings of the same numbers (PyTorch's here, the engine's there) as one of so many
    positions does: two binomial standard errors, so that one right engine in forty fails. The KL limit is the sharp one."""
    share = seen.top1_agreement
    room = 0.02 + 2 * (share * (1 - share) / seen.num_positions) ** 0.5
    return {
        "max_kl": round(1.5 * seen.kl + 0.002, 6),
        "min_top1_agreement": round(max(0.0, share - room), 6),
        "max_perplexity_ratio": round(max(1.0, seen.perplexity_ratio) * 1.02, 6),
    }


def backends_of(losses: Mapping[str, tuple[Loss, Loss]], kind: str | None, quant: QuantConfig) -> dict[str, Any]:
    """Loss and limits of each way to run an engine: its graph, which plans and `--exact` run, and onnxruntime's operators on a CPU."""
    has_head = quant.embedding and not quant.covers("lm_head")
    runs = {EXACT: GRAPH, ORT: OPERATORS[kind] if kind else OF_HEAD if has_head else SAME}
    runs[ORT] += "; 8-bit layers' to 16" if quant.wide and FORMATS[wide_of(quant).algo or ""].number == INT8 else ""
    measured = {way: losses.get(way, losses[EXACT]) for way in (EXACT, ORT)}
    return {
        way: {"runs": runs[way], "end_to_end": report.plain(whole), "limits": limits_of(on_stored)}
        for way, (whole, on_stored) in measured.items()
    }


def stored_bits(quant: QuantConfig) -> float:
    return FORMATS[quant.algo or ""].bits(quant.group_size, quant.zero_point)


def wide_bits(config: ModelConfig) -> int:
    return 32 if config.dtype == "float32" else 16


def judged_modules(modules: Mapping[str, Any], quant: QuantConfig) -> dict[str, Any]:
    """The layers whose bits count: the head only when it is quantized, for it shares the embedding otherwise."""
    return {name: facts for name, facts in modules.items() if name != "lm_head" or quant.covers("lm_head")}


def sizes(config: ModelConfig, quant: QuantConfig, modules: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Bytes and mean bits of the linear layers' weights, before and after, as an engine of 16 bits (float32: 32) holds them; and the bits
    of the embedding."""
    wide, counted = wide_bits(config), judged_modules(modules, quant)
    total = sum(facts["num_weights"] for facts in counted.values())
    of_table = stored_bits(embedding_of(quant)) if quant.embedding else wide
    used = sum(facts["num_weights"] * (stored_bits(form) if (form := stored_as(quant, name)) else wide) for name, facts in counted.items())
    return {
        "num_weights": total,
        "mean_bits": used / total,
        "bytes_before": total * wide / 8,
        "bytes_after": used / 8,
        "embedding_bits": of_table,
    }


def warnings_of(modules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    silent = [name for name, facts in modules.items() if not facts["input_amax"]]
    wide = [name for name, facts in modules.items() if facts["exceeds_float16"]]
    found = []
    if silent:
        found.append(f"always zero inputs, so kept as they are: {', '.join(silent)}")
    if wide:
        found.append(f"inputs beyond float16's range (build with bfloat16 or float32): {', '.join(wide)}")
    for why in sorted({facts["rounding_fallback"] for facts in modules.values() if facts.get("rounding_fallback")}):
        names = ", ".join(name for name, facts in modules.items() if facts.get("rounding_fallback") == why)
        found.append(f"rounded to nearest, for {why}: {names}")
    return found
