"""Calibration on what the model itself writes: each prompt of the data, and behind it the model's own answer.

A reasoning model is mostly fed its own thoughts, and no data set sounds like them. The answers are sampled as the checkpoint's
generation_config.json says, by an onnxruntime engine that is built for this and removed afterwards. They depend on data and seed alone:
`BATCH` rows share a call, whatever --batch_size says. A batch that is done is on disk, and a run that is started again goes on behind it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trtllm_thoughtx import report
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.data import Data
from trtllm_thoughtx.files import atomic_file, read_json
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.runtime.engine import Engine

BATCH = 8
ENDS = ("eos", "stop")
OPTIONS: dict[str, Any] = {"backend": ("onnxruntime",), "max_batch_size": BATCH}


def answered(data: Data, model_dir: Path, work: Path, max_len: int, seed: int, progress: Progress) -> Data:
    """`data`, a list of prompts, with the model's answers behind them; a sequence has at most `max_len` tokens."""
    prompts = [*data.rows, *(data.held if data.facts["num_held_out"] else [])]
    done = _written(work)
    if len(done) < len(prompts):
        build(model_dir, work / "engine", OPTIONS | {"max_seq_len": max_len}, force=True, progress=progress)
        done = _write(prompts, done, work, seed, progress)
        shutil.rmtree(work / "engine")
    sequences = [[*prompt, *one["ids"]][:max_len] for prompt, one in zip(prompts, done, strict=True)]
    rows, held = sequences[: len(data.rows)], sequences[len(data.rows) :]
    num_open = sum(one["stop"] not in ENDS for one in done)
    facts = data.facts | {
        "source": f"the model's own answers to {data.facts['source']}",
        "prompts_sha256": data.facts["tokens_sha256"],
        "num_tokens": sum(map(len, rows)),
        "num_answer_tokens": sum(len(one["ids"]) for one in done),
        "num_unfinished": num_open,
    }
    warnings = list(data.warnings)
    if 2 * num_open > len(done):
        warnings.append(f"{num_open} of {len(done)} answers did not end within {max_len} tokens (--calib_seq_len)")
    made = replace(data, rows=rows, held=held or rows, facts=facts, warnings=warnings)
    facts["tokens_sha256"] = made.digest
    return made


def _written(work: Path) -> list[dict[str, Any]]:
    """Answers of an earlier run, as far as they go: {"ids": new tokens, "stop": why they end}."""
    done: list[dict[str, Any]] = []
    while (path := work / f"answers.{len(done) // BATCH}.json").is_file() and len(done) % BATCH == 0:
        done += read_json(work, path.name)["answers"]
    return done


def _write(prompts: Sequence[list[int]], done: list[dict[str, Any]], work: Path, seed: int, progress: Progress) -> list[dict[str, Any]]:
    engine = Engine.load(work / "engine", "onnxruntime")
    try:
        most = engine.build.max_seq_len
        params = engine.default_params(max_new_tokens=most, seed=seed, exit_policy="off")
        with progress.stage("the model's own answers", len(prompts)) as stage:
            stage.advance(len(done))
            for start in range(len(done), len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                found = engine.generate(batch, params, streams=range(start, start + len(batch)))
                rows = [{"ids": one.output_ids, "stop": one.stop_reason} for one in found]
                with atomic_file(work / f"answers.{start // BATCH}.json") as out:
                    out.write(report.to_json({"answers": rows}).encode())
                done += rows
                stage.advance(len(batch))
    finally:
        engine.close()
    return done
