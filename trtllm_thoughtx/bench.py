"""Tokens per second of an engine, and of transformers beside it under the same conditions.

Prompts are random token ids and decoding is greedy without a stop, so every run does the same amount of work. Runs of the two
are separate processes' worth of noise apart only in time: same machine, same threads, same dtype, same batch and lengths. Each
row states its conditions, how many runs it is the median of and how many went before as warm-up. Numbers of one machine say
nothing about another.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx import __version__, report
from trtllm_thoughtx.checkpoint.directory import HUGGING_FACE
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.process.outside import need
from trtllm_thoughtx.progress import SILENT, Progress

BUSY = 0.25  # load per CPU, one-minute average, above which timings say more about the neighbours


@dataclass(frozen=True, kw_only=True)
class Row:
    """One phase of one system. Rates are tokens per second over all rows of the batch; p10 is the slow tail."""

    system: str
    phase: str  # prefill | decode
    dtype: str
    batch_size: int
    prompt_len: int
    new_tokens: int
    num_threads: int | None
    chunk_size: int | None
    num_runs: int
    num_warmup: int
    median: float
    p10: float
    p90: float


def _row(phase: str, rates: Sequence[float], **conditions: Any) -> Row:
    p10, median, p90 = (float(value) for value in np.percentile(rates, [10, 50, 90]))
    return Row(phase=phase, median=median, p10=p10, p90=p90, num_runs=len(rates), **conditions)


def bench(
    engine_dir: Path,
    against: Path | None = None,
    *,
    backend: str | None = None,
    prompt_len: int = 64,
    max_new_tokens: int = 32,
    batch_size: int = 1,
    num_threads: int | None = None,
    exact: bool = False,
    verify_key: Path | None = None,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Time prefill and decode of the engine, and of the Hugging Face model `against`. E122 when the engine is too small."""
    from trtllm_thoughtx.runtime.engine import Engine
    from trtllm_thoughtx.text.params import GenerationParams

    if against is not None:
        _check_against(against)
    load = os.getloadavg()[0]
    began = time.perf_counter()
    engine = Engine.load(engine_dir, backend, num_threads, exact=exact, verify_key=verify_key)
    load_seconds = time.perf_counter() - began
    limits = [
        ("batch_size", batch_size, engine.build.max_batch_size, "max_batch_size"),
        ("prompt_len + max_new_tokens", prompt_len + max_new_tokens, engine.build.max_seq_len, "max_seq_len"),
    ]
    for name, wanted, most, limit in limits:
        if wanted > most:
            raise ThoughtxError(
                "E122",
                f"{name} is {wanted}, the engine takes {most}",
                where=str(engine_dir),
                why="the engine was built for less",
                fix=f"ask for at most {most}, or build again with more: thoughtx-build --{limit} {wanted}",
            )
    prompts = np.random.default_rng(seed).integers(0, engine.config.vocab_size, (batch_size, prompt_len)).tolist()
    params = GenerationParams(max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)
    conditions: dict[str, Any] = {
        "dtype": engine.build.dtype,
        "batch_size": batch_size,
        "prompt_len": prompt_len,
        "new_tokens": max_new_tokens,
        "num_threads": num_threads,
        "num_warmup": warmup,
    }
    prefill, decode, chunk_size = [], [], None
    with progress.stage(f"timing {engine.backend}", warmup + repeats) as stage:
        for run in range(warmup + repeats):
            completions = engine.generate(prompts, params)
            chunk_size = completions[0].chunk_size
            assert all(len(done.output_ids) == max_new_tokens for done in completions), [done.stop_reason for done in completions]
            if run >= warmup:
                prefill.append(batch_size * prompt_len / engine.stats.prefill_seconds)
                decode.append(engine.stats.num_decoded / engine.stats.decode_seconds)
            stage.advance(1)
    system = f"{engine.backend}, exact" if exact else engine.backend
    engine.close()
    peak = _peak_rss()
    rows = [
        _row(phase, rates, system=system, chunk_size=chunk_size, **conditions)
        for phase, rates in (("prefill", prefill), ("decode", decode))
    ]
    if against is not None:
        rows += _transformers_rows(against, conditions, repeats, progress)
    medians = {(row.system == system, row.phase): row.median for row in rows}
    ratios = {phase: medians[True, phase] / medians[False, phase] for phase in ("prefill", "decode")} if against is not None else None
    return {
        "engine_dir": str(engine_dir),
        "against": None if against is None else str(against),
        "rows": [dataclasses.asdict(row) for row in rows],
        "ratio_to_transformers": ratios,
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak,
        "machine": {"cpu": platform.processor() or platform.machine(), "num_cpus": os.cpu_count(), "load_before": load},
        "python": platform.python_version(),
        "tool_version": __version__,
    }


def _check_against(path: Path) -> None:
    """What `reference` would refuse after the engine was timed; it is not imported yet, since its memory would count as the engine's."""
    open_weights(Checkpoint.open(path, HUGGING_FACE), allow_nonfinite=True).close()
    fix = 'pip install "trtllm-thoughtx[reference]", or leave --against out'
    need(("torch", "transformers"), "--against needs torch and transformers", where=str(path), fix=fix)


def _transformers_rows(against: Path, conditions: dict[str, Any], repeats: int, progress: Progress) -> list[Row]:
    from trtllm_thoughtx.validate.reference import time_decode, version

    prefill, decode, num_threads = [], [], None
    batch, length, new = (conditions[key] for key in ("batch_size", "prompt_len", "new_tokens"))
    with progress.stage("timing transformers", repeats) as stage:
        for _ in range(repeats):
            seen = time_decode(
                against, prompt_len=length, new_tokens=new, batch=batch, dtype=conditions["dtype"], num_threads=conditions["num_threads"]
            )
            prefill.append(batch * length / seen.prefill_seconds)
            decode.append(seen.decode_tokens_per_second)
            num_threads = seen.num_threads
            stage.advance(1)
    same = {**conditions, "num_threads": num_threads, "num_warmup": 1}  # time_decode warms up with one short call
    system = f"transformers {version()} eager"
    return [_row(phase, rates, system=system, chunk_size=None, **same) for phase, rates in (("prefill", prefill), ("decode", decode))]


def _peak_rss() -> int:
    """Most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def bench_table(result: dict[str, Any]) -> list[Any]:
    """A bench result for people: the rows, then one line of ratios and memory."""
    from trtllm_thoughtx.files import human_bytes

    columns = [field.name for field in dataclasses.fields(Row)]
    lines: list[Any] = [report.table("tokens per second", columns, [[row[column] for column in columns] for row in result["rows"]])]
    ratio, machine = result["ratio_to_transformers"], result["machine"]
    if ratio is not None:
        closing = "same process, dtype, batch and lengths"
        lines.append(f"against transformers: prefill x{ratio['prefill']:.2f}, decode x{ratio['decode']:.2f} ({closing})")
    memory = human_bytes(result["peak_rss_bytes"])
    lines.append(f"loaded in {result['load_seconds']:.2f} s; peak memory of the process before transformers {memory}")
    if machine["load_before"] > BUSY * (machine["num_cpus"] or 1):
        lines.append(
            f"NOT TO BE QUOTED: the machine was busy before the start (load {machine['load_before']:.1f} on {machine['num_cpus']} CPUs)"
        )
    return lines
