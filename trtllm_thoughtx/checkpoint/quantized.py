"""Quantized Hugging Face checkpoints as input: FP8 (compressed-tensors, ModelOpt), AWQ and GPTQ with 4 bits. Nothing is rounded again.

    FP8    weight F8_E4M3 [out, in], weight_scale [1] or [out, 1], input_scale [1]; none if tokens have their own, or inputs are as they are
    AWQ    qweight I32 [in, out / 8], qzeros I32 [in / group, out / 8], scales [in / group, out]; eight outputs a word, as 0 2 4 6 1 3 5 7
    GPTQ   qweight I32 [in / 8, out], qzeros I32 [in / group, out / 8], scales, g_idx [in]; zeros are stored less one, except in gptq_v2

q, k and v keep their own scales: where they differ, a matrix has a scale per row. A zero point z becomes a number added per group,
(q - z) * s = (q - 8) * s + (8 - z) * s, which is exact on every engine. With activation order g_idx names the group of each channel:
channels are sorted by it, so that a group is a run again, and the order is kept for the inputs. What cannot be kept as it is (blocks of
FP8, orders that differ within q, k and v, other formats) is E103: a checkpoint is never widened behind the user's back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from trtllm_thoughtx import files
from trtllm_thoughtx.checkpoint import tensor_file
from trtllm_thoughtx.checkpoint.members import QUANT_FILE
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.outputs import Output
from trtllm_thoughtx.checkpoint.recorded import command_line
from trtllm_thoughtx.checkpoint.tensor_check import HEAD, STORED_DTYPES
from trtllm_thoughtx.checkpoint.weights import NUMPY_DTYPES
from trtllm_thoughtx.config import ModelConfig, QuantConfig
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.families import Tensor, tensors_of
from trtllm_thoughtx.families.fields import Fields
from trtllm_thoughtx.families.formats import FORMATS, FP8, algo_of
from trtllm_thoughtx.families.hf_config import model_config_from_hf
from trtllm_thoughtx.families.quantization import linear_modules, with_quantization
from trtllm_thoughtx.families.trtllm_config import model_config_from_trtllm, trtllm_config
from trtllm_thoughtx.progress import SILENT, Progress

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|k_scale|v_scale)")
Made = dict[str, np.ndarray]  # suffix -> tensor


@dataclass(frozen=True)
class Scheme:
    """How the matrices are stored: `kind` is fp8 | awq | gptq; the sizes and orders belong to the 4-bit ones."""

    kind: str
    group_size: int = 128
    zero_offset: int = 0  # what is added to a stored zero
    needs_order: bool = False  # the config speaks of activation order, so g_idx cannot be missing
    inputs: str = "static"  # FP8: `Format.inputs`


def only_plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `import_quantized` among those of thoughtx-convert; E001 for one that would change numbers or split them."""
    for name, plain in (("dtype", "auto"), ("tp_size", 1), ("pp_size", 1), ("allow_nonfinite", False), ("lora_dir", None)):
        if options.get(name, plain) != plain:
            why = "the numbers of a quantized checkpoint are kept as they are, in one piece"
            raise ThoughtxError("E001", f"--{name} {options[name]} cannot be used", where=f"--{name}", why=why, fix="leave it out")
    return {"force": options.get("force", False)}


def scheme_of(source: Checkpoint) -> Scheme:
    """E103 for a format whose numbers cannot be kept."""
    where, raw = source.where, source.raw.get("quantization_config")
    if not raw:
        where = str(source.path / QUANT_FILE)
        table = Fields(files.read_json(source.path, QUANT_FILE), where).table("quantization")
        return _modelopt(table.get("quant_algo") if table else None, f"{QUANT_FILE}: quant_algo", where)
    fields = Fields(raw, where, "quantization_config.")
    method = fields.text("quant_method")
    if method == "modelopt":
        return _modelopt(fields.get("quant_algo"), "modelopt", where)
    if method == "compressed-tensors":
        return _compressed(fields, where)
    if method not in ("awq", "gptq"):
        return _unread(f"quant_method {shown(method)}", where)
    if fields.integer("bits", 1, 64, 4) != 4:
        return _unread(f"{method} with {fields.get('bits')} bits", where)
    if method == "awq" and str(fields.get("version", "gemm")).lower() != "gemm":
        return _unread(f"awq version {shown(fields.get('version'))}", where)
    size = fields.integer("group_size", 2, 1 << 16, 128)
    if method == "awq":
        return Scheme(method, size)
    packing = fields.get("checkpoint_format", "gptq")
    if packing not in ("gptq", "gptq_v2"):
        return _unread(f"gptq with checkpoint_format {shown(packing)}", where)
    return Scheme(method, size, 1 if packing == "gptq" else 0, needs_order=fields.boolean("desc_act", False))


def _modelopt(algo: Any, what: str, where: str) -> Scheme:
    if algo not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return _unread(f"{what} {shown(algo)}", where)
    return Scheme("fp8", inputs=FORMATS[algo].inputs)


def _compressed(fields: Fields, where: str) -> Scheme:
    groups = fields.get("config_groups")
    if fields.get("format") not in ("float-quantized", "naive-quantized") or not isinstance(groups, dict) or len(groups) != 1:
        return _unread(f"compressed-tensors format {shown(fields.get('format'))}", where)
    group = Fields(next(iter(groups.values())), where, "quantization_config.config_groups.")
    weights, inputs = group.table("weights"), group.table("input_activations")
    if (
        not weights
        or weights.get("type") != "float"
        or weights.get("num_bits") != 8
        or weights.get("strategy") not in ("tensor", "channel")
    ):
        return _unread("compressed-tensors weights that are not FP8 with a scale per tensor or channel", where)
    if not inputs:
        return Scheme("fp8", inputs="as they are")
    if inputs.get("type") != "float" or inputs.get("num_bits") != 8:
        return _unread("compressed-tensors FP8 weights with inputs of another type", where)
    kind = (inputs.get("dynamic", False), inputs.get("strategy"))
    if kind not in ((False, "tensor"), (True, "token")):
        return _unread(f"FP8 with input scales of dynamic {shown(kind[0])}, strategy {shown(kind[1])}", where)
    return Scheme("fp8", inputs="token" if kind[0] else "static")


QUANTIZE = "use the original checkpoint, and quantize it with thoughtx-calibrate"


def _unread(what: str, where: str, fix: str = QUANTIZE) -> NoReturn:
    why = "read are FP8 with scales per tensor, row or token (compressed-tensors, ModelOpt), and AWQ and GPTQ with 4 bits"
    raise ThoughtxError("E103", f"{what} is not read", where=where, why=why, fix=fix)


def unpack_words(words: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Eight 4-bit numbers of each 32-bit word, uint8, unfolded along `axis`; place i of a word holds number `order[i]`."""
    wide = words.astype("<u4") if axis == 1 else words.T.astype("<u4")
    out = np.empty((*wide.shape, 8), np.uint8)
    for place, number in enumerate(order):
        out[..., number] = (wide >> np.uint32(4 * place)) & np.uint32(15)
    flat = out.reshape(wide.shape[0], -1)
    return flat if axis == 1 else flat.T


def _four_bits(source: Checkpoint, base: str, num_out: int, num_in: int, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numbers [out, in], zeros [out, groups], scales [out, groups]) of one layer, as they are stored."""
    size = scheme.group_size
    num_groups = num_in // size
    scales = source.read(f"{base}.scales", (num_groups, num_out)).astype(np.float32).T
    words = source.read(f"{base}.qzeros", (num_groups, num_out // 8), ("I32",))
    if scheme.kind == "awq":
        numbers = unpack_words(source.read(f"{base}.qweight", (num_in, num_out // 8), ("I32",)), 1, AWQ_ORDER).T
        zeros = unpack_words(words, 1, AWQ_ORDER).T
    else:
        numbers = unpack_words(source.read(f"{base}.qweight", (num_in // 8, num_out), ("I32",)), 0).T
        zeros = unpack_words(words, 1).T
    return numbers, zeros.astype(np.int16) + scheme.zero_offset, scales


def _input_order(source: Checkpoint, tensor: Tensor, scheme: Scheme) -> np.ndarray:
    """Input channels in the order of their groups, I32 [in]; rising where the layer has no activation order.

    E107 when g_idx is missing or names groups that do not exist, E103 when groups differ in size, or the parts of a matrix in order.
    """
    num_in, size = tensor.shape[1], scheme.group_size
    found = np.arange(num_in, dtype=np.int32)
    orders: list[np.ndarray] = []
    for part in tensor.parts if scheme.kind == "gptq" else ():
        name = f"{part.source.removesuffix('.weight')}.g_idx"
        groups = source.read(name, (num_in,), ("I32",)) if scheme.needs_order or name in source.stored else found // size
        if groups.min() < 0 or groups.max() >= num_in // size:
            raise source.misfit(name, f"it must name the groups 0 to {num_in // size - 1}")
        if np.any(np.bincount(groups, minlength=num_in // size) != size):
            _unread(f"GPTQ with groups that do not have {size} channels each ({name})", str(source.path))
        orders.append(np.argsort(groups, kind="stable").astype(np.int32))
        if not np.array_equal(orders[0], orders[-1]):
            _unread(f"GPTQ with an activation order of its own for a part of one matrix ({name})", str(source.path))
    return orders[0] if orders else found


def _made_four(source: Checkpoint, tensor: Tensor, scheme: Scheme) -> Made:
    parts = [_four_bits(source, part.source.removesuffix(".weight"), part.shape[0], part.shape[1], scheme) for part in tensor.parts]
    numbers, zeros, scales = (np.concatenate([part[i] for part in parts]) for i in range(3))
    order = _input_order(source, tensor, scheme)
    packed = tensor_file.pack_four(numbers[:, order].astype(np.int8) - 8)
    zero = (8 - zeros).astype(np.float32) * scales
    scales, zero = np.ascontiguousarray(scales), np.ascontiguousarray(zero)
    return {"weight": packed, "weights_scaling_factor": scales, "zero": zero, "input_order": order}


def _made_fp8(source: Checkpoint, tensor: Tensor, scheme: Scheme) -> Made:
    """The rows as they are, a scale per row, and the largest of the static input scales."""
    weights, rows, inputs = [], [], []
    for part in tensor.parts:
        base = part.source.removesuffix(".weight")
        weights.append(source.read(f"{base}.weight", part.shape, (FP8.stored,)))
        scale = source.read(f"{base}.weight_scale")
        if scale.shape not in ((), (1,), (1, 1), (part.shape[0],), (part.shape[0], 1)):
            _unread(f"FP8 with blocks ({base}.weight_scale)", str(source.path))
        rows.append(np.broadcast_to(scale.astype(np.float32).reshape(-1), (part.shape[0],)))
        if scheme.inputs != "static":
            continue
        if f"{base}.input_scale" not in source.stored:
            _unread(f"FP8 without static input scales ({base}.input_scale is missing)", str(source.path))
        inputs.append(source.read(f"{base}.input_scale"))
        if inputs[-1].size != 1:
            raise source.misfit(f"{base}.input_scale", f"{list(inputs[-1].shape)}, wanted one number")
    made = {"weight": np.concatenate([weight.view(np.uint8) for weight in weights]).view(weights[0].dtype)}
    if scheme.inputs != "static":
        return made | {FORMATS[algo_of(FP8, "row", scheme.inputs)].scale_name: np.concatenate(rows)}
    largest = np.max([scale.astype(np.float32).reshape(1) for scale in inputs], axis=0)
    return made | {"weights_scaling_factor": np.concatenate(rows), "activation_scaling_factor": largest}


def import_quantized(model_dir: Path | Checkpoint, output_dir: Path, *, force: bool = False, progress: Progress = SILENT) -> dict[str, Any]:
    """Write a quantized Hugging Face checkpoint as a TensorRT-LLM one, number for number; returns a summary."""
    command = command_line("thoughtx-convert", locals())
    output_dir = Path(output_dir)
    with Checkpoint.open(model_dir) as source:
        scheme, config = scheme_of(source), _config_of(source)
        for note in (notes := source.members.notes()):
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
        made = _Made(source, covered, scheme)
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
        _unread("a quantized mixture of experts", str(source.path), fix)
    return config


def _covered(source: Checkpoint, table: Sequence[Tensor], modules: Sequence[str], scheme: Scheme) -> dict[str, Tensor]:
    """The linear layers that are quantized. E103 for one of which only a part is."""
    named = {tensor.name: tensor for tensor in table}
    mark = ".weight_scale" if scheme.kind == "fp8" else ".qweight"
    covered: dict[str, Tensor] = {}
    for module in modules:
        tensor = named[f"{module}.weight"]
        marked = [part.source.removesuffix(".weight") + mark in source.stored for part in tensor.parts]
        if any(marked) and not all(marked):
            _unread(f"a layer of which a part is quantized ({module})", str(source.path))
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

    def __init__(self, source: Checkpoint, covered: Mapping[str, Tensor], scheme: Scheme) -> None:
        self.source, self.covered, self.scheme = source, covered, scheme
        self.held: tuple[str, Made] = ("", {})

    def layer(self, module: str) -> Made:
        if self.held[0] != module:
            tensor = self.covered[module]
            make = _made_fp8 if self.scheme.kind == "fp8" else _made_four
            self.held = (module, make(self.source, tensor, self.scheme))
        return self.held[1]

    def quant_config(self, exclude: list[str]) -> QuantConfig:
        """One pass over the scales: does every matrix have one scale, is every zero in the middle, has any layer an activation order?"""
        if not self.covered:
            _unread("a checkpoint that says it is quantized and has no quantized layer", str(self.source.path))
        if self.scheme.inputs != "static":
            return QuantConfig(algo=algo_of(FP8, "row", self.scheme.inputs), exclude=tuple(exclude))
        if self.scheme.kind == "fp8":
            same = all(np.ptp(self.layer(module)["weights_scaling_factor"]) == 0 for module in self.covered)
            return QuantConfig(algo=algo_of(FP8, "tensor" if same else "row", "static"), exclude=tuple(exclude))
        orders = [_input_order(self.source, tensor, self.scheme) for tensor in self.covered.values()]
        ordered = any(np.any(np.diff(order) < 0) for order in orders)
        zero = any(np.any(self.layer(module)["zero"]) for module in self.covered)
        size = self.scheme.group_size
        return QuantConfig(algo="W4A16_GPTQ", group_size=size, zero_point=zero, input_order=ordered, exclude=tuple(exclude))

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
