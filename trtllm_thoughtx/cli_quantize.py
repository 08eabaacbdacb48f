"""`thoughtx-calibrate`: a checkpoint and data become a quantized checkpoint, and a report of what that cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from trtllm_thoughtx.command import PATH, POSITIVE, command
from trtllm_thoughtx.config import KV_ALGOS, QUANT_ALGOS
from trtllm_thoughtx.console import CommaList, Count, FiniteFloat, OneOf, emit
from trtllm_thoughtx.progress import Progress

MODULES = CommaList("NAMES", r"[\w.*?\-\[\]]{1,200}", str, "the name of a layer")


class _Budget(click.ParamType):
    """`kl=0.01`."""

    name = "kl=X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"kl=(\d*\.?\d+(?:e-?\d+)?)", str(value))
        if isinstance(value, float):
            return value
        if match is None or not 0 < float(match[1]) < 100:
            self.fail(f"{value!r} is not kl=X with a positive number, such as kl=0.01", param, ctx)
        return float(match[1])


BUDGET = _Budget()


@command(
    "calibrate",
    "thoughtx-calibrate --model_dir ./model --output_dir ./ckpt-fp8 --qformat fp8 --calib_data prompts.jsonl",
    "thoughtx-calibrate --model_dir ./model --output_dir ./ckpt-int4 --qformat int4_awq --exclude 'transformer.layers.0.*'",
)
@click.option("--model_dir", type=PATH, required=True, help="Hugging Face directory or unquantized TensorRT-LLM checkpoint.")
@click.option("--output_dir", type=PATH, required=True, help="Where the quantized TensorRT-LLM checkpoint goes.")
@click.option("--qformat", type=OneOf(tuple(QUANT_ALGOS)), required=True, help=f"Format of the linear layers: {', '.join(QUANT_ALGOS)}.")
@click.option("--calib_data", type=PATH, help="JSONL or .txt file, or a saved data set.  [default: generated tasks]")
@click.option("--calib_size", type=POSITIVE, default=128, help="Sequences to take; an eighth of them (at most 16) judges the result.")
@click.option("--calib_seq_len", type=Count(8, 1 << 20), default=512, help="Tokens of a sequence, at most.")
@click.option("--batch_size", type=Count(1, 4096), default=8, help="Sequences in memory at once; changes no number.")
@click.option("--group_size", type=Count(2, 1 << 16), help="Inputs that share a 4-bit scale.  [default: 128, or the largest that fits]")
@click.option("--exclude", type=MODULES, help="Layers that stay as they are, e.g. 'transformer.layers.0.*'.")
@click.option("--quant_lm_head", is_flag=True, help="Quantize the output matrix as well.")
@click.option(
    "--kv_cache_dtype",
    type=OneOf(("auto", *KV_ALGOS)),
    default="auto",
    help="int8: for onnxruntime; fp8: for tensorrt-llm. Refused where it would hurt.  [default: auto, the engine's type]",
)
@click.option("--plain_rounding", is_flag=True, help="No search (SmoothQuant, AWQ): the format's plain rounding, to compare with.")
@click.option("--sensitivity", is_flag=True, help="Also measure what quantizing each layer alone costs.")
@click.option(
    "--accuracy_budget", type=BUDGET, help="kl=X: keep the most sensitive layers as they are until the mean KL is at most X nats."
)
@click.option(
    "--target_bits", type=FiniteFloat(1, 32), help="Keep the most sensitive layers as they are up to this mean of bits per weight."
)
@click.option("--seed", type=Count(0, (1 << 31) - 1), default=0, help="Seed of the sample.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
def calibrate(model_dir: Path, output_dir: Path, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Quantize a model on data, and report what it cost."""
    from trtllm_thoughtx.calibrate.job import calibrate
    from trtllm_thoughtx.calibrate.page import calibration_tables

    options["exclude"] = options["exclude"] or ()
    found = calibrate(model_dir, output_dir, progress=Progress(quiet=quiet), **options)
    following = f"next: thoughtx-build --checkpoint_dir {output_dir} --output_dir ENGINE"
    emit("calibrate", found, as_json=as_json, human=[*calibration_tables(found), following])
