"""`thoughtx-calibrate`: measure a model on data, and write what follows: a quantized checkpoint, or the settings of chunked attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trtllm_thoughtx.command import COUNT, PATH, POSITIVE, command
from trtllm_thoughtx.config import QUANT_ALGOS
from trtllm_thoughtx.console import CommaList, Count, FiniteFloat, OneOf, emit
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.progress import Progress

MODULES = CommaList("NAMES", r"[\w.*?\-\[\]]{1,200}", str, "the name of a layer")
SHARE = FiniteFloat(0, 1)
OF_BOTH = ("calib_data", "calib_size", "seed", "force")
OF_QUANTIZING = ("calib_seq_len", "batch_size", "group_size", "exclude", "quant_lm_head", "plain_rounding")
OF_CHUNKS = ("context", "target_capture", "max_task_loss", "eval_items")


@command(
    "calibrate",
    "thoughtx-calibrate --model_dir ./model --output_dir ./ckpt-fp8 --qformat fp8 --calib_data prompts.jsonl",
    "thoughtx-calibrate --model_dir ./model --output_dir ./ckpt-int4 --qformat int4_awq --exclude 'transformer.layers.0.*'",
    "thoughtx-calibrate --model_dir ./model --output_dir ./chunks --chunk_report --target_capture 0.97",
    "thoughtx-build --config ./chunks/build.yaml --checkpoint_dir ./model --output_dir ./engine",
)
@click.option("--model_dir", type=PATH, required=True, help="Hugging Face directory; to quantize, also an unquantized checkpoint.")
@click.option("--output_dir", type=PATH, required=True, help="Where the quantized checkpoint, or the report and its settings, go.")
@click.option("--qformat", type=OneOf(tuple(QUANT_ALGOS)), help=f"Quantize the linear layers: {', '.join(QUANT_ALGOS)}.")
@click.option("--chunk_report", is_flag=True, help="What chunked attention keeps, and the smallest window that keeps enough.")
@click.option("--calib_data", type=PATH, help="JSONL file (chunk report: of traces), .txt file or data set.  [default: generated tasks]")
@click.option("--calib_size", type=POSITIVE, help="Sequences to take.  [default: 128, of which an eighth judges; chunk report 16]")
@click.option("--calib_seq_len", type=Count(8, 1 << 20), help="Tokens of a sequence, at most.  [default: 512]")
@click.option("--batch_size", type=Count(1, 4096), help="Sequences in memory at once; changes no number.  [default: 8]")
@click.option("--group_size", type=Count(2, 1 << 16), help="Inputs that share a 4-bit scale.  [default: 128, or the largest that fits]")
@click.option("--exclude", type=MODULES, help="Layers that stay as they are, e.g. 'transformer.layers.0.*'.")
@click.option("--quant_lm_head", is_flag=True, default=None, help="Quantize the output matrix as well.")
@click.option("--plain_rounding", is_flag=True, default=None, help="No search (SmoothQuant, AWQ): plain rounding, to compare with.")
@click.option("--context", type=Count(32, 1 << 24), help="Tokens of the full cache that windows are measured against.  [default: 2048]")
@click.option("--target_capture", type=SHARE, help="Share of the attention mass that the window must keep.  [default: 0.97]")
@click.option("--max_task_loss", type=SHARE, help="Share of right answers that may be lost.  [default: 0.01]")
@click.option("--eval_items", type=COUNT, help="Questions of each task that are asked; 0: none.  [default: 60]")
@click.option("--seed", type=Count(0, (1 << 31) - 1), default=0, help="Seed of the sample.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
def calibrate(
    model_dir: Path, output_dir: Path, qformat: str | None, chunk_report: bool, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> None:
    """Quantize a model on data, or measure what chunked attention keeps of it; report what that costs."""
    if chunk_report == (qformat is not None):
        why = "both were given" if chunk_report else "none was given"
        fix = "thoughtx-calibrate --help shows examples"
        raise ThoughtxError("E001", "one of --qformat and --chunk_report is needed", where="thoughtx-calibrate", why=why, fix=fix)
    given = {name: value for name, value in options.items() if value is not None}
    mine, flag = (OF_CHUNKS, "--chunk_report") if chunk_report else (OF_QUANTIZING, "--qformat")
    other = [f"--{name}" for name in given if name not in (*mine, *OF_BOTH)]
    if other:
        fix = "leave it out"
        raise ThoughtxError("E001", f"{', '.join(other)} cannot be used here", where=flag, why="it means nothing with this flag", fix=fix)
    progress = Progress(quiet=quiet)
    if chunk_report:
        from trtllm_thoughtx.capture import job

        found = job.chunk_report(model_dir, output_dir, progress=progress, **given)
        following = f"next: thoughtx-build --config {output_dir / 'build.yaml'} --checkpoint_dir {model_dir} --output_dir ENGINE"
        human = [*job.chunk_tables(found), *([following] if found["chosen"] is not None else [])]
    else:
        assert qformat is not None
        from trtllm_thoughtx.calibrate.job import calibrate
        from trtllm_thoughtx.calibrate.page import calibration_tables

        found = calibrate(model_dir, output_dir, progress=progress, qformat=qformat, **given)
        human = [*calibration_tables(found), f"next: thoughtx-build --checkpoint_dir {output_dir} --output_dir ENGINE"]
    emit("calibrate", found, as_json=as_json, human=human)
