"""`thoughtx-release`: many models, formats and targets from one document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trtllm_thoughtx.build.flags import PATH
from trtllm_thoughtx.cli import framework
from trtllm_thoughtx.cli.params import emit
from trtllm_thoughtx.errors import Exit
from trtllm_thoughtx.progress import Progress

# Flags that a release sets itself, or that mean nothing in one
COMMON = {"config", "json", "quiet", "debug", "help", "version", "force", "dry_run", "output", "resume", "answers", "on_error", "plot"}
PLACES = {"model_dir", "output_dir", "checkpoint_dir", "engine_dir", "reference", "record", "golden", "compare", "junit", "export_check"}
WITHHELD = COMMON | PLACES | {"against", "verify_key", "plugin_library"}


@framework.command(
    "release",
    "thoughtx-release build_configs/releases/samples.yaml --output_dir ./release-out",
    "thoughtx-release build_configs/releases/samples.yaml --output_dir ./release-out --dry_run",
)
@click.argument("release_file", type=PATH, metavar="RELEASE.yaml")
@click.option("--output_dir", type=PATH, required=True, help="Directory for the engines, release.json and release.xml.")
@click.option("--store", type=PATH, help="Directory of steps' outputs, shared by machines and releases.  [default: OUTPUT_DIR/store]")
@click.option("--dry_run", is_flag=True, help="Print the steps, what they take and what is made already, without writing.")
def release_command(
    release_file: Path, output_dir: Path, store: Path | None, dry_run: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Make, prove and ship every engine that RELEASE.yaml names; status 1 when one does not hold what it must."""
    from trtllm_thoughtx.release import job

    names = ("calibrate", "build", "validate", "eval", "bench")
    flags = {name: _flags(framework.COMMANDS[name]) for name in names}
    if dry_run:
        plan = job.dry_run(release_file, output_dir, flags, store_dir=store, progress=Progress(quiet=quiet))
        return emit("release", plan, as_json=as_json, human=job.dry_tables(plan))
    made = job.release(release_file, output_dir, flags, store_dir=store, ray=None, quiet=quiet, as_json=as_json)
    emit("release", made, as_json=as_json, ok=made.ok, human=job.tables(made))
    if not made.ok:
        raise click.exceptions.Exit(Exit.NO)


def _flags(command: click.Command) -> dict[str, Any]:
    """The flags that a document may hold, by their typed name."""
    named = {max(param.opts, key=len).lstrip("-"): param for param in command.params if isinstance(param, click.Option)}
    return {name: param for name, param in named.items() if name not in WITHHELD}
