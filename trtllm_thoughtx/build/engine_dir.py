"""An engine directory as data: what `thoughtx-build` writes and everything else reads.

    config.json      version, pretrained_config (TensorRT-LLM's fields), build_config (trtllm-build's names), thoughtx (ours)
    rank0.onnx/.data the graph and its weights; rank0.stage{k} and rank0.head when cut into stages
    libthoughtx_chunked_attention.so   the plugin library that the plans need, with --plugin cpp
    rank0.engine     the TensorRT plan of the graph of that name (rank0.trt.engine for plain TensorRT)
    manifest.json    sha256 of every file, what they were made from
    tokenizer files  as they came with the checkpoint

The `thoughtx` section has a schema number. Older schemas are read: a setting that they lack has the value it had before it existed
(`config.since`). Newer ones are refused with the version to install. tests/build/engines/ holds a directory of every released schema.

Nothing here loads an engine; `verify` compares all hashes and must pass before one is loaded: a plan is a program, and a tokenizer or
a chat template that changed gives other answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from trtllm_thoughtx import __version__, report
from trtllm_thoughtx.backends import BACKENDS, keeps_weights
from trtllm_thoughtx.build.options import misfits
from trtllm_thoughtx.checkpoint.directory import kind_of
from trtllm_thoughtx.checkpoint.exits import is_threshold
from trtllm_thoughtx.checkpoint.members import CARRIED
from trtllm_thoughtx.config import CHUNK_STEP, PLUGIN_LIBRARY, BuildConfig, ModelConfig, PartFiles, PlanFile
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.families.trtllm_config import model_config_from_trtllm, trtllm_config
from trtllm_thoughtx.files import read_json

CONFIG = "config.json"
SCHEMA = 2  # of the `thoughtx` section: raised once for each release that adds settings; 0 is the form without a number
# An engine that was built without one of these must not read one that was added later.
READ_WHERE_PRESENT = tuple(name for name in CARRIED if not name.startswith(("LICENSE", "NOTICE")))
ENGINE_FILES = (".onnx", ".data", ".engine", ".plan", ".so")  # no such file may lie beside those that config.json names


@dataclass(frozen=True)
class EngineDir:
    """What config.json says; nothing is loaded."""

    root: Path
    config: ModelConfig
    build: BuildConfig
    parts: list[PartFiles]

    @classmethod
    def open(cls, root: Path, raw: Any = None) -> EngineDir:
        """Read and check config.json, or `raw`: its content. E101 when `root` is not an engine directory, E121 when it is malformed."""
        root = Path(root)
        where = str(root / CONFIG)
        if not (root / CONFIG).is_file():
            kind_of(root, ("engine",))  # which refuses it
        raw = raw or read_json(root, CONFIG, code="E121")
        if not isinstance(raw, dict) or "thoughtx" not in raw:
            kind_of(root, ("engine",))
            raise ThoughtxError(
                "E101",
                "not an engine directory of this package",
                where=where,
                why="its config.json has no `thoughtx` section: it looks like TensorRT-LLM's own engine",
                fix="build an engine from its checkpoint: thoughtx-build --checkpoint_dir CKPT --output_dir ENGINE",
            )
        mine = _table(raw, "thoughtx", where)
        schema = _schema(mine, raw.get("version"), where)
        build = _build_config(_table(mine, "build", where), schema, where)
        parts = mine.get("parts")
        if not isinstance(parts, list) or not parts:
            raise _malformed(where, "thoughtx.parts is not a list of parts")
        config = model_config_from_trtllm(_table(raw, "pretrained_config", where), where)
        directory = cls(root, config, build, [read_part(part, where) for part in parts])
        if wrong := directory.contradictions():
            raise _malformed(where, listed(wrong))
        return directory

    @property
    def backends(self) -> tuple[str, ...]:
        """What was built, in the order of preference for running."""
        return tuple(name for name in BACKENDS if name in self.build.backends)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """E121 when it is missing or malformed."""
        return report.read_manifest(self.root)

    def contradictions(self) -> list[str]:
        """Where the files of the parts are not those of `build.backends`, no more and no less."""
        listed_backends = self.build.backends
        if not listed_backends:
            return ["thoughtx.build.backends is empty"]
        plans = {name for name in listed_backends if BACKENDS[name].builds_plans}
        wrong = []
        for part in self.parts:
            of_part = f"thoughtx.parts: {shown(part.name)} has"
            wrong += [f"{of_part} no plan for {name}, which build.backends lists" for name in sorted(plans - set(part.plans))]
            wrong += [f"{of_part} a plan for {shown(name)}, which build.backends does not list" for name in sorted(set(part.plans) - plans)]
            if keeps_weights(listed_backends) != (part.data is not None):
                wrong.append(f"{of_part} {'weights' if part.data else 'no weights'}, and build.backends lists {', '.join(listed_backends)}")
        return wrong

    def files_of(self, backend: str) -> list[str]:
        """The files that `backend` loads."""
        if not BACKENDS[backend].builds_plans:
            return [name for part in self.parts for name in (part.onnx, part.data) if name]
        library = [PLUGIN_LIBRARY] if BACKENDS[backend].takes_plugins and self.build.plugin == "cpp" else []
        return [*library, *(part.plans[backend].file for part in self.parts)]

    def choose(self, backend: str | None) -> str:
        """`backend`, or the first that this directory holds; E101 when it holds none such."""
        if backend is None:
            return self.backends[0]
        if backend not in self.backends:
            raise ThoughtxError(
                "E101",
                f"this directory holds no {shown(backend)} engine",
                where=str(self.root),
                why=f"it was built for {', '.join(self.backends)}",
                fix=f"choose one of those with --backend, or build again with it: thoughtx-build --backend {shown(backend)}",
            )
        return backend

    def adapter_weights(self, layer: int) -> int:
        """Parameters of the exit adapter before `layer`: its map, its norm and its confidence."""
        rank = self.build.draft_ranks[self.build.draft_layers.index(layer)]
        return (2 * rank + 2) * self.config.hidden_size

    def verify(self) -> None:
        """Hash every file of the manifest, whichever of them are wanted; what `backends` would load must be among them, and what
        would be read if it were there. E120 on any difference, E121 for a graph, plan or library that no part or backend has."""
        needed = [CONFIG, *(name for backend in self.backends for name in self.files_of(backend))]
        mine = {*needed, *(part.onnx for part in self.parts)}
        surplus = sorted(path.name for path in self.root.iterdir() if path.suffix in ENGINE_FILES and path.name not in mine)
        if surplus:
            raise ThoughtxError(
                "E121",
                "the directory holds engine files that are not its own",
                where=shown(str(self.root), 400),
                why=f"{CONFIG} names no part or backend that would load {', '.join(map(shown, surplus[:20]))}",
                fix="remove these files, or build an engine again with every backend that is wanted",
            )
        report.verify_files(self.root, needed, READ_WHERE_PRESENT, manifest=self.manifest)


def config_json(config: ModelConfig, build: BuildConfig, parts: list[PartFiles]) -> dict[str, Any]:
    """The engine's config.json: trtllm-build's three keys, and ours."""
    return {
        "version": __version__,
        "pretrained_config": trtllm_config(config, dtype=build.dtype, tp_size=1, pp_size=1),
        "build_config": {
            "max_batch_size": build.max_batch_size,
            "max_input_len": build.max_input_len,
            "max_seq_len": build.max_seq_len,
            "max_beam_width": 1,
            "max_num_tokens": build.max_batch_size * build.max_input_len,
            "kv_cache_type": "CONTINUOUS",
            "strongly_typed": True,
            "plugin_config": {},
        },
        "thoughtx": {"schema": SCHEMA, "build": build.as_dict(), "parts": [part.as_dict() for part in parts]},
    }


def _schema(mine: Mapping[str, Any], version: object, where: str) -> int:
    """The schema of the `thoughtx` section; E121 for one that is newer than this version."""
    schema = mine.get("schema", 0)
    if type(schema) is not int or schema < 0:
        raise _malformed(where, f"thoughtx.schema is {shown(schema)}, not a whole number from 0")
    if schema > SCHEMA:
        writer = f"trtllm-thoughtx {shown(version, 40)}" if isinstance(version, str) else "a newer trtllm-thoughtx"
        raise ThoughtxError(
            "E121",
            "the engine was built by a newer version",
            where=where,
            why=f"{writer} wrote it with schema {schema}; this is trtllm-thoughtx {__version__}, which reads schemas 0 to {SCHEMA}",
            fix=f"install {writer} or later, or build the engine again with this version",
        )
    return schema


def _build_config(raw: Mapping[str, Any], schema: int, where: str) -> BuildConfig:
    """The settings of a directory of that schema; later ones keep `BuildConfig`'s defaults."""
    known = {field.name for field in fields(BuildConfig) if field.metadata.get("schema", 0) <= schema}
    wrong = [f"{name} is missing" for name in sorted(known - set(raw))]
    wrong += [f"{shown(name, 60)} is no setting of schema {schema}" for name in sorted(set(raw) - known)]
    if wrong:
        raise _malformed(where, f"thoughtx.build: {listed(wrong)}")
    blank = BuildConfig()
    values: dict[str, Any] = {}
    for name, value in raw.items():
        like = getattr(blank, name)
        if isinstance(like, tuple):
            value = tuple(value) if isinstance(value, list) else value
        if type(value) not in ((type(None), int) if like is None else (type(like),)):
            raise _malformed(where, f"thoughtx.build.{name} is {shown(value)}")
        values[name] = value
    build = BuildConfig(**values)
    if wrong := misfits(build):
        raise _malformed(where, f"thoughtx.build: {', '.join(wrong)} cannot be")
    if build.max_chunk_size < build.chunk_size or build.use_chunked_attention != (build.chunk_size > 0):
        raise _malformed(where, "thoughtx.build has chunks that cannot be")
    if build.base_size and build.max_chunk_size % CHUNK_STEP:
        raise _malformed(where, "thoughtx.build has thresholds that cannot be")
    if build.adaptive_chunks and not build.base_size:
        raise _malformed(where, "thoughtx.build chooses chunks without a base_size")
    drafts = list(zip(build.draft_layers, build.draft_ranks, build.draft_thresholds, strict=False))
    if not len(build.draft_layers) == len(build.draft_thresholds) == len(build.draft_ranks) or not all(
        layer in build.stages and type(rank) is int and rank > 0 and is_threshold(threshold) for layer, rank, threshold in drafts
    ):
        raise _malformed(where, "thoughtx.build has drafts that cannot be")
    if build.exit_head != (build.exit_threshold > 0) or not 0 <= build.exit_threshold <= 1:
        raise _malformed(where, "thoughtx.build has an exit head that cannot be")
    return build


def read_part(raw: object, where: str) -> PartFiles:
    """E121 for a part that names no files, or whose fields have other types."""
    names = dict.fromkeys(("name", "onnx", "graph_sha256"), str)
    kinds = {**names, "first_layer": int, "last_layer": int, "embeds": bool, "head": bool, "plans": dict}
    good = (
        isinstance(raw, dict)
        and all(isinstance(raw.get(key), kind) for key, kind in kinds.items())
        and all(raw.get(key) is None or isinstance(raw[key], str) for key in ("data", "weights_sha256"))
        and all(isinstance(plan, dict) and isinstance(plan.get("file"), str) for plan in raw["plans"].values())
    )
    if not good:
        raise _malformed(where, "thoughtx.parts is not a list of parts")
    assert isinstance(raw, dict)
    plans = {
        backend: PlanFile(
            plan["file"],
            **{key: plan.get(key) for key in ("sha256", "graph_sha256", "weights_sha256")},
            compute_capabilities=tuple(plan.get("compute_capabilities") or ()),
        )
        for backend, plan in raw["plans"].items()
    }
    return PartFiles(
        **{key: raw[key] for key in kinds if key != "plans"}, data=raw.get("data"), weights_sha256=raw.get("weights_sha256"), plans=plans
    )


def _table(raw: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise _malformed(where, f"{key} is {shown(value)}, not an object")
    return value


def _malformed(where: str, why: str) -> ThoughtxError:
    return ThoughtxError("E121", "the engine's config.json is malformed", where=where, why=why, fix="build the engine again")
