"""What became of each engine: its size, quality, speed and proof, read from the results of its steps, and whether what must hold holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtllm_thoughtx import report
from trtllm_thoughtx.errors import counted
from trtllm_thoughtx.files import human_bytes
from trtllm_thoughtx.release.document import Limits
from trtllm_thoughtx.release.plan import EVIDENCE, Engine
from trtllm_thoughtx.release.schedule import DONE, State
from trtllm_thoughtx.release.store import Store


@dataclass
class Row:
    """One engine of release.json. Measures are None where they were not taken; `why` says so of each."""

    name: str
    at: dict[str, str]
    status: str = "failed"  # passed | failed | skipped
    reasons: list[str] = field(default_factory=list)  # why it did not pass
    skipped: list[str] = field(default_factory=list)  # what was not judged, and why
    num_bytes: int | None = None
    kl: float | None = None
    kl_from: str | None = None  # the step that measured it
    accuracy: float | None = None  # share of right answers
    points_lost: float | None = None  # against the first format
    tokens_per_second: float | None = None
    parity: dict[str, int] | None = None  # checks by status
    signed_by: str | None = None
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: list[report.Check] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}


class Judge:
    """Reads results as steps end; `states` is the scheduler's."""

    def __init__(self, engines: Sequence[Engine], limits: Limits, store: Store, states: Mapping[str, State]) -> None:
        self.engines = {engine.name: engine for engine in engines}
        self.limits, self.store, self.states = limits, store, states

    def passed(self, name: str) -> str:
        """Why the engine did not pass; "" when it did. Its evidence has ended."""
        row = self.row(self.engines[name])
        return "" if row.status == "passed" else "; ".join(row.reasons or row.skipped)

    def row(self, engine: Engine) -> Row:
        row = Row(engine.name, engine.at)
        results = {}
        for kind, step in engine.steps.items():
            state = self.states[step.key]
            row.steps[kind] = {"key": step.key, "status": state.status, "reason": state.reason, "code": state.code}
            if state.status in DONE:
                results[kind] = self.store.result(step.key)
        self._measure(row, results)
        for kind in engine.steps:
            if kind not in (*EVIDENCE, "sign", "export") and kind not in results:
                state = self.states[engine.steps[kind].key]
                (row.reasons if state.status == "failed" else row.skipped).append(f"{kind}: {state.reason or state.status}")
        if "build" in results:
            self._prove(row, engine, results)
        is_judged = "build" in results and ("validate" in results or "validate" not in engine.steps)
        row.status = "failed" if row.reasons else "passed" if is_judged else "skipped"
        for kind in ("sign", "export"):
            if kind in engine.steps and self.states[engine.steps[kind].key].status == "failed":
                row.reasons.append(f"{kind}: {self.states[engine.steps[kind].key].reason}")
                row.status = "failed"
        row.checks.insert(0, report.Check(engine.name, row.status, "; ".join(row.reasons or row.skipped)))
        return row

    def _measure(self, row: Row, results: Mapping[str, Mapping[str, Any]]) -> None:
        if "build" in results:
            row.num_bytes = results["build"]["bytes"]
        if "validate" in results:
            found = results["validate"]["result"]
            row.parity = found["count"]
            losses = [check["evidence"]["kl"] for check in found["checks"] if check["name"].endswith("answers within the limits")]
            if losses:
                row.kl, row.kl_from = max(losses), "validate"
            elif "calibrate" not in results and not found["count"]["skipped"] and not found["count"]["failed"]:
                row.kl, row.kl_from = 0.0, "parity"  # within the rounding of its type
        if row.kl is None and "calibrate" in results:  # a plan that does not run here computes what the graph says
            ways = results["calibrate"]["result"].get("backends") or {}
            if "exact" in ways:
                row.kl, row.kl_from = ways["exact"]["end_to_end"]["kl"], "calibrate"
        if "evaluate" in results:
            found = results["evaluate"]["result"]
            row.accuracy = found["summary"]["overall"]["accuracy"]
            if found.get("comparison"):
                row.points_lost = _points_lost(found["comparison"])
        if "bench" in results:
            rows = results["bench"]["result"]["rows"]
            row.tokens_per_second = next((one["median"] for one in rows if one["phase"] == "decode"), None)
        if "sign" in results:
            row.signed_by = results["sign"]["result"]["key"]

    def _prove(self, row: Row, engine: Engine, results: Mapping[str, Mapping[str, Any]]) -> None:
        """The checks of a built engine, against what must hold."""
        for kind in EVIDENCE:
            if kind not in engine.steps:
                if kind in engine.missing and engine.missing[kind] != "not asked for":
                    row.skipped.append(f"{kind}: {engine.missing[kind]}")
            elif kind not in results:
                state = self.states[engine.steps[kind].key]
                (row.reasons if state.status == "failed" else row.skipped).append(f"{kind}: {state.reason or state.status}")
        if "validate" in results:
            found = results["validate"]["result"]
            row.reasons += [f"{check['name']}: {check['reason']}" for check in found["checks"] if check["status"] == "failed"]
            row.skipped += [f"{check['name']}: {check['reason']}" for check in found["checks"] if check["status"] == "skipped"]
            row.checks += [report.Check(f"{row.name}: {c['name']}", c["status"], c["reason"], c["evidence"]) for c in found["checks"]]
        if "evaluate" in results and (errors := results["evaluate"]["result"]["num_errors"]):
            row.reasons.append(f"evaluate: {counted(errors, 'question')} could not be asked")
        limits = self.limits
        self._limit(row, "max_kl", row.kl, limits.max_kl, most=True)
        if row.at["formats"] != next(iter(self.engines.values())).at["formats"]:
            self._limit(row, "max_points_lost", row.points_lost, limits.max_points_lost, most=True)
        self._limit(row, "max_bytes", row.num_bytes, limits.max_bytes, most=True)
        self._limit(row, "min_tokens_per_second", row.tokens_per_second, limits.min_tokens_per_second, most=False)
        if limits.strict:
            row.reasons += row.skipped

    @staticmethod
    def _limit(row: Row, name: str, value: float | None, limit: float | None, *, most: bool) -> None:
        if limit is None:
            return
        if value is None:
            row.skipped.append(f"{name}: it was not measured")
            return
        said = human_bytes(value) if name == "max_bytes" else f"{value:.4g}"
        asked = human_bytes(limit) if name == "max_bytes" else f"{limit:.4g}"
        if value > limit if most else value < limit:
            row.reasons.append(f"{name}: {said}, {'at most' if most else 'at least'} {asked} must hold")


def _points_lost(comparison: Mapping[str, Any]) -> float | None:
    """Of right answers, in points, of all tasks together."""
    found = [row["second"] - row["first"] for row in comparison["rows"] if row["measure"] == "accuracy"]
    return float(found[-1]) if found else None
