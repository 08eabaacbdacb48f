"""docs/claims.md says what the result files say, and its verdicts follow from their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import script

claims = script("bench/claims.py")


def test_the_page_is_what_the_results_say() -> None:
    assert claims.PAGE.read_text() == claims.page(), "python bench/claims.py"


def test_every_result_has_its_claim() -> None:
    assert {path.name for path in claims.RESULTS.iterdir()} == {claim.result for claim in claims.CLAIMS if claim.result is not None}


def _turned(name: str, found: dict) -> None:
    """Numbers that turn the verdict on a claim of this result."""
    if name == "chunks.json":
        found["windows"][found["chosen"]]["share"] = 0.9
    elif name == "early-exit.json":
        next(row for row in found["level_1"]["rows"] if row["name"] == "exit head")["saved_with_prompt"] = 0.5
        next(row for row in found["presets"] if row["name"].startswith("batch preset"))["accuracy"] = 1.0
    elif name == "compare.json":
        for row in found["comparison"]["rows"]:
            row["first"] = row["second"] + 20
    else:
        found["engines"]["full"]["batch_1"]["total_gib"] = 18.7


@pytest.mark.parametrize("name", sorted({claim.result for claim in claims.CLAIMS if claim.result}))
def test_a_verdict_follows_from_its_numbers(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = claims.page()
    for path in claims.RESULTS.iterdir():
        found = json.loads(path.read_text())
        if path.name == name:
            _turned(name, found)
        (tmp_path / path.name).write_text(json.dumps(found))
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    rows = [line.split("|")[4] for line in claims.page().splitlines() if line.startswith("| ")]
    assert rows != [line.split("|")[4] for line in before.splitlines() if line.startswith("| ")]
