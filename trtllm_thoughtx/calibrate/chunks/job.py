"""One `thoughtx-calibrate --chunk_report`: what windows keep, which one to take, whether choosing chunks pays; written as files.

chunks.json   every number            chunks.png   pictures of them
build.yaml    flags for thoughtx-build: the smallest cache that keeps what was asked for, and the fitted thresholds
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trtllm_thoughtx import files, plot, report
from trtllm_thoughtx.calibrate.chunks import adaptive
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
from trtllm_thoughtx.progress import Progress
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Look at `calib_size` whole traces and ask `eval_items` questions of each task (0: none). `target_capture` and
    `max_task_loss` are shares in [0, 1]. Returns what chunks.json holds. E101, E112, E161 for inputs that cannot be used."""
    command = command_line("thoughtx-calibrate --chunk_report", locals())
    progress = progress or Progress.silent()
    plot.need_matplotlib()
    checkpoint = Checkpoint.open(model_dir, HUGGING_FACE)
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
    recall, outputs = _look(model_dir, sequences, windows, config.num_layers, progress)
    rows = [
        {"window": report.plain(w), "slots": num_slots(w, context), "share": num_slots(w, context) / context, **recall.summary(i)}
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
        "tasks": None,
        "adaptive": None,
        "chosen": None,
        "skipped": [],
    }
    if questions:
        _ask(found, model_dir, questions, windows, enough, progress, template, has_tags=text.think_ids is not None)
    else:
        found["skipped"].append("right answers and thresholds: no questions were asked for (--eval_items 0)")
        found["chosen"] = enough[0] if enough else None
    if found["chosen"] is None:
        found["skipped"].append(f"build.yaml: no window below {context} tokens reaches the targets")
    else:
        found["output_error"] = outputs(windows[found["chosen"]])
    with output.writing() as root:
        output.write(CHUNKS, report.to_json({"schema": SCHEMA, **found, "model_dir": Path(model_dir).name}))
        plot.capture_plot(root / "chunks.png", found)
        if found["chosen"] is not None:
            output.write("build.yaml", _recipe(found, windows[found["chosen"]]))
    return {**found, "up_to_date": False}


def _look(
    model_dir: Path, sequences: Sequence[Sequence[int]], windows: list[ChunkSpec], num_layers: int, progress: Progress
) -> tuple[Recall, Callable[[ChunkSpec], dict[str, Any]]]:
    """Recalls of all windows on all sequences, and a function that runs the model under one of them and compares its outputs."""
    from trtllm_thoughtx.validate.reference import Reference

    reference = Reference(model_dir, "float32")
    recall = Recall(windows, num_layers)
    longest = max(map(len, sequences))
    masks = masks_of(windows, longest)
    with progress.stage("attention of whole traces", len(sequences)) as stage:
        for ids in sequences:
            mine = masks[:, : len(ids), : len(ids)]
            reference.attention(ids, lambda layer, weights, mine=mine: recall.add(layer, weights, mine))  # type: ignore[misc]
            stage.advance(1)

    def outputs(window: ChunkSpec) -> dict[str, Any]:
        divergences, same, apart = [], [], []
        for ids in sequences:
            (full, states), (cut, cut_states) = (reference.run(ids, chunk=chunk, layers=True) for chunk in (None, window))
            log_full, log_cut = log_softmax(full), log_softmax(cut)
            divergences.append(kl_divergence(log_full, log_cut))
            same.append(full.argmax(-1) == cut.argmax(-1))
            apart.append([float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(states[1:], cut_states[1:], strict=True)])
        kl = np.concatenate(divergences)
        return {
            "kl_mean": float(kl.mean()),
            "kl_p95": float(np.percentile(kl, 95)),
            "top1_agreement": float(np.concatenate(same).mean()),
            "relative_error_by_layer": np.mean(apart, axis=0).tolist(),
        }

    return recall, outputs


def _ask(
    found: dict[str, Any],
    model_dir: Path,
    questions: list[Question],
    windows: list[ChunkSpec],
    enough: list[int],
    progress: Progress,
    template: tuple[str | None, str | None],
    *,
    has_tags: bool,
) -> None:
    """Fill in `tasks`, `chosen` and `adaptive`: right answers under full attention, and under the windows from the smallest that
    captures enough upwards, until one loses no more than is allowed; and under some that are smaller."""
    max_loss, context = found["max_task_loss"], found["context"]
    with Asker(model_dir, context, progress, template) as asker:
        asked = asker.fits(questions)
        if len(asked) < len(questions):
            found["skipped"].append(f"{counted(len(questions) - len(asked), 'question')}: too long for --context {context}")
        with progress.stage("questions under full attention", 1) as stage:
            full = asker.ask(asked, None)
            stage.advance(1)
        tasks: dict[str, Any] = {"num_items": len(asked), "full": _accuracy(full, full), "windows": {}}
        found["tasks"] = tasks

        def loss(index: int) -> float:
            if str(index) not in tasks["windows"]:
                tasks["windows"][str(index)] = _accuracy(asker.ask(asked, windows[index]), full)
            return float(tasks["windows"][str(index)]["loss"])

        with progress.stage("questions under windows", None, "steps") as stage:
            for index in enough:
                lost = loss(index)
                stage.advance(1)
                if lost <= max_loss:
                    found["chosen"] = index
                    break
            tried = enough[0] if enough else len(windows) - 1
            for index in np.unique(np.linspace(0, tried, NUM_SMALLER + 2).astype(int))[:-1].tolist():
                loss(index)
                stage.advance(1)
        if found["chosen"] is None:
            return
        window = windows[found["chosen"]]
        fitting, judging = asked[::2], asked[1::2]
        steps = 2 * len(adaptive.grid(window.chunk_size)) + 5
        with progress.stage("adaptive chunks", steps) as stage:
            found["adaptive"] = adaptive.fit_and_judge(
                asker, fitting, judging, window, max_loss, lambda: stage.advance(1), has_tags=has_tags
            )
        if not has_tags:
            found["skipped"].append("single-step answers (thoughtx-build --threshold_low): the model has no thinking tags")


def _accuracy(records: Sequence[Record], full: Sequence[Record]) -> dict[str, Any]:
    """Accuracy by task, and of lookups by the distance of the farthest fact needed; `loss` and its interval against `full`."""
    lost = [float(a.correct) - float(b.correct) for a, b in zip(full, records, strict=True)]
    tasks = {task: [one.correct for one in records if one.task == task] for task in dict.fromkeys(one.task for one in records)}
    bins, low = [], 0
    for high in DISTANCES:
        inside = [one.correct for one in records if low < one.traits.get("distance", 0) <= high]
        if inside:
            bins.append({"above": low, "up_to": high, "num_items": len(inside), "accuracy": float(np.mean(inside))})
        low = high
    return {
        "accuracy": float(np.mean([one.correct for one in records])),
        "loss": float(np.mean(lost)),
        "loss_interval": mean_interval(lost),
        "p": mcnemar(sum(x > 0 for x in lost), sum(x < 0 for x in lost)),
        "by_task": {task: float(np.mean(right)) for task, right in tasks.items()},
        "by_distance": bins,
    }


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
    head = ("", "window", "slots", f"of {found['context']}", "capture", "p5", "beyond sinks", "where hidden", "min", "points lost")
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
