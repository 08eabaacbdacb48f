"""`thoughtx-release`: many models, formats and targets from one document."""

from __future__ import annotations

from pathlib import Path

import click

from trtllm_thoughtx.build.flags import PATH
from trtllm_thoughtx.cli import framework
from trtllm_thoughtx.cli.params import emit
from trtllm_thoughtx.errors import Exit
from trtllm_thoughtx.progress import Progress

# Flags that a release sets itself, or that mean nothing in one
COMMON = {"config", "json", "quiet", "debug", "help", "version", "force", "dry_run", "output", "resume", "answers", "on_error", "plot"}
PLACES = {"model_dir", "output_dir", "checkpoint_dir", "engine_dir", "reference", "record", "golden", "compare", "junit", "export_check"}
WITHHELD = COMMON | PLACES | {"against", "verify_key", "plugin_library", "lora_dir"}


@framework.command(
    "release",
    "thoughtx-release build_configs/releases/samples.yaml --output_dir ./release-out",
    "thoughtx-release build_configs/releases/samples.yaml --output_dir ./release-out --dry_run",
    "thoughtx-release build_configs/releases/samples.yaml --output_dir ./release-out --store ./store --ray auto",
)
@click.argument("release_file", type=PATH, metavar="RELEASE.yaml")
@click.option("--output_dir", type=PATH, required=True, help="Directory for the engines, release.json and release.xml.")
@click.option("--store", type=PATH, help="Directory of steps' outputs, shared by machines and releases.  [default: OUTPUT_DIR/store]")
@click.option("--ray", metavar="ADDRESS|local", help="Run the steps on a Ray cluster that sees the store; local: one of this machine.")
@click.option("--dry_run", is_flag=True, help="Print the steps, what they take and what is made already, without writing.")
def release_command(
    release_file: Path, output_dir: Path, store: Path | None, ray: str | None, dry_run: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Make, prove and ship every engine that RELEASE.yaml names; status 1 when one does not hold what it must."""
    from trtllm_thoughtx.release import job

    flags = flags_of_documents()
    if dry_run:
        plan = job.dry_run(release_file, output_dir, flags, store_dir=store, progress=Progress(quiet=quiet))
        return emit("release", plan, as_json=as_json, human=job.dry_tables(plan))
    made = job.release(release_file, output_dir, flags, store_dir=store, ray=ray, quiet=quiet, as_json=as_json)
    emit("release", made, as_json=as_json, ok=made.ok, human=job.tables(made))
    if not made.ok:
        raise click.exceptions.Exit(Exit.NO)


def flags_of_documents() -> dict[str, dict[str, click.Parameter]]:
    """Those that a document may hold, by command and by the name that one types."""
    found: dict[str, dict[str, click.Parameter]] = {}
    for name in ("calibrate", "build", "validate", "eval", "bench"):
        options = [param for param in framework.COMMANDS[name].params if isinstance(param, click.Option)]
        typed = {max(param.opts, key=len).lstrip("-"): param for param in options}
        found[name] = {flag: param for flag, param in typed.items() if flag not in WITHHELD}
    return found
