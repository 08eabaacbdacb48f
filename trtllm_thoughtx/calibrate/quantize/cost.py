"""What quantizing costs those who ask, and what it buys: right answers and speed of two onnxruntime engines, before and after.

The engines are built in the calibration's working directory and removed afterwards. Both get the same questions, greedily, so differences
are paired; the two are timed in turn, and only one is in memory at a time. Speeds are those of this machine's CPU: on a GPU
`thoughtx-bench` tells.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_thoughtx.bench import bench
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.questions import SIZES, Question, from_file, generated
from trtllm_thoughtx.evaluate.record import Result
from trtllm_thoughtx.evaluate.run import evaluate, prompt_of
from trtllm_thoughtx.evaluate.summary import PER_TASK, compare
from trtllm_thoughtx.evaluate.systems import EngineSystem, need_text
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.text import Text

Template = tuple[str | None, str | None]  # --enable_thinking, --chat_template_kwargs
BATCH = 16
NUM_ROUNDS, NUM_RUNS = 3, 3
PROMPT_LEN, NEW_TOKENS = 64, 32
SPLIT = "test"  # the built-in calibration data are of another one


def questions_of(dataset: Path | None, num_items: int, seed: int, progress: Progress) -> list[Question]:
    """The rows of a file (E140 for bad ones), at most `num_items` unless that is 0, or `num_items` generated ones of each task."""
    if dataset is not None:
        return from_file(dataset, num_items or None, progress.note)
    return generated(sorted(SIZES), SPLIT, num_items=num_items, seed=seed, lengths=(0, 64, 128)) if num_items else []


def capacity(
    questions: Sequence[Question], max_new_tokens: int, text: Text | None, config: ModelConfig, kv_cache_dtype: str, model_dir: Path
) -> int:
    """Tokens that the engines must take. E112 without a tokenizer, E122 for a question that the model has no room for, E001 for a
    cache that no engine of this machine holds: all before any work."""
    if kv_cache_dtype == "fp8":
        why, fix = "onnxruntime holds no fp8 cache", "leave out --eval_items and --dataset, or --kv_cache_dtype"
        raise ThoughtxError("E001", "no engine can be asked here", where="--kv_cache_dtype fp8", why=why, fix=fix)
    lengths = [len(prompt_of(asked, need_text(text, model_dir))) for asked in questions]
    need = max(max(lengths) + max_new_tokens, PROMPT_LEN + NEW_TOKENS)
    if need > config.longest:
        why = f"question {questions[lengths.index(max(lengths))].id} has {max(lengths)} tokens, and --max_new_tokens is {max_new_tokens}"
        what = f"a question needs {need} tokens, the model has {config.longest} positions"
        raise ThoughtxError("E122", what, where=str(model_dir), why=why, fix="lower --max_new_tokens, or ask shorter questions")
    return need


@dataclass(frozen=True)
class Answers:
    """Right answers of both engines to the same questions: of each task in percent, and where only one of them was right."""

    num_items: int
    max_new_tokens: int
    accuracy_percent: Sequence[Mapping[str, Any]]
    only_before_right: int
    only_after_right: int
    p_equal: float
    mean_tokens: tuple[float, float]


@dataclass(frozen=True)
class Speed:
    """Prefill and decoding of both engines in turns, and what was measured under."""

    tokens_per_second: Mapping[str, Mapping[str, float]]
    conditions: Mapping[str, Any]
    engine_bytes: Sequence[int]


def measure(
    before: Path | Checkpoint,
    after: Path,
    work: Path,
    questions: Sequence[Question],
    max_seq_len: int,
    max_new_tokens: int,
    progress: Progress,
    template: Template = (None, None),
    *,
    load: float,
) -> tuple[Answers, Speed]:
    """Of engines of the checkpoints `before` and `after`. `load`: of other processes, before the calibration began."""
    options = {"backend": ("onnxruntime",), "max_seq_len": max_seq_len, "max_batch_size": BATCH}
    engines = [work / "before", work / "after"]
    for checkpoint, engine in zip((before, after), engines, strict=True):
        build(checkpoint, engine, options, force=True, progress=progress)
    answers = _answers(engines, questions, max_new_tokens, progress, template)
    speed = _speed(engines, load, progress)
    for engine in engines:
        shutil.rmtree(engine)
    return answers, speed


def _answers(
    engines: Sequence[Path], questions: Sequence[Question], max_new_tokens: int, progress: Progress, template: Template
) -> Answers:
    results: list[Result] = []
    for engine in engines:
        system = EngineSystem(engine, None, None, BATCH)
        try:
            system.text.set_template(*template)
            results.append(evaluate(system, questions, GenerationParams(max_new_tokens=max_new_tokens), progress))
        finally:
            system.close()
    found = compare(*results)
    keys = ("task", "num_items", "first", "second", "difference", "interval")
    rows = [{key: getattr(row, key) for key in keys} for row in found.rows if row.measure == PER_TASK[0]]
    tokens = next(row for row in found.rows if row.measure == "tokens")
    return Answers(
        num_items=found.num_items,
        max_new_tokens=max_new_tokens,
        accuracy_percent=rows,
        only_before_right=found.only_first_right,
        only_after_right=found.only_second_right,
        p_equal=found.p_accuracy,
        mean_tokens=(tokens.first, tokens.second),
    )


def _speed(engines: Sequence[Path], load: float, progress: Progress) -> Speed:
    rates: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in engines]
    found: dict[str, Any] = {}
    with progress.stage("timing both engines", NUM_ROUNDS * len(engines)) as stage:
        for _ in range(NUM_ROUNDS):
            for engine, seen in zip(engines, rates, strict=True):
                found = bench(engine, prompt_len=PROMPT_LEN, max_new_tokens=NEW_TOKENS, repeats=NUM_RUNS)
                for row in found["rows"]:
                    seen[row["phase"]].append(row["median"])
                stage.advance(1)
    phases = {}
    for phase in ("prefill", "decode"):
        one, other = (seen[phase] for seen in rates)
        ratios = [b / a for a, b in zip(one, other, strict=True)]
        phases[phase] = {"before": statistics.median(one), "after": statistics.median(other), "ratio": statistics.median(ratios)}
    return Speed(
        tokens_per_second=phases,
        conditions={
            "backend": found["rows"][0]["system"],
            "dtype": found["rows"][0]["dtype"],
            "batch_size": 1,
            "prompt_len": PROMPT_LEN,
            "new_tokens": NEW_TOKENS,
            "num_rounds": NUM_ROUNDS,
            "num_cpus": found["machine"]["num_cpus"],
            "load_before": load,
        },
        engine_bytes=[sum(path.stat().st_size for path in engine.rglob("*") if path.is_file()) for engine in engines],
    )
