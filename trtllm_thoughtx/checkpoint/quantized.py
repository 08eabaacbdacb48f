"""Quantized Hugging Face checkpoints as input: FP8, NVFP4, INT8, and integers of 4 and 8 bits in groups. Nothing is rounded again.

`schemes` tells formats apart, `layouts` reads their matrices. What cannot be kept as it is (orders that differ within q, k and v, other
formats) is E103: a checkpoint is never widened behind the user's back.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx import files
from trtllm_thoughtx.checkpoint import layouts, tensor_file
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.outputs import Output
from trtllm_thoughtx.checkpoint.recorded import command_line
from trtllm_thoughtx.checkpoint.schemes import Scheme, scheme_of, unread
from trtllm_thoughtx.checkpoint.tensor_check import HEAD, STORED_DTYPES
from trtllm_thoughtx.checkpoint.weights import NUMPY_DTYPES
from trtllm_thoughtx.config import ModelConfig, QuantConfig
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.families import Tensor, tensors_of
from trtllm_thoughtx.families.formats import BLOCK, FP4, FP8, INT8, algo_of
from trtllm_thoughtx.families.hf_config import model_config_from_hf
from trtllm_thoughtx.families.quantization import linear_modules, with_quantization
from trtllm_thoughtx.families.trtllm_config import model_config_from_trtllm, trtllm_config
from trtllm_thoughtx.progress import SILENT, Progress

LONGEST_GROUP = 128  # that a row with one scale is cut into
IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|k_scale|v_scale|weight_shape)")


def only_plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `import_quantized` among those of thoughtx-convert; E001 for one that would change numbers or split them."""
    for name, plain in (("dtype", "auto"), ("tp_size", 1), ("pp_size", 1), ("allow_nonfinite", False), ("lora_dir", None)):
        if options.get(name, plain) != plain:
            why = "the numbers of a quantized checkpoint are kept as they are, in one piece"
            raise ThoughtxError("E001", f"--{name} {options[name]} cannot be used", where=f"--{name}", why=why, fix="leave it out")
    return {"force": options.get("force", False)}


def import_quantized(model_dir: Path | Checkpoint, output_dir: Path, *, force: bool = False, progress: Progress = SILENT) -> dict[str, Any]:
    """Write a quantized Hugging Face checkpoint as a TensorRT-LLM one, number for number; returns a summary."""
    command = command_line("thoughtx-convert", locals())
    output_dir = Path(output_dir)
    with Checkpoint.open(model_dir) as source:
        scheme, config = scheme_of(source), _config_of(source)
        for note in (notes := [*source.members.notes(), *([scheme.note] if scheme.note else [])]):
            progress.note(f"note: {note}")
        exits = source.exits(config)
        table = tensors_of(config)
        covered = _covered(source, table, linear_modules(config), scheme)
        settings = {"scheme": scheme.kind, "dtype": config.dtype}
        output = Output(output_dir, source.members, settings, command=command, force=force, progress=progress)
        facts = {"output_dir": str(output_dir), "model_type": config.family, "dtype": config.dtype, "num_quantized": len(covered)}
        if output.is_current():
            there = model_config_from_trtllm(files.read_json(output_dir, "config.json"), str(output_dir / "config.json"))
            return {**facts, **_facts_of(there.quantization), "up_to_date": True}
        output.prepare(sum(info.num_bytes for info in source.stored.values()))
        made = _Made(source, covered, scheme, config)
        quant = made.quant_config([module for module in linear_modules(config) if module not in covered])
        _write(output, made, table, replace(config, quantization=quant), progress)
    return {**facts, **_facts_of(quant), "up_to_date": False, "notes": notes, "exits": str(exits) if exits else None}


def _config_of(source: Checkpoint) -> ModelConfig:
    """The model less its quantization; weights that are not quantized tell its type where config.json does not. E103 for experts."""
    raw = {key: value for key, value in source.raw.items() if key != "quantization_config"}
    norms = [info for name, info in source.stored.items() if name.endswith("norm.weight")]
    kinds = {STORED_DTYPES[info.dtype] for info in norms if info.dtype in STORED_DTYPES}
    config = model_config_from_hf(raw, source.where, weights_dtype=kinds.pop() if len(kinds) == 1 else None)
    if config.experts is not None:
        fix = "use the original checkpoint: mixtures are built in float32 and 16 bits"
        unread("a quantized mixture of experts", str(source.path), fix)
    return config


def _covered(source: Checkpoint, table: Sequence[Tensor], modules: Sequence[str], scheme: Scheme) -> dict[str, Tensor]:
    """The linear layers that are quantized. E103 for one of which only a part is."""
    named = {tensor.name: tensor for tensor in table}
    mark = f".{scheme.mark}"
    covered: dict[str, Tensor] = {}
    for module in modules:
        tensor = named[f"{module}.weight"]
        marked = [part.source.removesuffix(".weight") + mark in source.stored for part in tensor.parts]
        if any(marked) and not all(marked):
            unread(f"a layer of which a part is quantized ({module})", str(source.path))
        if all(marked):
            covered[module] = tensor
    return covered


def _write(output: Output, made: _Made, table: Sequence[Tensor], config: ModelConfig, progress: Progress) -> None:
    source, entries = made.source, with_quantization(table, config)
    names = {kind: name for name, kind in STORED_DTYPES.items()}
    rows = [(t.name, t.stored or names[config.dtype], t.shape) for t in entries]
    output.prepare(tensor_file.num_bytes(rows))
    with output.writing() as partial, progress.stage("import", len(entries)) as stage:

        def values() -> Iterator[np.ndarray]:
            for tensor in entries:
                stage.advance(1)
                yield made.value(tensor) if tensor.stored else _plain(source, tensor, config.dtype)

        output.hashes["rank0.safetensors"] = tensor_file.write(partial / "rank0.safetensors", rows, values())
        unused = [n for n in source.stored if not (n in source.used or IGNORED.fullmatch(n) or (n == HEAD and config.tied))]
        unused = [n for n in unused if not _adds_nothing(source, n, made.scheme)]
        if unused:
            why = listed([shown(name) for name in unused])
            fix = "use the config.json that belongs to these weights"
            raise ThoughtxError("E107", f"tensors that do not fit: {len(unused)}", where=str(source.path), why=why, fix=fix)
        output.write("config.json", json.dumps(trtllm_config(config, dtype=config.dtype), indent=2) + "\n")
        output.carry(*source.members.carried, *source.members.exits)


def _facts_of(quant: QuantConfig | None) -> dict[str, Any]:
    assert quant is not None
    return {"quant_algo": quant.algo, "has_zero_point": quant.zero_point, "has_input_order": quant.input_order}


class _Made:
    """The quantized layers of the checkpoint in our form, one in memory at a time."""

    def __init__(self, source: Checkpoint, covered: Mapping[str, Tensor], scheme: Scheme, config: ModelConfig) -> None:
        self.source, self.covered, self.scheme = source, covered, scheme
        widths = (config.hidden_size, config.q_size, config.intermediate_size)
        self.group_size = scheme.group_size or math.gcd(LONGEST_GROUP, *widths)
        self.held: tuple[str, layouts.Made] = ("", {})

    def layer(self, module: str) -> layouts.Made:
        if self.held[0] != module:
            self.held = (module, layouts.made(self.source, self.covered[module], self.scheme, self.group_size))
        return self.held[1]

    def quant_config(self, exclude: list[str]) -> QuantConfig:
        """One pass over the scales: does every matrix have one scale, is every zero in the middle, has any layer an activation order?"""
        if not self.covered:
            unread("a checkpoint that says it is quantized and has no quantized layer", str(self.source.path))
        scheme, kept, size = self.scheme, tuple(exclude), self.group_size
        if scheme.kind == "nvfp4":
            return QuantConfig(algo=algo_of(FP4, "block", scheme.inputs), group_size=BLOCK, exclude=kept)
        if scheme.kind == "fp8 blocks":
            return QuantConfig(algo=algo_of(FP8, "group", scheme.inputs), group_size=size, exclude=kept)
        if scheme.kind == "fp8" and scheme.inputs == "static":
            same = all(np.ptp(self.layer(module)["weights_scaling_factor"]) == 0 for module in self.covered)
            return QuantConfig(algo=algo_of(FP8, "tensor" if same else "row", "static"), exclude=kept)
        if scheme.kind in ("fp8", "int8"):
            return QuantConfig(algo=algo_of(FP8 if scheme.kind == "fp8" else INT8, "row", scheme.inputs), exclude=kept)
        if scheme.bits == INT8.bits:
            return QuantConfig(algo=algo_of(INT8, "group" if scheme.group_size else "row", "as they are"), group_size=size, exclude=kept)
        orders = [layouts.input_order(self.source, tensor, scheme) for tensor in self.covered.values()]
        ordered = any(np.any(np.diff(order) < 0) for order in orders)
        zero = any(np.any(self.layer(module)["zero"]) for module in self.covered)
        return QuantConfig(algo="W4A16_GPTQ", group_size=size, zero_point=zero, input_order=ordered, exclude=kept)

    def value(self, tensor: Tensor) -> np.ndarray:
        module, _, suffix = tensor.name.rpartition(".")
        return self.layer(module)[suffix].reshape(-1)[: int(np.prod(tensor.shape))].reshape(tensor.shape)


def _adds_nothing(source: Checkpoint, name: str, scheme: Scheme) -> bool:
    """A bias of zeros, which GPTQ writers give to every layer that they quantize."""
    base, _, last = name.rpartition(".")
    return scheme.kind == "gptq" and last == "bias" and f"{base}.qweight" in source.stored and not np.any(source.read(name))


def _plain(source: Checkpoint, tensor: Tensor, dtype: str) -> np.ndarray:
    parts = [source.read(part.source, part.shape) for part in tensor.parts]
    return np.concatenate(parts).astype(NUMPY_DTYPES[dtype], copy=False)
