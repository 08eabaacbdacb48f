"""Early exits on a trained sample: what they save, what they cost in accuracy, and whether a plain budget does as well.

    python bench/early_exit.py [--sample longcot-tiny] [--num_items 120] [--num_calib 120] [--rounds 3] [--output early-exit-out]

Everything is done anew from the sample: calibration (exit head, adapter), two engines, then on held-out questions that the calibration
has not seen:

- level 1: whole traces, the exit head, answer probes, a budget of tokens with the same mean, the oracle; curves and a picture;
- the recommended batch settings against the checkpoint's own defaults and the family's;
- level 2: drafts at batch 1, 8 and 32, interleaved with plain decoding: acceptance, weight bytes, wall-clock, losslessness;
- all of it re-costed for the 7B shape, computed from its config.

Compute is in layer-tokens (a row of logits counts as its matrix's share of a layer, exit heads and adapters by their weights, trial
answers in full) and in weight bytes read at batch 1. Writes OUTPUT/early-exit.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exit_drafts import Asked, drafts, percent, recost
from matplotlib.figure import Figure

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.exits import rule
from trtllm_thoughtx.calibrate.exits.calibrate import calibrate_exits, measure
from trtllm_thoughtx.calibrate.exits.traces import Stop, Trace
from trtllm_thoughtx.checkpoint.exits import read_exits
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.evaluate.questions import generated
from trtllm_thoughtx.evaluate.record import Record, Result
from trtllm_thoughtx.evaluate.run import evaluate
from trtllm_thoughtx.evaluate.statistics import mean_interval, wilson
from trtllm_thoughtx.evaluate.summary import compare
from trtllm_thoughtx.evaluate.systems import EngineSystem
from trtllm_thoughtx.families.size import head_in_layers, layer_parameters
from trtllm_thoughtx.files import atomic_file
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.report import plain, to_json
from trtllm_thoughtx.tasks import TASKS
from trtllm_thoughtx.text.params import GenerationParams

ROOT = Path(__file__).resolve().parents[1]
MAX_NEW = 400
SEED = 7  # of the questions: not the calibration's
RANK = 64


def tradeoff_plot(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], points: Mapping[str, tuple[float, float]]) -> None:
    """Right answers in % over generated tokens: a line for each rule whose strictness varies, a mark for each that was run."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for name, line in curves.items():
        axis.plot(*zip(*line, strict=True), marker=".", label=name)
    for name, point in points.items():
        axis.plot(*point, marker="*", markersize=13, linestyle="none", label=name)
    axis.set(xlabel="generated tokens a question, answer probes included", ylabel="right answers, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def priced(traces: Sequence[Trace], stop_at: Callable[[Trace], Stop | None]) -> tuple[float, float]:
    """Generated tokens a question, and right answers in %, of a rule."""
    found = [rule.outcome(trace, stop_at(trace)) for trace in traces]
    return sum(one.num_generated for one in found) / len(found), 100 * sum(one.is_right for one in found) / len(found)


def fixed_depth(num: int) -> Callable[[Trace], Stop | None]:
    return lambda trace: trace.stops[num] if num < len(trace.stops) else None  # stops[0] is before the first step


class Bench:
    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch, self.progress = args, scratch, Progress()
        self.sample = Path(args.sample) if "/" in args.sample else ROOT / "trtllm_thoughtx" / "samples" / args.sample
        args.sample = self.sample.name
        with open_weights(self.sample) as source:
            self.config = source.config
            self.gain = source.read("transformer.ln_f.weight", "float32")
        self.layer = args.layer
        self.found: dict[str, Any] = {"sample": args.sample, "num_items": args.num_items * len(TASKS), "seed": SEED}
        self.lines: list[str] = []

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def prepare(self) -> None:
        made = calibrate_exits(
            self.sample, self.scratch / "ckpt", fit_exit_head=True, exit_layers=(self.layer,), adapter_rank=RANK,
            num_items=self.args.num_calib, max_new_tokens=MAX_NEW, num_threads=self.args.num_threads, progress=self.progress,
        )  # fmt: skip
        self.found["calibration"] = made
        options = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 1024, "max_batch_size": 32}
        build(self.scratch / "ckpt", self.scratch / "engine", options)
        build(self.scratch / "ckpt", self.scratch / "stages", {**options, "early_exit_layers": (self.layer,)})
        self.questions = generated(tuple(TASKS), "test", num_items=self.args.num_items, seed=SEED)

    # --- level 1 -----------------------------------------------------------------------------------------------------------

    def ask(self, name: str, *, batch_size: int = 16, **settings: Any) -> Result:
        system = EngineSystem(self.scratch / "engine", None, self.args.num_threads, batch_size)
        try:
            began = time.perf_counter()
            result = evaluate(system, self.questions, GenerationParams(max_new_tokens=MAX_NEW, **settings), self.progress)
            result.conditions["wall_seconds"] = time.perf_counter() - began
        finally:
            system.close()
        result.system["name"] = name
        return result

    def compute(self, record: Record, has_head: bool) -> tuple[float, float, float]:
        """Of one answer in layers: generation, generation and prompt, and weights read at batch 1."""
        head = head_in_layers(self.config)
        of_exit = 2 * self.config.hidden_size / layer_parameters(self.config) if has_head else 0.0
        fed = record.num_layer_tokens / self.config.num_layers - record.num_prompt_tokens  # written tokens and answer probes
        generation = fed * (self.config.num_layers + head + of_exit)
        prompt = record.num_prompt_tokens * self.config.num_layers + head + of_exit
        return generation, generation + prompt, (fed + 1) * (self.config.num_layers + head + of_exit)

    def row(self, name: str, result: Result, full: Result, has_head: bool = False) -> dict[str, Any]:
        records, whole = result.of(), {record.id: record for record in full.of()}
        mine = [self.compute(record, has_head) for record in records]
        theirs = [self.compute(whole[record.id], False) for record in records]
        saved = [1 - sum(one[k] for one in mine) / sum(one[k] for one in theirs) for k in range(3)]
        test = compare(full, result)
        apart = [100.0 * record.correct - 100.0 * whole[record.id].correct for record in records]
        return {
            "name": name,
            "num_items": len(records),
            "accuracy": sum(record.correct for record in records) / len(records),
            "interval": wilson(sum(record.correct for record in records), len(records)),
            "points_against_whole": sum(apart) / len(apart),
            "points_interval": mean_interval(apart),
            "only_whole_right": test.only_first_right,
            "only_this_right": test.only_second_right,
            "p_accuracy": test.p_accuracy,
            "tokens": sum(record.num_tokens for record in records) / len(records),
            "saved_generation": saved[0],
            "saved_with_prompt": saved[1],
            "saved_weight_bytes": saved[2],
            "stops": {
                why: sum(record.thinking_stop == why for record in records) for why in sorted({str(r.thinking_stop) for r in records})
            },
            "wall_seconds": result.conditions["wall_seconds"],
        }

    def level_1(self) -> None:
        full = self.ask("whole traces", exit_policy="off")
        runs = {
            "exit head": self.ask("exit head", exit_policy="off", exit_threshold="auto"),
            "answer probes, 1": self.ask("answer probes, 1", exit_policy="off", exit_probe=0.9, probe_agree=1, probe_tokens=8),
            "answer probes, 2 agree": self.ask("answer probes, 2 agree", exit_policy="off", exit_probe=0.9, probe_agree=2, probe_tokens=8),
        }
        head = runs["exit head"].of()
        budget = self.equal_budget(full, sum(record.num_tokens for record in head))
        traces = self.traces()
        mean = sum(record.num_tokens for record in head) / len(head)
        depth = next(num for num in range(1, 100) if priced(traces, fixed_depth(num))[0] >= mean)
        name = f"budget of {depth} steps"
        runs[name] = self.ask(name, exit_policy="off", max_reasoning_depth=depth)
        runs[f"budget of {budget} tokens"] = self.ask("budget", exit_policy="off", max_thinking_tokens=budget)
        rows = [self.row("whole traces", full, full)]
        rows += [self.row(name, result, full, has_head=name == "exit head") for name, result in runs.items()]
        head_row = rows[1]
        against = compare(runs[name], runs["exit head"])
        oracle = rule.apply(traces, rule.oracle)
        self.found["level_1"] = {
            "rows": rows,
            "oracle": plain(oracle),
            "head_against_budget": {k: getattr(against, k) for k in ("only_first_right", "only_second_right", "p_accuracy")},
        }
        self.say(f"## Level 1 on {self.args.sample}: {len(full.of())} held-out questions, greedy")
        self.say()
        self.say(
            "| | right | against whole traces, points (95 %) | exact p | tokens | saved: generation | with the prompt | weight bytes |"
        )
        self.say("|---|---|---|---|---|---|---|---|")
        for one in rows:
            low, high = one["points_interval"]
            self.say(
                f"| {one['name']} | {percent(one['accuracy'])} | {one['points_against_whole']:+.2f} ({low:+.2f} .. {high:+.2f}) "
                f"| {one['p_accuracy']:.2g} | {one['tokens']:.1f} "
                f"| {' | '.join(percent(one[f'saved_{of}']) for of in ('generation', 'with_prompt', 'weight_bytes'))} |"
            )
        self.say(
            f"| oracle (first step at which the answer is the whole trace's) | {100 * oracle.accuracy:.1f} % | | | | "
            f"{100 * oracle.saved_of_generated_tokens:.1f} % | {100 * oracle.saved_of_all_tokens:.1f} % | |"
        )
        self.say()
        self.say(
            f"The exit head against the budget of steps, which has at least its mean of tokens: only the budget right "
            f"{against.only_first_right}, only the head right {against.only_second_right}, exact p {against.p_accuracy:.2g}. "
            f"Why the thinking ended with the head: {head_row['stops']}."
        )
        by_task = {}
        for task in TASKS:
            pair = [(a, b) for a, b in zip(full.of(task), runs["exit head"].of(task), strict=True)]
            saved = 1 - sum(self.compute(b, True)[0] for _, b in pair) / sum(self.compute(a, False)[0] for a, _ in pair)
            by_task[task] = {
                "whole": sum(a.correct for a, _ in pair),
                "head": sum(b.correct for _, b in pair),
                "of": len(pair),
                "saved_generation": saved,
            }
            self.say(
                f"- {task}: right {by_task[task]['whole']} whole, {by_task[task]['head']} with the head, of {len(pair)}; "
                f"generation saved {percent(saved)}"
            )
        self.found["level_1"]["by_task"] = by_task
        self.failures(full, runs["exit head"])
        self.curves(traces, rows)

    def equal_budget(self, full: Result, wanted: int) -> int:
        """The most thinking tokens whose total of written tokens is nearest to `wanted`, from the whole traces (a cut answers as long)."""
        thinking = [self.num_thinking(record) for record in full.of()]
        rest = sum(record.num_tokens for record in full.of()) - sum(thinking)
        return min(range(1, MAX_NEW), key=lambda n: abs(sum(min(t, n) for t in thinking) + rest - wanted))

    def num_thinking(self, record: Record) -> int:
        answer = 0 if record.answer is None else len(self.text.encode(record.answer, add_special=False)) + 1
        return max(0, record.num_tokens - answer - 1)

    def failures(self, full: Result, other: Result) -> None:
        lost = [(a, b) for a, b in zip(full.of(), other.of(), strict=True) if a.correct and not b.correct]
        won = sum(b.correct and not a.correct for a, b in zip(full.of(), other.of(), strict=True))
        self.found["level_1"]["failures"] = [
            {
                "id": a.id,
                "expected": a.expected,
                "answer": b.answer,
                "steps_whole": a.num_steps,
                "steps": b.num_steps,
                "num_sufficient": a.traits.get("num_sufficient"),
            }
            for a, b in lost
        ]
        self.say()
        self.say(f"Questions that only whole traces get right: {len(lost)} (only the head: {won}).")
        for a, b in lost[:12]:
            self.say(
                f"- `{a.id}`: wanted {a.expected!r}, said {b.answer!r} after {b.num_steps} steps; "
                f"{a.traits.get('num_sufficient')} suffice, the whole trace has {a.num_steps}"
            )

    def traces(self) -> list[Trace]:
        engine = Engine.load(self.scratch / "engine", num_threads=self.args.num_threads, tap_layers=True)
        try:
            return measure(engine, self.questions, MAX_NEW, self.gain, (), self.progress, self.sample).traces
        finally:
            engine.close()

    def curves(self, traces: Sequence[Trace], rows: Sequence[dict[str, Any]]) -> None:
        head = read_exits(self.scratch / "ckpt", self.config).head
        assert head is not None

        curves = {
            "exit head, threshold 0.5 to 0.9999": [
                priced(traces, rule.by_head(head, t)) for t in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.997, 0.999, 0.9999)
            ],
            "fixed number of steps, 1 to 24": [priced(traces, fixed_depth(num)) for num in range(1, 25)],
        }
        points = {
            one["name"]: (one["tokens"] + one.get("trial", 0.0), 100 * one["accuracy"])
            for one in rows
            if not one["name"].startswith("trial")
        }
        points["oracle"] = priced(traces, rule.oracle)
        self.found["level_1"]["curves"] = curves
        tradeoff_plot(self.args.output / "early-exit.png", curves, points)

    # --- presets -----------------------------------------------------------------------------------------------------------

    def presets(self) -> None:
        asked: dict[str, dict[str, Any]] = {
            "the checkpoint's own defaults (greedy)": {},
            "the family's (0.6, 0.95, 20)": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
            "batch preset (depth 6, 0.3)": {"temperature": 0.3, "max_reasoning_depth": 6},
            "depth 6, greedy": {"max_reasoning_depth": 6},
            "exit head, greedy": {"exit_threshold": "auto"},
        }
        self.say()
        self.say(f"## Settings for batches, {self.args.sample}, batch 32")
        self.say()
        self.say("| | right (95 %) | tokens | answers a second |")
        self.say("|---|---|---|---|")
        rows = []
        for name, settings in asked.items():
            result = self.ask(name, batch_size=32, exit_policy="off", **settings)
            records = result.of()
            right = sum(record.correct for record in records)
            row = {
                "name": name,
                "accuracy": right / len(records),
                "interval": wilson(right, len(records)),
                "tokens": sum(r.num_tokens for r in records) / len(records),
                "answers_per_second": len(records) / result.conditions["wall_seconds"],
            }
            rows.append(row)
            self.say(
                f"| {name} | {percent(row['accuracy'])} ({percent(row['interval'][0])} .. {percent(row['interval'][1])}) "
                f"| {row['tokens']:.1f} | {row['answers_per_second']:.1f} |"
            )
        self.found["presets"] = rows

    def run(self) -> None:
        self.prepare()
        engine = Engine.load(self.scratch / "engine")
        assert engine.text
        self.text = engine.text
        engine.close()
        self.level_1()
        self.presets()
        asked = Asked(self.args.sample, self.questions, self.config, self.layer, self.args.rounds, self.args.num_threads)
        self.found["level_2"] = drafts(self.scratch / "stages", asked, self.say)
        self.found["computed_for_7b"] = recost(self.found, asked, RANK, self.say)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default="longcot-tiny", help="a sample of the package, or a directory")
    parser.add_argument("--num_items", type=int, default=120, help="questions of each task that are asked")
    parser.add_argument("--num_calib", type=int, default=120, help="questions of each task and set that the calibration traces")
    parser.add_argument("--layer", type=int, default=3, help="layers that draft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("early-exit-out"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="early-exit-") as folder:
        bench = Bench(args, Path(folder))
        bench.run()
    with atomic_file(args.output / "early-exit.json") as file:
        file.write(to_json(json.loads(json.dumps(bench.found, default=float))).encode())
    with atomic_file(args.output / "early-exit.md") as file:
        file.write(("\n".join(bench.lines) + "\n").encode())


if __name__ == "__main__":
    main()
