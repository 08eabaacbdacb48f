"""What a release costs beside its steps, and what kills do to it.

    python bench/release.py overhead [--ray]      seconds a step, of steps that do nothing: local processes, Ray
    python bench/release.py plan                  a dry run of 1,000 steps, and 1,000 and 10,000 steps with an executor that does nothing
    python bench/release.py kills --num_kills 50  the samples' release, killed at random moments (driver or a command), and undisturbed
    python bench/release.py ray                   the samples' release by local processes and by Ray, in turns

Every figure is of this machine and this run; ratios are within one run. Results go to stdout as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trtllm_thoughtx.release.executor import Executor, LocalExecutor
from trtllm_thoughtx.release.rates import Rates
from trtllm_thoughtx.release.schedule import Schedule
from trtllm_thoughtx.release.step import HERE, Step, make_step
from trtllm_thoughtx.release.store import Store
from trtllm_thoughtx.release.watch import Watch
from trtllm_thoughtx.release.work import Outcome

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "build_configs" / "releases" / "samples.yaml"
NOTHING = '#!/bin/sh\nmkdir "$3"\necho \'{"ok": true}\'\n'  # a command that takes a millisecond
SHIPPED = ("convert", "calibrate", "build", "sign", "export")  # kinds whose outputs are files that are shipped; others are measurements


def steps_of_nothing(num: int, width: int = 20) -> dict[str, Step]:
    """Chains of steps side by side."""
    steps: dict[str, Step] = {}
    last: list[Step | None] = [None] * width
    for index in range(num):
        words: list[Any] = ["build", "--output_dir", f"{HERE}/s{index}", *filter(None, [last[index % width]])]
        step = make_step("build", f"s{index}", words, facts={})
        steps[step.key], last[index % width] = step, step
    return steps


def timed(steps: dict[str, Step], store: Store, executor: Executor) -> float:
    began = time.perf_counter()
    states = Schedule(steps, store, executor, Watch(steps, Rates(), executor.cores)).run()
    assert {state.status for state in states.values()} == {"made"}, next(s for s in states.values() if s.status != "made")
    return time.perf_counter() - began


def overhead(work: Path, with_ray: bool) -> dict[str, Any]:
    program = work / "nothing.sh"
    program.write_text(NOTHING)
    command = ("/bin/sh", str(program))
    found: dict[str, Any] = {}
    for name in ("local", *(("ray",) if with_ray else ())):
        rows = list[float]()
        for num in (20, 200, 200):  # the first starts workers
            store = Store(fresh(work / f"{name}-{len(rows)}"))
            executor: Executor
            if name == "ray":
                from trtllm_thoughtx.release.on_ray import RayExecutor

                if not rows:
                    import ray

                    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
                    ray.init(logging_level=logging.ERROR, log_to_driver=False)
                executor = RayExecutor(store, "local", program=command)
            else:
                executor = LocalExecutor(store, program=command)
            rows.append(1000 * timed(steps_of_nothing(num), store, executor) / num)
            cores = executor.cores
            executor.close()
        found[name] = {"ms_per_step": rows[1:], "cores": cores}
    return found


class Instant:
    """An executor whose steps have ended when they begin."""

    cores = 64

    def __init__(self) -> None:
        self.ended: list[Outcome] = []

    def lacks(self, step: Step) -> str:
        return ""

    def take(self, step: Step) -> bool:
        if len(self.ended) == self.cores:
            return False
        self.ended.append(Outcome(step.key, "made"))
        return True

    def wait(self, seconds: float) -> list[Outcome]:
        found, self.ended = self.ended, []
        return found

    def cancel(self) -> None: ...
    def close(self) -> None: ...


def plan(work: Path) -> dict[str, Any]:
    formats = "".join(f"  f{n}: {{qformat: int8_sq, calib_size: {n + 8}}}\n" for n in range(50))
    targets = "".join(f"  t{n}: {{backend: onnxruntime, max_seq_len: {n + 64}}}\n" for n in range(7))
    model = ROOT / "trtllm_thoughtx" / "samples" / "thoughtx-tiny"
    text = f"name: big\nmodels: {{m: {{path: {model}}}}}\nformats:\n{formats}targets:\n{targets}evaluate: {{task: chain}}\n"
    (work / "big.yaml").write_text(text)
    words = [sys.executable, "-m", "trtllm_thoughtx", "release", str(work / "big.yaml"), "--output_dir", str(work / "out"), "--dry_run"]
    rows = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        rows.append(time.perf_counter() - began)
    found: dict[str, Any] = {"dry_run_seconds": rows, "says": done.stdout.strip().splitlines()[-1]}
    for num in (1000, 10_000):
        steps = steps_of_nothing(num, width=100)
        found[f"simulated_{num}_seconds"] = timed(steps, Store(fresh(work / f"sim{num}")), Instant())
    return found


def driver(document: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "trtllm_thoughtx", "release", str(document), "--output_dir", str(out), "--json", *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found


def objects(out: Path) -> dict[str, tuple[str, int]]:
    """Of each finished step: its kind, and the identity of its result file."""
    found = {}
    for path in (out / "store" / "objects").glob("*/*/step.json"):
        found[path.parent.name] = (json.loads(path.read_text())["kind"], path.stat().st_ino)
    return found


def shipped(out: Path) -> dict[str, str]:
    kinds = {key: kind for key, (kind, _) in objects(out).items()}
    return {
        f"{key[:12]}/{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for key, kind in kinds.items()
        if kind in SHIPPED
        for folder in [out / "store" / "objects" / key[:2] / key]
        for path in folder.rglob("*")
        if path.is_file() and path.parent != folder
    }


def kills(work: Path, num_kills: int, seed: int, document: Path) -> dict[str, Any]:
    began = time.perf_counter()
    plain, chance, counts = work / "plain", random.Random(seed), {"driver": 0, "command": 0, "releases": 0}
    status = driver(document, plain).wait()
    undisturbed = time.perf_counter() - began
    assert status in (0, 1), status
    longest, made_again = undisturbed / 12, 0
    wanted = shipped(plain)
    while counts["driver"] + counts["command"] < num_kills:
        out, seen = fresh(work / "killed"), dict[str, tuple[str, int]]()
        shutil.rmtree(out)
        counts["releases"] += 1
        running = driver(document, out)
        while running.poll() is None and counts["driver"] + counts["command"] < num_kills:
            try:
                running.wait(chance.uniform(0.2, longest))
                break
            except subprocess.TimeoutExpired:
                pass
            victims = children(running.pid)
            if victims and chance.random() < 0.5:
                os.kill(chance.choice(victims), signal.SIGKILL)
                counts["command"] += 1
            else:
                running.kill()
                running.wait()
                counts["driver"] += 1
                running = driver(document, out)
            now = objects(out)
            made_again += sum(now.get(key) != row for key, row in seen.items())
            seen = now
        running.wait()
        status = driver(document, out).wait()  # also after a command that was killed three times
        now = objects(out)
        made_again += sum(now.get(key) != row for key, row in seen.items())
        differing = sorted(name for name, digest in wanted.items() if shipped(out).get(name) != digest)
        assert not differing, differing[:5]
        left = list((out / "store" / "partial").iterdir())
        assert not left, left
    return {**counts, "undisturbed_seconds": undisturbed, "files_compared": len(wanted), "differing": 0, "finished_made_again": made_again}


def beside_ray(work: Path, document: Path) -> dict[str, Any]:
    found: dict[str, list[float]] = {"local": [], "ray": []}
    for turn in range(2):
        for name, more in (("local", ()), ("ray", ("--ray", "local"))):
            began = time.perf_counter()
            assert driver(document, work / f"{name}{turn}", *more).wait() == 0
            found[name].append(time.perf_counter() - began)
    assert shipped(work / "local0") == shipped(work / "ray0")
    return {**found, "ratio": min(found["ray"]) / min(found["local"])}


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "plan", "kills", "ray"))
    parser.add_argument("--ray", action="store_true", help="overhead: of Ray too")
    parser.add_argument("--num_kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--release", type=Path, default=SAMPLES)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="release-bench-") as name:
        work = Path(name)
        if given.what == "kills":
            found = kills(work, given.num_kills, given.seed, given.release)
        elif given.what == "ray":
            found = beside_ray(work, given.release)
        else:
            found = overhead(work, given.ray) if given.what == "overhead" else plan(work)
    print(json.dumps({"what": given.what, "num_cpus": os.cpu_count(), "load": os.getloadavg()[0], **found}, indent=2))


if __name__ == "__main__":
    main()
