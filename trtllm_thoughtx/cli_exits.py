"""`thoughtx-calibrate`: what a checkpoint learns of its own traces. Here: the exit head, and exit adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trtllm_thoughtx.cli_eval import NAMES
from trtllm_thoughtx.command import LAYERS, PATH, POSITIVE, command
from trtllm_thoughtx.console import Count, FiniteFloat, emit
from trtllm_thoughtx.progress import Progress


def exit_options(function: Callable[..., None]) -> Callable[..., None]:
    """The flags that fit exits."""
    for option in reversed((
        click.option("--fit_exit_head", is_flag=True, help="Fit a head that says when the answer is known and a step ends."),
        click.option("--exit_layers", type=LAYERS, help="Fit exit adapters before these layers, which draft tokens of a staged engine."),
        click.option("--adapter_rank", type=POSITIVE, default=64, help="Rank of an exit adapter's map."),
        click.option("--max_accuracy_loss", type=FiniteFloat(0, 100), default=0.5, help="Points of accuracy that the threshold may cost."),
        click.option("--task", "tasks", type=NAMES, help="Generated questions to trace.  [default: all]"),
        click.option("--dataset", type=PATH, help='JSONL file of {"prompt": ..., "answer": ...} to trace instead.'),
        click.option("--num_items", type=POSITIVE, default=120, help="Generated questions of each task and set."),
        click.option("--max_new_tokens", type=POSITIVE, default=512, help="Most tokens of a trace."),
        click.option("--batch_size", type=POSITIVE, default=16, help="Traces at once."),
        click.option("--seed", type=Count(0, (1 << 31) - 1), default=0, help="Seed of the questions."),
        click.option("--num_threads", type=Count(1, 1024), help="CPU threads."),
    )):  # fmt: skip
        function = option(function)
    return function


@command(
    "calibrate",
    "thoughtx-calibrate --model_dir ./model --output_dir ./ckpt --fit_exit_head",
    "thoughtx-calibrate --model_dir ./model --output_dir ./ckpt --fit_exit_head --exit_layers 3 --dataset questions.jsonl",
)
@click.option("--model_dir", type=PATH, required=True, help="Hugging Face directory or TensorRT-LLM checkpoint.")
@click.option("--output_dir", type=PATH, required=True, help="Where the checkpoint with its exits goes.")
@exit_options
@click.option("--force", is_flag=True, help="Replace an existing output.")
def calibrate(model_dir: Path, output_dir: Path, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Fit what an engine needs to stop early, on the model's own traces."""
    from trtllm_thoughtx.exits.calibrate import calibrate_exits
    from trtllm_thoughtx.exits.tables import exit_tables

    options["exit_layers"] = options["exit_layers"] or ()
    found = calibrate_exits(model_dir, output_dir, progress=Progress(quiet=quiet), **options)
    emit(
        "calibrate",
        found,
        as_json=as_json,
        human=[*exit_tables(found), f"next: thoughtx-build --checkpoint_dir {output_dir} --output_dir ENGINE"],
    )
