"""What a calibration found, for people: tables for the terminal, and report.html, one file with its pictures inside.

The pictures are drawn here as SVG, so that a report needs no plotting package and repeats byte for byte.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_thoughtx import report
from trtllm_thoughtx.bench import BUSY
from trtllm_thoughtx.errors import shown

NUM_WORST = 8
NOT_QUOTED = "not to be quoted: other work ran on this machine"


def calibration_tables(found: Mapping[str, Any]) -> list[Any]:
    """End-to-end numbers, then the layers that lost most."""
    loss, size = found["end_to_end"], found["size"]
    rows = [
        ["KL divergence, mean (nats)", loss["kl"]],
        ["the same, onnxruntime on a CPU", found["backends"]["onnxruntime"]["end_to_end"]["kl"]],
        ["KL divergence, worst position", loss["worst_kl"]],
        ["same top token", loss["top1_agreement"]],
        ["perplexity before", loss["perplexity_reference"]],
        ["perplexity after", loss["perplexity"]],
        ["mean bits of a weight", size["mean_bits"]],
        ["bytes of the matrices, after / before", size["bytes_after"] / size["bytes_before"]],
    ]
    rows += _engine_rows(found)
    num_held = found["data"]["num_held_out"]
    title = f"{found['qformat']} on {loss['num_positions']} held-out positions" if num_held else f"{found['qformat']} on its own data"
    judged = {name: facts for name, facts in found["modules"].items() if facts["quantized"]}
    worst = sorted(judged.items(), key=lambda item: -item[1]["error_share"])[:NUM_WORST]
    kept = [name for name, facts in found["modules"].items() if facts.get("kept")]
    rows += [["kept as they are", f"{len(kept)}: {', '.join(kept)}"]] if kept else []
    wide = [name for name, facts in found["modules"].items() if facts.get("widened")]
    rows += [["in 8 bits", f"{len(wide)}: {', '.join(wide)}"]] if wide else []
    columns = ["layer", "SQNR dB", "clipped share", "largest input", "alpha"]
    lines = [[name, f["sqnr_db"], f["clipped_share"], f["input_amax"], f["alpha"]] for name, f in worst]
    return [report.table(title, ["measure", "value"], rows), report.table("layers that lost most", columns, lines), *found["skipped"]]


def _engine_rows(found: Mapping[str, Any]) -> list[list[Any]]:
    """What engines of both checkpoints answered, and how fast; nothing when they were not asked."""
    answers, speed = found["answers"], found["speed"]
    if answers is None:
        return []
    whole, rates = answers["accuracy_percent"][-1], speed["tokens_per_second"]
    low, high = whole["interval"]
    return [
        [f"right answers before, % of {whole['num_items']}", whole["first"]],
        ["right answers after, %", whole["second"]],
        ["difference, points (95 %)", f"{whole['difference']:+.2f} ({low:+.2f} .. {high:+.2f})"],
        ["decode, after / before", rates["decode"]["ratio"]],
        ["prefill, after / before", rates["prefill"]["ratio"]],
        ["bytes of the engine, after / before", speed["engine_bytes"][1] / speed["engine_bytes"][0]],
        *([["timings", NOT_QUOTED]] if _is_busy(speed) else []),
    ]


def _is_busy(speed: Mapping[str, Any]) -> bool:
    return bool(speed["conditions"]["load_before"] > BUSY * (speed["conditions"]["num_cpus"] or 1))


STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}tr.kept td{color:#888}.warning{background:#fff3cd;padding:.5rem 1rem}
svg text{font:11px system-ui,sans-serif;fill:#444}h2{margin-top:2rem}"""
WIDTH, HEIGHT, LEFT, BELOW = 960, 190, 52, 34
COLORS = {
    "attention.qkv": "#4269d0",
    "attention.dense": "#efb118",
    "mlp.fc": "#ff725c",
    "mlp.gate": "#6cc5b0",
    "mlp.proj": "#3ca951",
    "lm_head": "#a463f2",
}


def report_html(found: Mapping[str, Any]) -> str:
    """The whole report as one HTML page; every text from the data is escaped."""
    modules = found["modules"]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>Calibration: {_text(found['qformat'])}</title><style>{STYLE}</style>",
        f"<h1>Calibration: {_text(found['qformat'])}</h1>",
        *(f"<p class='warning'>{_text(warning)}</p>" for warning in found["warnings"]),
        "<h2>What it cost</h2>",
        _table(["on held-out positions", ""], [[name, value] for name, value in sorted(found["end_to_end"].items())]),
        "<p>KL is in nats, of the unquantized model's distribution from the quantized one's. An engine of this checkpoint is judged "
        "by <code>thoughtx-validate</code> with these limits:</p>",
        _table(
            ["way to run", "computes", "KL, mean", *found["limits"]],
            [
                [way, one["runs"], one["end_to_end"]["kl"], *(one["limits"][name] for name in found["limits"])]
                for way, one in found["backends"].items()
            ],
        ),
        "<h2>Size</h2>",
        _table(["linear layers", ""], [[name, value] for name, value in found["size"].items()]),
        *_engines(found),
        "<h2>Data</h2>",
        _table(["calibrated on", ""], [[name, value] for name, value in found["data"].items()]),
        "<h2>Layer by layer</h2>",
    ]
    for key, title, is_log in (
        ("sensitivity", "Sensitivity: KL of the model with this layer alone quantized, nats", True),
        ("sqnr_db", "Signal over rounding noise of the outputs, dB, on held-out rows", False),
        ("input_amax", "Largest input on the calibration data", True),
        ("weight_amax", "Largest weight", True),
        ("clipped_share", "Share of held-out inputs beyond the scale", False),
    ):
        if values := {name: facts[key] for name, facts in modules.items() if facts.get(key) is not None}:
            parts += [f"<h3>{title}</h3>", bars(values, is_log=is_log)]
    columns = ["layer", "stored", "SQNR dB", "sensitivity", "clipped", "largest input", "largest weight", "alpha", "search error", "plain"]
    keys = ("sqnr_db", "sensitivity", "clipped_share", "input_amax", "weight_amax", "alpha", "search_error", "search_error_nearest")
    rows = [[name, "quantized" if f["quantized"] else "as it was", *(f.get(key) for key in keys)] for name, f in modules.items()]
    parts += [_table(columns, rows), "</html>\n"]
    return "\n".join(parts)


def _engines(found: Mapping[str, Any]) -> list[str]:
    """Answers and speed of engines of both checkpoints."""
    answers, speed = found["answers"], found["speed"]
    if answers is None:
        return ["<h2>Answers and speed</h2>", *(f"<p>Not measured: {_text(reason)}</p>" for reason in found["skipped"])]
    rows = [[r["task"], r["num_items"], r["first"], r["second"], r["difference"], *r["interval"]] for r in answers["accuracy_percent"]]
    rates = [[phase, *(one[key] for key in ("before", "after", "ratio"))] for phase, one in speed["tokens_per_second"].items()]
    before, after = speed["engine_bytes"]
    told = f"only before right: {answers['only_before_right']}, only after: {answers['only_after_right']}"
    conditions = ", ".join(f"{key} {value}" for key, value in speed["conditions"].items())
    return [
        "<h2>Answers</h2>",
        _table(["right answers, %", "questions", "before", "after", "points", "95 % from", "to"], rows),
        f"<p>The same questions to engines of both checkpoints, greedy; {told}; exact p of equal accuracy {answers['p_equal']:.3g}.</p>",
        "<h2>Speed</h2>",
        *([f"<p class='warning'>{NOT_QUOTED}</p>"] if _is_busy(speed) else []),
        _table(["tokens a second", "before", "after", "ratio"], [*rates, ["bytes of the engine", before, after, after / before]]),
        f"<p>{_text(conditions)}. These are speeds on this machine's CPU; on a GPU, and for another backend, thoughtx-bench tells.</p>",
    ]


def bars(values: Mapping[str, float], *, is_log: bool) -> str:
    """A bar a layer, in the model's order, coloured by kind. On a logarithmic axis values that are not positive have no bar."""
    shown_values = [v for v in values.values() if not is_log or v > 0]
    if not shown_values:
        return "<p>all zero</p>"
    low = math.floor(math.log10(min(shown_values))) if is_log else min(0.0, *shown_values, 0.0)
    high = math.ceil(math.log10(max(shown_values))) if is_log else max(shown_values)
    high = high if high > low else low + 1
    step, plot = (WIDTH - LEFT) / len(values), HEIGHT - BELOW

    def height(value: float) -> float:
        at = math.log10(value) if is_log else value
        return plot * (at - low) / (high - low)

    out = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}' role='img'>"]
    for i in range(5):
        at = low + (high - low) * i / 4
        y = plot - plot * i / 4
        label = f"{10**at:.2g}" if is_log else f"{at:.3g}"
        out.append(
            f"<line x1='{LEFT}' x2='{WIDTH}' y1='{y:.1f}' y2='{y:.1f}' stroke='#eee'/><text x='0' y='{min(y + 4, plot):.1f}'>{label}</text>"
        )
    for number, (name, value) in enumerate(values.items()):
        if is_log and value <= 0:
            continue
        tall, kind = max(height(value), 0.5), next((k for k in COLORS if name.endswith(k)), "")
        x, color = LEFT + number * step, COLORS.get(kind, "#999")
        box = f"x='{x:.1f}' y='{plot - tall:.1f}' width='{max(step * 0.8, 0.5):.1f}' height='{tall:.1f}' fill='{color}'"
        out.append(f"<rect {box}><title>{_text(name)}: {value:.4g}</title></rect>")
    for number, (kind, color) in enumerate(COLORS.items()):
        x = LEFT + 130 * number
        out.append(
            f"<rect x='{x}' y='{HEIGHT - 20}' width='10' height='10' fill='{color}'/><text x='{x + 15}' y='{HEIGHT - 11}'>{kind}</text>"
        )
    return "".join([*out, "</svg>"])


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else _text(value)
        return f"<td class='n'>{text}</td>" if is_number else f"<td>{text}</td>"

    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(f"<tr{' class=kept' if 'as it was' in row else ''}>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: Any) -> str:
    return html.escape(shown(str(value), 400))
