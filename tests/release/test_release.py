"""A release of a small model by the real commands: what is left for people and for programs."""

from __future__ import annotations

import hashlib
import html.parser
import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fake_release import PROGRAM, Silent, fake_step
from tiny import write_tiny

from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.release.document import Limits, Target
from trtllm_thoughtx.release.executor import LocalExecutor
from trtllm_thoughtx.release.page import frontier, page
from trtllm_thoughtx.release.plan import Engine
from trtllm_thoughtx.release.schedule import Schedule, State
from trtllm_thoughtx.release.store import Store
from trtllm_thoughtx.release.verdict import Judge, Row

TEXT = """name: small
date: 2026-11-30
models: {tiny: {path: model}}
formats: {plain: {}}
targets:
  cpu: {backend: onnxruntime, dtype: float32, max_seq_len: 64}
limits: {max_bytes: 1 MiB}
sign: {key: key.pem}
export: {tag: v1}
"""


def release(root: Path, capsys: pytest.CaptureFixture[str], out: str = "out") -> tuple[int, dict]:
    capsys.readouterr()
    words = [str(root / "r.yaml"), "--output_dir", str(root / out), "--store", str(root / "store"), "--json"]
    status = run(cli.COMMANDS["release"], "thoughtx-release", words)
    captured = capsys.readouterr()
    assert all(json.loads(line)["event"] == "step" for line in captured.err.splitlines() if line.startswith("{"))
    return status, json.loads(captured.out)


def shipped(root: Path) -> dict[str, str]:
    """Hashes of the files behind the links."""
    return {
        f"{path.parent.name}/{path.name}/{file.relative_to(path.resolve())}": hashlib.sha256(file.read_bytes()).hexdigest()
        for path in [*root.glob("engines/*"), *root.glob("images/*")]
        for file in path.resolve().rglob("*")
        if file.is_file()
    }


@pytest.mark.slow
def test_a_release(tmp_path, capsys):
    pytest.importorskip("transformers", reason="validation compares with transformers")
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519", reason="signatures need cryptography")
    from cryptography.hazmat.primitives import serialization

    secret = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(
        secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "key.pem").chmod(0o600)
    write_tiny(tmp_path / "model", tokenizer=True, dtype="float32")
    (tmp_path / "r.yaml").write_text(TEXT)
    status, made = release(tmp_path, capsys)
    assert status == 0, made
    assert made["ok"] and made["count"] == {"passed": 1} and made["steps"] == {"made": 5}
    row = made["engines"][0]
    assert row["parity"]["failed"] == 0 and row["parity"]["passed"] > 3 and row["signed_by"] and row["kl_from"] == "parity"
    first = shipped(tmp_path / "out")
    assert {"engines/tiny-plain-cpu/thoughtx.sig", "images/tiny-plain-cpu/index.json"} <= set(first)
    suite = ElementTree.parse(tmp_path / "out" / "release.xml").getroot()
    cases = [case.get("name") for case in suite]
    assert {"tiny-plain-cpu", "tiny-plain-cpu: files match the manifest"} <= set(cases)
    assert suite.get("failures") == "0" and len(cases) == 1 + sum(row["parity"].values())
    assert json.loads((tmp_path / "out" / "release.json").read_text())["release"] == "small"

    status, again = release(tmp_path, capsys)
    assert status == 0 and again["steps"] == {"found": 5} and shipped(tmp_path / "out") == first

    # other limits judge again what is there: nothing is built, and what does not pass is not shipped
    (tmp_path / "r.yaml").write_text(TEXT.replace("1 MiB", "100 KiB"))
    status, judged = release(tmp_path, capsys)
    assert status == 1 and judged["steps"] == {"found": 3, "skipped": 2} and judged["count"] == {"failed": 1}
    assert shipped(tmp_path / "out") == {} and "max_bytes" in (tmp_path / "out" / "release.html").read_text()

    # what the store has lost is made again, with the same bytes; the commands are those that one types
    lost = [path.parent for path in (tmp_path / "store" / "objects").glob("*/*/step.json") if '"kind": "validate"' not in path.read_text()]
    for path in lost:
        shutil.rmtree(path)
    (tmp_path / "r.yaml").write_text(TEXT)
    status, fresh = release(tmp_path, capsys, "other")
    assert status == 0 and fresh["steps"] == {"made": 4, "found": 1} and shipped(tmp_path / "other") == first
    assert [line.split()[0] for line in fresh["engines"][0]["commands"]] == ["thoughtx-convert", "thoughtx-build", "thoughtx-validate"]


def test_an_output_of_something_else_is_left_alone(tmp_path, capsys):
    write_tiny(tmp_path / "model", tokenizer=True)
    (tmp_path / "r.yaml").write_text(TEXT.replace("sign: {key: key.pem}\n", ""))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    status, made = release(tmp_path, capsys)
    assert status == 3 and made["error"]["code"] == "E130" and not (tmp_path / "store").exists()


def row(name: str, num_bytes: int | None, kl: float | None, status: str = "passed", **more) -> Row:
    at = {"models": "m", "formats": name, "targets": "t", "attention": "none", "exits": "none"}
    return Row(name, at, status=status, num_bytes=num_bytes, kl=kl, **more)


def test_the_frontier():
    rows = [row("a", 100, 0.0), row("b", 50, 0.1), row("c", 60, 0.2), row("d", 40, 0.05, "failed"), row("e", 50, 0.3), row("f", 10, None)]
    assert [one.name for one in frontier(rows)] == ["b", "a"]


def test_the_page_holds_everything_and_loads_nothing():
    class Parsed(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags, self.open, self.text = [], [], ""

        def handle_starttag(self, tag, attrs):
            self.tags.append((tag, dict(attrs)))
            if tag != "meta":
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            self.tags.append((tag, dict(attrs)))

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.text += data

    rows = [
        row("a", 100 << 20, 0.0, kl_from="parity"),
        row("b", 50 << 20, 0.1),
        row("c", 20 << 20, 0.3, "failed", reasons=["max_kl: 0.3, at most 0.1 must hold"]),
        row("<b>x</b>", None, None, "skipped", commands=["thoughtx-build --x '<y>'"]),
    ]
    parsed = Parsed()
    parsed.feed(page("r", rows, 3.0, {"made": 4}))
    assert parsed.open == []
    assert not [attrs for _, attrs in parsed.tags if {"src", "href"} & set(attrs)] and not {"script", "link"} & {
        tag for tag, _ in parsed.tags
    }
    circles = [attrs["class"] for tag, attrs in parsed.tags if tag == "circle"]
    assert sorted(circles) == ["on", "on", "out"] and len([tag for tag, _ in parsed.tags if tag == "polyline"]) == 1
    assert "at most 0.1 must hold" in parsed.text and "<b>x</b>" in parsed.text and "thoughtx-build --x '<y>'" in parsed.text


def test_an_engine_that_was_not_validated_is_not_passed(tmp_path):
    """Where no machine has the GPU of its plan, it is neither signed nor exported."""
    target = Target(gpu="H999")
    engine = Engine("e", {"formats": "f"}, target)
    build = fake_step(tmp_path / "note", "build", "e")
    engine.steps = {"build": build, "validate": fake_step(tmp_path / "note", "validate", "e", [build], gpu="H999")}
    engine.steps["sign"] = fake_step(tmp_path / "note", "sign", "e", [build], after=(engine.steps["validate"].key,), gate="e")
    (tmp_path / "store").mkdir()
    store, steps = Store(tmp_path / "store"), {step.key: step for step in engine.steps.values()}
    schedule = Schedule(steps, store, LocalExecutor(store, program=PROGRAM), Silent())
    judge = Judge([engine], Limits(), store, schedule.states)
    schedule.passed = judge.passed
    states = schedule.run()
    row = judge.row(engine)
    assert [states[step.key].status for step in engine.steps.values()] == ["made", "skipped", "skipped"]
    assert row.status == "skipped" and "H999" in row.skipped[0] and "H999" in states[engine.steps["sign"].key].reason


def judged(tmp_path: Path, limits: Limits, **found) -> Row:
    """The row of an engine with these results."""
    engine = Engine("e", {"formats": "f"}, Target())
    store = Store(tmp_path)
    for kind, result in {"build": {}, "validate": {"count": {"passed": 1, "failed": 0, "skipped": 0}, "checks": []}, **found}.items():
        step = engine.steps[kind] = fake_step(tmp_path / "note", kind, "e")
        with store.partial(step.key) as here:
            store.publish(step.key, here, {"bytes": 1000, "result": result})
    states = {step.key: State("made") for step in engine.steps.values()}
    return Judge([engine], limits, store, states).row(engine)


LIMITS = [
    (Limits(), "passed", ""),
    (Limits(max_bytes=999), "failed", "max_bytes: 1000 bytes, at most 999 bytes"),
    (Limits(min_tokens_per_second=100), "failed", "min_tokens_per_second: 50, at least 100"),
    (Limits(min_tokens_per_second=50), "passed", ""),
    (Limits(max_kl=0.0), "passed", ""),
    (Limits(max_points_lost=1), "passed", ""),  # the first format is what others are compared with
    (Limits(strict=True), "passed", ""),
]


@pytest.mark.parametrize(("limits", "status", "why"), LIMITS)
def test_limits(limits, status, why, tmp_path):
    row = judged(tmp_path, limits, bench={"rows": [{"phase": "prefill", "median": 1}, {"phase": "decode", "median": 50}]})
    assert row.status == status and why in "; ".join(row.reasons)


def test_what_was_not_measured_is_skipped_and_with_strict_fails(tmp_path):
    limits = Limits(min_tokens_per_second=1)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    lax, strict = judged(tmp_path / "a", limits), judged(tmp_path / "b", replace(limits, strict=True))
    assert (lax.status, strict.status) == ("passed", "failed")
    assert lax.skipped == strict.reasons == ["min_tokens_per_second: it was not measured"]


def test_points_lost_are_those_of_all_tasks(tmp_path):
    rows = [{"measure": "accuracy", "first": 90.0, "second": 95.0}, {"measure": "F1", "first": 1.0, "second": 2.0}]
    evaluate = {"num_errors": 0, "summary": {"overall": {"accuracy": 0.9}}, "comparison": {"rows": rows}}
    row = judged(tmp_path, Limits(), evaluate=evaluate)
    assert row.points_lost == 5.0 and row.accuracy == 0.9
