"""The claims that are made for this kind of model, each with what it means exactly, what was measured, and the verdict: docs/claims.md.

    python bench/claims.py            write the table of docs/claims.md from bench/results/*.json
    python bench/claims.py --check    status 1 when the file is another
    python bench/claims.py --take FILE [NAME]    keep a command's result, less its rows by layer and points of curves

A number in the table is read from a result file, as the command in the same row wrote it, and a verdict follows from the number: measure
again, and the table says what was found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "claims.md", ROOT / "bench" / "results"
BEGIN, END = "<!-- claims: made by bench/claims.py -->", "<!-- end of claims -->"
CAPTURE, LESS_MEMORY, LESS_COMPUTE = 0.97, 0.23, 0.31
ACCURACY, F1 = 12.3, 8.7
CLAIMED_GIB, USUAL_GIB = 14.2, 18.7
HOPS = 3.2


@dataclass(frozen=True)
class Claim:
    """`said`; what it means here; the command; and what is found in a result file, with the verdict. Without a file: `found` of nothing."""

    said: str
    meaning: str
    command: str
    result: str | None
    found: Callable[[Any], tuple[str, str]]


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def interval(low: float, high: float) -> str:
    return f"({low:+.1f} .. {high:+.1f})"


def window(chunks: dict[str, Any]) -> tuple[str, str]:
    rows = chunks["windows"]
    enough = next(row for row in rows if row["everywhere"]["with_sinks"]["mean"] >= CAPTURE)
    chosen = rows[chunks["chosen"]]
    saved = 1 - chosen["share"]
    least = f"{percent(1 - enough['share'])} less KV at a capture of {enough['everywhere']['with_sinks']['mean']:.3f}"
    kept = f"{percent(saved)} less at {chosen['everywhere']['with_sinks']['mean']:.3f}, within the allowed loss of answers"
    return f"{least}; {kept}", "bettered" if saved > LESS_MEMORY else "not reached"


def chosen_chunks(chunks: dict[str, Any]) -> tuple[str, str]:
    adaptive = chunks["adaptive"]
    rows = {row["system"]: row for row in adaptive["systems"]}
    mine, parts = rows["chosen"], []
    for name in ("fixed", "random"):
        low, high = (100 * end for end in rows[name]["interval"])
        parts.append(f"{100 * rows[name]['chosen_minus_this']:+.1f} points {interval(low, high)} against {name}, p {rows[name]['p']:.2g}")
    text = f"{percent(mine['accuracy'])} right in {mine['mean_slots']:.0f} slots, {rows['largest']['mean_slots']:.0f} for the largest; "
    text += "; ".join(parts)
    return text, "confirmed on the sample" if adaptive["beats_fixed_and_random"] else "not shown"


def exits(found: dict[str, Any]) -> tuple[str, str]:
    row = next(one for one in found["level_1"]["rows"] if one["name"] == "exit head")
    generation, whole, points = row["saved_generation"], row["saved_with_prompt"], row["points_against_whole"]
    text = f"{percent(generation)} of generation, {percent(whole)} with prompt tokens counted; "
    text += f"{points:+.1f} points {interval(*row['points_interval'])}"
    if whole >= LESS_COMPUTE:
        return text, "bettered"
    return text, "bettered for generation, not reached with prompts" if generation >= LESS_COMPUTE else "not reached"


def accuracy(found: dict[str, Any]) -> tuple[str, str]:
    rows = {row["measure"]: row for row in found["comparison"]["rows"] if row["task"] == "all"}
    gains = {name: rows[name]["first"] - rows[name]["second"] for name in ("accuracy", "F1")}
    said = [f"{name} {gain:+.1f} points {interval(*(-end for end in reversed(rows[name]['interval'])))}" for name, gain in gains.items()]
    text = f"{'; '.join(said)}; {rows['tokens']['first']:.1f} tokens against {rows['tokens']['second']:.1f}"
    return text, "confirmed" if gains["accuracy"] >= ACCURACY and gains["F1"] >= F1 else "refuted on the samples"


def hops(found: dict[str, Any]) -> tuple[str, str]:
    steps = next(row for row in found["comparison"]["rows"] if row["measure"] == "steps")["first"]
    return f"{steps:.1f} steps a thought", "a property of the questions asked, not of the model"


def memory(found: dict[str, Any]) -> tuple[str, str]:
    full, chunked = (found["engines"][name]["batch_1"]["total_gib"] for name in ("full", "chunked"))
    largest = found["engines"]["full"]["batch_32"]["total_gib"]
    text = f"{full:.2f} GiB full, {chunked:.2f} chunked; {largest:.2f} full at batch 32"
    return text, "refuted" if full < USUAL_GIB - 1 and largest < USUAL_GIB else "possible"


def settings(found: dict[str, Any]) -> tuple[str, str]:
    rows = {row["name"].split(" (")[0]: row for row in found["presets"]}
    preset, own, head = (rows[name] for name in ("batch preset", "the checkpoint's own defaults", "exit head, greedy"))
    text = f"{percent(preset['accuracy'])} right, {preset['tokens']:.0f} tokens; "
    text += f"own settings {percent(own['accuracy'])}, {own['tokens']:.0f}; exit head {percent(head['accuracy'])}, {head['tokens']:.0f}"
    is_best = preset["accuracy"] >= max(row["accuracy"] for row in rows.values())
    return text, "confirmed" if is_best else "refuted on the sample"


def nothing(found: str, verdict: str) -> Callable[[Any], tuple[str, str]]:
    return lambda _: (found, verdict)


CLAIMS = (
    Claim(
        "23 % less memory, 97 % of the information kept",
        "KV cache of the smallest window whose queries keep 0.97 of their attention mass on average, against 2,048 tokens; "
        "`thoughtx-tiny`, whole traces",
        "`thoughtx-calibrate --model_dir trtllm_thoughtx/samples/thoughtx-tiny --output_dir OUT --chunk_report --eval_items 120 "
        "--calib_size 32`: OUT/chunks.json",
        "chunks.json",
        window,
    ),
    Claim(
        "Chunks sized by the input's entropy",
        "right answers with a chunk for each prompt, against one size that needs no less on average, and the same sizes dealt out at "
        "random; `thoughtx-tiny`",
        "the same",
        "chunks.json",
        chosen_chunks,
    ),
    Claim(
        "31 % less compute by early exit",
        "layer-tokens at equal answers, exit head and its misses included; `longcot-tiny`, held-out questions, greedy",
        "`python bench/early_exit.py --sample longcot-tiny --num_items 60 --num_calib 100 --rounds 1 --num_threads 1`: early-exit.json",
        "early-exit.json",
        exits,
    ),
    Claim(
        "+12.3 % accuracy, +8.7 % F1",
        "distilled on short paths (`thoughtx-tiny`) against the same base on whole long traces (`longcot-tiny`), the same 480 questions, "
        "paired",
        "`thoughtx-eval --engine_dir THOUGHTX --compare LONGCOT --task chain,lookup,story,loan --num_items 120 --json`",
        "compare.json",
        accuracy,
    ),
    Claim(
        "3.2 hops on average",
        "reasoning steps of `thoughtx-tiny` on the same questions",
        "the same",
        "compare.json",
        hops,
    ),
    Claim(
        "14.2 GB against 18.7 GB at 2,048 tokens",
        "weights and KV cache of Qwen2.5-7B's shape in bfloat16 at batch 1, in GiB, computed from the shapes; the weights alone are "
        "14.2 GiB",
        "`python bench/chunked.py --shape qwen2.5-7b --length 2048 --chunk_size 1024 --left_chunks 0 --batches 1,32 --json`",
        "memory-7b.json",
        memory,
    ),
    Claim(
        "Depth 6 and temperature 0.3 are the best settings",
        "right answers of `longcot-tiny` with the batch preset, its own settings, and the exit head",
        "as for early exit",
        "early-exit.json",
        settings,
    ),
    Claim(
        "38 ms a token against 45 ms",
        "time between tokens of a 7B on an A100",
        "`thoughtx-bench --engine_dir ENGINE` on such a machine",
        None,
        nothing("no GPU here; a CPU's ratios are in BENCHMARKS.md (chunked beside full attention)", "not measured"),
    ),
    Claim(
        "Distillation is 2.4 times as efficient",
        "no unit is given: neither tokens, nor steps, nor time to an accuracy",
        "`thoughtx-distill ablation` compares the stages",
        None,
        nothing("of the stages after the first, none bought accuracy on the sample (BENCHMARKS.md)", "not testable as stated"),
    ),
    Claim(
        "Mixtures of experts work as well",
        "parity of Qwen2-MoE and Qwen3-MoE with transformers, on random weights",
        "`pytest tests/families/test_experts.py`",
        None,
        nothing("passes in three types, full and chunked", "confirmed for the numbers; no trained one was had"),
    ),
)


def table() -> str:
    lines = ["| said | here it means | measured | verdict | by |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        found = None if claim.result is None else json.loads((RESULTS / claim.result).read_text())
        measured, verdict = claim.found(found)
        lines.append(f"| {claim.said} | {claim.meaning} | {measured} | **{verdict}** | {claim.command} |")
    return "\n".join(lines)


def page() -> str:
    """docs/claims.md with the table made anew."""
    head, rest = PAGE.read_text().split(BEGIN)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


def without_details(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_details(one) for key, one in value.items() if key not in ("layers", "curve", "curves", "by_distance")}
    return [without_details(one) for one in value] if isinstance(value, list) else value


def take(path: Path, name: str) -> None:
    (RESULTS / name).write_text(json.dumps(without_details(json.loads(path.read_text())), sort_keys=True) + "\n")


def main() -> None:
    if "--take" in sys.argv[1:]:
        path = Path(sys.argv[2])
        take(path, sys.argv[3] if len(sys.argv) > 3 else path.name)
        return
    made = page()
    if "--check" in sys.argv[1:]:
        sys.exit(int(made != PAGE.read_text()))
    PAGE.write_text(made)


if __name__ == "__main__":
    main()
