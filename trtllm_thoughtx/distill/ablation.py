"""What each stage bought: every stage's model answers the same held-out questions, and is compared with supervised only.

The table goes to output_dir/ablation.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_thoughtx import report
from trtllm_thoughtx.distill.settings import GENERATED, STAGES, Settings
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate import summary
from trtllm_thoughtx.evaluate.models import ModelSystem
from trtllm_thoughtx.evaluate.questions import from_file, generated
from trtllm_thoughtx.evaluate.record import Result
from trtllm_thoughtx.evaluate.run import evaluate
from trtllm_thoughtx.files import atomic_file
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.tasks import TASKS
from trtllm_thoughtx.text.params import GenerationParams

BATCH_SIZE = 16
MAX_NEW_TOKENS = 400
KEPT = ("num_items", "accuracy", "accuracy_interval", "coherence", "tokens", "steps", "redundant_steps", "num_truncated")
COMPARED = ("accuracy", "tokens", "steps")


def stages_of(settings: Settings) -> dict[str, Path]:
    """The stages whose model is there, in order."""
    found = {stage: settings.stage_dir(stage) / "model" for stage in STAGES}
    return {stage: path for stage, path in found.items() if (path / "config.json").is_file()}


def ablate(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Ask every stage's model greedily; rows of the table. E163 without a finished stage or without questions."""
    stages = stages_of(settings)
    if not stages:
        why = "none of its stages holds a model"
        fix = "run thoughtx-distill with this --output_dir first"
        raise ThoughtxError("E163", "nothing to compare", where=str(settings.output_dir), why=why, fix=fix)
    if settings.eval_data is not None:
        asked = from_file(settings.eval_data, settings.eval_items or None, progress.note)
    elif settings.data == GENERATED:
        asked = generated(tuple(TASKS), "validation", num_items=max(1, settings.eval_items), seed=settings.seed)
    else:
        why = "the traces of --data are learned, so they cannot be the measure"
        fix = 'give --eval_data FILE.jsonl with rows {"prompt": ..., "answer": ...}'
        raise ThoughtxError("E163", "no held-out questions", where="--eval_data", why=why, fix=fix)
    results: dict[str, Result] = {}
    for stage, path in stages.items():
        system = ModelSystem(path, batch_size=BATCH_SIZE)
        system.description["name"] = stage
        results[stage] = evaluate(system, asked, GenerationParams(max_new_tokens=MAX_NEW_TOKENS), progress)
        system.close()
    first = results[next(iter(stages))]
    rows = []
    for stage, result in results.items():
        numbers = summary.Numbers.of(result.of())
        against = None if result is first else _against(first, result)
        rows.append({"stage": stage, **{key: getattr(numbers, key) for key in KEPT}, "against_first": against})
    made = {"first": next(iter(stages)), "num_questions": len(asked), "rows": rows}
    with atomic_file(settings.output_dir / "ablation.json") as file:
        file.write(report.to_json(made).encode())
    return made


def _against(first: Result, result: Result) -> dict[str, Any]:
    found = summary.compare(first, result)
    apart = {row.measure: row for row in found.rows if row.measure in COMPARED and row.task in ("all", first.tasks[0])}
    differences = {name: {"difference": row.difference, "interval": row.interval} for name, row in apart.items()}
    return {"p_accuracy": found.p_accuracy, **differences}


def bought(row: dict[str, Any], first: str) -> str:
    """One stage in words: only differences whose interval leaves zero out are claimed."""
    if row["against_first"] is None:
        return "what the others are compared with"
    told = []
    for name in COMPARED:
        apart = row["against_first"][name]
        low, high = apart["interval"]
        if low > 0 or high < 0:
            unit = " points of accuracy" if name == "accuracy" else f" {name}"
            told.append(f"{apart['difference']:+.2f}{unit} ({low:.2f} .. {high:.2f})")
    return ", ".join(told) if told else f"nothing that these questions show, against {first}"


def ablation_tables(made: dict[str, Any]) -> list[Any]:
    columns = ("after", "items", "accuracy", "95 % interval", "coherence", "tokens", "steps", "redundant", f"against {made['first']}")
    lines = []
    for row in made["rows"]:
        low, high = row["accuracy_interval"]
        accuracies = [f"{100 * row['accuracy']:.1f} %", f"{100 * low:.1f} .. {100 * high:.1f} %", row["coherence"]]
        lines.append(
            [row["stage"], row["num_items"], *accuracies, row["tokens"], row["steps"], row["redundant_steps"], bought(row, made["first"])]
        )
    return [report.table("what each stage bought", columns, lines)]
