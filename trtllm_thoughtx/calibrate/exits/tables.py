"""A calibration of exits for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtllm_thoughtx import report


def exit_tables(found: Mapping[str, Any]) -> list[Any]:
    tables: list[Any] = []
    if "head" in found:
        head = found["head"]
        names = {"chosen_on": "where it was chosen", "reported_on": "on other questions", "oracle": "an oracle there"}
        lines = [[label, *_line(head[key])] for key, label in names.items()]
        title = f"exit head: threshold {head['threshold']:.4g} for a loss of at most {head['max_accuracy_loss']:g} points"
        columns = ("", "items", "accuracy whole", "stopped early", "p of equal", "generated tokens saved", "all tokens saved")
        tables.append(report.table(title, columns, lines))
    if "adapters" in found:
        lines = [
            [
                row["layer"],
                row["rank"],
                report.percent(row["agreement"]),
                row["threshold"],
                report.percent(row["share_above"]),
                report.percent(row["agreement_above"]),
            ]
            for row in found["adapters"]
        ]
        names_of = ("before layer", "rank", "next token as the model's", "threshold", "tokens above", "right of those")
        tables.append(report.table("exit adapters, on other questions", names_of, lines))
    return tables


def _line(one: Mapping[str, Any]) -> list[Any]:
    accuracies = [report.percent(one[key]) for key in ("accuracy_full", "accuracy")]
    return [
        one["num_items"],
        *accuracies,
        f"{one['p_accuracy']:.3g}",
        *(report.percent(one[f"saved_of_{key}_tokens"]) for key in ("generated", "all")),
    ]
