"""The commands: each parses its flags, calls one function of the package and prints what that returned.

Heavy modules are imported inside the commands, so that `--help` and a wrong flag answer at once, with no TensorRT, torch or
onnx on the machine. Flags are spelled with underscores, as trtllm-build does; dashes work as well. Every flag of a command
may also stand in a YAML file (`--config`), and the command line wins.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from trtllm_thoughtx import __version__
from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.build.flags import CHUNK_SIZE, PATH, POSITIVE, TOKENS, Count, FiniteFloat, OneOf
from trtllm_thoughtx.cli import framework
from trtllm_thoughtx.cli.calibrate import calibrate  # noqa: F401 (importing registers a command)
from trtllm_thoughtx.cli.distill import distill  # noqa: F401
from trtllm_thoughtx.cli.evaluate import evaluate  # noqa: F401
from trtllm_thoughtx.cli.framework import COMMANDS, command
from trtllm_thoughtx.cli.params import CONTEXT, EXIT_CODES, emit, run
from trtllm_thoughtx.cli.release import release_command  # noqa: F401
from trtllm_thoughtx.cli.serve import serve_command  # noqa: F401
from trtllm_thoughtx.config import DTYPES
from trtllm_thoughtx.errors import Exit, ThoughtxError
from trtllm_thoughtx.process import interrupt
from trtllm_thoughtx.progress import Progress

# in which one uses them
ORDER = ("distill", "convert", "calibrate", "build", "validate", "run", "serve", "eval", "bench", "sign", "export", "release", "inspect")


@command(
    "convert",
    "thoughtx-convert --model_dir ./DistilQwen2.5-ThoughtX-7B --output_dir ./ckpt",
    "thoughtx-convert --model_dir ./model --output_dir ./ckpt --dtype float16 --force",
)
@click.option("--model_dir", type=PATH, required=True, help="Hugging Face directory (safetensors).")
@click.option("--output_dir", type=PATH, required=True, help="Output directory for the TensorRT-LLM checkpoint.")
@framework.lora_option
@click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", help="Weight type; auto keeps the checkpoint's.")
@click.option("--tp_size", type=Count(1, 64), default=1, help="Tensor parallel ranks (for tensorrt-llm).")
@click.option("--pp_size", type=Count(1, 64), default=1, help="Pipeline parallel ranks (for tensorrt-llm).")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--allow_nonfinite", is_flag=True, help="Accept NaN and infinite weights, and record it.")
def convert(model_dir: Path, output_dir: Path, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Convert a Hugging Face model to a TensorRT-LLM 1.2 checkpoint."""
    from trtllm_thoughtx.checkpoint.convert import convert
    from trtllm_thoughtx.checkpoint.opened import Checkpoint
    from trtllm_thoughtx.checkpoint.quantized import import_quantized, only_plain
    from trtllm_thoughtx.inspection import describe, summary_table
    from trtllm_thoughtx.report import UP_TO_DATE

    checkpoint = Checkpoint.open(model_dir)
    if checkpoint.is_quantized():
        summary = import_quantized(checkpoint, output_dir, progress=Progress(quiet=quiet), **only_plain(options))
    else:
        summary = convert(checkpoint, output_dir, progress=Progress(quiet=quiet), **options)
    found = describe(output_dir)["notes"]
    for note in found:
        Progress(quiet=quiet).note(f"note: {note}")
    summary["notes"] = [*summary.get("notes", ()), *found]
    following = f"next: thoughtx-build --checkpoint_dir {output_dir} --output_dir ENGINE"
    if summary["up_to_date"]:
        following = f"{UP_TO_DATE}\n{following}"
    emit("convert", summary, as_json=as_json, human=[summary_table("checkpoint", summary), following])


@command(
    "build",
    "thoughtx-build --checkpoint_dir ./ckpt --output_dir ./engine --use_chunked_attention",
    "thoughtx-build --config build_configs/thoughtx-tiny.yaml --checkpoint_dir ./ckpt --output_dir ./engine",
)
@click.option("--checkpoint_dir", type=PATH, required=True, help="TensorRT-LLM checkpoint or Hugging Face directory.")
@click.option("--output_dir", type=PATH, required=True, help="Output directory for the engine.")
@framework.lora_option
@framework.build_options
@click.option("--only_part", type=Count(0, 4096), help="Build this stage of a staged engine alone; the last one is the head.")
@click.option("--built_part", type=PATH, multiple=True, help="Directory of such a part; all of them make the engine.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--dry_run", is_flag=True, help="Check everything and print the plan, without writing.")
def build(
    checkpoint_dir: Path,
    output_dir: Path,
    lora_dir: Path | None,
    only_part: int | None,
    built_part: tuple[Path, ...],
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Build an engine directory from a checkpoint."""
    from trtllm_thoughtx.build import trtllm
    from trtllm_thoughtx.build.build import build
    from trtllm_thoughtx.inspection import build_tables

    options["backend"] = [name for names in options["backend"] for name in names] or None
    progress = Progress(quiet=quiet)
    if only_part is not None and built_part:
        why = "one builds a part, the other puts parts together"
        raise ThoughtxError("E001", "--only_part and --built_part exclude each other", where="thoughtx-build", why=why, fix="give one")
    apart: dict[str, Any] = {"only_part": only_part, "built_part": built_part}
    if (only_part is not None or built_part) and trtllm.is_wanted(options):
        why = "trtllm-build makes all of an engine at once"
        raise ThoughtxError("E001", "tensorrt-llm engines have no parts", where="thoughtx-build", why=why, fix="leave the flag out")
    how: dict[str, Any] = {"lora_dir": lora_dir, "force": force, "dry_run": dry_run, "progress": progress}
    summary = build(checkpoint_dir, output_dir, options, **apart, **how)
    if "trtllm_build" in summary:
        return emit("build", summary, as_json=as_json, human=trtllm.tables(summary))
    is_whole = not dry_run and only_part is None
    following = [f"next: thoughtx-validate --engine_dir {output_dir} --reference HF_DIR"] if is_whole else []
    emit("build", summary, as_json=as_json, human=[*build_tables(summary), *following])


@command(
    "validate",
    "thoughtx-validate --engine_dir ./engine --reference ./model --record golden.safetensors",
    "thoughtx-validate --engine_dir ./engine --golden golden.safetensors --junit report.xml",
    "thoughtx-validate --engine_dir ./engine --export_check ./check",
)
@click.option("--engine_dir", type=PATH, required=True, help="Engine directory to validate.")
@click.option("--reference", type=PATH, help="Hugging Face directory to compare with, run by transformers.")
@framework.lora_option
@click.option("--golden", type=PATH, help="Recorded reference values, for machines without transformers.")
@click.option("--record", type=PATH, help="Write the reference values to this file.")
@click.option("--prompts", type=PATH, help="JSONL file of prompts to compare as well, as thoughtx-run reads it.")
@click.option("--private_data", is_flag=True, help="Record only the hashes of --prompts.")
@click.option("--backend", type=OneOf(tuple(BACKENDS)), help="Validate this backend only.  [default: every backend in the directory]")
@click.option("--seed", type=Count(0, (1 << 63) - 1), default=0, help="Seed of the prompts.")
@framework.exact_option
@framework.verify_key_option
@click.option("--bisect", is_flag=True, help="On a failure, name the first layer that leaves the band.")
@click.option("--export_check", type=PATH, help="Write files with which Polygraphy checks the engine, where this package is not installed.")
@click.option("--strict", is_flag=True, help="Count skipped checks as failures.")
@click.option("--junit", "junit_file", type=PATH, help="Also write the checks as JUnit XML.")
def validate(engine_dir: Path, strict: bool, junit_file: Path | None, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Compare an engine with PyTorch; status 1 when they differ."""
    from trtllm_thoughtx import report
    from trtllm_thoughtx.validate.validate import validate

    if junit_file is not None:
        report.check_file_output(junit_file)
    result = validate(engine_dir, progress=Progress(quiet=quiet), **options)
    result = result.strictly() if strict else result
    if junit_file is not None:
        report.junit(junit_file, result.checks, "thoughtx-validate")
    rows = [[check.status, check.name, check.reason or report.brief(report.plain(check.evidence))] for check in result.checks]
    human = [report.table(f"checks of {engine_dir}", ["status", "check", "evidence or reason"], rows), result.verdict]
    emit("validate", {"engine_dir": engine_dir, **result.document()}, as_json=as_json, ok=result.ok, human=human)
    if not result.ok:
        raise click.exceptions.Exit(Exit.NO)


@command(
    "run",
    'thoughtx-run --engine_dir ./engine --prompt "x1 = 3 x2 = 5 ?"',
    "thoughtx-run --engine_dir ./engine --input_ids 4,49,8,16 --max_new_tokens 16 --temperature 0 --json",
    "thoughtx-run --engine_dir ./engine --prompts requests.jsonl --output answers.jsonl --resume",
)
@click.option("--engine_dir", type=PATH, required=True, help="Engine directory to run.")
@click.option("--prompt", help="Text of one request; the chat template is applied.")
@click.option("--input_ids", type=TOKENS, help="Token ids of one request, comma-separated.")
@click.option("--prompts", type=PATH, help='JSONL file, - is stdin: {"prompt": TEXT} and settings a line, or lines of a server batch.')
@click.option("--output", type=PATH, help="Append each answer to this JSONL file when it is done.")
@framework.worn_lora_option
@click.option("--resume", is_flag=True, help="Go on with --output: what it holds is not asked again.")
@framework.on_error_option
@click.option("--no_chat_template", is_flag=True, help="Do not apply the chat template.")
@click.option("--backend", type=OneOf(tuple(BACKENDS)), help="Which of the engine's plans to run.  [default: onnxruntime, if built]")
@click.option("--max_new_tokens", type=POSITIVE, help="Maximum tokens to generate per request.  [default: the checkpoint's, or 256]")
@click.option("--temperature", type=FiniteFloat(min=0, max=100), help="0 is greedy.  [default: the checkpoint's]")
@click.option(
    "--top_p",
    type=FiniteFloat(min=0, min_open=True, max=1),
    help="Nucleus sampling: keep this probability mass.  [default: the checkpoint's]",
)
@click.option("--seed", type=Count(0, (1 << 63) - 1), default=0, help="Sampling seed.")
@framework.sampling_options
@click.option("--num_return_sequences", type=Count(1, 1024), help="Answers to each prompt, from different random streams.  [default: 1]")
@click.option("--logprobs", type=Count(0, 1000), help="With --json: log-probabilities of each token and of the N likeliest in its place.")
@click.option("--ignore_eos", is_flag=True, help="Continue past the end-of-sequence token.")
@click.option("--chunk_size", type=CHUNK_SIZE, help="Tokens per attention chunk; auto: chosen from prompt entropy.")
@framework.template_options
@framework.thinking_options
@framework.exact_option
@framework.verify_key_option
@click.option("--num_threads", type=Count(1, 1024), help="CPU threads.")
@click.option("--output_logits_npy", type=PATH, help="Write float32 logits [new tokens, vocabulary] of one request.")
def run_command(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Generate text or token ids with an engine."""
    from trtllm_thoughtx.cli.run import run_requests

    stream = None if as_json else sys.stdout
    options["stop"] = options["stop"] or None
    result = run_requests(stream=stream, progress=Progress(quiet=quiet), **options)
    emit("run", result, as_json=as_json, ok=not result["num_errors"])
    if result["num_errors"]:
        raise click.exceptions.Exit(Exit.NO)


@command(
    "bench",
    "thoughtx-bench --engine_dir ./engine --prompt_len 128 --max_new_tokens 64",
    "thoughtx-bench --engine_dir ./engine --against ./model --num_threads 2 --json",
)
@click.option("--engine_dir", type=PATH, required=True, help="Engine directory to time.")
@click.option("--against", type=PATH, help="Hugging Face directory that transformers runs eagerly in the same process.")
@click.option("--backend", type=OneOf(tuple(BACKENDS)), help="Which of the engine's plans to time.  [default: onnxruntime, if built]")
@click.option("--prompt_len", type=POSITIVE, default=64, help="Tokens of each random prompt.")
@click.option("--max_new_tokens", type=Count(2, 1 << 20), default=32, help="Tokens to decode per request.")
@click.option("--batch_size", type=POSITIVE, default=1, help="Requests per call.")
@click.option("--num_threads", type=Count(1, 1024), help="CPU threads.")
@framework.exact_option
@framework.verify_key_option
@click.option("--repeats", type=Count(1, 1000), default=5, help="Timed runs; the median is reported.")
@click.option("--warmup", type=Count(0, 1000), default=1, help="Warm-up runs before timing.")
@click.option("--seed", type=Count(0, (1 << 63) - 1), default=0, help="Seed of the random prompts.")
def bench(engine_dir: Path, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Time prefill and decode of an engine."""
    from trtllm_thoughtx.bench import bench, bench_table

    result = bench(engine_dir, progress=Progress(quiet=quiet), **options)
    emit("bench", result, as_json=as_json, human=bench_table(result))


@command(
    "sign",
    "thoughtx-sign --engine_dir ./engine --key key.pem",
    "thoughtx-sign --engine_dir ./engine --key next.pem --force",
)
@click.option("--engine_dir", type=PATH, required=True, help="Engine directory to sign.")
@click.option("--key", type=PATH, required=True, help="Private key (PEM): EC P-256, P-384, P-521 or Ed25519.")
@click.option("--force", is_flag=True, help="Replace a signature.")
def sign(engine_dir: Path, key: Path, force: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """Sign an engine directory, with its provenance and bill of materials."""
    from trtllm_thoughtx.inspection import summary_table
    from trtllm_thoughtx.ship.sign import sign

    signed = sign(engine_dir, key, force=force)
    following = f"next: thoughtx-inspect {engine_dir} --verify_key PUB.pem (openssl pkey -in {key} -pubout -out PUB.pem)"
    emit("sign", signed, as_json=as_json, human=[summary_table("signed", signed), following])


@command(
    "export",
    "thoughtx-export --engine_dir ./engine --oci ./engine.oci --tag 2026-11",
    "thoughtx-export --engine_dir ./engine --triton ./repository --model_name answers --verify_key pub.pem",
)
@click.option("--engine_dir", type=PATH, required=True, help="Engine directory to export.")
@click.option("--oci", type=PATH, help="New directory for an OCI image layout with ModelPack's media types.")
@click.option("--tag", help="With --oci: name of the artifact in the layout.  [default: latest]")
@click.option("--triton", type=PATH, help="Model repository of a Triton server, to which the engine is added.")
@click.option("--model_name", help="With --triton: name of the model.  [default: the engine directory's]")
@framework.verify_key_option
def export(
    engine_dir: Path,
    oci: Path | None,
    tag: str | None,
    triton: Path | None,
    model_name: str | None,
    verify_key: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Write an engine in the form that container registries, or Triton, take."""
    from trtllm_thoughtx.inspection import summary_table
    from trtllm_thoughtx.ship.export.oci import export_oci
    from trtllm_thoughtx.ship.export.triton import export_triton

    framework.one_of({"oci": oci, "triton": triton}, "thoughtx-export")
    if (tag if triton is not None else model_name) is not None:
        flag, other = ("--tag", "--oci") if triton is not None else ("--model_name", "--triton")
        raise ThoughtxError(
            "E001", f"{flag} needs {other}", where="thoughtx-export", why="it names what that flag writes", fix=f"leave {flag} out"
        )
    if triton is not None:
        made = export_triton(engine_dir, triton, model_name=model_name, verify_key=verify_key, progress=Progress(quiet=quiet))
        title, following = "Triton model", f"next: tritonserver --model-repository {triton.resolve()}"
    else:
        assert oci is not None
        made = export_oci(engine_dir, oci, tag=tag or "latest", verify_key=verify_key, progress=Progress(quiet=quiet))
        title, following = "OCI image layout", f"next: oras cp --from-oci-layout {oci}:{made['tag']} REGISTRY/NAME:{made['tag']}"
    emit("export", made, as_json=as_json, human=[summary_table(title, made), following])


@command(
    "inspect",
    "thoughtx-inspect ./engine",
    "thoughtx-inspect ./engine/rank0.onnx --json",
    "thoughtx-inspect ./engine --preflight --backend tensorrt-rtx --junit preflight.xml",
)
@click.argument("path", type=PATH)
@click.option("--preflight", is_flag=True, help="Judge whether an engine would load and run on this machine.")
@click.option("--backend", type=OneOf(tuple(BACKENDS)), help="With --preflight: this backend only.  [default: every one in the directory]")
@click.option("--junit", "junit_file", type=PATH, help="With --preflight: also write the checks as JUnit XML.")
@framework.verify_key_option
def inspect(
    path: Path,
    preflight: bool,
    backend: str | None,
    junit_file: Path | None,
    verify_key: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Describe PATH: a model, checkpoint, engine directory, .onnx or .engine file."""
    if preflight:
        return _preflight(path, backend, junit_file, verify_key, as_json)
    for name, value in (("backend", backend), ("junit", junit_file)):
        if value is not None:
            why = "without --preflight nothing is judged"
            raise ThoughtxError(
                "E001", f"--{name} needs --preflight", where="thoughtx-inspect", why=why, fix="add --preflight, or leave it out"
            )
    from trtllm_thoughtx.inspection import describe, description_tables

    description = describe(path, verify_key)
    ok = description.get("matches_manifest") is not False
    emit("inspect", description, as_json=as_json, ok=ok, human=description_tables(description))
    if not ok:
        raise click.exceptions.Exit(Exit.REFUSED)


def _preflight(path: Path, backend: str | None, junit_file: Path | None, verify_key: Path | None, as_json: bool) -> None:
    from trtllm_thoughtx import report
    from trtllm_thoughtx.ship.preflight import preflight

    if junit_file is not None:
        report.check_file_output(junit_file)
    found = preflight(path, backend, verify_key)
    if junit_file is not None:
        report.junit(junit_file, found.checks, "thoughtx-inspect-preflight")
    emit("preflight", found, as_json=as_json, ok=found.exit == Exit.OK, human=found.tables())
    if found.exit != Exit.OK:
        raise click.exceptions.Exit(found.exit)


class _Group(click.Group):
    """Lists the commands in the order in which one uses them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in ORDER if name in self.commands]


@click.group("thoughtx", cls=_Group, commands=COMMANDS, context_settings=CONTEXT, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="trtllm-thoughtx")
def thoughtx() -> None:
    """Turn a distilled reasoning checkpoint into engine files that can be shipped, and prove them correct."""


def main(name: str = "thoughtx") -> NoReturn:
    """Run the command `name` of `COMMANDS`, or the group of them, and end the process with its status."""
    status = run(COMMANDS.get(name, thoughtx), name if name == "thoughtx" else f"thoughtx-{name}")
    if status == Exit.INTERRUPTED:
        interrupt.leave()
    sys.exit(status)
