"""Rotary embedding settings, as Hugging Face spells them, to `RopeConfig` and back.

transformers 4 has `rope_theta` beside `rope_scaling` (whose kind is `type` or `rope_type`); transformers 5 has one
`rope_parameters` object. A file may carry both spellings; then they have to say the same.
"""

from __future__ import annotations

from typing import Any

from trtllm_thoughtx.config import RopeConfig
from trtllm_thoughtx.errors import shown
from trtllm_thoughtx.families.fields import BOUNDS, Fields

KINDS = ("default", "linear", "yarn", "llama3")  # "default" is `RopeConfig.kind` "none"
DEFAULT_THETA = 10_000.0
_HUGE = 1e18


def _kind(spelled: Fields) -> str:
    kind = spelled.text("rope_type", spelled.text("type", "default"))
    if spelled.text("type", kind) != kind:
        spelled.wrong("type", f"is {shown(spelled.raw['type'])}, but rope_type is {shown(kind)}")
    if kind not in KINDS:
        why = f"supported types are {', '.join(KINDS)}"
        fix = "use another checkpoint: this model was trained with it"
        if kind == "dynamic":
            fix = "remove rope_scaling from config.json: up to max_position_embeddings, where engines then end, it changes nothing"
        spelled.unsupported(f"rope type {shown(kind)} is not supported", why, fix)
    return kind


def _scaling(spelled: Fields, theta: float, max_position: int, outer_original: int | None) -> RopeConfig:
    """One `rope_scaling` or `rope_parameters` object."""
    for key, value in spelled.raw.items():
        if isinstance(value, dict):
            spelled.unsupported(f"{spelled.prefix}{shown(key)} is a set of its own", "one rotary embedding for all layers is supported")
    if spelled.get("mrope_section") is not None:
        spelled.unsupported("multimodal rotary embedding (mrope_section) is not supported", "text-only models are supported")
    if spelled.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        spelled.unsupported("partial_rotary_factor is not 1", "rotary embedding over the whole head is supported")
    kind = _kind(spelled)
    theta = spelled.number("rope_theta", 1.0 + 1e-9, _HUGE, theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    original = 0
    if kind != "linear":
        original = spelled.integer("original_max_position_embeddings", 1, BOUNDS["context"], outer_original or max_position)
        if outer_original not in (None, original):
            spelled.wrong("original_max_position_embeddings", f"is {original}, but {outer_original} beside it")
    if kind == "yarn" and "factor" in spelled.raw and spelled.raw["factor"] is None:
        factor = max_position / original
    else:
        factor = spelled.number("factor", 1e-6, 1e6)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind == "llama3":
        low, high = spelled.number("low_freq_factor", 1e-6, 1e6), spelled.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            spelled.wrong("high_freq_factor", f"is {high:g}, wanted more than low_freq_factor, {low:g}")
        return RopeConfig(
            theta=theta, kind="llama3", factor=factor, original_max_position=original, low_freq_factor=low, high_freq_factor=high
        )
    # transformers takes 0 for "not given" here
    beta_fast, beta_slow = spelled.number("beta_fast", 0.0, 1e6, 32.0) or 32.0, spelled.number("beta_slow", 0.0, 1e6, 1.0) or 1.0
    if beta_fast < beta_slow:
        spelled.wrong("beta_fast", f"is {beta_fast:g}, wanted at least beta_slow, {beta_slow:g}")
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        attention_factor=spelled.optional_number("attention_factor", 0.0, 1e6),
        mscale=spelled.optional_number("mscale", 0.0, 1e6),
        mscale_all_dim=spelled.optional_number("mscale_all_dim", 0.0, 1e6),
        truncate=spelled.boolean("truncate", True) if spelled.raw.get("truncate", True) is not None else False,
    )


def rope_from_hf(raw: Fields, max_position: int) -> RopeConfig:
    """`RopeConfig` of a Hugging Face config.json. E102 when two spellings disagree, E103 for a kind that is not supported."""
    if raw.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        raw.unsupported("partial_rotary_factor is not 1", "rotary embedding over the whole head is supported")
    outer = raw.integer("original_max_position_embeddings", 1, BOUNDS["context"]) if raw.get("original_max_position_embeddings") else None
    theta = raw.optional_number("rope_theta", 1.0 + 1e-9, _HUGE)
    spellings = [table for key in ("rope_scaling", "rope_parameters") if (table := raw.table(key)) is not None]
    if not spellings:
        return RopeConfig(theta=DEFAULT_THETA if theta is None else theta)
    thetas = {t.number("rope_theta", 1.0 + 1e-9, _HUGE) for t in spellings if t.get("rope_theta") is not None}
    thetas |= set() if theta is None else {theta}
    if len(thetas) > 1:
        raw.wrong("rope_theta", f"is given {len(thetas)} times with different values: {', '.join(f'{t:g}' for t in sorted(thetas))}")
    found = [_scaling(t, thetas.copy().pop() if thetas else DEFAULT_THETA, max_position, outer) for t in spellings]
    if found[0] != found[-1]:
        raw.wrong("rope_scaling", "and rope_parameters do not say the same")
    return found[0]


def rope_to_trtllm(rope: RopeConfig) -> dict[str, Any] | None:
    """The `rotary_scaling` object of a TensorRT-LLM config; `type` for its older readers, `rope_type` for the newer."""
    if rope.kind == "none":
        return None
    scaling: dict[str, Any] = {"type": rope.kind, "rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    if rope.kind == "yarn":
        scaling |= {
            "original_max_position_embeddings": rope.original_max_position,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }
        optional = {"attention_factor": rope.attention_factor, "mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
        scaling |= {k: v for k, v in optional.items() if v is not None}
        if not rope.truncate:
            scaling["truncate"] = False
    return scaling


def rope_from_trtllm(theta: float, scaling: Fields | None, max_position: int) -> RopeConfig:
    """Inverse of `rope_to_trtllm`."""
    return RopeConfig(theta=theta) if scaling is None else _scaling(scaling, theta, max_position, None)
