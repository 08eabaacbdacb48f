"""Pictures: accuracy by size and length, and the curves of a training. Only this file imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.files import atomic_file
from trtllm_thoughtx.process.outside import need, own_caches

FORMATS = ("png", "svg", "pdf")
SIZE_NAMES = {"chain": "operands", "lookup": "hops", "story": "operations", "loan": "rules"}


def check_format(path: Path) -> None:
    """E001 unless the name says a format that can be drawn, E201 without what draws it."""
    if path.suffix.removeprefix(".") not in FORMATS:
        why = f"its name must end with .{', .'.join(FORMATS)}"
        raise ThoughtxError("E001", "not a picture's name", where=str(path), why=why, fix="choose such a name")
    need_matplotlib()


def need_matplotlib() -> None:
    """E201 where there is none."""
    need(("matplotlib",), "pictures need matplotlib", where="import matplotlib", fix='pip install "trtllm-thoughtx[plots]"')


def _figure(num_columns: int) -> tuple[Any, Sequence[Any]]:
    need_matplotlib()
    own_caches()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * num_columns, 3.4), layout="constrained")
    return figure, figure.subplots(1, num_columns, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    kind = path.suffix.removeprefix(".")
    plain = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with atomic_file(path) as file:
        figure.savefig(file, format=kind, dpi=110, metadata=plain)


def accuracy_plot(path: Path, summaries: Sequence[Any]) -> None:
    """Accuracy in % with its 95 % interval, a panel for each task and each thing that makes it harder; a line for each of the summaries."""
    panels = [
        (task, key, "words of context" if key == "by_length" else SIZE_NAMES.get(task, "size"))
        for task, found in summaries[0].tasks.items()
        for key in ("by_size", "by_length")
        if len(getattr(found, key) or ()) > 1
    ]
    if not panels:
        panels = [(task, "by_size", "size") for task in summaries[0].tasks]
    figure, axes = _figure(len(panels))
    for axis, (task, key, label) in zip(axes, panels, strict=True):
        for found in summaries:
            rows = getattr(found.tasks.get(task), key, None) or []
            accuracies = [100 * row.accuracy for row in rows]
            low = [max(0.0, accuracy - 100 * row.accuracy_interval[0]) for accuracy, row in zip(accuracies, rows, strict=True)]
            high = [max(0.0, 100 * row.accuracy_interval[1] - accuracy) for accuracy, row in zip(accuracies, rows, strict=True)]
            name = f"{found.system['name']} ({found.system['kind']})"
            axis.errorbar([row.value for row in rows], accuracies, yerr=[low, high], marker="o", markersize=4, capsize=3, label=name)
        axis.set(title=task, xlabel=label, ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right answers, % (95 % interval)")
    axes[0].legend(loc="lower left", fontsize=8)
    _save(figure, path)


def retained_mass_plot(path: Path, found: Mapping[str, Any]) -> None:
    """What windows keep against their cache; by layer and by distance for the chosen one; adaptive chunks beside fixed ones."""
    rows, chosen, tasks, fitted = found["windows"], found["chosen"], found["tasks"], found["adaptive"]
    figure, axes = _figure(2 + (tasks is not None) + (fitted is not None))
    fractions = [100 * row["share"] for row in rows]
    for key, name in (("mean", "mean"), ("p5", "5th percentile")):
        axes[0].scatter(fractions, [row["everywhere"]["with_sinks"][key] for row in rows], s=12, label=name)
    axes[0].axhline(found["target_capture"], color="gray", linewidth=0.8, linestyle="--")
    if chosen is not None:
        axes[0].axvline(fractions[chosen], color="tab:red", linewidth=0.8, label="chosen")
    axes[0].set(title="attention mass kept", xlabel=f"KV cache, % of {found['context']} tokens", ylim=(-0.03, 1.03), xscale="log")
    axes[0].legend(fontsize=8)
    shown = rows[chosen if chosen is not None else -1]
    for population, color in (("everywhere", "tab:blue"), ("where_hidden", "tab:orange")):
        for key, style in (("mean", "-"), ("p5", "--"), ("min", ":")):
            values = [layer[key] for layer in shown[population]["with_sinks"]["layers"]]
            axes[1].plot(range(len(values)), values, style, color=color, label=f"{key}, {population.replace('_', ' ')}")
    axes[1].set(title="by layer, " + ("chosen window" if chosen is not None else "largest window"), xlabel="layer", ylim=(-0.03, 1.03))
    axes[1].legend(fontsize=7)
    at = 2
    if tasks is not None:
        drawn = [("full attention", tasks["full"])]
        drawn += [(f"{rows[int(i)]['slots']} slots", one) for i, one in sorted(tasks["windows"].items(), key=lambda pair: int(pair[0]))]
        for name, one in drawn:
            bins = one["by_distance"]
            axes[at].plot([row["up_to"] for row in bins], [100 * row["accuracy"] for row in bins], marker="o", markersize=3, label=name)
        axes[at].set(title="lookups right, %", xlabel="distance of the farthest fact, words, up to", xscale="log", ylim=(-3, 103))
        axes[at].legend(fontsize=7)
        at += 1
    if fitted is not None:
        slots = [point["mean_slots"] for point in fitted["curve"]]
        for key in ("chosen", "fixed", "random"):
            axes[at].plot(slots, [100 * point[key] for point in fitted["curve"]], label=f"{key}, any base")
        for one in fitted["systems"]:
            axes[at].scatter(one["mean_slots"], 100 * one["accuracy"], label=one["system"])
        axes[at].set(title="adaptive chunks: right answers, %", xlabel="mean slots of the window")
        axes[at].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    _save(figure, path)


def curves_plot(path: Path, stages: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """The loss of each stage over its steps, and the reward or accuracy where the log has them."""
    drawn = {name: rows for name, rows in stages.items() if rows}
    figure, axes = _figure(max(1, len(drawn)))
    for axis, (name, rows) in zip(axes, drawn.items(), strict=False):
        for key, is_right in (("loss", False), ("rewards/accuracies", True), ("reward", True)):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                where = axis.twinx() if is_right else axis
                where.plot(*zip(*points, strict=True), color="tab:orange" if is_right else "tab:blue", label=key)
                where.set_ylabel(key, color="tab:orange" if is_right else "tab:blue")
        if name in ("base", "practice", "supervised") and all(row["loss"] > 0 for row in rows if "loss" in row):
            axis.set_yscale("log")
        axis.set(title=name, xlabel="optimizer steps")
        axis.grid(alpha=0.3)
    _save(figure, path)
