"""One `thoughtx-calibrate --chunk_report`: what windows keep, which one to take, whether choosing chunks pays; written as files.

chunks.json   every number            chunks.png   pictures of them
build.yaml    flags for thoughtx-build: the smallest cache that keeps what was asked for, and the fitted thresholds
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trtllm_thoughtx import files, plot, report
from trtllm_thoughtx.calibrate.chunks import adaptive
from trtllm_thoughtx.calibrate.chunks.adaptive import Adaptive
from trtllm_thoughtx.calibrate.chunks.asking import Asker
from trtllm_thoughtx.calibrate.chunks.data import questions_of, sequences_of
from trtllm_thoughtx.calibrate.chunks.recall import Recall, masks_of
from trtllm_thoughtx.calibrate.chunks.windows import candidates, name_of, num_slots, settings
from trtllm_thoughtx.checkpoint.directory import HUGGING_FACE
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.outputs import Output
from trtllm_thoughtx.checkpoint.recorded import command_line
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.errors import ThoughtxError, counted
from trtllm_thoughtx.evaluate.questions import Question, sha256_of_questions
from trtllm_thoughtx.evaluate.record import Record
from trtllm_thoughtx.evaluate.statistics import mcnemar, mean_interval
from trtllm_thoughtx.evaluate.systems import need_text
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.runtime.logits import kl_divergence, log_softmax
from trtllm_thoughtx.text.text import Text
from trtllm_thoughtx.validate.golden import ChunkSpec

SCHEMA = "thoughtx.chunks/1"
CHUNKS = "chunks.json"
DISTANCES = (64, 128, 256, 512, 1024)  # upper ends of the bins of a needed fact's distance, in words
NUM_SMALLER = 3  # windows below the chosen one that questions are asked with

DEFAULT_CONTEXT = 2048


def chunk_report(
    model_dir: Path,
    output_dir: Path,
    *,
    lora_dir: Path | None = None,
    calib_data: Path | None = None,
    calib_size: int = 16,
    context: int | None = None,
    target_capture: float = 0.97,
    max_task_loss: float = 0.01,
    eval_items: int = 60,
    seed: int = 0,
    enable_thinking: str | None = None,
    chat_template_kwargs: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Look at `calib_size` whole traces and ask `eval_items` questions of each task (0: none). `target_capture` and
    `max_task_loss` are fractions in [0, 1]. Returns what chunks.json holds. E101, E112, E161 for inputs that cannot be used."""
    command = command_line("thoughtx-calibrate --chunk_report", locals())
    plot.need_matplotlib()
    checkpoint = Checkpoint.open(model_dir, HUGGING_FACE, lora_dir)
    with open_weights(checkpoint, progress=progress) as source:
        config, members = source.config, source.members
    context = min(DEFAULT_CONTEXT, config.longest) if context is None else context
    if context > config.longest:
        why = f"the model was made for {config.longest} positions"
        raise ThoughtxError("E001", f"--context {context}", where="--context", why=why, fix=f"use at most {config.longest}")
    text, template = need_text(Text.load(model_dir, checkpoint.raw), model_dir), (enable_thinking, chat_template_kwargs)
    for unread in text.set_template(*template):
        progress.note(f"not applied: {unread}")
    sequences = sequences_of(text, calib_data, calib_size, context, seed)
    questions = questions_of(calib_data, eval_items, seed, progress)
    asked = {
        "context": context,
        "template_kwargs": text.template_kwargs,
        "target_capture": target_capture,
        "max_task_loss": max_task_loss,
        "sequences": hashlib.sha256(json.dumps(sequences).encode()).hexdigest(),
        "questions": sha256_of_questions(questions),
    }
    output = Output(output_dir, members, asked, command=command, force=force, progress=progress)
    if output.is_current():
        return {**files.read_json(output_dir, CHUNKS), "model_dir": str(model_dir), "up_to_date": True}
    output.prepare(0)
    windows = candidates(context)
    seen = Look(checkpoint, sequences, windows, config.num_layers, progress)
    rows = [
        {"window": report.plain(w), "slots": num_slots(w, context), "share": num_slots(w, context) / context, **seen.recall.summary(i)}
        for i, w in enumerate(windows)
    ]
    enough = [i for i, row in enumerate(rows) if row["everywhere"]["with_sinks"]["mean"] >= target_capture]
    found: dict[str, Any] = {
        "model_dir": str(model_dir),
        "context": context,
        "kv_bytes_per_token": config.kv_bytes_per_token(config.dtype),
        "num_sequences": len(sequences),
        "longest_sequence": max(map(len, sequences)),
        "target_capture": target_capture,
        "max_task_loss": max_task_loss,
        "windows": rows,
    }
    if questions:
        with Asker(checkpoint, context, progress, template) as asker:
            told = _ask(asker, questions, windows, enough, max_task_loss, has_tags=text.think_ids is not None)
    else:
        told = Told(chosen=enough[0] if enough else None)
        told.skipped.append("right answers and thresholds: no questions were asked for (--eval_items 0)")
    if told.chosen is None:
        told.skipped.append(f"build.yaml: no window below {context} tokens reaches the targets")
    else:
        found["output_error"] = report.plain(seen.outputs(windows[told.chosen]))
    found |= report.plain(told)
    with output.writing() as root:
        output.write(CHUNKS, report.to_json({"schema": SCHEMA, **found, "model_dir": Path(model_dir).name}))
        plot.retained_mass_plot(root / "chunks.png", found)
        if found["chosen"] is not None:
            output.write("build.yaml", _recipe(found, windows[found["chosen"]]))
    return {**found, "up_to_date": False}


@dataclass(frozen=True)
class OutputError:
    """What a window changes in the outputs: nats, a fraction of the positions, and norms of differences over norms by layer."""

    kl_mean: float
    kl_p95: float
    top1_agreement: float
    relative_error_by_layer: list[float]


class Look:
    """Recalls of all windows on all sequences (`recall`), and the outputs of the model under one of them."""

    def __init__(
        self, model_dir: Checkpoint, sequences: Sequence[Sequence[int]], windows: list[ChunkSpec], num_layers: int, progress: Progress
    ) -> None:
        from trtllm_thoughtx.validate.reference import Reference

        self.sequences, self.reference, self.recall = sequences, Reference(model_dir, "float32"), Recall(windows, num_layers)
        masks = masks_of(windows, max(map(len, sequences)))
        with progress.stage("attention of whole traces", len(sequences)) as stage:
            for ids in sequences:
                mine = masks[:, : len(ids), : len(ids)]
                self.reference.attention(ids, lambda layer, weights, mine=mine: self.recall.add(layer, weights, mine))  # type: ignore[misc]
                stage.advance(1)

    def outputs(self, window: ChunkSpec) -> OutputError:
        divergences, same, apart = [], [], []
        for ids in self.sequences:
            (full, states), (cut, cut_states) = (self.reference.run(ids, chunk=chunk, layers=True) for chunk in (None, window))
            divergences.append(kl_divergence(log_softmax(full), log_softmax(cut)))
            same.append(full.argmax(-1) == cut.argmax(-1))
            apart.append([float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(states[1:], cut_states[1:], strict=True)])
        kl = np.concatenate(divergences)
        agreement = float(np.concatenate(same).mean())
        return OutputError(float(kl.mean()), float(np.percentile(kl, 95)), agreement, np.mean(apart, axis=0).tolist())


@dataclass(frozen=True)
class Bin:
    """Lookups whose farthest needed fact is more than `above` and at most `up_to` words away."""

    above: int
    up_to: int
    num_items: int
    accuracy: float


@dataclass(frozen=True)
class Accuracy:
    """Right answers by task, and by distance; `loss` and its interval against full attention."""

    accuracy: float
    loss: float
    loss_interval: tuple[float, float]
    p: float
    by_task: dict[str, float]
    by_distance: list[Bin]


@dataclass
class Tasks:
    """Of the same questions under full attention, and under windows by their index."""

    num_items: int
    full: Accuracy
    windows: dict[int, Accuracy] = field(default_factory=dict)


@dataclass
class Told:
    """What questions say: the window that is chosen, right answers, thresholds of adaptive chunks; and what was not asked."""

    chosen: int | None = None
    tasks: Tasks | None = None
    adaptive: Adaptive | None = None
    skipped: list[str] = field(default_factory=list)


def _ask(asker: Asker, questions: list[Question], windows: list[ChunkSpec], enough: list[int], max_loss: float, *, has_tags: bool) -> Told:
    """Right answers under full attention, and under the windows from the smallest that retains enough mass upwards, until one loses no more
    than is allowed; and under some that are smaller."""
    asked, progress, told = asker.fits(questions), asker.progress, Told()
    if len(asked) < len(questions):
        told.skipped.append(f"{counted(len(questions) - len(asked), 'question')}: too long for --context {asker.context}")
    with progress.stage("questions under full attention", 1) as stage:
        full = asker.ask(asked, None)
        stage.advance(1)
    told.tasks = tasks = Tasks(len(asked), _accuracy(full, full))

    def loss(index: int) -> float:
        if index not in tasks.windows:
            tasks.windows[index] = _accuracy(asker.ask(asked, windows[index]), full)
        return tasks.windows[index].loss

    with progress.stage("questions under windows", None, "steps") as stage:
        for index in enough:
            lost = loss(index)
            stage.advance(1)
            if lost <= max_loss:
                told.chosen = index
                break
        tried = enough[0] if enough else len(windows) - 1
        for index in np.unique(np.linspace(0, tried, NUM_SMALLER + 2).astype(int))[:-1].tolist():
            loss(index)
            stage.advance(1)
    if told.chosen is None:
        return told
    window = windows[told.chosen]
    with progress.stage("adaptive chunks", 2 * len(adaptive.grid(window.chunk_size)) + 5) as stage:
        step = lambda: stage.advance(1)  # noqa: E731
        told.adaptive = adaptive.fit_and_judge(asker, asked[::2], asked[1::2], window, max_loss, step, has_tags=has_tags)
    if not has_tags:
        told.skipped.append("single-step answers (thoughtx-build --threshold_low): the model has no thinking tags")
    return told


def _accuracy(records: Sequence[Record], full: Sequence[Record]) -> Accuracy:
    lost = [float(a.correct) - float(b.correct) for a, b in zip(full, records, strict=True)]
    tasks = {task: [one.correct for one in records if one.task == task] for task in dict.fromkeys(one.task for one in records)}
    bins, low = [], 0
    for high in DISTANCES:
        inside = [one.correct for one in records if low < one.traits.get("distance", 0) <= high]
        if inside:
            bins.append(Bin(low, high, len(inside), float(np.mean(inside))))
        low = high
    return Accuracy(
        accuracy=float(np.mean([one.correct for one in records])),
        loss=float(np.mean(lost)),
        loss_interval=mean_interval(lost),
        p=mcnemar(sum(x > 0 for x in lost), sum(x < 0 for x in lost)),
        by_task={task: float(np.mean(right)) for task, right in tasks.items()},
        by_distance=bins,
    )


def _recipe(found: dict[str, Any], window: ChunkSpec) -> str:
    fitted = found["adaptive"] or {}
    flags = settings(window, found["context"])
    flags |= {name: fitted[name] for name in ("base_size", "threshold_low") if fitted.get(name)}
    head = f"# Written by thoughtx-calibrate --chunk_report for {Path(found['model_dir']).name}: {name_of(window)}.\n"
    if fitted:
        verdict = "beat" if fitted["beats_fixed_and_random"] else "did not beat"
        head += f"# Chunks chosen from the prompt {verdict} a fixed chunk of equal memory and random ones.\n"
        head += "# chunk_size: auto asks for them.\n"
    return head + yaml.safe_dump(flags, sort_keys=False)


def chunk_tables(found: dict[str, Any]) -> list[Any]:
    """The report for people."""
    asked = (found["tasks"] or {}).get("windows", {})
    best = _frontier(found["windows"])
    lines = []
    for i, row in enumerate(found["windows"]):
        if i not in best and i != found["chosen"] and str(i) not in asked:
            continue
        kept, beyond, hidden = row["everywhere"]["with_sinks"], row["everywhere"]["beyond_sinks"], row["where_hidden"]["with_sinks"]
        loss = f"{100 * asked[str(i)]['loss']:+.1f}" if str(i) in asked else None
        mark = "*" if i == found["chosen"] else ""
        window = ChunkSpec(**row["window"])
        means = [kept["mean"], kept["p5"], beyond["mean"], hidden["mean"], hidden["min"]]
        lines.append([mark, name_of(window), row["slots"], f"{100 * row['share']:.1f} %", *means, loss])
    head = ("", "window", "slots", f"of {found['context']}", "retained mass", "p5", "beyond sinks", "where hidden", "min", "points lost")
    seen = f"{counted(found['num_sequences'], 'whole trace')} of up to {found['longest_sequence']} tokens"
    tables: list[Any] = [report.table(f"what windows keep of {seen} (the best of each size; * chosen)", head, lines)]
    fitted = found["adaptive"]
    if fitted:
        rows = [
            [s["system"], s["mean_chunk_size"], s["mean_slots"], f"{100 * s['accuracy']:.1f} %", s["tokens"], 100 * s["chosen_minus_this"]]
            for s in fitted["systems"]
        ]
        names = ("chunks", "mean size", "mean slots", "accuracy", "tokens", "chosen minus this, points")
        tables.append(report.table(f"adaptive chunks on {fitted['num_judged']} other questions", names, rows))
        single = f"single step below {fitted['threshold_low']:.3g} nats" if fitted["threshold_low"] else "no single steps"
        verdict = "beats" if fitted["beats_fixed_and_random"] else "does NOT beat"
        tables.append(
            f"{fitted['base_size']:.4g} tokens per nat, {single}; choosing {verdict} both a fixed chunk of equal memory and random chunks"
        )
    tables += [f"skipped: {one}" for one in found["skipped"]]
    return tables


def _frontier(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Windows that keep more than every one that is no larger."""
    best, kept = [], -1.0
    for i, row in enumerate(rows):
        mean = row["everywhere"]["with_sinks"]["mean"]
        if mean > kept:
            best.append(i)
            kept = mean
    return best
