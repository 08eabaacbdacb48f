"""What a path is: a Hugging Face model, a TensorRT-LLM checkpoint, an engine directory, an ONNX graph or an engine plan.

Only headers and JSON are read, plus the hashes that an engine's manifest asks for. Nothing found here is run: no plan is
deserialised, no weights are loaded, external data of a graph is counted and not opened.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_thoughtx import files, report
from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.build.options import speed_notes
from trtllm_thoughtx.checkpoint import directory as checkpoint
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, counted, shown
from trtllm_thoughtx.text.notes import text_notes

if TYPE_CHECKING:
    from rich.table import Table

ONNX_LIMIT = (1 << 31) - 1  # a protobuf message cannot be larger
SHOWN_APART = ("files", "kind", "error", "inputs", "outputs", "operators", "functions", "parts", "checks")


def describe(path: Path, verify_key: Path | None = None) -> dict[str, Any]:
    """The facts about `path` as JSON types; `kind` says what it is. Raises the error of whoever would read it for use, and E124 for an
    engine that `verify_key` did not sign."""
    kind, raw = checkpoint.kind_and_config(Path(path))
    if verify_key is not None and kind != "engine":
        why, fix = "this is none, and only they are signed", "leave --verify_key out"
        raise ThoughtxError("E001", "--verify_key is for engine directories", where=shown(str(path)), why=why, fix=fix)
    if kind in ("huggingface", "tensorrt-llm"):
        described = _checkpoint(Checkpoint(Path(path), known=(kind, raw)))
    else:
        described = _engine(Path(path), raw, verify_key) if kind == "engine" else {"onnx": _onnx, "plan": _plan}[kind](Path(path))
    return {"kind": kind, "path": str(path), **described}


def _file_rows(root: Path) -> list[dict[str, Any]]:
    return [{"name": entry.name, "bytes": entry.stat().st_size} for entry in sorted(root.iterdir()) if entry.is_file()]


def _model(config: ModelConfig) -> dict[str, Any]:
    facts = report.plain(config)
    if config.rope.kind == "none":
        facts["rope"] = {"kind": "none", "theta": config.rope.theta}  # the other fields belong to scaled kinds
    facts["kv_bytes_per_token"] = config.kv_bytes_per_token(config.dtype)
    return facts


def _checkpoint(opened: Checkpoint) -> dict[str, Any]:
    from trtllm_thoughtx.families.hf_config import model_config_from_hf
    from trtllm_thoughtx.families.trtllm_config import model_config_from_trtllm

    path, kind = opened.path, opened.kind
    facts: dict[str, Any] = {}
    if kind == "huggingface":
        config = model_config_from_hf(opened.raw, opened.where)
    else:
        facts["tp_size"], facts["pp_size"], _ = opened.mapping
        config = model_config_from_trtllm(opened.raw, opened.where)
    shards, exits = opened.shards, opened.exits(config)
    if exits.head is not None:
        facts["exit_head"] = {"threshold": exits.head.threshold}
    if exits.adapters:
        facts["exit_adapters"] = [f"before layer {one.layer} (rank {len(one.down)}, from {one.threshold:g} on)" for one in exits.adapters]
    tensors = opened.tensors()
    types = Counter(info.dtype for info in tensors)
    return {
        **facts,
        "notes": text_notes(path, config.vocab_size, opened.raw),
        "model": _model(config),
        "num_tensors": len(tensors),
        "num_parameters": sum(math.prod(info.shape) for info in tensors),
        "weight_bytes": sum(info.num_bytes for info in tensors),
        "stored_types": dict(sorted(types.items())),
        "weight_files": shards,
        "ignored_files": checkpoint.ignored_files(path, shards) if kind == "huggingface" else [],
        "files": _file_rows(path),
    }


def _engine(path: Path, raw: dict[str, Any], verify_key: Path | None) -> dict[str, Any]:
    from trtllm_thoughtx.build.engine_dir import EngineDir
    from trtllm_thoughtx.ship.sign import MADE
    from trtllm_thoughtx.ship.signature import SIGNATURE, verify

    engine = EngineDir.open(path, raw)
    error = signed = None
    manifest: dict[str, Any] = {}
    try:
        manifest = engine.manifest
        signed = verify(engine, verify_key)
    except ThoughtxError as refused:
        if refused.code not in ("E120", "E121"):
            raise
        error = refused.as_dict()
    is_signed = os.path.lexists(path / SIGNATURE)
    listed = {row["name"]: row["sha256"] for row in manifest.get("outputs", [])}
    rows = [{**row, "sha256": listed.get(row["name"])} for row in _file_rows(path)]
    facts: dict[str, Any] = {
        "backends": list(engine.backends),
        "model": _model(engine.config),
        "build": engine.build.as_dict(),
        "notes": [*speed_notes(engine.config, engine.build), *text_notes(path, engine.config.vocab_size, {})],
        "parts": [part.as_dict() for part in engine.parts],
        "made_by": manifest.get("command"),
        "made_with": manifest.get("environment"),
        "created": manifest.get("created"),
        "checks": manifest.get("checks"),
        "matches_manifest": error is None,
        "signature": f"by the key {signed.key}" if signed else "not verified (--verify_key)" if is_signed else None,
        "unlisted_files": [row["name"] for row in rows if row["sha256"] is None and row["name"] not in (report.MANIFEST, *MADE)],
        "files": rows,
    }
    return facts if error is None else {**facts, "error": error}


def _onnx(path: Path) -> dict[str, Any]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(files.read_named(path, ONNX_LIMIT))
    except DecodeError:
        model = onnx.ModelProto()
    if not model.ir_version or not model.graph.node:  # an empty file is a valid, empty message
        raise ThoughtxError(
            "E101",
            "this is not an ONNX graph",
            where=shown(str(path)),
            why="it does not parse as an ONNX model with nodes; it may be truncated, or something else under this name",
            fix="build the engine again, or copy the file again",
        )
    external = [{entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer if tensor.external_data]
    inline = sum(tensor.ByteSize() for tensor in model.graph.initializer if not tensor.external_data)

    def value(info: onnx.ValueInfoProto) -> dict[str, Any]:
        tensor = info.type.tensor_type
        known = tensor.elem_type in onnx.TensorProto.DataType.values()
        shape = [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in tensor.shape.dim]
        return {"name": info.name, "type": onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if known else "?", "shape": shape}

    return {
        "bytes": path.stat().st_size,
        "sha256": files.sha256_of(path),
        "producer": model.producer_name,
        "ir_version": model.ir_version,
        "opsets": {row.domain or "ai.onnx": row.version for row in model.opset_import},
        "num_nodes": len(model.graph.node),
        "operators": dict(
            sorted(Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node).items())
        ),
        "functions": [{"name": f"{function.domain}::{function.name}", "num_nodes": len(function.node)} for function in model.functions],
        "num_initializers": len(model.graph.initializer),
        "initializer_bytes": inline
        + sum(int(entry["length"]) for entry in external if entry.get("length", "").isascii() and entry["length"].isdigit()),
        "external_files": sorted({entry.get("location", "") for entry in external}),
        "inputs": [value(info) for info in model.graph.input],
        "outputs": [value(info) for info in model.graph.output],
        "belongs_to": _owner(path),
    }


def _plan(path: Path) -> dict[str, Any]:
    return {
        "bytes": path.stat().st_size,
        "sha256": files.sha256_of(path),
        "belongs_to": _owner(path),
        "note": "a plan is a program: it was not opened",
    }


def _owner(path: Path) -> str | None:
    """Whether the manifest beside `path` lists exactly this file: its directory, or None."""
    root = path.absolute().parent
    if not os.path.lexists(root / report.MANIFEST):
        return None
    rows = [row for row in report.read_manifest(root)["outputs"] if row["name"] == path.name]
    return str(root) if rows and rows[0]["sha256"] == files.sha256_of(path) else None


# --- for people --------------------------------------------------------------------------------------------------------


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[list[object]]:
    """Nested facts as rows of a two-column table; nulls and empty lists are left out."""
    rows: list[list[object]] = []
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            rows += [[name, ", ".join(str(item) for item in value)]] if value else []
        elif isinstance(value, int) and not isinstance(value, bool) and "bytes" in key:
            rows.append([name, f"{value:,} ({files.human_bytes(value)})"])
        elif value is not None:
            rows.append([name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value])
    return rows


def summary_table(title: str, facts: Mapping[str, Any]) -> Table:
    """What a command returned, one fact a row."""
    return report.table(title, ["fact", "value"], _flat(report.plain(facts)))


def _generations(build: Mapping[str, Any]) -> list[str]:
    """The compute capabilities that the plans are for, where there are plans."""
    plans = [BACKENDS[name] for name in build["backends"] if BACKENDS[name].builds_plans]
    named = ", ".join(build["compute_capabilities"])
    return [f"{record.name}: {named if record.has_targets else 'of this machine'}" for record in plans]


def build_tables(summary: Mapping[str, Any]) -> list[Any]:
    """What thoughtx-build made, or with --dry_run what it would make."""
    model, build = summary["model"], summary["build"]
    chunks = f"chunks of {counted(build['chunk_size'], 'token')}, {build['left_chunks']} behind, {counted(build['sink_tokens'], 'sink')}"
    chunks += f", {counted(build['num_anchors'], 'anchor')}" if build["num_anchors"] else ""
    if build["base_size"]:
        single = f", a single step below {build['threshold_low']:g} nats" if build["threshold_low"] else ""
        asked = "" if build["adaptive_chunks"] else " when asked"
        chunks += f"; chosen{asked}: {build['base_size']:g} tokens per nat up to {build['max_chunk_size']}{single}"
    drafts = list(zip(build["draft_layers"], build["draft_thresholds"], strict=True))
    estimate = {"disk, at most": summary["disk_bytes"], "memory of the build, about": summary["memory_bytes"]}
    done = summary.get("up_to_date") is not None
    facts = {
        "output": summary["output_dir"],
        "model": ", ".join(
            (model["family"], counted(model["num_layers"], "layer"), f"hidden {model['hidden_size']}", f"vocabulary {model['vocab_size']}")
        ),
        "dtype": build["dtype"],
        "backends": build["backends"],
        "GPU generations": _generations(build),
        "limits": f"batch {build['max_batch_size']}, prompt segment {build['max_input_len']}, sequence {build['max_seq_len']} tokens",
        "attention": chunks if build["use_chunked_attention"] else "full causal",
        "exit head": f"ends the thinking from {build['exit_threshold']:g} on, when asked" if build["exit_head"] else None,
        "drafts": [f"by the first {counted(layer, 'layer')}, from {sure:g} on" for layer, sure in drafts],
        "parts": summary["part_names"],
        "weights": files.human_bytes(summary["weights_bytes"]),
        "KV cache at full batch and length": files.human_bytes(summary["kv_bytes"]),
        **({} if done else {name: files.human_bytes(value) for name, value in estimate.items()}),
    }
    tables: list[Any] = [summary_table("engine" if done else "plan: nothing was written", facts)]
    if summary.get("files"):
        tables.append(report.table("files", ["name", "size"], [[name, files.human_bytes(size)] for name, size in summary["files"].items()]))
    if summary.get("up_to_date"):
        tables.append(report.UP_TO_DATE)
    return tables


def _rows_table(title: str, rows: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[", ".join(map(str, row[key])) if isinstance(row.get(key), list) else row.get(key) for key in columns] for row in rows]
    return report.table(title, columns, cells)


def description_tables(description: Mapping[str, Any]) -> list[Any]:
    """A description as tables: the facts, then the lists; last a line for an engine that does not match its manifest."""
    shown_facts = {key: value for key, value in description.items() if key not in SHOWN_APART}
    tables: list[Any] = [summary_table(description["kind"], shown_facts)]
    if description.get("parts"):
        keys = ("name", "first_layer", "last_layer", "embeds", "head", "onnx", "data")
        parts = [{**{key: part.get(key) for key in keys}, "plans": sorted(part.get("plans", {}))} for part in description["parts"]]
        tables.append(_rows_table("parts", parts))
    if description.get("checks"):
        checks = [[check.get("status"), check.get("name"), report.brief(check.get("evidence"))] for check in description["checks"]]
        tables.append(report.table("checks at build", ["status", "check", "evidence"], checks))
    if description.get("operators"):
        counts = sorted(description["operators"].items(), key=lambda item: -item[1])
        tables.append(report.table("operators", ["operator", "nodes"], [list(item) for item in counts]))
    tables += [_rows_table(key, description[key]) for key in ("functions", "inputs", "outputs", "files") if description.get(key)]
    if "error" in description:
        tables.append(f"DOES NOT MATCH ITS MANIFEST: {description['error']['why']}")
    return tables
