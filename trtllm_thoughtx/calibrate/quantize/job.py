"""`thoughtx-calibrate --qformat`: a checkpoint and data in, a quantized TensorRT-LLM checkpoint out, with a report of what it cost.

Everything that can be refused is refused before the first layer. The walk keeps its state beside the output, in a hidden directory that
a run with the same inputs and settings goes on from; the output appears whole or not at all.

    data (-> answers of the model itself) -> walk -> layers that are kept -> checkpoint (-> questions to engines) -> report
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_thoughtx import __version__, files, report
from trtllm_thoughtx.calibrate.data import Data, read_data
from trtllm_thoughtx.calibrate.quantize import cost
from trtllm_thoughtx.calibrate.quantize.page import report_html
from trtllm_thoughtx.calibrate.quantize.result import (
    Calibration,
    backends_of,
    judged_modules,
    limits_of,
    sizes,
    stored_bits,
    warnings_of,
    wide_bits,
)
from trtllm_thoughtx.calibrate.quantize.settings import check_target, fits_nothing, quant_config, rounding_of, with_excluded
from trtllm_thoughtx.calibrate.self_traces import answered
from trtllm_thoughtx.checkpoint import tensor_file
from trtllm_thoughtx.checkpoint.members import CALIBRATION, CALIBRATION_PAGE
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.outputs import Output
from trtllm_thoughtx.checkpoint.recorded import command_line
from trtllm_thoughtx.checkpoint.tensor_check import STORED_DTYPES
from trtllm_thoughtx.checkpoint.weights import WeightSource, open_weights
from trtllm_thoughtx.config import ModelConfig, QuantConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.questions import sha256_of_questions
from trtllm_thoughtx.families import Tensor
from trtllm_thoughtx.families.formats import KV_ALGOS
from trtllm_thoughtx.families.quantization import TABLE, with_quantization
from trtllm_thoughtx.families.trtllm_config import trtllm_config
from trtllm_thoughtx.progress import SILENT, Progress, duration
from trtllm_thoughtx.text.text import Text
from trtllm_thoughtx.validate.quality import EXACT

if TYPE_CHECKING:
    from trtllm_thoughtx.calibrate.quantize.layers import Walk

Modules = Mapping[str, Mapping[str, Any]]
EXITS_CARRIED = (
    "{} came with the checkpoint, with thresholds calibrated before the layers were quantized; "
    "to calibrate them on the quantized model, fit them again from this output"
)
WALK = 3  # form of the state that a walk keeps
# Sequences and their tokens: to fit scales on; for GPTQ, which runs them twice; only to measure what rounding loses.
SIZES, COMPENSATED, MEASURED = (128, 512), (64, 256), (16, 256)
AFTER_THE_WALK = ("sensitivity", "accuracy_budget", "target_bits", "questions", "max_new_tokens")
NOT_ASKED = "right answers and speed: no questions were asked for (--eval_items, --dataset)"


@dataclass(frozen=True)
class Goal:
    """Which layers stay unquantized for what they cost: none, or those that a mean KL or a mean of bits decides."""

    sensitivity: bool
    accuracy_budget: float | None
    target_bits: float | None

    @property
    def is_set(self) -> bool:
        return self.sensitivity or self.accuracy_budget is not None or self.target_bits is not None

    def check(self) -> None:
        if self.accuracy_budget is not None and self.target_bits is not None:
            where, why = "--accuracy_budget, --target_bits", "each decides which layers stay"
            raise ThoughtxError("E001", "two goals", where=where, why=why, fix="give one of the two")


def calibrate(
    model_dir: Path,
    output_dir: Path,
    *,
    lora_dir: Path | None = None,
    qformat: str,
    calib_data: Path | None = None,
    calib_size: int | None = None,
    calib_seq_len: int | None = None,
    batch_size: int = 8,
    group_size: int | None = None,
    exclude: Sequence[str] = (),
    int8_layers: Sequence[str] = (),
    quant_lm_head: bool = False,
    kv_cache_dtype: str = "auto",
    rounding: str | None = None,
    plain_rounding: bool = False,
    sensitivity: bool = False,
    accuracy_budget: float | None = None,
    target_bits: float | None = None,
    self_traces: bool = False,
    private_data: bool = False,
    eval_items: int = 0,
    dataset: Path | None = None,
    max_new_tokens: int = 512,
    seed: int = 0,
    enable_thinking: str | None = None,
    chat_template_kwargs: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write `model_dir`, quantized to `qformat`, to `output_dir`; returns what calibration.json holds, and where it went.

    `accuracy_budget` is a mean KL in nats that the result holds, `target_bits` a mean of bits that it uses: layers that cost most stay.
    `int8_layers` names those that a 4-bit format stores in 8 bits. `self_traces`: the model's own answers to the data's prompts calibrate
    it. `private_data`: no token of the data is written.
    `eval_items` questions of each task, or those of `dataset`, are put to engines of both checkpoints, with `max_new_tokens` at most.
    E001 for settings that do not fit the model, E164 for bad data, E165 for activations that are not finite; then nothing is written.
    """
    command = command_line("thoughtx-calibrate", locals())
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    load, goal = os.getloadavg()[0], Goal(sensitivity, accuracy_budget, target_bits)
    with open_weights(Checkpoint.open(model_dir, lora_dir=lora_dir), progress=progress) as source:
        config = source.config
        goal.check()
        quant = quant_config(config, qformat, group_size, exclude, quant_lm_head, plain_rounding, int8_layers)
        quant, rounding = replace(quant, kv_algo=KV_ALGOS.get(kv_cache_dtype)), rounding_of(quant, rounding, plain_rounding)
        measures = fits_nothing(quant, rounding) and calib_size is None and not (goal.is_set or self_traces)
        sizes_of = MEASURED if measures else COMPENSATED if rounding == "gptq" else SIZES
        calib_size, calib_seq_len = calib_size or sizes_of[0], calib_seq_len or sizes_of[1]
        text, template = Text.load(model_dir, source.members.config), (enable_thinking, chat_template_kwargs)
        for unread in text.set_template(*template) if text else ():
            progress.note(f"not applied: {unread}")
        data = read_data(
            calib_data,
            text,
            vocab_size=config.vocab_size,
            num_samples=calib_size,
            max_len=min(calib_seq_len, config.longest),
            seed=seed,
            pad_id=text.pad_id if text else None,
            only_prompts=self_traces,
            is_private=private_data,
            only_measures=measures,
        )
        questions = cost.questions_of(dataset, eval_items, seed, progress)
        room = cost.capacity(questions, max_new_tokens, text, config, kv_cache_dtype, model_dir) if questions else 0
        settings = {
            "walk": WALK,
            "qformat": qformat,
            "group_size": quant.group_size,
            "kv_cache_dtype": kv_cache_dtype,
            "rounding": rounding,
            "plain_rounding": plain_rounding,
            "sensitivity": sensitivity,
            "accuracy_budget": accuracy_budget,
            "target_bits": target_bits,
            "exclude": list(quant.exclude),
            **({"int8_layers": list(quant.wide)} if quant.wide else {}),
            "calib_seq_len": calib_seq_len,
            "calib_size": calib_size,
            "seed": seed,
            "data": data.facts["tokens_sha256"],
            "self_traces": self_traces,
            "private_data": private_data,
            "questions": sha256_of_questions(questions),
            "max_new_tokens": max_new_tokens,
            "template_kwargs": text.template_kwargs if text else {},
        }
        output = Output(output_dir, source.members, settings, command=command, force=force, progress=progress)
        if output.is_current():
            return {**files.read_json(output_dir, CALIBRATION), "output_dir": str(output_dir), "up_to_date": True}
        carried_exits = [EXITS_CARRIED.format(source.exits)] if source.exits else []
        check_target(config, quant, target_bits)
        num_tokens = [calib_seq_len if self_traces else len(row) for row in [*data.rows, *data.judging * 3]]
        num_states = 3 * sum(num_tokens) * config.hidden_size * 4
        num_engines = 2 if questions else int(self_traces)  # in float32, at most twice the source
        output.prepare(2 * (1 + num_engines) * source_bytes(source) + num_states)
        walked = {key: value for key, value in settings.items() if key not in AFTER_THE_WALK}
        work = working_dir(output_dir, {**walked, "inputs": output.inputs(), "version": __version__}, progress)
        say = progress.warn if data.facts["is_generic"] else progress.note
        say(told(data, quant, rounding))
        if self_traces:
            data = answered(data, source.checkpoint.again(), work, min(calib_seq_len, config.longest), seed, progress)
        for warning in data.warnings:
            progress.note(f"warning: {warning}")
        from trtllm_thoughtx.calibrate.quantize import estimate
        from trtllm_thoughtx.calibrate.quantize.layers import Walk

        walk = Walk(source, data, quant, work, batch_size, rounding)
        say(f"about {duration(estimate.seconds(walk))} on this machine, by one row")
        walk.run(progress)
        walk.keep_wide((), {})
        modules, losses = _kept(walk, config, quant, goal, progress) if goal.is_set else walk.facts()
        final = with_excluded(quant, modules)
        warnings = [*carried_exits, *warnings_of(modules)]
        for warning in warnings:
            progress.note(f"warning: {warning}")

        def result(made: Path) -> Calibration:
            answers = speed = None
            if questions:
                answers, speed = cost.measure(
                    source.checkpoint.again(), made, work, questions, room, max_new_tokens, progress, template, load=load
                )
            return Calibration(
                qformat=qformat,
                quantization=final,
                data=data.facts,
                end_to_end=losses[EXACT][0],
                limits=limits_of(losses[EXACT][1]),
                backends=backends_of(losses, walk.kind, final),
                size=sizes(config, final, modules),
                modules=modules,
                warnings=[*data.warnings, *warnings],
                answers=answers,
                speed=speed,
                skipped=[] if questions else [NOT_ASKED],
                validation=walk.stored_rows(),
            )

        found = _write(output, source, replace(config, quantization=final), work, result, progress)
        shutil.rmtree(work, ignore_errors=True)
    return {**found, "output_dir": str(output_dir), "up_to_date": False}


def _kept(walk: Walk, config: ModelConfig, quant: QuantConfig, goal: Goal, progress: Progress) -> tuple[Modules, Mapping[str, Any]]:
    """Facts of the layers and losses, with the layers kept that the goal leaves unquantized; each layer's sensitivity is measured."""
    from trtllm_thoughtx.calibrate.quantize import budget

    modules, losses = walk.facts()
    alone = budget.sensitivities(walk, modules, progress)
    modules = {name: facts | {"sensitivity": alone.get(name)} for name, facts in modules.items()}
    mix = budget.Mix()
    seen: budget.Losses = {}
    if goal.accuracy_budget is not None and max(whole.kl for whole, _ in losses.values()) > goal.accuracy_budget:
        mix, seen = budget.keep_for_budget(walk, modules, alone, goal.accuracy_budget, progress)
    elif goal.target_bits is not None:
        num_weights, bits = int(sizes(config, quant, modules)["num_weights"]), (stored_bits(quant), wide_bits(config))
        mix = budget.Mix(budget.keep_for_bits(judged_modules(modules, quant), alone, *bits, num_weights, goal.target_bits))
        seen = budget.measured(walk, [mix], modules, progress)[0]
    if seen:
        losses = {way: (whole.summary(), on_stored.summary()) for way, (whole, on_stored) in seen.items()}
    walk.keep_wide(mix.wide, modules)
    modules = {name: facts | ({"widened": True} if name in mix.wide else {}) for name, facts in modules.items()}
    return {name: facts | ({"quantized": False, "kept": True} if name in mix.kept else {}) for name, facts in modules.items()}, losses


def told(data: Data, quant: QuantConfig, rounding: str) -> str:
    """What the data are, and what for, before they are used."""
    facts = data.facts
    use = "measures what rounding loses" if fits_nothing(quant, rounding) else "fits the scales, the last of them measure the loss"
    own = " in place of your own prompts (--calib_data)" if facts["is_generic"] else ""
    num = facts["num_sequences"] + facts["num_held_out"]
    return f"{facts['source']}{own}: {num} sequences, {facts['num_tokens']} tokens and {sum(map(len, data.held))} held out; this {use}"


def source_bytes(source: WeightSource) -> int:
    return sum(source.num_bytes(name) for name in source.names())


def working_dir(output_dir: Path, key: Mapping[str, Any], progress: Progress) -> Path:
    """Where calibration keeps its state: emptied unless a run with the same key left it."""
    real = output_dir.resolve()
    work = real.parent / f".{real.name}.calibration"
    digest = hashlib.sha256(json.dumps(report.plain(key), sort_keys=True).encode()).hexdigest()
    try:
        if (work / "key.json").is_file() and files.read_json(work, "key.json") == {"key": digest}:
            done = len(list(work.glob("layer.*.json")))
            progress.note(f"going on from an earlier run: {done} layers are done")
            return work
    except ThoughtxError:
        pass
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with files.atomic_file(work / "key.json") as out:
        out.write(report.to_json({"key": digest}).encode())
    return work


def _write(
    output: Output,
    source: WeightSource,
    config: ModelConfig,
    work: Path,
    result: Callable[[Path], Calibration],
    progress: Progress,
) -> dict[str, Any]:
    """Write the checkpoint and the documents of `result`, which may look at the checkpoint; returns calibration.json's."""
    table = with_quantization(source.tensors(), config)
    entries = [(t.name, t.stored or _stored_name(config.dtype), t.shape) for t in table]
    with output.writing() as partial:
        with progress.stage("write", len(table)) as stage:

            def values() -> Iterator[np.ndarray]:
                for value in _values(table, source, work):
                    stage.advance(1)
                    yield value

            output.hashes["rank0.safetensors"] = tensor_file.write(partial / "rank0.safetensors", entries, values())
        output.write("config.json", json.dumps(trtllm_config(config, dtype=config.dtype), indent=2) + "\n")
        output.carry(*(name for name in source.members.carried if name != CALIBRATION), *source.members.exits)
        found = result(partial).as_dict()
        output.write(CALIBRATION, report.to_json(found))
        output.write(CALIBRATION_PAGE, report_html(found))
    return found


def _stored_name(dtype: str) -> str:
    return {name: stored_as for stored_as, name in STORED_DTYPES.items()}[dtype]


def _values(tensors: Sequence[Tensor], source: WeightSource, work: Path) -> Iterator[np.ndarray]:
    """Every tensor in order: quantized ones from calibration's files, a layer in memory at a time, the rest from the source."""
    from trtllm_thoughtx.calibrate.quantize import table

    held: dict[str, np.ndarray] = {}
    name_held = ""
    for tensor in tensors:
        if tensor.stored is None:
            yield source.read(tensor.name)
            continue
        outside = table.FILE if tensor.name.startswith(TABLE) else "head.safetensors"
        file = f"layer.{tensor.layer}.safetensors" if tensor.layer is not None else outside
        if file != name_held:
            held, name_held = tensor_file.read_all(work, file), file
            if (work / f"wide.{file}").is_file():
                held |= tensor_file.read_all(work, f"wide.{file}")
        yield held[tensor.name]
