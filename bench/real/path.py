"""The whole way on a real model, as a user types it: convert, calibrate, build, validate, run, eval, for each format.

    python bench/real/path.py --model_dir DIR [--formats none,int8_wo,int4_wo,...] [--work DIR] [--num_questions 50] [--json]

Every step is the installed command in a process of its own. The table gives each step's exit status and seconds, the engine's size, the
KL that calibration.json states beside the one that `thoughtx-validate` measured, and right answers on `questions.jsonl`, fifty short
questions written for this. Exit status 1 when any step did not end with 0. `none` is the unquantized model in the checkpoint's own type.
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

from commands import ROOT, build_flags, command

FORMATS = ("none", "int8_wo", "int8_sq", "fp8", "int4_wo", "int4_awq")
QUESTIONS = Path(__file__).with_name("questions.jsonl")


def step(name: str, *flags: object) -> dict[str, Any]:
    """Run `thoughtx-NAME ... --json`; its document (if any), status and seconds."""
    line = command(name, *flags, "--json")
    began = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True)
    try:
        document = json.loads(done.stdout)
    except ValueError:
        document = None
    result = {"step": name, "command": line, "status": done.returncode, "seconds": time.perf_counter() - began, "document": document}
    if done.returncode:
        result["stderr"] = done.stderr[-2000:]
    return result


def run_format(qformat: str, model_dir: Path, work: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The steps of one format, until one fails in a way that leaves nothing to go on with."""
    checkpoint, engine = work / f"{qformat}-ckpt", work / f"{qformat}-engine"
    first = ("--model_dir", str(model_dir), "--output_dir", str(checkpoint))
    steps = [step("convert", *first) if qformat == "none" else step("calibrate", *first, "--qformat", qformat, *args.calibrate_flags)]
    if steps[-1]["status"]:
        return steps
    steps.append(step("build", *build_flags(checkpoint, engine, "--max_seq_len", args.max_seq_len)))
    if steps[-1]["status"]:
        return steps
    where = ("--engine_dir", str(engine))
    steps.append(step("validate", *where, "--reference", str(model_dir)))
    steps.append(step("run", *where, "--prompt", "What is the capital of France?", "--max_new_tokens", "32", "--temperature", "0"))
    asked = ("--dataset", str(args.questions), "--limit", str(args.num_questions), "--max_new_tokens", "64", "--temperature", "0")
    steps.append(step("eval", *where, *asked))
    return steps


def engine_bytes(engine: Path) -> int:
    return sum(file.stat().st_size for file in engine.iterdir()) if engine.is_dir() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--work", type=Path, help="default: real-out/path-MODEL in the repository")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--num_questions", type=int, default=50)
    parser.add_argument("--max_seq_len", type=int, default=2048)
    parser.add_argument("--calibrate_flags", nargs=argparse.REMAINDER, default=[], help="more flags for thoughtx-calibrate; must come last")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    work = args.work or ROOT / "real-out" / f"path-{args.model_dir.name}"
    work.mkdir(parents=True, exist_ok=True)
    load, rows = os.getloadavg()[0], []
    for qformat in args.formats.split(","):
        steps = run_format(qformat, args.model_dir, work, args)
        rows.append({"format": qformat, "engine_bytes": engine_bytes(work / f"{qformat}-engine"), "steps": steps})
        for done in steps:
            print(f"{qformat:9} {done['step']:10} status {done['status']}  {done['seconds']:7.1f} s", file=sys.stderr, flush=True)
            if done["status"]:
                print(done["stderr"], file=sys.stderr)
    result = {"model_dir": str(args.model_dir), "load_before": load, "formats": rows}
    (work / "path.json").write_text(json.dumps(result, indent=1))
    if args.json:
        print(json.dumps(result))
    else:
        for row in rows:
            by_step = {done["step"]: done for done in row["steps"]}
            asked = (by_step.get("eval", {}).get("document") or {}).get("summary", {}).get("overall")
            answers = f"{asked['num_correct']} of {asked['num_items']} questions right" if asked else "no answers"
            print(f"{row['format']:9} {row['engine_bytes'] / 2**20:8.1f} MiB  {answers}")
    return int(any(done["status"] for row in rows for done in row["steps"]))


if __name__ == "__main__":
    sys.exit(main())
