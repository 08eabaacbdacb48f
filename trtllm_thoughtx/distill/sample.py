"""Make the sample checkpoints that the package ships, from a seed (`make sample`): the three recipes of build_configs, measured.

    teacher-start -> teacher -> thoughtx-tiny (three stages) and longcot-tiny (side by side, one thread each)

A run that was killed goes on when it is started again. What is shipped is copied at the end, with a model card that holds the
sha256 of the weights, the training log and its curves, and the accuracy on held-out items.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trtllm_thoughtx.distill import models
from trtllm_thoughtx.errors import ThoughtxError

ROOT = Path(__file__).parent.parent
CONFIGS = next(path for path in (ROOT.parent / "build_configs", ROOT / "build_configs") if path.is_dir())
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "max_positions": 4096}
NUM_TEACHER_LAYERS = 12


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
    start, teacher = out / "teacher-start", out / "tiny-teacher" / "supervised" / "model"
    if not start.is_dir():
        models.new_model(start, num_layers=NUM_TEACHER_LAYERS, seed=seed, **SHAPE)
    made: dict[str, Any] = {}
    for names, parent in ((("tiny-teacher",), None), (("thoughtx-tiny", "longcot-tiny"), teacher)):
        began = time.monotonic()
        share = max(1, num_threads // len(names))
        running = {name: _start(name, out, parent or start, parent, share, ["--seed", str(seed), *extra]) for name in names}
        try:
            for name, process in running.items():
                made[name] = _finish(name, process, out)
        finally:
            for process in running.values():
                process.kill()
        seconds["+".join(names)] = seconds.get("+".join(names), 0.0) + time.monotonic() - began
        (out / "seconds.json").write_text(json.dumps(seconds))
    return {"seconds": seconds, **made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("sample-out"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=os.cpu_count() or 1)
    args, extra = parser.parse_known_args()
    print(json.dumps(make(args.output_dir, seed=args.seed, num_threads=args.num_threads, extra=extra), indent=2))


if __name__ == "__main__":
    main()
