"""Steps on the machines of a Ray cluster: the executor behind `--ray`.

A task is one step. It takes the step and the path of the store as text and returns how the step ended; no tensor and no file passes through
Ray, so every machine must see the store under one path. Cores, memory, GPU kind and custom resources are Ray's, which places the tasks. The
scheduler's own rules say what is tried again; Ray itself tries nothing twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import human_bytes
from trtllm_thoughtx.process.outside import need
from trtllm_thoughtx.release.step import Step
from trtllm_thoughtx.release.store import Store
from trtllm_thoughtx.release.work import LOST, PROGRAM, Outcome, Stop, run_step

ACCELERATOR = "accelerator_type:"  # the prefix of Ray's own resources for kinds of GPUs
OUTSTANDING = 4  # tasks for each core of the cluster that are handed over at a time
LACKING_FOR = 8.0  # seconds for which a resource may be missing: a node that joins brings it
CLEAN_WITHIN = 15.0  # seconds that a cancelled task has to end
LOOK_EVERY = 1.0  # seconds between two looks at the nodes


def _work(step: str, root: str, program: list[str]) -> str:
    """The task. Its process is the starter of the command, which ends with it."""
    stop = Stop()
    try:
        return json.dumps(dataclasses.asdict(run_step(Step.from_json(step), Store(Path(root)), stop, program)))
    except BaseException:  # Ray's cancel raises KeyboardInterrupt here
        stop.set()
        raise


class RayExecutor:
    """`address`: of a running cluster, or `local` for one of this machine that ends with the release."""

    def __init__(self, store: Store, address: str, *, program: Sequence[str] = PROGRAM) -> None:
        fix = 'pip install "trtllm-thoughtx[ray]", or leave --ray out: local processes make the same'
        need(["ray"], "Ray is not installed", where="--ray", fix=fix)
        import ray

        self.ray, self.store, self.program = ray, store, list(program)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        given: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
        self._is_mine = not ray.is_initialized()
        if self._is_mine:
            try:
                ray.init(address, **given)  # `local` is Ray's own word
            except (ConnectionError, RuntimeError, ValueError) as error:
                why, fix = shown(str(error), 400), "start a cluster (ray start), correct the address, or use --ray local"
                raise ThoughtxError("E205", "no Ray cluster answers", where=f"--ray {shown(address)}", why=why, fix=fix) from None
        self._task = ray.remote(_work)
        self._running: dict[Any, Step] = {}
        self._lacking: dict[str, float] = {}  # step -> since when
        self._nodes, self._looked = list[dict[str, float]](), 0.0
        self._look()

    def _look(self) -> None:
        if time.monotonic() - self._looked > LOOK_EVERY:
            self._nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            self._looked = time.monotonic()

    @property
    def cores(self) -> int:
        return max(1, int(sum(node.get("CPU", 0) for node in self._nodes)))

    def _asks(self, step: Step, node: dict[str, float] | None = None) -> dict[str, float]:
        """Resources by name. A step that measures time takes all cores of its node."""
        cores = step.cores if not step.alone else max((one.get("CPU", 1) for one in self._nodes), default=1)
        asks = {"CPU": float(cores), "memory": float(step.memory), **dict(step.resources)}
        if step.gpu is not None:
            asks |= {"GPU": 1.0} if step.resources else {"GPU": 1.0, ACCELERATOR + step.gpu: 0.001}
        return asks

    def lacks(self, step: Step) -> str:
        self._look()
        asks = self._asks(step)
        if any(all(node.get(name, 0) >= amount for name, amount in asks.items()) for node in self._nodes):
            self._lacking.pop(step.key, None)
            return ""
        since = self._lacking.setdefault(step.key, time.monotonic())
        return "" if time.monotonic() - since < LACKING_FOR else f"no node of the cluster has {_said(asks)}; {self._has()}"

    def _has(self) -> str:
        return "it has " + ("; ".join(sorted(_said(node) for node in self._nodes)) or "no node")

    def take(self, step: Step) -> bool:
        if step.key in self._lacking or len(self._running) >= OUTSTANDING * self.cores:
            return False
        asks = self._asks(step)
        options: dict[str, Any] = {"num_cpus": asks.pop("CPU"), "memory": int(asks.pop("memory")), "max_retries": 0}
        if step.gpu is not None:
            options["num_gpus"] = asks.pop("GPU")
        options |= {"resources": asks} if asks else {}
        self._running[self._task.options(name=step.name, **options).remote(step.as_json(), str(self.store.root), self.program)] = step
        return True

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._running:
            time.sleep(seconds)
            return []
        ended, _ = self.ray.wait(list(self._running), num_returns=1, timeout=max(seconds, 0.0))
        if ended:  # and all others that have ended meanwhile
            ended, _ = self.ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [self._outcome(ref) for ref in ended] + self._stranded()

    def _outcome(self, ref: Any) -> Outcome:
        step = self._running.pop(ref)
        try:
            return Outcome(**json.loads(self.ray.get(ref)))
        except self.ray.exceptions.OutOfMemoryError as error:
            return _failed(step, "E204", "Ray ended the step for want of memory", error, "it is tried again with more")
        except self.ray.exceptions.RayError as error:  # a worker or a node that is gone
            return _failed(step, LOST, f"{step.kind} was lost with its worker or node", error, "it is tried again")

    def _stranded(self) -> list[Outcome]:
        """Tasks that wait for what no node has any more: the node that had it is gone."""
        self._look()
        found = []
        for ref, step in list(self._running.items()):
            if self.lacks(step):
                self.ray.cancel(ref, force=True)
                del self._running[ref]
                found.append(_failed(step, LOST, "the node that the step was for is gone", None, "it is tried again"))
        return found

    def cancel(self) -> None:
        for ref in self._running:
            self.ray.cancel(ref, force=True)
        if self._running:
            self.ray.wait(list(self._running), num_returns=len(self._running), timeout=CLEAN_WITHIN)
        ended = time.monotonic() + CLEAN_WITHIN
        for step in self._running.values():
            while not self._is_clean(step) and time.monotonic() < ended:
                time.sleep(0.05)
        self._running.clear()

    def _is_clean(self, step: Step) -> bool:
        """Nobody makes the step any more, and nothing of it is left: its lock, which its command has too, could be taken."""
        with self.store.lock(step.key) as lock:
            return lock is not None

    def close(self) -> None:
        self.cancel()
        if self._is_mine:
            self.ray.shutdown()


def _said(resources: dict[str, float]) -> str:
    """Resources as people read them, without those that Ray makes of nodes."""
    shown_ones = []
    for name, amount in sorted(resources.items()):
        if name.startswith(("node:", "object_store")):
            continue
        value = human_bytes(amount) if name == "memory" else "" if name.startswith(ACCELERATOR) else f"{amount:g}"
        shown_ones.append(f"{name} {value}".strip())
    return ", ".join(shown_ones)


def _failed(step: Step, code: str, what: str, error: BaseException | None, fix: str) -> Outcome:
    why = shown(str(error or "no node has its resources").splitlines()[0], 400)
    return Outcome(step.key, "failed", {"code": code, "what": what, "where": step.name, "why": why, "fix": fix})
