"""`thoughtx-build`: a checkpoint becomes an engine directory.

checkpoint -> graph per part -> weights streamed beside it (onnxruntime) and a plan per part (TensorRT). With only a TensorRT backend the
weights never touch the disk: the builder takes them from memory, a part at a time, while the next part's are read.

Everything that can be refused is refused before the first byte is written; the directory appears whole or not at all. A build that
would repeat what the output already holds (same inputs, same settings, files intact) does nothing and says so.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_thoughtx import files, report
from trtllm_thoughtx.backends import BACKENDS, keeps_weights
from trtllm_thoughtx.backends.gpu import native_capability
from trtllm_thoughtx.build import engine_dir, trtllm
from trtllm_thoughtx.build import parts as parts_apart
from trtllm_thoughtx.build.flags import PATH
from trtllm_thoughtx.build.options import OPTIONS, refuse, resolve, speed_notes
from trtllm_thoughtx.checkpoint.exits import ExitWeights
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.outputs import Output
from trtllm_thoughtx.checkpoint.recorded import command_line
from trtllm_thoughtx.checkpoint.weights import WeightSource, open_weights
from trtllm_thoughtx.config import PLUGIN_LIBRARY, BuildConfig, PartFiles, PlanFile
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.graph import external
from trtllm_thoughtx.graph.builder import Graph
from trtllm_thoughtx.graph.decoder import decoder_graph, parts_of
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.text.notes import text_notes

if TYPE_CHECKING:
    from trtllm_thoughtx.backends.tensorrt import HeldWeights

PROFILES = ("prefill", "decode")
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # (min, opt, max) shape by input
MAX_LOGIT_ROWS = 32  # of one sequence and call in a TensorRT plan: enough to verify drafts and to measure prompt entropy
LIBRARY_BYTES = 256 << 20
MEMORY_FACTOR = 4.2  # of a TensorRT build, over the weights of its largest part: 3.2 as measured, and the next part's weights


def build(
    checkpoint_dir: Path | Checkpoint,
    output_dir: Path,
    options: Mapping[str, Any] | None = None,
    *,
    lora_dir: Path | None = None,
    only_part: int | None = None,
    built_part: Sequence[Path] = (),
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Build an engine directory from a Hugging Face or TensorRT-LLM checkpoint; `options` are those of `build.options`,
    `lora_dir` is an adapter that is merged. `only_part`, `built_part`: see `build.parts`.

    Returns a summary. Raises ThoughtxError; then nothing is left behind.
    """
    given = {name: Path(value) if value and OPTIONS[name].takes is PATH else value for name, value in (options or {}).items()}
    told = {"checkpoint_dir": checkpoint_dir, "output_dir": output_dir, "lora_dir": lora_dir, "only_part": only_part, **given}
    command = command_line("thoughtx-build", told)
    output_dir = Path(output_dir)
    checkpoint_dir = Checkpoint.open(checkpoint_dir, lora_dir=lora_dir)
    if trtllm.is_wanted(given):
        return trtllm.build_trtllm(checkpoint_dir, output_dir, given, command=command, force=force, dry_run=dry_run, progress=progress)
    began = time.monotonic()
    with open_weights(checkpoint_dir, progress=progress) as source:
        config, exits = source.config, source.exits
        library = given.get("plugin_library")
        settings = _with_exits(resolve(config, given), exits)
        _check_library(settings, library)
        graphs = [decoder_graph(config, settings, part, exits) for part in parts_of(config, settings.stages)]
        bounds = [external.bind(graph, settings.dtype, f"{graph.part.name}.data") for graph in graphs]
        names = [bound.graph.part.name for bound in bounds]
        recorded = {"build": settings.as_dict(), "model": report.plain(config)}
        if only_part is not None:
            bounds = [bounds[parts_apart.number_of(only_part, names)]]
            recorded[parts_apart.KEY] = bounds[0].graph.part.name
        plan = _plan(source, settings, bounds, output_dir)
        notes = [
            *_unused_exits(settings, exits),
            *speed_notes(config, settings),
            *text_notes(source.path, config.vocab_size, source.members.config),
        ]
        for note in notes:
            plan["notes"].append(note)
            progress.note(f"note: {note}")
        if dry_run:
            return {**plan, "dry_run": True}
        more = [] if library is None else [Path(library)]
        output = Output(output_dir, source.members, recorded, command=command, more=more, force=force, progress=progress)
        output.packages |= {BACKENDS[name].module for name in settings.backends}
        if output.is_current():
            return {**plan, "up_to_date": True, "seconds": time.monotonic() - began}
        output.prepare(plan["disk_bytes"])
        _load_backends(settings)
        with output.writing() as partial:
            if library is not None and only_part is None:
                output.write(PLUGIN_LIBRARY, files.read_named(library, LIBRARY_BYTES))
            if built_part:
                parts, output.checks = parts_apart.take(built_part, names, output)
            else:
                parts, output.checks = _build_parts(partial, source, settings, bounds, output_dir, progress)
                output.hashes |= _hashes(parts)
            if only_part is not None:
                output.write(parts_apart.PART, report.to_json(parts[0]))
            else:
                output.carry(*source.members.carried)
                output.write(engine_dir.CONFIG, report.to_json(engine_dir.config_json(config, settings, parts)))
        made = {path.name: path.stat().st_size for path in sorted(output_dir.iterdir())}
    return {
        **plan,
        "up_to_date": False,
        "seconds": time.monotonic() - began,
        "parts": [part.as_dict() for part in parts],
        "files": made,
        "checks": output.checks,
    }


def _unused_exits(settings: BuildConfig, exits: ExitWeights) -> list[str]:
    """A sentence about exit adapters of layers at which the engine is not cut; none where all are used."""
    unused = [str(one.layer) for one in exits.adapters if one.layer not in settings.draft_layers]
    if not unused:
        return []
    layers, cut = ", ".join(unused), ",".join(str(one.layer) for one in exits.adapters)
    return [f"exit adapters before layers {layers} are left out: the engine is not cut there (--early_exit_layers {cut} uses all)"]


def _check_library(settings: BuildConfig, library: Path | None) -> None:
    """E001 unless a library is named exactly where one is needed; E101 when it is no shared library."""
    if settings.plugin == "cpp" and library is None:
        raise refuse("plugin", "cpp", "it needs the shared library", "make plugin TRT_INCLUDE=..., and give it with --plugin_library")
    if settings.plugin != "cpp" and library is not None:
        raise refuse("plugin_library", library, f"the plugin's form is {settings.plugin}", "add --plugin cpp, or leave it out")
    if library is not None and files.read_named(library, LIBRARY_BYTES)[:4] != b"\x7fELF":
        fix = "give the .so that make plugin wrote"
        raise ThoughtxError("E101", "not a shared library", where=str(library), why="it does not begin as an ELF file does", fix=fix)


def _with_exits(settings: BuildConfig, exits: ExitWeights) -> BuildConfig:
    """What the engine takes of the checkpoint's exits: the head, and the adapters of layers at which it is cut."""
    drafts = [one for one in exits.adapters if one.layer in settings.stages]
    return dataclasses.replace(
        settings,
        exit_head=exits.head is not None,
        exit_threshold=exits.head.threshold if exits.head is not None else 0.0,
        draft_layers=tuple(one.layer for one in drafts),
        draft_ranks=tuple(int(one.down.shape[0]) for one in drafts),
        draft_thresholds=tuple(one.threshold for one in drafts),
    )


def _plan(source: WeightSource, settings: BuildConfig, bounds: list[external.Bound], output_dir: Path) -> dict[str, Any]:
    """What a build will do and need, known before any work."""
    weights = [bound.num_bytes for bound in bounds]
    plans = [backend for backend in settings.backends if BACKENDS[backend].builds_plans]
    copies = len(plans) + keeps_weights(settings.backends)
    kv = source.config.kv_bytes_per_token(settings.cache_dtype)
    return {
        "checkpoint_dir": str(source.path),
        "output_dir": str(output_dir),
        "model": report.plain(source.config),
        "build": settings.as_dict(),
        "weights_bytes": sum(weights),
        "disk_bytes": int(sum(weights) * copies * 1.02) + (16 << 20),
        "memory_bytes": int(max(weights) * (MEMORY_FACTOR if plans else 0)) + (512 << 20),
        "kv_bytes_per_token": kv,
        "kv_bytes": kv * settings.kv_capacity * settings.max_batch_size,
        "part_names": [bound.graph.part.name for bound in bounds],
        "notes": list(source.notes),
    }


def _load_backends(settings: BuildConfig) -> None:
    """Fail before any work when a backend's package is missing or does not know a target."""
    for backend in settings.backends:
        if BACKENDS[backend].builds_plans:
            from trtllm_thoughtx.backends.trt_module import load_module, targets

            targets(load_module(backend), backend, settings.compute_capabilities)


@dataclass
class _Ready:
    """A part whose graph and weights are written, or held in memory, so that its plans can be built."""

    entry: PartFiles
    held: HeldWeights | None

    def close(self) -> None:
        if self.held:
            self.held.close()


def _build_parts(
    partial: Path, source: WeightSource, settings: BuildConfig, bounds: list[external.Bound], output_dir: Path, progress: Progress
) -> tuple[list[PartFiles], list[dict[str, Any]]]:
    """Write every part's files into `partial`; returns the parts of config.json, and checks for the manifest.

    A builder keeps one core busy, so the next part's weights are read meanwhile.
    """
    parts, checks = [], []
    for backend in settings.backends:
        _log_path(output_dir, backend).unlink(missing_ok=True)
    stop = threading.Event()
    upcoming: concurrent.futures.Future[_Ready] = concurrent.futures.Future()
    try:
        with concurrent.futures.ThreadPoolExecutor(1, "next-part") as pool, contextlib.ExitStack() as stack:
            stack.callback(stop.set)
            upcoming = pool.submit(_prepare, partial, source, settings, bounds[0], stop, progress)
            for number, bound in enumerate(bounds, 1):
                with contextlib.closing(upcoming.result()) as ready:
                    if number < len(bounds):
                        upcoming = pool.submit(_prepare, partial, source, settings, bounds[number], stop, SILENT)
                    for backend in settings.backends:
                        if BACKENDS[backend].builds_plans:
                            ready.entry.plans[backend], found = _build_plan(partial, settings, bound, ready, backend, output_dir, progress)
                            checks += found
                    parts.append(ready.entry)
    finally:
        if upcoming.done() and not upcoming.exception():
            upcoming.result().close()
    return parts, checks


def _prepare(
    partial: Path, source: WeightSource, settings: BuildConfig, bound: external.Bound, stop: threading.Event, progress: Progress
) -> _Ready:
    """Write the part's graph, and its weights for onnxruntime; hold the weights for TensorRT."""
    part, onnx_file = bound.graph.part, f"{bound.graph.part.name}.onnx"
    (partial / onnx_file).write_bytes(bound.model)
    data, written = partial / bound.location, None
    if keeps_weights(settings.backends):
        written = external.write_data(bound, source, data, progress)
    entry = PartFiles(
        name=part.name,
        first_layer=part.first_layer,
        last_layer=part.last_layer,
        embeds=part.embeds,
        head=part.head,
        onnx=onnx_file,
        data=bound.location if written else None,
        graph_sha256=bound.sha256,
        weights_sha256=written,
        plans={},
    )
    if not any(BACKENDS[backend].builds_plans for backend in settings.backends):
        return _Ready(entry, None)
    from trtllm_thoughtx.backends.tensorrt import HeldWeights

    def initializers() -> Iterator[tuple[str, np.ndarray]]:
        arrays = ((item.name, value) for item, value in external.arrays(bound.graph, settings.dtype, source))
        for pair in external.read_data(bound, data) if entry.data else arrays:
            if stop.is_set():
                raise InterruptedError("another part failed")
            yield pair

    return _Ready(entry, HeldWeights(initializers, part.name, progress))


def _build_plan(
    partial: Path, settings: BuildConfig, bound: external.Bound, ready: _Ready, backend: str, output_dir: Path, progress: Progress
) -> tuple[PlanFile, list[dict[str, Any]]]:
    from trtllm_thoughtx.backends.tensorrt import build_plan

    graph = bound.graph
    assert ready.held
    record = BACKENDS[backend]
    file = f"{graph.part.name}{record.plan_suffix}"
    info = build_plan(
        backend=backend,
        model=bound.model,
        initializers=ready.held,
        plan_path=partial / file,
        profiles=profiles_of(graph, settings),
        compute_capabilities=settings.compute_capabilities if record.has_targets else (),
        optimization_level=settings.optimization_level,
        num_attention=graph.num_attention,
        products=[(product.node, product.weight, product.both) for product in graph.products],
        float32=settings.dtype == "float32",
        log_path=_log_path(output_dir, backend),
        progress=progress,
        plugin=settings.plugin if record.takes_plugins else "function",
        plugin_library=partial / PLUGIN_LIBRARY if record.takes_plugins and settings.plugin == "cpp" else None,
    )
    plan = PlanFile(
        file=file,
        sha256=info.sha256,
        graph_sha256=bound.sha256,
        weights_sha256=ready.entry.weights_sha256,
        compute_capabilities=settings.compute_capabilities if record.has_targets else (native_capability(),),
    )
    evidence = {"expected": graph.num_attention, "found": info.num_attention, "form": settings.plugin}
    checks = [{"name": f"attention layers in {file}", "status": "passed", "reason": "", "evidence": evidence}]
    if graph.products:
        checks.append(_products_check(graph, file, info.fallbacks))
        if info.fallbacks:
            progress.note(f"{file}: {checks[-1]['reason']}")
    return plan, checks


def _products_check(graph: Graph, file: str, fallbacks: list[str]) -> dict[str, Any]:
    """Are the quantized products low-precision ones in the plan? A layer that fell back is named."""
    evidence = {
        "expected": len(graph.products),
        "found": len(graph.products) - len(fallbacks),
        "types": sorted({p.weight for p in graph.products}),
    }
    reason = f"computed in the graph's type: {', '.join(fallbacks)}" if fallbacks else ""
    return {
        "name": f"low-precision products in {file}",
        "status": "failed" if fallbacks else "passed",
        "reason": reason,
        "evidence": evidence,
    }


def _log_path(output_dir: Path, backend: str) -> Path:
    """Where the builder's messages go, beside the output: they carry times, and the output must repeat byte for byte."""
    return output_dir.parent / f"{output_dir.name}.{backend}.log"


def _hashes(parts: list[PartFiles]) -> dict[str, str]:
    """sha256 of the parts' files, as known from writing them."""
    hashes: dict[str, str | None] = {}
    for part in parts:
        hashes |= {part.onnx: part.graph_sha256, **{plan.file: plan.sha256 for plan in part.plans.values()}}
        hashes |= {part.data: part.weights_sha256} if part.data else {}
    return {name: value for name, value in hashes.items() if value}


def profiles_of(graph: Graph, settings: BuildConfig) -> list[Profile]:
    """Shape ranges (min, opt, max) by input for prefill and for decode, in the order of `PROFILES`."""
    batch, length, segment = settings.max_batch_size, settings.kv_capacity, settings.max_segment
    slots = (1, max(1, length // 2), length)
    by_phase = {
        "prefill": {"B": (1, 1, batch), "S": (1, segment, segment), "T": slots, "K": (1, 1, min(MAX_LOGIT_ROWS, segment))},
        "decode": {"B": (1, batch, batch), "S": (1, 1, 1), "T": slots, "K": (1, 1, 1)},
    }
    profiles = []
    for phase in PROFILES:
        shapes = {}
        for value in graph.model.graph.input:
            dims = [by_phase[phase][d.dim_param] if d.dim_param else (d.dim_value,) * 3 for d in value.type.tensor_type.shape.dim]
            shapes[value.name] = (tuple(d[0] for d in dims), tuple(d[1] for d in dims), tuple(d[2] for d in dims))
        profiles.append(shapes)
    return profiles
