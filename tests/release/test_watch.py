"""What people and programs see of a running release."""

from __future__ import annotations

import io
import json

import pytest
from fake_release import fake_step

from trtllm_thoughtx.release import watch
from trtllm_thoughtx.release.rates import Rates
from trtllm_thoughtx.release.schedule import State


@pytest.fixture
def steps(tmp_path):
    made = [fake_step(tmp_path / "note", kind, f"m{n}", size=100) for n in range(2) for kind in ("convert", "build")]
    return {step.key: step for step in made}


def play(shown, steps):
    """The first is made, the second fails, the third runs, the fourth waits."""
    first, second, third, _ = steps.values()
    shown.changed(first, State("running"))
    shown.changed(first, State("made", seconds=4.0, peak_bytes=7))
    shown.changed(second, State("waiting", "try 2: no", tries=1))
    shown.changed(second, State("failed", "not \x1b[31mgood", "E103"))
    shown.changed(third, State("running"))


def test_lines(steps, capsys):
    play(watch.Lines(steps, Rates(), 2), steps)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1/4 convert m0: done in 4 s" and lines[1] == "1/4 build m0: waiting: try 2: no"
    assert lines[2] == r"2/4 build m0: failed: not \x1b[31mgood" and len(lines) == 3


def test_events(steps, capsys):
    play(watch.Events(steps, Rates(), 2), steps)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["status"] for event in events] == ["running", "made", "waiting", "failed", "running"]
    made = {"event": "step", "kind": "convert", "label": "m0", "key": next(iter(steps)), "status": "made", "ended": 1, "total": 4}
    assert events[1] == {**made, "seconds": 4.0, "peak_bytes": 7}
    assert events[3]["code"] == "E103"


def test_the_table(steps):
    from rich.console import Console

    shown = watch.Table(steps, Rates({"build": [1.0, 10.0, 100.0]}), 2)
    play(shown, steps)
    console = Console(file=io.StringIO(), width=120)
    console.print(shown.picture())
    text = console.file.getvalue()
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in text.splitlines() if "│" in line}
    assert rows == {"convert": ["-", "-", "1", "1", "-", "-"], "build": ["-", "1", "-", "-", "1", "-"]}
    assert "2 of 4 steps" in text and "convert m1" in text and "about 7 s left" in text  # 4 s and 10 s on two cores


def test_rates_follow_sizes(tmp_path):
    """Half of the mean is a start's, whatever the size; what never ran is not guessed; a file that is none is none."""
    rates, small = Rates(), fake_step(tmp_path / "n", "build", "a", size=100)
    large = fake_step(tmp_path / "n", "build", "b", size=1000)
    rates.add(small, 10.0)
    assert rates.seconds(small) == 10.0 and rates.seconds(large) == 55.0
    assert rates.left([small, fake_step(tmp_path / "n", "sign", "a")], 2) is None
    rates.write(tmp_path)
    assert Rates.read(tmp_path).sums == rates.sums
    (tmp_path / "rates.json").write_text("[1]")
    assert Rates.read(tmp_path).sums == {}
