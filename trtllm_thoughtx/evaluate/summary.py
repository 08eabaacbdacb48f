"""The numbers of a result, and of two side by side: what tables, JSON and pictures are made from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_thoughtx import report
from trtllm_thoughtx.errors import ThoughtxError, counted, listed, shown
from trtllm_thoughtx.evaluate.matching import EXACT
from trtllm_thoughtx.evaluate.record import CUT, Record, Result
from trtllm_thoughtx.evaluate.statistics import calibration_error, mcnemar, mean_interval, wilson
from trtllm_thoughtx.files import human_bytes

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

# What is compared: its name, its unit, its value of one record.
MEASURES: dict[str, tuple[str, Callable[[Record], float]]] = {
    "accuracy": ("%", lambda record: 100.0 * record.correct),
    "F1": ("%", lambda record: 100.0 * record.f1),
    "steps": ("", lambda record: float(record.num_steps)),
    "redundant steps": ("", lambda record: float(record.num_redundant)),
    "tokens": ("", lambda record: float(record.num_tokens)),
    "layer-tokens": ("", lambda record: float(record.num_layer_tokens)),
    "time per token": ("ms", lambda record: 1000.0 * record.seconds / max(record.num_tokens, 1)),
    "time to answer": ("ms", lambda record: 1000.0 * record.seconds),
}
PER_TASK = ("accuracy", "F1")


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Of free answers; means are per question. Without answers there is only `num_items`, 0."""

    num_items: int
    num_correct: int = 0
    accuracy: float = math.nan
    accuracy_interval: tuple[float, float] = (math.nan, math.nan)
    f1: float = math.nan
    tokens: float = math.nan
    prompt_tokens: float = math.nan
    steps: float = math.nan
    redundant_steps: float = math.nan
    coherence: float | None = None
    num_truncated: int = 0
    layer_tokens: float = math.nan
    thinking_stops: dict[str, int] = field(default_factory=dict)
    seconds: float = math.nan
    seconds_p95: float = math.nan
    ms_per_token: float = math.nan

    @classmethod
    def of(cls, records: Sequence[Record], **more: Any) -> Self:
        if not records:
            return cls(num_items=0, **more)
        num_right, seconds = sum(record.correct for record in records), [record.seconds for record in records]
        coherent = [record.coherence for record in records if record.coherence is not None]
        return cls(
            num_items=len(records),
            num_correct=num_right,
            accuracy=num_right / len(records),
            accuracy_interval=wilson(num_right, len(records)),
            f1=_mean([record.f1 for record in records]),
            tokens=_mean([record.num_tokens for record in records]),
            prompt_tokens=_mean([record.num_prompt_tokens for record in records]),
            steps=_mean([record.num_steps for record in records]),
            redundant_steps=_mean([record.num_redundant for record in records]),
            coherence=_mean(coherent) if coherent else None,
            num_truncated=sum(record.truncated for record in records),
            layer_tokens=_mean([record.num_layer_tokens for record in records]),
            thinking_stops=dict(Counter(str(record.thinking_stop) for record in records)),
            seconds=_mean(seconds),
            seconds_p95=float(np.percentile(seconds, 95)),
            ms_per_token=1000 * sum(seconds) / max(1, sum(record.num_tokens for record in records)),
            **more,
        )

    def document(self) -> dict[str, Any]:
        names = [one.name for one in fields(self)]
        if not self.num_items:
            names = ["num_items", *(name for name in names if name not in Numbers.__annotations__)]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Group(Numbers):
    """Of the questions of one size, or one length of context."""

    value: int

    @classmethod
    def by(cls, records: Sequence[Record], key: Callable[[Record], int]) -> list[Group]:
        return [cls.of([r for r in records if key(r) == value], value=value) for value in sorted({key(r) for r in records})]


@dataclass(frozen=True, kw_only=True)
class CutNumbers:
    """Of thoughts that were cut: how often `?` is said where it is due, and where it is not."""

    num_items: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    num_insufficient: int
    said_insufficient: float | None
    answered_when_sufficient: float | None

    @classmethod
    def of(cls, records: Sequence[Record]) -> CutNumbers | None:
        """None where no thought was cut."""
        if not records:
            return None
        due = [record.correct for record in records if record.expected == "?"]
        other = [record.correct for record in records if record.expected != "?"]
        return cls(
            num_items=len(records),
            accuracy=sum(due + other) / len(records),
            accuracy_interval=wilson(sum(due + other), len(records)),
            num_insufficient=len(due),
            said_insufficient=sum(due) / len(due) if due else None,
            answered_when_sufficient=sum(other) / len(other) if other else None,
        )


@dataclass(frozen=True, kw_only=True)
class TaskNumbers(Numbers):
    """`by_length` where the questions have several lengths of context, `cut` where thoughts were cut."""

    by_size: list[Group]
    by_length: list[Group] | None = None
    cut: CutNumbers | None = None

    def document(self) -> dict[str, Any]:
        return {name: value for name, value in super().document().items() if value is not None or name not in ("by_length", "cut")}


@dataclass(frozen=True)
class Summary:
    """All of a result: each task, its sizes and context lengths, free and cut thoughts, calibration."""

    system: dict[str, Any]
    conditions: dict[str, Any]
    overall: Numbers
    cut: CutNumbers | None
    calibration_error: float | None
    tasks: dict[str, TaskNumbers]


def summarize(result: Result) -> Summary:
    tasks = {}
    for task in result.tasks:
        free = result.of(task)
        has_lengths = len({record.traits.get("asked_words", 0) for record in free}) > 1
        tasks[task] = TaskNumbers.of(
            free,
            by_size=Group.by(free, lambda record: record.size),
            by_length=Group.by(free, lambda record: record.traits["asked_words"]) if has_lengths else None,
            cut=CutNumbers.of(result.of(task, CUT)),
        )
    answered = [record for record in result.records if record.confidence is not None]
    error = calibration_error([record.confidence or 0.0 for record in answered], [r.correct for r in answered])
    return Summary(result.system, result.conditions, Numbers.of(result.of()), CutNumbers.of(result.of(mode=CUT)), error, tasks)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else math.nan


def check_same_questions(asked: Sequence[tuple[str, str, str]], second: Result, failed: frozenset[str] = frozenset()) -> None:
    """E160 unless `second` was asked the questions of these ids and answers; those that `failed` in one of the two are left out."""
    failed |= second.failed
    ids = [one for one in asked if one[0] not in failed]
    others = [(record.id, record.expected, record.match) for record in second.records if record.id not in failed]
    if set(ids) != set(others) or len(ids) != len(others):
        apart = sorted(shown(name, 60) for name, *_ in set(ids) ^ set(others))
        why = f"in one of the two alone: {counted(len(apart), 'question')}, {listed(apart, 3)}"
        fix = "ask both with the same --dataset and --match, or --task, --sizes, --num_items, --lengths, --cut_share, --split and --seed"
        raise ThoughtxError("E160", "the two were not asked the same", where=str(second.system.get("path")), why=why, fix=fix)


@dataclass(frozen=True)
class Difference:
    """Means of a measure over the same questions, and of second - first with its 95 % interval."""

    measure: str
    unit: str
    task: str
    num_items: int
    first: float
    second: float
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same questions; `p_accuracy` is the exact test of equal accuracy, `num_errors` questions are not compared."""

    systems: list[dict[str, Any]]
    layer_tokens_saved: float | None
    num_items: int
    num_errors: int
    rows: list[Difference]
    only_first_right: int
    only_second_right: int
    p_accuracy: float
    memory: list[dict[str, Any] | None]


def compare(first: Result, second: Result) -> Comparison:
    """E160 unless both were asked the same. What ended in an error in one of the two is not compared."""
    check_same_questions([(record.id, record.expected, record.match) for record in first.records], second, first.failed)
    held = {record.id: record for record in second.records}
    failed = first.failed | second.failed
    pairs = [(record, held[record.id]) for record in first.of() if record.id not in failed]
    rows = [difference(name, task, [pair for pair in pairs if pair[0].task == task]) for task in first.tasks for name in PER_TASK]
    if len(first.tasks) > 1:
        rows += [difference(name, "all", pairs) for name in PER_TASK]
    rows += [difference(name, "all", pairs) for name in MEASURES if name not in PER_TASK]
    only = [sum(one.correct and not other.correct for one, other in pairs), sum(other.correct and not one.correct for one, other in pairs)]
    work = next(row for row in rows if row.measure == "layer-tokens")
    return Comparison(
        systems=[first.system, second.system],
        layer_tokens_saved=1 - work.second / work.first if work.first and work.second else None,
        num_items=len(pairs),
        num_errors=len(failed),
        rows=rows,
        only_first_right=only[0],
        only_second_right=only[1],
        p_accuracy=mcnemar(*only),
        memory=[first.conditions.get("memory"), second.conditions.get("memory")],
    )


def difference(name: str, task: str, pairs: Sequence[tuple[Record, Record]]) -> Difference:
    unit, value = MEASURES[name]
    one, other = [value(a) for a, _ in pairs], [value(b) for _, b in pairs]
    apart = [b - a for a, b in zip(one, other, strict=True)]
    return Difference(name, unit, task, len(pairs), _mean(one), _mean(other), _mean(apart), mean_interval(apart))


# --- for people ----------------------------------------------------------------------------------------------------------


def result_tables(found: Summary) -> list[Any]:
    """A summary as tables: tasks, then sizes, then cut thoughts."""
    named = [*found.tasks.items(), *([("all", found.overall)] if len(found.tasks) > 1 else [])]
    lines = [_task_line(name, n) for name, n in named if n.num_items]
    system = found.system
    tables: list[Any] = [report.table(f"{system['name']} ({system['backend']}, {system['dtype']})", TASK_COLUMNS, lines)]
    sizes = [
        [task, kind, row.value, row.num_items, report.percent(row.accuracy), f"{_between(row.accuracy_interval, 100)} %"]
        for task, n in found.tasks.items()
        for kind, rows in (("size", n.by_size), ("words of context", n.by_length or []))
        if len(rows) > 1
        for row in rows
    ]
    if sizes:
        tables.append(report.table("by size and length", ("task", "of", "value", "items", "accuracy", "95 % interval"), sizes))
    cuts = [
        [task, n.cut.num_items, report.percent(n.cut.said_insufficient), report.percent(n.cut.answered_when_sufficient)]
        for task, n in found.tasks.items()
        if n.cut
    ]
    if cuts:
        tables.append(report.table("thoughts cut short", ("task", "items", "said ? when due", "answered when it sufficed"), cuts))
    if errors := found.conditions.get("errors"):
        first = f"{shown(errors[0]['id'], 60)}: {shown(errors[0].get('error', {}).get('what'), 200)}"
        tables.append(f"not counted, since they ended in an error: {counted(len(errors), 'question')}; the first is {first}")
    matches = found.conditions.get("match", {})
    if set(matches) - {EXACT}:
        tables.append(f"answers compared by {', '.join(f'{match}: {num}' for match, num in matches.items())} (--match)")
    stops = found.overall.thinking_stops
    if set(stops) - {"None", "end", "cut"}:
        tables.append(f"the thinking ended by {', '.join(f'{why}: {num}' for why, num in sorted(stops.items()))}")
    if found.calibration_error is not None and math.isfinite(found.calibration_error):
        tables.append(f"calibration error of the answers' probabilities: {found.calibration_error:.4f}")
    return tables


TASK_COLUMNS = ("task", "items", "accuracy", "95 % interval", "F1", "tokens", "steps", "redundant", "cut off", "time to answer", "p95")


def _task_line(name: str, n: Numbers) -> list[Any]:
    accuracies = [report.percent(n.accuracy), f"{_between(n.accuracy_interval, 100)} %", report.percent(n.f1)]
    times = [f"{1000 * n.seconds:.4g} ms", f"{1000 * n.seconds_p95:.4g} ms"]
    return [name, n.num_items, *accuracies, n.tokens, n.steps, n.redundant_steps, n.num_truncated, *times]


def comparison_tables(found: Comparison) -> list[Any]:
    """Two systems side by side, then what could not be compared."""
    names = [system["name"] for system in found.systems]
    if names[0] == names[1]:
        names = [f"{name} ({system['kind']})" for name, system in zip(names, found.systems, strict=True)]
    lines: list[list[Any]] = []
    for row in found.rows:
        label = f"{row.measure}, {row.unit}" if row.unit else row.measure
        lines.append([label, row.task, row.first, row.second, row.difference, _between(row.interval)])
    measured = [one or {} for one in found.memory]
    if any("peak_bytes" in one for one in measured):
        peaks: list[Any] = [one.get("peak_bytes") for one in measured]
        apart = f"{(peaks[1] - peaks[0]) / (1 << 20):+.1f} MiB" if all(peaks) else None
        length = next(one["length"] for one in measured if one)
        lines.append([f"memory at {length} tokens", "all", *(peak and human_bytes(peak) for peak in peaks), apart, None])
    skipped = [f"{name}: memory not measured, {one['skipped']}" for name, one in zip(names, measured, strict=True) if "skipped" in one]
    saved = found.layer_tokens_saved
    right = f"only {names[0]} right: {found.only_first_right}, only {names[1]} right: {found.only_second_right}"
    return [
        report.table(f"{names[1]} against {names[0]}", ("", "task", *names, "difference", "95 % interval"), lines),
        f"{counted(found.num_items, 'question')}; {right}; exact p of equal accuracy {found.p_accuracy:.3g}",
        *(
            []
            if saved is None
            else [f"{names[1]} needs {100 * saved:.1f} % fewer layer-tokens, prompts, probe answers and drafts included"]
        ),
        *skipped,
    ]


def _between(interval: Sequence[float], scale: float = 1.0) -> str:
    return f"{scale * interval[0]:.4g} .. {scale * interval[1]:.4g}"
