"""The model card of a sample: what it is, what it can do and how that was measured, all from files of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_thoughtx import __version__, report
from trtllm_thoughtx.distill.ablation import KEPT
from trtllm_thoughtx.evaluate.summary import Numbers, Summary

ABOUT = {
    "thoughtx-tiny": "It thinks as long as a question needs: it was trained on traces with none to three redundant checks, then to "
    "prefer sound steps, then on its own scored paths.",
    "longcot-tiny": "The fixed-chain baseline: it was trained on whole long traces alone, in which 40 to 50 % of the steps are redundant, "
    "as in traces of R1-like models.",
}
TASKS = {
    "chain": "add 1 to 12 two-digit numbers modulo 100, one step each",
    "lookup": "follow 1 to 4 hops through facts among distractors and sentences that say nothing",
    "story": "word problems told in templates that training has not seen, with clauses that do not matter",
    "loan": "decide on a loan by cited rules, and name the rule that failed",
}
HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
"""


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def card(
    name: str,
    found: Summary,
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    sha256: str,
    seconds: Mapping[str, float],
    seed: int,
    ablation: Mapping[str, Any] | None,
    note: str = "",
) -> str:
    """Markdown. `found` is a summary of held-out questions, `logs` the log of each stage, `ablation` the comparison of the stages."""
    tasks = found.tasks
    accuracies = [
        [task, TASKS[task], row.num_items, _percent(row), f"{row.steps:.2f}", f"{row.redundant_steps:.2f}", f"{row.tokens:.1f}"]
        for task, row in tasks.items()
    ]
    sizes = [[task, "size", " ".join(f"{one.value}: {100 * one.accuracy:.1f}" for one in row.by_size)] for task, row in tasks.items()]
    sizes += [
        [task, "words of context", " ".join(f"{one.value or 'short'}: {100 * one.accuracy:.1f}" for one in row.by_length)]
        for task, row in tasks.items()
        if row.by_length
    ]
    cut = found.cut
    assert cut is not None, "a sample is asked thoughts that are cut short"
    stages = [
        [stage, rows[-1]["step"], f"{_first(rows)['loss']:.4f}", f"{_last(rows)['loss']:.4f}", f"{rows[-1]['seconds'] / 60:.1f}"]
        for stage, rows in logs.items()
        if rows
    ]
    parts = [
        f"{HEAD}# {name}",
        f"A small reasoning model that is made, not downloaded: stock `Qwen2ForCausalLM`, eight layers, trained by trtllm-thoughtx "
        f"{__version__} on generated tasks so that its engines can be judged by what they answer. {ABOUT[name]}",
        f"It was made by the steps of `make sample`. {note + ' ' if note else ''}Weights that are made again need not be the same bit for "
        "bit. It knows the tasks below and nothing else.",
        "## Held-out questions, greedy, exact match",
        markdown_table(("task", "what", "questions", "right (95 % interval)", "steps", "redundant", "tokens"), accuracies),
        "In % by size and by length of context:",
        markdown_table(("task", "by", "right"), sizes),
        "![accuracy by size](accuracy.png)",
        f"Thoughts cut short: of {cut.num_insufficient} that did not suffice it answered `?` to "
        f"{report.percent(cut.said_insufficient) or 'none'}, of {cut.num_items - cut.num_insufficient} that did it answered "
        f"{report.percent(cut.answered_when_sufficient) or 'none'} rightly. "
        f"Expected calibration error of the answers' probabilities, all questions: {found.calibration_error:.4f}.",
        "## Training",
        f"Seed {seed}. A teacher of twelve layers; a base from eight of them, its logits learned along with the traces, then "
        "practised without them; this sample from there. "
        + "; ".join(f"{names} {value / 60:.0f} minutes" for names, value in seconds.items())
        + " on two CPU cores. Every point of the curves is in `training-log.jsonl`.",
        markdown_table(("stage", "steps", "first loss", "last loss", "minutes"), stages),
        "![losses](curves.png)",
    ]
    if ablation is not None:
        parts += [
            "What each stage bought, on validation questions:",
            markdown_table(("after", "right", "tokens", "steps", "redundant"), _compared(ablation)),
        ]
    parts += [
        "## Use",
        "Its words are whole tokens. In transformers 5 `AutoTokenizer` replaces the splitting of any Qwen2 tokenizer.json by Qwen2's own, "
        "which is wrong here: load it with `PreTrainedTokenizerFast.from_pretrained(path)`, or use the package.",
        f"sha256 of `model.safetensors`: `{sha256}`",
    ]
    return "\n\n".join(parts) + "\n"


def _first(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(row for row in rows if "loss" in row)


def _last(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(row for row in reversed(rows) if "loss" in row)


def _percent(row: Numbers) -> str:
    low, high = row.accuracy_interval
    return f"{100 * row.accuracy:.1f} % ({100 * low:.1f} .. {100 * high:.1f})"


def _compared(ablation: Mapping[str, Any]) -> list[list[Any]]:
    lines = []
    for row in ablation["rows"]:
        own = Numbers(**{key: row[key] for key in KEPT})
        lines.append([row["stage"], _percent(own), *(f"{value:.2f}" for value in (own.tokens, own.steps, own.redundant_steps))])
    return lines
