"""`thoughtx-calibrate`: measure a model on data, and write what follows: a quantized checkpoint, exits, settings of chunked attention."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from trtllm_thoughtx.build.flags import COUNT, LAYERS, PATH, POSITIVE, CommaList, Count, FiniteFloat, OneOf
from trtllm_thoughtx.cli.evaluate import NAMES
from trtllm_thoughtx.cli.framework import command, lora_option, template_options
from trtllm_thoughtx.cli.params import emit
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families.formats import KV_ALGOS, QUANT_ALGOS
from trtllm_thoughtx.progress import Progress

MODULES = CommaList("NAMES", r"[\w.*?\-\[\]]{1,200}", str, "the name of a layer")
FRACTION = FiniteFloat(0, 1)


class Budget(click.ParamType):
    """`kl=0.01`."""

    name = "kl=X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"kl=(\d*\.?\d+(?:e-?\d+)?)", str(value))
        if isinstance(value, float):
            return value
        if match is None or not 0 < float(match[1]) < 100:
            self.fail(f"{value!r} is not kl=X with a positive number, such as kl=0.01", param, ctx)
        return float(match[1])


OF_ALL = ("lora_dir", "seed", "force", "enable_thinking", "chat_template_kwargs")
Ran = tuple[dict[str, Any], list[Any]]  # the JSON document, and the same for people


def _quantize(model_dir: Path, output_dir: Path, progress: Progress, **given: Any) -> Ran:
    from trtllm_thoughtx.calibrate.quantize.job import calibrate
    from trtllm_thoughtx.calibrate.quantize.page import calibration_tables

    found = calibrate(model_dir, output_dir, progress=progress, **given)
    return found, [*calibration_tables(found), _next(output_dir)]


def _report_chunks(model_dir: Path, output_dir: Path, progress: Progress, chunk_report: bool, **given: Any) -> Ran:
    from trtllm_thoughtx.calibrate.chunks import job

    found = job.chunk_report(model_dir, output_dir, progress=progress, **given)
    lora = f" --lora_dir {given['lora_dir']}" if "lora_dir" in given else ""
    recipe = f"next: thoughtx-build --config {output_dir / 'build.yaml'} --checkpoint_dir {model_dir}{lora} --output_dir ENGINE"
    return found, [*job.chunk_tables(found), *([recipe] if found["chosen"] is not None else [])]


def _fit_exits(model_dir: Path, output_dir: Path, progress: Progress, **given: Any) -> Ran:
    from trtllm_thoughtx.calibrate.exits.calibrate import calibrate_exits
    from trtllm_thoughtx.calibrate.exits.tables import exit_tables

    found = calibrate_exits(model_dir, output_dir, progress=progress, **given)
    return found, [*exit_tables(found), _next(output_dir)]


def _next(output_dir: Path) -> str:
    return f"next: thoughtx-build --checkpoint_dir {output_dir} --output_dir ENGINE"


@dataclass(frozen=True)
class Program:
    """One of the three programs of this command: the flags that ask for it, those that it takes beside them, and its function."""

    asked_by: tuple[str, ...]
    flags: tuple[str, ...]
    run: Callable[..., Ran]

    @property
    def name(self) -> str:
        return ", ".join(f"--{flag}" for flag in self.asked_by)


PROGRAMS = (
    Program(
        ("qformat",),
        (
            *(
                "calib_data",
                "calib_size",
                "calib_seq_len",
                "batch_size",
                "group_size",
                "exclude",
                "int8_layers",
                "quant_lm_head",
                "rounding",
                "plain_rounding",
            ),
            *("kv_cache_dtype", "sensitivity", "accuracy_budget", "target_bits", "self_traces", "private_data"),
            *("eval_items", "dataset", "max_new_tokens"),
        ),
        _quantize,
    ),
    Program(
        ("chunk_report",),
        ("calib_data", "calib_size", "context", "target_capture", "max_task_loss", "eval_items"),
        _report_chunks,
    ),
    Program(
        ("fit_exit_head", "exit_layers"),
        ("adapter_rank", "max_accuracy_loss", "tasks", "dataset", "num_items", "max_new_tokens", "batch_size", "num_threads"),
        _fit_exits,
    ),
)


@command(
    "calibrate",
    "thoughtx-calibrate --model_dir ./model --output_dir ./ckpt-fp8 --qformat fp8 --calib_data prompts.jsonl",
    "thoughtx-calibrate --model_dir ./model --output_dir ./ckpt-int4 --qformat int4_awq --exclude 'transformer.layers.0.*'",
    "thoughtx-calibrate --model_dir ./model --output_dir ./chunks --chunk_report --target_capture 0.97",
    "thoughtx-build --config ./chunks/build.yaml --checkpoint_dir ./model --output_dir ./engine",
    "thoughtx-calibrate --model_dir ./model --output_dir ./ckpt --fit_exit_head --exit_layers 3 --dataset questions.jsonl",
)
@click.option("--model_dir", type=PATH, required=True, help="Hugging Face directory or checkpoint (--chunk_report: Hugging Face only).")
@click.option("--output_dir", type=PATH, required=True, help="Output directory for the checkpoint, or for the report and its settings.")
@lora_option
@click.option("--qformat", type=OneOf(tuple(QUANT_ALGOS)), help=f"Quantize the linear layers: {', '.join(QUANT_ALGOS)}.")
@click.option("--chunk_report", is_flag=True, help="Measure retained attention mass and choose the smallest sufficient KV cache.")
@click.option("--fit_exit_head", is_flag=True, help="Fit an exit head that predicts when the answer is known.")
@click.option("--exit_layers", type=LAYERS, help="Fit exit adapters at these layers, for self-speculative decoding in a staged engine.")
@click.option("--calib_data", type=PATH, help="JSONL file (chunk report: of traces), .txt file or data set.  [default: generated tasks]")
@click.option("--calib_size", type=POSITIVE, help="Sequences to take.  [default: 128, an eighth judges; GPTQ 64; chunk report 16]")
@click.option("--calib_seq_len", type=Count(8, 1 << 20), help="Tokens of a sequence, at most.  [default: 512; GPTQ 256]")
@click.option("--batch_size", type=Count(1, 4096), help="Batch size; does not affect results.  [default: 8, exits 16]")
@click.option("--self_traces", is_flag=True, default=None, help="Calibrate on the model's own answers to the prompts of the data.")
@click.option(
    "--private_data", is_flag=True, default=None, help="Do not embed calibration tokens; engines are validated on synthetic sequences."
)
@click.option(
    "--group_size",
    type=Count(0, 1 << 16),
    help="Inputs that share a scale; int8_wo 0: a row.  [default: 64, int4_wo 32, int4_awq 128, or what fits]",
)
@click.option("--exclude", type=MODULES, help="Layers to leave unquantized, e.g. 'transformer.layers.0.*'.")
@click.option("--int8_layers", type=MODULES, help="Layers that a 4-bit format stores in 8 bits, e.g. '*.mlp.proj'.")
@click.option("--quant_lm_head", is_flag=True, default=None, help="Quantize lm_head as the layers are; a tied one is the embedding.")
@click.option(
    "--rounding", type=OneOf(("gptq", "nearest")), help="Rounding of weights.  [default: gptq where scales have groups, others nearest]"
)
@click.option("--plain_rounding", is_flag=True, default=None, help="Round to nearest without any search, as a baseline.")
@click.option("--kv_cache_dtype", type=OneOf(("auto", *KV_ALGOS)), help="int8: onnxruntime; fp8: tensorrt-llm.  [default: auto]")
@click.option("--sensitivity", is_flag=True, default=None, help="Also measure each layer's sensitivity to quantization.")
@click.option(
    "--accuracy_budget", type=Budget(), help="kl=X: keep the most sensitive layers in high precision until mean KL is at most X nats."
)
@click.option(
    "--target_bits", type=FiniteFloat(1, 32), help="Keep the most sensitive layers in high precision, up to this mean bits per weight."
)
@click.option(
    "--context", type=Count(32, 1 << 24), help="Tokens of the full cache that windows are measured against.  [default: at most 2048]"
)
@click.option("--target_capture", type=FRACTION, help="Fraction of attention mass to retain.  [default: 0.97]")
@click.option("--max_task_loss", type=FRACTION, help="Fraction of right answers that may be lost.  [default: 0.01]")
@click.option("--eval_items", type=COUNT, help="Number of questions per task.  [default: --qformat 0, --chunk_report 60]")
@click.option("--adapter_rank", type=POSITIVE, help="Rank of the exit adapters.  [default: 64]")
@click.option("--max_accuracy_loss", type=FiniteFloat(0, 100), help="Accuracy loss allowed for exits, in points.  [default: 0.5]")
@click.option("--task", "tasks", type=NAMES, help="Generated questions to trace for exits.  [default: all]")
@click.option("--dataset", type=PATH, help='JSONL file of {"prompt": ..., "answer": ...} to ask or trace instead.')
@click.option("--num_items", type=POSITIVE, help="Generated questions of each task and set, for exits.  [default: 120]")
@click.option("--max_new_tokens", type=POSITIVE, help="Maximum tokens per answer.  [default: 512]")
@template_options
@click.option("--num_threads", type=Count(1, 1024), help="CPU threads, for exits.")
@click.option("--seed", type=Count(0, (1 << 31) - 1), default=0, help="Seed of the sample.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
def calibrate(model_dir: Path, output_dir: Path, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Quantize a model, fit early exits, or choose chunk sizes on data, each with an accuracy report."""
    from trtllm_thoughtx.report import UP_TO_DATE

    given = {name: value for name, value in options.items() if value is not None and value is not False}
    program = _program(given)
    found, human = program.run(model_dir, output_dir, Progress(quiet=quiet), **given)
    if found["up_to_date"]:
        human = [UP_TO_DATE, *human]
    emit("calibrate", found, as_json=as_json, human=human)


def _program(given: dict[str, Any]) -> Program:
    """The one that `given` asks for. E001 for none, for two, and for a flag of another one."""
    wanted = [program for program in PROGRAMS if set(program.asked_by) & set(given)]
    if len(wanted) != 1:
        why = f"given: {'; '.join(program.name for program in wanted)}" if wanted else "none was given"
        fix = "thoughtx-calibrate --help shows examples"
        what = "one of --qformat, --chunk_report and --fit_exit_head (or --exit_layers) is needed"
        raise ThoughtxError("E001", what, where="thoughtx-calibrate", why=why, fix=fix)
    program = wanted[0]
    known = (*program.asked_by, *program.flags, *OF_ALL)
    other = [f"--{'task' if name == 'tasks' else name}" for name in given if name not in known]
    if other:
        why, fix = "it means nothing with this flag", "leave it out"
        raise ThoughtxError("E001", f"{', '.join(other)} cannot be used here", where=program.name, why=why, fix=fix)
    return program
