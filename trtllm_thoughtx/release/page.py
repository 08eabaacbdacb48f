"""release.html: one file with everything in it, for people who decide what to ship. No script, no font and no picture is loaded.

A picture for each model shows size against what is lost, the engines that no other one beats in both marked. Its text is in the reader's
light or dark colours.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from trtllm_thoughtx import report
from trtllm_thoughtx.errors import counted, shown
from trtllm_thoughtx.files import human_bytes
from trtllm_thoughtx.progress import duration
from trtllm_thoughtx.release.verdict import Row

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 860, 330, 76, 190, 16, 46
FLOOR = 0.1  # of the smallest loss that is not zero: where zero is drawn
MARKS = {"passed": "\N{CHECK MARK} passed", "failed": "\N{BALLOT X} failed", "skipped": "\N{EN DASH} skipped"}
STYLE = """:root{color-scheme:light dark;--back:#fff;--text:#1c2430;--soft:#5b6675;--line:#d9dee5;--mark:#1f5fbf;--dim:#8a94a3;
--bad:#b3261e;--good:#1d6b3a;--panel:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--back:#14181e;--text:#e4e8ee;--soft:#a3adba;--line:#343c47;--mark:#7fb0ff;--dim:#7d8896;
--bad:#ff8a80;--good:#7fd39b;--panel:#1c222a}}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:var(--text);
background:var(--back)}h1{margin:0}h2{margin:2.2rem 0 .5rem}p{color:var(--soft);margin:.3rem 0}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%}td,th{padding:.35rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;
white-space:nowrap}.n{text-align:right;font-variant-numeric:tabular-nums}td.why{white-space:normal;min-width:16rem;color:var(--soft)}
th{color:var(--soft);font-weight:600}.passed{color:var(--good)}.failed{color:var(--bad)}.skipped{color:var(--soft)}
details{border-bottom:1px solid var(--line);padding:.4rem 0}summary{cursor:pointer}pre{background:var(--panel);padding:.7rem;
overflow-x:auto;font:13px/1.5 ui-monospace,monospace;margin:.5rem 0}ul{margin:.3rem 0;padding-left:1.2rem;color:var(--soft)}
svg{max-width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}.axis{stroke:var(--line)}
.front{fill:none;stroke:var(--mark);stroke-width:2}.on{fill:var(--mark);stroke:var(--back);stroke-width:2}.off{fill:var(--dim);
stroke:var(--back);stroke-width:2}.out{fill:var(--back);stroke:var(--bad);stroke-width:2}svg text.on,svg text.off,svg text.out{
paint-order:stroke;stroke:var(--back);stroke-width:4px;fill:var(--soft)}svg text.on{fill:var(--text);font-weight:600}"""


def page(name: str, rows: Sequence[Row], seconds: float, counts: dict[str, int]) -> str:
    """The whole document."""
    kinds = [f"{sum(row.status == status for row in rows)} {status}" for status in MARKS if any(row.status == status for row in rows)]
    did = f"{counted(counts.get('made', 0), 'step')} made and {counts.get('found', 0)} found in {duration(seconds)}"
    body = [f"<h1>Release {_text(name)}</h1>", f"<p>{counted(len(rows), 'engine')}: {', '.join(kinds)}. {did}.</p>"]
    for model in dict.fromkeys(row.at["models"] for row in rows):
        body += _picture(model, [row for row in rows if row.at["models"] == model])
    body += ["<h2>Engines</h2>", '<div class="wide">', _table(rows), "</div>"]
    if failed := [row for row in rows if row.status == "failed"]:
        body += ["<h2>What failed, and why</h2>", *(f"<p><b>{_text(row.name)}</b></p>{_list(row.reasons)}" for row in failed)]
    body += ["<h2>Each engine again</h2>", "<p>The commands that make and judge it by hand, and what was not judged here.</p>"]
    body += [_details(row) for row in rows]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Release {_text(name)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _text(value: object) -> str:
    return html.escape(shown(str(value), 2000))


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"


def _table(rows: Sequence[Row]) -> str:
    columns = ("engine", "result", "size", "KL, nats", "right", "points lost", "tokens/s", "checks", "signed by", "why")
    numbers = ("size", "KL, nats", "right", "points lost", "tokens/s")
    head = "".join(f'<th class="{"n" if column in numbers else ""}">{column}</th>' for column in columns)
    lines = []
    for row in rows:
        checks = ", ".join(f"{count} {status}" for status, count in (row.parity or {}).items() if count)
        values = {
            "size": None if row.num_bytes is None else human_bytes(row.num_bytes),
            "KL, nats": None if row.kl is None else "rounding" if row.kl_from == "parity" else f"{row.kl:.3g}",
            "right": report.percent(row.accuracy),
            "points lost": None if row.points_lost is None else f"{row.points_lost:.1f}",
            "tokens/s": None if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
        }
        cells = [f"<td>{_text(row.name)}</td>", f'<td class="{row.status}">{MARKS[row.status]}</td>']
        cells += [f'<td class="n">{"-" if value is None else _text(value)}</td>' for value in values.values()]
        cells += [f"<td>{_text(checks or '-')}</td>", f"<td>{_text((row.signed_by or '-')[:16])}</td>"]
        lines.append(f'<tr>{"".join(cells)}<td class="why">{_text("; ".join(row.reasons or row.skipped[:1]))}</td></tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _details(row: Row) -> str:
    not_judged = f"<p>Not judged:</p>{_list(row.skipped)}" if row.skipped else ""
    commands = f"<pre>{html.escape(chr(10).join(row.commands))}</pre>"
    return f"<details><summary>{_text(row.name)}</summary>{commands}{not_judged}</details>"


# --- the picture -------------------------------------------------------------------------------------------------------


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Those that passed and that no other one beats in size and in loss, by size."""
    found: list[Row] = []
    measured = [row for row in rows if row.status == "passed" and row.num_bytes is not None and row.kl is not None]
    for row in sorted(measured, key=lambda row: (row.num_bytes, row.kl)):
        if not found or (row.kl or 0.0) < (found[-1].kl or 0.0):
            found.append(row)
    return found


def _picture(model: str, rows: Sequence[Row]) -> list[str]:
    drawn = [row for row in rows if row.num_bytes is not None and row.kl is not None]
    missing = [row.name for row in rows if row not in drawn]
    lines = [f"<h2>{_text(model)}</h2>"]
    if drawn:
        lines += ["<p>Size against loss; the line joins the engines that no other one beats in both.</p>", _svg(model, drawn)]
    if missing:
        lines.append(f"<p>Not in the picture, because size or loss was not measured here: {_text(', '.join(missing))}.</p>")
    return lines


class _Scale:
    """Where values are drawn: sizes from zero; losses by their logarithm, with zero below the smallest."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.most = 1.08 * max(row.num_bytes or 1 for row in rows)
        losses = [row.kl for row in rows if row.kl]
        self.low = math.floor(math.log10(FLOOR * min(losses))) if losses else -6
        self.high = math.ceil(math.log10(max(losses))) if losses else 0
        self.high = max(self.high, self.low + 1)

    def x(self, num_bytes: float) -> float:
        return LEFT + num_bytes / self.most * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        power = self.low if loss <= 0 else max(self.low, math.log10(loss))
        return HEIGHT - BELOW - (power - self.low) / (self.high - self.low) * (HEIGHT - TOP - BELOW)

    def ticks(self) -> list[float]:
        """Round sizes, four to nine of them."""
        step = 2.0 ** math.floor(math.log2(self.most / 4))
        return [step * n for n in range(int(self.most / step) + 1)]


def _svg(model: str, rows: Sequence[Row]) -> str:
    scale, best = _Scale(rows), frontier(rows)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(f"size against loss of the engines of {model}")}">']
    for power in range(scale.low, scale.high + 1):
        y = scale.y(10.0**power)
        name = "rounding" if power == scale.low and any(not row.kl for row in rows) else f"1e{power}"
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    for size in scale.ticks():
        parts.append(f'<text x="{scale.x(size):.1f}" y="{HEIGHT - BELOW + 18}" text-anchor="middle">{human_bytes(size)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">size of the engine directory</text>')
    parts.append(
        f'<text transform="translate(14 {(HEIGHT - BELOW) / 2}) rotate(-90)" text-anchor="middle">KL from the reference, nats</text>'
    )
    if len(best) > 1:
        points = " ".join(f"{scale.x(row.num_bytes or 0):.1f},{scale.y(row.kl or 0.0):.1f}" for row in best)
        parts.append(f'<polyline class="front" points="{points}"/>')
    names, taken = list[str](), list[tuple[float, float]]()
    for row in sorted(rows, key=lambda row: row not in best):  # the best have their names at their points
        x, y = scale.x(row.num_bytes or 0), scale.y(row.kl or 0.0)
        kind = "out" if row.status != "passed" else "on" if row in best else "off"
        label = _label(row, rows)
        title = f"{row.name}: {human_bytes(row.num_bytes or 0)}, KL {row.kl:.3g}, {row.status}"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{_text(title)}</title></circle>')
        at = y + 4
        while any(abs(at - other) < 14 and abs(x - across) < 8 * (len(label) + 2) for across, other in taken):
            at -= 14 if at > TOP + 20 and y > HEIGHT / 2 else -14
        taken.append((x, at))
        names.append(f'<text class="{kind}" x="{x + 11:.1f}" y="{at:.1f}">{_text(label)}</text>')
    return "".join([*parts, *names, "</svg>"])


def _label(row: Row, rows: Sequence[Row]) -> str:
    """The names that tell it from others of the picture."""
    return " ".join(name for axis, name in row.at.items() if len({other.at[axis] for other in rows}) > 1) or row.name
