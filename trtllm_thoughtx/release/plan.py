"""The graph of a release: an engine for every combination of its axes, and the steps that make and judge it.

    convert -> calibrate (a format) -> fit (exits) -> part (a stage of a plan) -> build (attention, target)
    -> validate, evaluate, bench -> sign -> export

Steps that two engines share are one step. What an engine cannot have, because its flags cannot be built, is refused before anything runs;
what this machine or cluster cannot do is left to the executor.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.config import BuildConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.files import open_named
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.release.document import AXES, KINDS, Flag, Release, Target
from trtllm_thoughtx.release.estimate import LIBRARIES, PLAN_FACTOR, TORCH, Size, bits_of, built, item_bytes, settings_of, size_of
from trtllm_thoughtx.release.facts import digest_of_files, facts_of, model_files
from trtllm_thoughtx.release.step import HERE, Input, Step, Word, digest_of, make_step

EVIDENCE = ("validate", "evaluate", "bench")
ANSWERS = "answers.json"
PLAIN = re.compile(r"[^A-Za-z0-9._-]")
SHORT = 12  # digits of a path's hash that names the memory of its files' hashes


@dataclass
class Engine:
    """One row of a release."""

    name: str
    at: dict[str, str]  # the name on each axis
    target: Target
    memory: int = 0  # of a process that runs it
    parameters: int = 0
    num_bytes: int = 0  # of its weights
    runs_here: bool = False  # on any machine: it has an onnxruntime graph
    steps: dict[str, Step] = field(default_factory=dict)  # by kind
    missing: dict[str, str] = field(default_factory=dict)  # kind of evidence -> why it is not asked for


@dataclass
class Plan:
    release: Release
    engines: list[Engine]
    steps: dict[str, Step]  # by key, each after those that it needs


class Planner:
    """Makes the steps of a release; `gpu`: that of this machine, for a target that names none; None where there is none."""

    def __init__(self, release: Release, cache: Path | None, gpu: str | None, progress: Progress = SILENT) -> None:
        self.release, self.cache, self.gpu, self.progress = release, cache, gpu, progress
        self.steps: dict[str, Step] = {}
        self._inputs: dict[Path, Input] = {}
        self._facts = {kind: facts_of(kind) for kind in KINDS}

    def plan(self) -> Plan:
        engines = []
        release = self.release
        for names in itertools.product(*(getattr(release, axis) for axis in AXES)):
            at = dict(zip(AXES, names, strict=True))
            if not any(all(at[axis] == name for axis, name in rule.items()) for rule in release.leave_out):
                shown = [name for axis, name in at.items() if axis in ("models", "formats", "targets") or len(getattr(release, axis)) > 1]
                engines.append(Engine("-".join(shown), at, release.targets[at["targets"]]))
        if twice := {engine.name for engine in engines if sum(other.name == engine.name for other in engines) > 1}:
            why = f"{min(twice)} is made of other names in two ways"
            raise ThoughtxError("E002", "two engines have one name", where=release.name, why=why, fix="choose names without -")
        if not engines:
            fix = "remove a rule of leave_out"
            raise ThoughtxError("E002", "the release is empty", where=release.name, why="leave_out leaves no engine", fix=fix)
        for engine in engines:
            self._make(engine)
            same = (other for other in engines if all(other.at[axis] == engine.at[axis] for axis in AXES if axis != "formats"))
            self._prove(engine, next(same))
            self._ship(engine)
        return Plan(release, engines, self.steps)

    def _add(self, kind: str, label: str, words: Sequence[Word], **more: Any) -> Step:
        cores = (self.release.cores or {}).get(kind, 1)
        step = make_step(kind, label, words, facts=self._facts[kind], cores=cores, date=self.release.date, **more)
        return self.steps.setdefault(step.key, step)

    def _input(self, path: Path, files: Sequence[Path]) -> Input:
        if path not in self._inputs:
            cache = self.cache / f"{digest_of(str(path))[:SHORT]}.json" if self.cache else None
            self._inputs[path] = Input(path, digest_of_files(files, cache, self.progress))
        return self._inputs[path]

    def _model(self, path: Path) -> Input:
        return self._inputs.get(path) or self._input(path, model_files(path))

    def _lora(self, engine: Engine) -> list[Word]:
        """For the command that reads the model itself, and for the reference."""
        path = self.release.models[engine.at["models"]].lora_dir
        return [] if path is None else ["--lora_dir", self._input(path, _files(path))]

    def _words(self, flags: Sequence[Flag]) -> list[Word]:
        words: list[Word] = []
        for flag in flags:
            words.append(f"--{flag.name}")
            words += [self._input(flag.file, _files(flag.file))] if flag.file else list(flag.words)
        return words

    def _make(self, engine: Engine) -> None:
        """The steps up to the engine directory."""
        release, at = self.release, engine.at
        model, quantized, exits = release.models[at["models"]], release.formats[at["formats"]], release.exits[at["exits"]]
        source, size = self._model(model.path), size_of(model.path)
        item = item_bytes(model.dtype, size.config)
        stored = size.total * item
        step: Step | Input = source
        lora = self._lora(engine)
        words: list[Word]
        if model.dtype != "auto" or not (quantized.flags or exits.flags):  # a calibration reads the model itself
            words = ["convert", "--model_dir", source, "--output_dir", f"{HERE}/{at['models']}", "--dtype", model.dtype, *lora]
            step = engine.steps["convert"] = self._add("convert", at["models"], words, memory=LIBRARIES, disk=stored, size=stored)
        for kind, given in (("calibrate", quantized), ("fit", exits)):
            if given.flags:
                label = "-".join((at["models"], at["formats"], *((at["exits"],) if kind == "fit" else ())))
                words = ["calibrate", "--model_dir", step, "--output_dir", f"{HERE}/{label}", *self._words(given.flags)]
                words += lora if step is source else []
                memory = TORCH + 6 * size.layer * 4 + 2 * size.table * 4 if kind == "calibrate" else TORCH + size.total * 6
                step = engine.steps[kind] = self._add(kind, label, words, memory=memory, disk=stored, size=size.total * 4)
        flags = {flag.name: flag for flag in (*release.attention[at["attention"]].flags, *engine.target.flags)}
        made = built(size, self._settings(engine, size, flags), bits_of(quantized, item))
        words = ["build", "--checkpoint_dir", step, "--output_dir", f"{HERE}/{engine.name}", *self._words(list(flags.values()))]
        on_gpu = any(BACKENDS[name].builds_plans and not BACKENDS[name].has_targets for name in self._backends(flags))
        words_of = self._where(engine) if on_gpu else {}
        more = {"disk": made.disk, "size": made.weights, **words_of}
        if len(made.parts) > 1:  # each on a machine of its own; the build puts them together
            for index, weights in enumerate(made.parts):
                label, share = f"{engine.name}-part{index}", weights / max(made.weights, 1)
                apart = [*words[:3], "--output_dir", f"{HERE}/{label}", *words[5:], "--only_part", str(index)]
                took = {"memory": int(weights * PLAN_FACTOR) + LIBRARIES, "disk": int(made.disk * share), "size": weights, **words_of}
                engine.steps[f"part{index}"] = self._add("part", label, apart, **took)
            words += [word for index in range(len(made.parts)) for word in ("--built_part", engine.steps[f"part{index}"])]
            more |= {"memory": LIBRARIES, "size": 0}
        engine.steps["build"] = self._add("build", engine.name, words, **{"memory": made.memory, **more})
        engine.memory, engine.parameters, engine.num_bytes = made.run_memory, size.total, made.weights
        engine.runs_here = "onnxruntime" in self._backends(flags)

    def _settings(self, engine: Engine, size: Size, flags: dict[str, Flag]) -> BuildConfig:
        try:
            return settings_of(size, flags)
        except ThoughtxError as error:
            raise error.at(f"{engine.name} {error.where}") from None

    @staticmethod
    def _backends(flags: dict[str, Flag]) -> list[str]:
        words = flags["backend"].words[0] if "backend" in flags else "tensorrt-rtx,onnxruntime"
        return [word.strip().replace("_", "-") for word in words.split(",")]

    @staticmethod
    def _where(engine: Engine) -> dict[str, Any]:
        """What a step asks of the machine that has the target's GPU."""
        target = engine.target
        return {"gpu": target.gpu, "resources": tuple(sorted((target.resources or {}).items()))}

    def _prove(self, engine: Engine, first: Engine) -> None:
        """Validation, evaluation beside `first`, the engine of the first format, and speed."""
        release, build = self.release, engine.steps["build"]
        where = {} if engine.runs_here else self._where(engine)
        gpu = "" if engine.runs_here else engine.target.gpu or ",".join(engine.target.resources or ()) or self.gpu
        on = engine.name if not gpu else f"{engine.name}-{PLAIN.sub('_', gpu)}"  # without a GPU it is another step, which skips the plan
        if release.validate is not None:
            source = self._model(release.models[engine.at["models"]].path)
            words: list[Word] = [
                "validate",
                "--engine_dir",
                build,
                "--reference",
                source,
                *self._lora(engine),
                *self._words(release.validate.flags),
            ]
            memory, size = TORCH + engine.parameters * 4 + engine.memory, engine.parameters * 4
            engine.steps["validate"] = self._add("validate", on, words, memory=memory, size=size, **(where if gpu else {}))
        for kind, given in (("evaluate", release.evaluate), ("bench", release.bench)):
            if given is None or gpu is None:
                engine.missing[kind] = "not asked for" if given is None else "no GPU here that could run the plan"
                continue
            words = ["eval" if kind == "evaluate" else kind, "--engine_dir", build, *self._words(given.flags)]
            if kind == "evaluate":
                words += ["--output", f"{HERE}/{ANSWERS}", *([] if given.value("memory_context") else ["--memory_context", "0"])]
                if first is not engine and kind in first.steps:
                    words += ["--compare", (first.steps[kind], ANSWERS)]
            more = {"memory": engine.memory, "size": engine.num_bytes, "alone": kind == "bench", **where}
            engine.steps[kind] = self._add(kind, on, words, **more)

    def _ship(self, engine: Engine) -> None:
        """Signature and export, once the engine has passed."""
        release, step = self.release, engine.steps["build"]
        after = tuple(engine.steps[kind].key for kind in EVIDENCE if kind in engine.steps)
        more = {"after": after, "gate": engine.name, "memory": LIBRARIES, "size": engine.num_bytes}
        if release.sign is not None:
            key = self._input(release.sign.key, _files(release.sign.key))
            words: list[Word] = ["sign", "--engine_dir", f"{HERE}/{engine.name}", "--key", key]
            step = engine.steps["sign"] = self._add("sign", engine.name, words, copies=step, **more)
        if release.export is not None:
            words = ["export", "--engine_dir", step, "--oci", f"{HERE}/{engine.name}", "--tag", release.export.tag]
            engine.steps["export"] = self._add("export", engine.name, words, disk=engine.num_bytes, **more)


def _files(path: Path) -> list[Path]:
    """The file, or all files of a directory. E101 when there is none."""
    if path.is_dir():
        return sorted(one for one in path.rglob("*") if one.is_file())
    open_named(path).close()
    return [path]
