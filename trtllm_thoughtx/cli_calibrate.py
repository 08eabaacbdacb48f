"""`thoughtx-calibrate`: measure a model on data, and write the settings that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trtllm_thoughtx.command import COUNT, PATH, POSITIVE, command
from trtllm_thoughtx.console import Count, FiniteFloat, emit
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.progress import Progress

SHARE = FiniteFloat(0, 1)


@command(
    "calibrate",
    "thoughtx-calibrate --model_dir ./model --output_dir ./chunks --chunk_report --target_capture 0.97",
    "thoughtx-build --config ./chunks/build.yaml --checkpoint_dir ./model --output_dir ./engine",
)
@click.option("--model_dir", type=PATH, required=True, help="Hugging Face directory to look at.")
@click.option("--output_dir", type=PATH, required=True, help="Where the report and the settings go.")
@click.option("--chunk_report", is_flag=True, help="What chunked attention keeps, and the smallest window that keeps enough.")
@click.option("--data", type=PATH, help='JSONL file of {"prompt": ..., "steps" or "thought": ..., "answer": ...}.  [default: generated]')
@click.option("--num_samples", type=POSITIVE, default=16, help="Whole traces whose attention is looked at.")
@click.option("--context", type=Count(32, 1 << 24), default=2048, help="Tokens of the full cache that windows are measured against.")
@click.option("--target_capture", type=SHARE, default=0.97, help="Share of the attention mass that the window must keep.")
@click.option("--max_task_loss", type=SHARE, default=0.01, help="Share of right answers that may be lost.")
@click.option("--eval_items", type=COUNT, default=60, help="Questions of each task that are asked; 0: none.")
@click.option("--seed", type=Count(0, (1 << 31) - 1), default=0, help="Seed of generated data.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
def calibrate(model_dir: Path, output_dir: Path, chunk_report: bool, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Measure what chunked attention keeps of a model, and write the settings that follow."""
    if not chunk_report:
        why, fix = "nothing was asked for", "add --chunk_report"
        raise ThoughtxError("E001", "nothing to calibrate", where="thoughtx-calibrate", why=why, fix=fix)
    from trtllm_thoughtx.capture import job

    found = job.chunk_report(model_dir, output_dir, progress=Progress(quiet=quiet), **options)
    following = f"next: thoughtx-build --config {output_dir / 'build.yaml'} --checkpoint_dir {model_dir} --output_dir ENGINE"
    human = [*job.chunk_tables(found), *([following] if found["chosen"] is not None else [])]
    emit("calibrate", found, as_json=as_json, human=human)
