"""`thoughtx-release`: read the document, plan, run what is not there, judge, and leave release.json, release.xml and the engines.

OUT/store/              outputs by key, unless --store names a directory that machines share
OUT/engines/NAME        links to what passed: signed where there is a key
OUT/images/NAME         links to its OCI layout
OUT/release.json        every engine with its measures, checks, steps and commands
OUT/release.html        the same for people
OUT/release.xml         the checks as JUnit
"""

from __future__ import annotations

import os
import shlex
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_thoughtx import __version__, report
from trtllm_thoughtx.backends.gpu import gpus
from trtllm_thoughtx.errors import ThoughtxError, counted, shown
from trtllm_thoughtx.files import atomic_file, human_bytes
from trtllm_thoughtx.progress import Progress, duration
from trtllm_thoughtx.release.document import Flags, read_release
from trtllm_thoughtx.release.executor import Executor, LocalExecutor
from trtllm_thoughtx.release.page import page
from trtllm_thoughtx.release.plan import Engine, Plan, Planner
from trtllm_thoughtx.release.rates import Rates
from trtllm_thoughtx.release.schedule import DONE, Schedule, State
from trtllm_thoughtx.release.step import HERE, OTHER, Step
from trtllm_thoughtx.release.store import Store
from trtllm_thoughtx.release.verdict import Judge, Row
from trtllm_thoughtx.release.watch import watch_for

SHOWN = ("convert", "calibrate", "fit", "build", "validate")  # the steps that reproduce an engine


@dataclass(frozen=True)
class Released:
    """What `release` made. `counts`: steps by how they ended."""

    name: str
    output_dir: Path
    rows: list[Row]
    counts: dict[str, int]
    seconds: float

    @property
    def ok(self) -> bool:
        return not any(row.status == "failed" for row in self.rows)

    def document(self) -> dict[str, Any]:
        return {
            "release": self.name,
            "output_dir": self.output_dir,
            "tool_version": __version__,
            "engines": self.rows,
            "count": dict(Counter(row.status for row in self.rows)),
            "steps": self.counts,
            "seconds": self.seconds,
        }


def open_plan(path: Path, flags: Flags, cache: Path | None, progress: Progress) -> Plan:
    release = read_release(path, flags)
    found = gpus()
    return Planner(release, cache, found[0].name if found else None, progress).plan()


def release(path: Path, output_dir: Path, flags: Flags, *, store_dir: Path | None, ray: str | None, quiet: bool, as_json: bool) -> Released:
    """Make the release that the document at `path` describes. What fails is a row of the result; ThoughtxError for what cannot begin."""
    began = time.monotonic()
    output_dir = Path(output_dir)
    _check_output(output_dir)
    root = (store_dir or output_dir / "store").absolute()
    plan = open_plan(path, flags, root / "inputs" if root.is_dir() else None, Progress(quiet=quiet or as_json))  # refusals leave nothing
    for directory in (output_dir, root):
        directory.mkdir(exist_ok=True)
    store, rates = Store(root), Rates.read(root)
    is_done = all(map(store.has, plan.steps))  # then no cluster is asked
    executor = _executor(None if is_done else ray, store)
    try:
        watch = watch_for(plan.steps, rates, executor.cores, quiet=quiet, as_json=as_json)
        scheduler = Schedule(plan.steps, store, executor, watch)
        judge = Judge(plan.engines, plan.release.limits, store, scheduler.states)
        scheduler.passed = judge.passed
        with watch:
            scheduler.run()
    finally:
        executor.close()
    rows = [judge.row(engine) for engine in plan.engines]
    for row, engine in zip(rows, plan.engines, strict=True):
        row.commands = commands(engine, plan.steps)
    counts = dict(Counter(state.status for state in scheduler.states.values()))
    made = Released(plan.release.name, output_dir, rows, counts, round(time.monotonic() - began, 1))
    rates.write(root)
    _write(made, plan, store, scheduler.states)
    return made


def _executor(ray: str | None, store: Store) -> Executor:
    if ray is None:
        return LocalExecutor(store)
    from trtllm_thoughtx.release.on_ray import RayExecutor

    return RayExecutor(store, ray)


def _check_output(output_dir: Path) -> None:
    """E130 for an output that this command did not write."""
    parent = output_dir.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why, fix = "the directory that shall hold it does not exist, or cannot be written", "create it first"
    elif output_dir.is_symlink() or (output_dir.exists() and not output_dir.is_dir()):
        why, fix = "it is a file or a link", "choose another output path"
    elif output_dir.is_dir() and any(output_dir.iterdir()) and not {"store", "release.json"} & {path.name for path in output_dir.iterdir()}:
        why, fix = "it holds something else than a release", "choose another output path"
    else:
        return
    raise ThoughtxError("E130", "the output path cannot be used", where=shown(str(output_dir), 400), why=why, fix=fix)


def commands(engine: Engine, steps: Mapping[str, Step]) -> list[str]:
    """The commands that make and judge the engine by hand, with names of their own in place of the store's paths."""
    lines = []
    for kind in SHOWN:
        if kind in engine.steps:
            words = [_readable(word, steps) for word in engine.steps[kind].words]
            while "--built_part" in words:  # by hand it is built at once, with the same bytes
                at = words.index("--built_part")
                del words[at : at + 2]
            lines.append(shlex.join([f"thoughtx-{words[0]}", *words[1:]]))
    return lines


def _readable(word: str, steps: Mapping[str, Step]) -> str:
    match = OTHER.fullmatch(word)
    if match is None:
        return word.removeprefix(f"{HERE}/")
    return steps[match[1]].label if (match[2] or "")[1:] == steps[match[1]].label else f"{steps[match[1]].label}{match[2] or ''}"


def _write(made: Released, plan: Plan, store: Store, states: Mapping[str, State]) -> None:
    for folder, kinds in (("engines", ("sign", "build")), ("images", ("export",))):
        root = made.output_dir / folder
        for row, engine in zip(made.rows, plan.engines, strict=True):
            wanted = [kind for kind in kinds if kind in engine.steps][:1]
            step = engine.steps[wanted[0]] if wanted else None
            is_there = step is not None and row.status == "passed" and states[step.key].status in DONE
            _point(root / engine.name, store.path(step.key) / step.label if is_there and step else None)
    report.junit(made.output_dir / "release.xml", [check for row in made.rows for check in row.checks], "thoughtx-release")
    with atomic_file(made.output_dir / "release.html") as file:
        file.write(page(made.name, made.rows, made.seconds, made.counts).encode())
    with atomic_file(made.output_dir / "release.json") as file:
        file.write(report.to_json({"schema": "thoughtx.release/1", **report.plain(made)}).encode())


def _point(link: Path, target: Path | None) -> None:
    """`link` leads to `target`, or is gone."""
    if target is None:
        link.unlink(missing_ok=True)
        return
    link.parent.mkdir(exist_ok=True)
    aside = link.parent / f".{link.name}.{uuid.uuid4().hex[:8]}"
    os.symlink(os.path.relpath(target, link.parent), aside)
    os.replace(aside, link)


# --- for people ---------------------------------------------------------------------------------------------------------


def tables(made: Released) -> list[Any]:
    columns = ["engine", "result", "size", "KL", "right", "points lost", "tokens/s", "why"]
    rows = [
        [
            row.name,
            row.status,
            None if row.num_bytes is None else human_bytes(row.num_bytes),
            row.kl,
            report.percent(row.accuracy),
            row.points_lost,
            None if row.tokens_per_second is None else round(row.tokens_per_second),
            "; ".join(row.reasons or row.skipped[:1]) or None,
        ]
        for row in made.rows
    ]
    num_made = made.counts.get("made", 0)
    did = f"{counted(num_made, 'step')} made" if num_made else "up to date: nothing was to be made"
    return [report.table(f"release {made.name}", columns, rows), f"{did}, {made.counts.get('found', 0)} found, in {duration(made.seconds)}"]


def dry_run(path: Path, output_dir: Path, flags: Flags, *, store_dir: Path | None, progress: Progress) -> dict[str, Any]:
    """The steps with what they will take, and what is there already. Nothing is written."""
    root = (store_dir or Path(output_dir) / "store").absolute()
    plan = open_plan(path, flags, None, progress)
    there = {key for key in plan.steps if (root / "objects" / key[:2] / key / "step.json").exists()}
    rates = Rates.read(root)
    cores = len(os.sched_getaffinity(0))
    open_steps = [step for key, step in plan.steps.items() if key not in there]
    return {
        "release": plan.release.name,
        "dry_run": True,
        "num_engines": len(plan.engines),
        "steps": [
            {
                "kind": step.kind,
                "label": step.label,
                "key": step.key,
                "needs": list(step.needs),
                "cores": step.cores,
                "memory_bytes": step.memory,
                "disk_bytes": step.disk,
                "seconds": rates.seconds(step),
                "gpu": step.gpu,
                "resources": dict(step.resources),
                "found": key in there,
            }
            for key, step in plan.steps.items()
        ],
        "num_found": len(there),
        "disk_bytes": sum(step.disk for step in open_steps),
        "largest_memory_bytes": max((step.memory for step in open_steps), default=0),
        "seconds": rates.left(open_steps, cores),
    }


def dry_tables(plan: Mapping[str, Any]) -> list[Any]:
    rows = [
        [
            step["kind"],
            step["label"],
            "found" if step["found"] else "to make",
            human_bytes(step["memory_bytes"]),
            human_bytes(step["disk_bytes"]),
            None if step["seconds"] is None else duration(step["seconds"]),
            ", ".join([step["gpu"] or "", *step["resources"]]).strip(", ") or None,
        ]
        for step in plan["steps"]
    ]
    left = "nothing is known of the time" if plan["seconds"] is None else f"about {duration(plan['seconds'])} on this machine"
    text = f"{counted(plan['num_engines'], 'engine')}, {counted(len(rows), 'step')}, {plan['num_found']} found; to make: "
    text += f"{human_bytes(plan['disk_bytes'])} of disk, {human_bytes(plan['largest_memory_bytes'])} of memory at most, {left}"
    return [report.table(f"release {plan['release']}", ["step", "of", "state", "memory", "disk", "time", "GPU"], rows), text]
