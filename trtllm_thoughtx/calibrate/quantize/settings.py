"""How the layers are to be stored and rounded: what was asked for, checked against the model before any work."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trtllm_thoughtx.calibrate.quantize.result import stored_bits, wide_bits
from trtllm_thoughtx.config import ModelConfig, QuantConfig
from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.families.formats import BLOCK, FORMATS, FP8, INT8, QUANT_ALGOS
from trtllm_thoughtx.families.quantization import TABLE, linear_modules

GROUPS, SHORT_GROUPS = (128, 64, 32, 16), (32, 16, 64, 128)  # that fit first; of formats with zero points
BYTE_GROUPS = (64, 32, 128, 16)  # of 8-bit formats


def rounding_of(quant: QuantConfig, rounding: str | None, plain: bool) -> str:
    """gptq | nearest | plain, with no search of scales; `gptq` for 4-bit layers unless told otherwise. E001 where it cannot be: inputs are
    rounded too, with one scale, or plain rounding was asked for."""
    form = FORMATS[quant.algo or ""]
    if rounding == "gptq" and (plain or not (form.is_weight_only or form.is_grouped)):
        why = "--plain_rounding rounds to nearest" if plain else "its scales are fitted to rounded inputs, one of a tensor or row"
        raise ThoughtxError("E001", "--rounding gptq cannot be used here", where="--rounding", why=why, fix="leave it out")
    if plain and form.scales == "block":
        return "plain"
    return rounding or ("gptq" if form.is_grouped and not plain else "nearest")


def fits_nothing(quant: QuantConfig, rounding: str) -> bool:
    """True for weight-only rounding without a search: no number of the checkpoint depends on the data."""
    form = FORMATS[quant.algo or ""]
    is_fitted = quant.prequant or quant.zero_point or rounding == "gptq" or (form.scales == "block" and rounding != "plain")
    return not is_fitted and form.is_weight_only and quant.kv_algo is None


def quant_config(
    config: ModelConfig,
    qformat: str,
    group_size: int | None,
    exclude: Sequence[str],
    quant_lm_head: bool,
    plain: bool = False,
    wide: Sequence[str] = (),
) -> QuantConfig:
    """E001 for a format or group size that does not fit; E103 for a model that is quantized already."""
    if config.quantization is not None:
        why = f"it holds {config.quantization.algo or config.quantization.kv_algo} tensors; rounding them again loses twice"
        raise ThoughtxError(
            "E103", "the checkpoint is already quantized", where="--model_dir", why=why, fix="calibrate the original checkpoint"
        )
    if config.experts is not None:
        why, fix = "the searches know dense MLPs", "build it in bfloat16 or float16"
        raise ThoughtxError("E103", "mixtures of experts cannot be quantized yet", where="--model_dir", why=why, fix=fix)
    if qformat not in QUANT_ALGOS:
        why = f"known are {', '.join(QUANT_ALGOS)}"
        raise ThoughtxError("E001", f"unknown format {shown(qformat)}", where="--qformat", why=why, fix="choose one of them")
    algo, size = _sizes(config, QUANT_ALGOS[qformat], group_size)
    eight = FORMATS[algo].wide
    if wide and (eight is None or FORMATS[eight].number != INT8):
        why = f"{qformat} has {'no INT8 layers' if eight else 'at least 8 bits in all of them'}"
        raise ThoughtxError(
            "E001", "--int8_layers widens nothing", where="--int8_layers", why=why, fix="leave it out, or choose a 4-bit format"
        )
    excluded = tuple(dict.fromkeys([*exclude, *([] if quant_lm_head else ["lm_head"])]))
    table_stays = any(fnmatch.fnmatchcase(TABLE, pattern) for pattern in exclude)
    quant = QuantConfig(
        algo=algo,
        group_size=size,
        scale_dtype="float16" if FORMATS[algo].scales == "group" else "float32",
        prequant=FORMATS[algo].search is not None and not plain,
        zero_point=FORMATS[algo].zeros is not None and not plain,
        embedding=not (FORMATS[algo].number == FP8 or table_stays),  # trtllm-build reads FP8 checkpoints, but no such embedding
        embedding_group=size if FORMATS[algo].of_rows and not table_stays else 0,
        wide=tuple(wide),
        exclude=excluded,
    )
    known = [*linear_modules(config), TABLE]
    for flag, patterns, modules in (("--exclude", exclude, known), ("--int8_layers", wide, known[:-1])):
        idle = [pattern for pattern in patterns if not fnmatch.filter(modules, pattern)]
        if idle:
            why, fix = "every name must cover a layer", f"names are like {known[0]} and {known[4]}; * and ? are wildcards"
            raise ThoughtxError("E001", f"{flag} {shown(idle[0])} names no layer", where=flag, why=why, fix=fix)
    if not any(quant.covers(module) for module in known if module != TABLE):
        raise ThoughtxError("E001", "every layer is excluded", where="--exclude", why="nothing is left to quantize", fix="exclude fewer")
    return quant


def _sizes(config: ModelConfig, algo: str, group_size: int | None) -> tuple[str, int]:
    """(format, inputs of a group); a format that has rows as well takes them for a group size of 0, and where no group fits."""
    form = FORMATS[algo]
    if not form.is_grouped:
        return algo, group_size or 128
    widths = (config.hidden_size, config.q_size, config.intermediate_size)
    wanted = (BLOCK,) if form.scales == "block" else BYTE_GROUPS if form.of_rows else SHORT_GROUPS if form.zeros else GROUPS
    fitting = [g for g in wanted if all(width % g == 0 for width in widths)]
    if form.of_rows and (group_size == 0 or (group_size is None and not fitting)):
        return form.of_rows, 128
    size = group_size or (fitting[0] if fitting and group_size is None else 0)
    rule = f"be {BLOCK}" if form.scales == "block" else "be even"
    if not size or size % 2 or any(width % size for width in widths) or (form.scales == "block" and size != BLOCK):
        why = f"a group must {rule} and divide the numbers of inputs, {', '.join(map(str, sorted(set(widths))))}"
        fix = f"use --group_size {fitting[0]}" if fitting else "choose an 8-bit format"
        raise ThoughtxError("E001", "groups of inputs do not fit this model", where=f"--group_size {group_size or 0}", why=why, fix=fix)
    return algo, size


def with_excluded(quant: QuantConfig, modules: Mapping[str, Mapping[str, Any]]) -> QuantConfig:
    """The same with the layers by name that were covered and stay as they are, or have 8 bits."""
    kept = [name for name, facts in modules.items() if not facts["quantized"] and quant.covers(name)]
    wide = [name for name, facts in modules.items() if facts.get("widened")]
    return replace(quant, exclude=(*quant.exclude, *kept), wide=(*quant.wide, *wide))


def check_target(config: ModelConfig, quant: QuantConfig, target_bits: float | None) -> None:
    if target_bits is not None and not stored_bits(quant) <= target_bits <= wide_bits(config):
        why = f"weights of this format take {stored_bits(quant):g} bits, those of the checkpoint {wide_bits(config)}"
        fix = f"give a number from {stored_bits(quant):g} to {wide_bits(config)}"
        raise ThoughtxError("E001", f"--target_bits {target_bits:g} cannot be met", where="--target_bits", why=why, fix=fix)
