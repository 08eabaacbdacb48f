"""Calibration on what the model itself writes: each prompt of the data, and behind it the model's own answer.

A reasoning model is mostly fed its own thoughts, and no data set sounds like them. The answers are sampled as the checkpoint's
generation_config.json says, by an onnxruntime engine that is built for this and removed afterwards. They depend on data and seed alone.
An answer that is done is on disk, and a run that is started again writes the others.
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
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.files import atomic_file, read_json
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.row import Request

NUM_SLOTS = 8
ENDS = ("eos", "stop")
OPTIONS: dict[str, Any] = {"backend": ("onnxruntime",), "max_batch_size": NUM_SLOTS}


def answered(data: Data, model_dir: Path | Checkpoint, work: Path, max_len: int, seed: int, progress: Progress) -> Data:
    """`data`, a list of prompts, with the model's answers behind them; a sequence has at most `max_len` tokens."""
    prompts = [*data.rows, *(data.held if data.facts["num_held_out"] else [])]
    done = {i: read_json(work, path.name) for i in range(len(prompts)) if (path := _path(work, i)).is_file()}
    if len(done) < len(prompts):
        build(model_dir, work / "engine", OPTIONS | {"max_seq_len": max_len}, force=True, progress=progress)
        _write(prompts, done, work, seed, progress)
        shutil.rmtree(work / "engine")
    sequences = [[*prompt, *done[i]["ids"]][:max_len] for i, prompt in enumerate(prompts)]
    rows, held = sequences[: len(data.rows)], sequences[len(data.rows) :]
    num_open = sum(one["stop"] not in ENDS for one in done.values())
    facts = data.facts | {
        "source": f"the model's own answers to {data.facts['source']}",
        "prompts_sha256": data.facts["tokens_sha256"],
        "num_tokens": sum(map(len, rows)),
        "num_answer_tokens": sum(len(one["ids"]) for one in done.values()),
        "num_unfinished": num_open,
    }
    warnings = list(data.warnings)
    if 2 * num_open > len(done):
        warnings.append(f"{num_open} of {len(done)} answers did not end within {max_len} tokens (--calib_seq_len)")
    made = replace(data, rows=rows, held=held or rows, facts=facts, warnings=warnings)
    facts["tokens_sha256"] = made.digest
    return made


def _path(work: Path, index: int) -> Path:
    """The answer to a prompt: {"ids": new tokens, "stop": why they end}."""
    return work / f"answer.{index}.json"


def _write(prompts: Sequence[list[int]], done: dict[int, dict[str, Any]], work: Path, seed: int, progress: Progress) -> None:
    """Add the answers that are not there."""
    engine = Engine.load(work / "engine", "onnxruntime")
    try:
        params = engine.default_params(max_new_tokens=engine.build.max_seq_len, seed=seed, exit_policy="off")
        requests = [Request(prompt, params, i, i) for i, prompt in enumerate(prompts) if i not in done]
        with progress.stage("the model's own answers", len(prompts)) as stage:
            stage.advance(len(done))
            for index, one in engine.complete(requests):
                if isinstance(one, ThoughtxError):
                    raise one
                done[index] = {"ids": one.output_ids, "stop": one.stop_reason}
                with atomic_file(_path(work, index)) as out:
                    out.write(report.to_json(done[index]).encode())
                stage.advance(1)
    finally:
        engine.close()
