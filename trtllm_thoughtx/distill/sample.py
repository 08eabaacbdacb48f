"""Make the sample checkpoints that the package ships, from a seed (`make sample`): five recipes of build_configs, measured.

    teacher-start -> tiny-teacher -> tiny-base -> tiny-practice -> thoughtx-tiny (three stages) and longcot-tiny (side by side) -> shipped/

A run that was killed goes on when it is started again. `shipped/` holds each sample as the package has it: weights, tokenizer,
training log and curves, accuracy on held-out questions, and a model card made from them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trtllm_thoughtx import plot, report
from trtllm_thoughtx.distill import loop, models
from trtllm_thoughtx.distill.card import card
from trtllm_thoughtx.distill.settings import STAGES
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate import record, summary
from trtllm_thoughtx.evaluate.models import ModelSystem
from trtllm_thoughtx.evaluate.questions import generated
from trtllm_thoughtx.evaluate.run import evaluate
from trtllm_thoughtx.files import atomic_dir, sha256_of
from trtllm_thoughtx.process import interrupt
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.text.params import GenerationParams

ROOT = Path(__file__).parent.parent
CONFIGS = next(path for path in (ROOT.parent / "build_configs", ROOT / "build_configs") if path.is_dir())
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "max_positions": 4096}
NUM_TEACHER_LAYERS = 12
STUDENTS = ("thoughtx-tiny", "longcot-tiny")
# What is asked of a finished sample, as flags of thoughtx-eval.
ASKED: tuple[dict[str, Any], ...] = (
    {"tasks": ("chain",), "num_items": 1200, "cut_share": 0.1},
    {"tasks": ("lookup",), "num_items": 1000, "lengths": (0, 128, 256, 512, 1024), "cut_share": 0.1},
    {"tasks": ("story", "loan"), "num_items": 400, "cut_share": 0.3},
)
MEASURED = GenerationParams(max_new_tokens=400)
BATCH_SIZE = 16


def _start(name: str, out: Path, student: Path, teacher: Path | None, num_threads: int, extra: list[str]) -> subprocess.Popen[str]:
    """One `thoughtx-distill` in its own process; its progress goes to a file beside its output."""
    command = [sys.executable, "-m", "trtllm_thoughtx", "distill", "--config", str(CONFIGS / f"distill-{name}.yaml"), "--json", *extra]
    command += ["--student_dir", str(student), "--output_dir", str(out / name)]
    command += [] if teacher is None else ["--teacher_dir", str(teacher)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    with open(out / f"{name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)


def _finish(name: str, process: subprocess.Popen[str], out: Path) -> dict[str, Any]:
    answer, _ = process.communicate()
    if process.returncode:
        fix = "repair what it names and start again: what is finished is kept"
        raise ThoughtxError("E205", f"{name} was not made", where=str(out / f"{name}.log"), why=answer[-400:] or "see the log", fix=fix)
    made: dict[str, Any] = json.loads(answer)
    return made


def make(out: Path, *, seed: int, num_threads: int, extra: list[str]) -> dict[str, Any]:
    """Train teacher and students in `out`; seconds and stages of each."""
    out.mkdir(parents=True, exist_ok=True)
    seconds = json.loads((out / "seconds.json").read_text()) if (out / "seconds.json").is_file() else {}
    start, shared = out / "teacher-start", ("tiny-teacher", "tiny-base", "tiny-practice")
    teacher, base, practised = (out / name / "supervised" / "model" for name in shared)
    if not start.is_dir():
        models.new_model(start, num_layers=NUM_TEACHER_LAYERS, seed=seed, **SHAPE)
    made: dict[str, Any] = {}
    for names, student, guide in (
        (("tiny-teacher",), start, None),
        (("tiny-base",), teacher, teacher),
        (("tiny-practice",), base, None),
        (STUDENTS, practised, None),
    ):
        began = time.monotonic()
        threads_each = max(1, num_threads // len(names))
        running = {name: _start(name, out, student, guide, threads_each, ["--seed", str(seed), *extra]) for name in names}
        try:
            for name, process in running.items():
                made[name] = _finish(name, process, out)
        finally:
            for process in running.values():
                process.kill()
        seconds[" + ".join(names)] = seconds.get(" + ".join(names), 0.0) + time.monotonic() - began
        (out / "seconds.json").write_text(json.dumps(seconds))
    return {"seconds": seconds, **made}


def measure(model_dir: Path, seed: int, progress: Progress) -> record.Result:
    """Answers of a sample to held-out questions that neither training nor the comparison of the stages has seen."""
    questions = [asked for flags in ASKED for asked in generated(split="test", seed=seed, **flags)]
    system = ModelSystem(model_dir, batch_size=BATCH_SIZE)
    try:
        return evaluate(system, questions, MEASURED, progress)
    finally:
        system.close()


def ship(name: str, out: Path, *, seed: int, seconds: dict[str, float], progress: Progress, note: str = "") -> dict[str, Any]:
    """Write `out/shipped/name`; its summary. `note` goes into the card."""
    stages = [stage for stage in STAGES if (out / name / stage / "model" / "config.json").is_file()]
    model = out / name / stages[-1] / "model"
    result = measure(model, seed, progress)
    result.system.update(name=name, path=name)
    found = summary.summarize(result)
    before = {name: loop.read_log(out / f"tiny-{name}" / "supervised") for name in ("base", "practice")}
    logs = {**before, **{stage: loop.read_log(out / name / stage) for stage in stages}}
    ablation = out / name / "ablation.json"
    (out / "shipped").mkdir(exist_ok=True)
    with atomic_dir(out / "shipped" / name, force=True) as root:
        for file in model.iterdir():
            shutil.copyfile(file, root / file.name)
        plot.accuracy_plot(root / "accuracy.png", [found])
        plot.curves_plot(root / "curves.png", logs)
        points = [{**row, "stage": stage} for stage, rows in logs.items() for row in rows]
        (root / "training-log.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
        (root / "evaluation.json").write_text(report.to_json(found))
        stages_compared = json.loads(ablation.read_bytes()) if ablation.is_file() else None
        digest = sha256_of(root / "model.safetensors")
        (root / "README.md").write_text(
            card(name, found, logs, sha256=digest, seconds=seconds, seed=seed, ablation=stages_compared, note=note),
            encoding="utf-8",
        )
    return {"sha256": digest, "accuracy": {task: row.accuracy for task, row in found.tasks.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("sample-out"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--note", default="", help="a sentence for the cards")
    args, extra = parser.parse_known_args()
    made = make(args.output_dir, seed=args.seed, num_threads=args.num_threads, extra=extra)
    progress = Progress()
    for name in STUDENTS:
        made[name] = ship(name, args.output_dir, seed=args.seed, seconds=made["seconds"], progress=progress, note=args.note)
    print(report.to_json(made))


if __name__ == "__main__":
    interrupt.guard()
    main()
