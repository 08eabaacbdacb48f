"""What was made and what was proved, on file and on screen: the manifest, tables, JSON and JUnit.

`manifest.json` lists every file of an output directory with its sha256, what it was made from, with which settings, by which
versions, and which checks it passed. It is sorted and canonical: two identical runs differ in `created` alone, so it can be
compared and signed. An engine plan is a program; `verify_files` must pass before one is loaded. A manifest protects against
damage and mix-ups. It does not protect against somebody who can rewrite it: sign it for that.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_thoughtx import __version__
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.files import PLAIN_NAME, atomic_file, open_inside, read_json, sha256_of
from trtllm_thoughtx.progress import SILENT, Progress

if TYPE_CHECKING:
    from rich.table import Table

MANIFEST = "manifest.json"
SCHEMA = "thoughtx.manifest/1"
TOOL = {"name": "trtllm-thoughtx", "version": __version__}
UP_TO_DATE = "up to date: the same inputs and settings made what is there, and its files are intact"
STATUSES = ("passed", "failed", "skipped")
# key of the manifest -> the type it must have
_FIELDS: dict[str, type] = {
    "schema": str,
    "tool": dict,
    "command": str,
    "config": dict,
    "inputs": list,
    "outputs": list,
    "environment": dict,
    "checks": list,
    "created": str,
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One question and its answer. `evidence` holds numbers and short texts; `reason` says why not, when not passed."""

    name: str
    status: str  # of STATUSES
    reason: str = ""
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)


def count(checks: Sequence[Check]) -> dict[str, int]:
    """How many of them have each status."""
    return {status: sum(check.status == status for check in checks) for status in STATUSES}


def plain(value: object) -> Any:
    """`value` as JSON types only: dataclasses (by their `document`, where they have one), paths, tuples and NumPy scalars converted, NaN
    and Infinity as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        document = getattr(value, "document", None)
        return plain(document()) if document else {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, os.PathLike) else repr(value)


def to_json(obj: object) -> str:
    """Canonical JSON text: sorted keys, two spaces, no NaN, newline at the end."""
    return json.dumps(plain(obj), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def manifest_inputs(paths: Sequence[Path], progress: Progress = SILENT) -> list[dict[str, Any]]:
    """`name`, `bytes` and `sha256` of every file in `paths`, sorted by name. Names are file names, not machine paths."""
    rows = []
    with progress.stage("hashing inputs", sum(path.stat().st_size for path in paths), "bytes") as stage:
        for path in sorted(paths, key=lambda path: path.name):
            size = path.stat().st_size
            rows.append({"name": path.name, "bytes": size, "sha256": sha256_of(path, stage)})
    return rows


def write_manifest(
    root: Path,
    *,
    command: str,
    inputs: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    checks: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Write `root`/manifest.json over every file now in `root`, a flat directory. `hashes` holds sha256 sums already known."""
    known = hashes or {}
    outputs = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": known.get(path.name) or sha256_of(path)}
        for path in sorted(root.iterdir())
        if path.name != MANIFEST
    ]
    body = {
        "schema": SCHEMA,
        "tool": TOOL,
        "command": command,
        "config": dict(config),
        "inputs": sorted((dict(row) for row in inputs), key=lambda row: str(row.get("name"))),
        "outputs": outputs,
        "environment": dict(environment),
        "checks": list(checks),
        "created": _now().isoformat(timespec="seconds"),
    }
    with atomic_file(root / MANIFEST) as file:
        file.write(to_json(body).encode())


def _now() -> datetime.datetime:
    """The time, or what SOURCE_DATE_EPOCH sets in its place, for outputs that repeat to the last byte (reproducible-builds.org)."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    seconds = int(fixed) if fixed.isascii() and fixed.isdigit() and len(fixed) < 12 else None
    now = datetime.datetime.now(datetime.timezone.utc)
    return now if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)


def _is_file_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and PLAIN_NAME.fullmatch(row["name"]) is not None
        and isinstance(row.get("bytes"), int)
        and not isinstance(row["bytes"], bool)
        and isinstance(row.get("sha256"), str)
        and len(row["sha256"]) == 64
    )


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of `root`, checked field by field. E121 when it is missing or malformed."""

    def refuse(why: str) -> ThoughtxError:
        return ThoughtxError(
            "E121",
            "no usable manifest",
            where=shown(str(root / MANIFEST)),
            why=why,
            fix="run thoughtx-build (or thoughtx-convert) again; an output without its manifest is not loaded",
        )

    if not (root / MANIFEST).exists():
        raise refuse("the file is missing: this is not an output of this package, or it was copied in part")
    manifest = read_json(root, MANIFEST, code="E121")
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise refuse(
            f"it must be an object with schema {SCHEMA!r}, it has {shown(manifest.get('schema') if isinstance(manifest, dict) else None)}"
        )
    wrong = [f"{key} must be of type {kind.__name__}" for key, kind in _FIELDS.items() if not isinstance(manifest.get(key), kind)]
    rows = [row for key in ("inputs", "outputs") if isinstance(manifest.get(key), list) for row in manifest[key]]
    wrong += [f"file entry {shown(row)} needs a plain name, bytes and a 64-digit sha256" for row in rows if not _is_file_row(row)]
    names = [row["name"] for row in manifest.get("outputs") or [] if _is_file_row(row)]
    wrong += [f"{shown(name)} is listed twice" for name in sorted({name for name in names if names.count(name) > 1})]
    if wrong:
        raise refuse(listed(wrong))
    return manifest


def verify_files(
    root: Path, needed: Sequence[str] = (), unwanted: Sequence[str] = (), *, manifest: Mapping[str, Any] | None = None
) -> None:
    """Compare size and sha256 of every listed file with the manifest of `root`, unless it was read already. `needed` must be listed;
    `unwanted` must not be there unless listed. E120 lists every difference."""
    manifest = manifest or read_manifest(root)
    rows = {row["name"]: row for row in manifest["outputs"]}
    wrong = []
    for name, row in rows.items():
        if not os.path.lexists(root / name):
            wrong.append(f"{shown(name)}: missing")
            continue
        with open_inside(root, name) as file:
            size = os.fstat(file.fileno()).st_size
        if size != row["bytes"]:
            wrong.append(f"{shown(name)}: {size} bytes, the manifest says {row['bytes']}")
        elif sha256_of(root / name) != row["sha256"]:
            wrong.append(f"{shown(name)}: its content changed (sha256 differs)")
    wrong += [f"{shown(name)}: not listed in {MANIFEST}" for name in dict.fromkeys(needed) if name not in rows]
    wrong += [f"{name}: added, {MANIFEST} does not list it" for name in unwanted if name not in rows and os.path.lexists(root / name)]
    if wrong:
        again = manifest["command"] if manifest["command"].startswith("thoughtx-") else f"thoughtx-{manifest['command']}"
        raise ThoughtxError(
            "E120",
            "the files do not match their manifest",
            where=shown(str(root)),
            why=listed(wrong),
            fix=f"copy the directory again, or make it again: {shown(again, 4000)} --force. Nothing was loaded.",
        )


def percent(fraction: float | None) -> str | None:
    """`97.2 %`."""
    return None if fraction is None else f"{100 * fraction:.1f} %"


def brief(evidence: object) -> str:
    """Evidence of a check on one line: `name value` pairs joined by commas."""
    if not isinstance(evidence, Mapping):
        return "" if evidence is None else str(evidence)
    short = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in evidence.items()}
    return ", ".join(f"{key} {value}" for key, value in short.items() if not isinstance(value, (Mapping, list)))


def is_current(root: Path, config: Mapping[str, Any], inputs: Callable[[], list[dict[str, Any]]]) -> bool:
    """Whether `root` holds, intact, what this version would make of `inputs()` with `config`: then there is nothing to do."""
    if not (root / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(root)
        if manifest["tool"].get("version") != __version__ or manifest["config"] != plain(config) or manifest["inputs"] != inputs():
            return False
        verify_files(root, manifest=manifest)
    except ThoughtxError:
        return False
    return True


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A rich table. Cells are printed as they are: no markup is read from them, control characters are escaped."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        is_number = bool(rows) and all(isinstance(row[index], (int, float)) and not isinstance(row[index], bool) for row in rows)
        made.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text("-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else shown(str(cell), 400)) for cell in row))
    return made


def check_file_output(path: Path) -> None:
    """E130 unless a file may be written to `path`: asked before the work whose result it shall hold."""
    if path.is_dir() or path.is_symlink():
        why = "it is a directory or a symbolic link"
    elif not path.absolute().parent.is_dir():
        why = "the directory that shall hold it does not exist"
    elif not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        why = "its directory cannot be written"
    else:
        return
    raise ThoughtxError("E130", "the output file cannot be written", where=shown(str(path), 400), why=why, fix="choose another output path")


def junit(path: Path, checks: Sequence[Check], command: str) -> None:
    """Write `checks` as one JUnit suite of `command`; a skipped check carries its reason."""
    from xml.etree import ElementTree

    counts = count(checks)
    suite = ElementTree.Element(
        "testsuite",
        name=command,
        tests=str(len(checks)),
        failures=str(counts["failed"]),
        skipped=str(counts["skipped"]),
        errors="0",
    )
    for row in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=command.replace("-", "."), name=shown(row.name))
        reason, evidence = shown(row.reason, 4000), shown(json.dumps(plain(row.evidence), sort_keys=True), 4000)
        if row.status == "passed":
            ElementTree.SubElement(case, "system-out").text = evidence
        else:
            ElementTree.SubElement(case, "failure" if row.status == "failed" else "skipped", message=reason).text = evidence
    with atomic_file(path) as file:
        file.write(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True) + b"\n")
