"""Golden files: they judge like the reference, without torch, and only for the engine that they were recorded for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.validate.validate import validate


def test_a_golden_file_judges_like_the_reference(hf: Path, engine_dir: Path, golden: Path) -> None:
    by_reference, by_golden = validate(engine_dir, reference=hf, bisect=True), validate(engine_dir, golden=golden, bisect=True)
    assert [(c.name, c.status) for c in by_reference.checks] == [(c.name, c.status) for c in by_golden.checks]
    for ours, theirs in zip(by_reference.checks, by_golden.checks, strict=True):
        assert ours.evidence.get("rms_ratio", 0) == pytest.approx(theirs.evidence.get("rms_ratio", 0), abs=0.1)


def test_a_golden_file_is_the_same_for_the_same_model(hf: Path, engine_dir: Path, golden: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    validate(engine_dir, reference=hf, record=again)
    assert again.read_bytes() == golden.read_bytes()


def test_checking_a_golden_file_needs_neither_torch_nor_transformers(engine_dir: Path, golden: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pathlib import Path; from trtllm_thoughtx.validate.validate import validate\n"
        f"r = validate(Path({str(engine_dir)!r}), golden=Path({str(golden)!r})); print(r.ok, r.count['passed'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "True" and int(done.stdout.split()[1]) > 20


def rewritten(golden: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    data = golden.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    story = json.loads(head["__metadata__"]["thoughtx.golden"])
    change(story)
    head["__metadata__"]["thoughtx.golden"] = json.dumps(story)
    new = json.dumps(head).encode()
    return len(new).to_bytes(8, "little") + new + data[8 + length :]


def test_rewriting_changes_nothing_by_itself(engine_dir: Path, golden: Path, tmp_path: Path) -> None:
    (tmp_path / "g").write_bytes(rewritten(golden, lambda story: None))
    assert validate(engine_dir, golden=tmp_path / "g").ok


STORIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another schema": lambda s: s.update(schema="thoughtx.golden/9"),
    "a surplus key": lambda s: s.update(extra=1),
    "no prompts": lambda s: s.update(prompts=[]),
    "prompts is a number": lambda s: s.update(prompts=3),
    "a prompt is a number": lambda s: s["prompts"].__setitem__(0, 3),
    "an id is negative": lambda s: s["prompts"][1]["ids"].__setitem__(0, -1),
    "an id is true": lambda s: s["prompts"][1]["ids"].__setitem__(0, True),
    "an id is outside the vocabulary": lambda s: s["prompts"][1]["ids"].__setitem__(0, 97),
    "a row is outside the prompt": lambda s: s["prompts"][1]["rows"].__setitem__(-1, 4000),
    "rows are not ascending": lambda s: s["prompts"][1]["rows"].reverse(),
    "a band is negative": lambda s: s["prompts"][0]["bands"][0].__setitem__(0, -1.0),
    "a band is text": lambda s: s["prompts"][0]["bands"][0].__setitem__(0, "1"),
    "a band is enormous": lambda s: s["prompts"][0]["bands"][0].__setitem__(0, 1e300),
    "a band is missing": lambda s: s["prompts"][0]["bands"].pop(),
    "two prompts of one name": lambda s: s["prompts"][1].update(name=s["prompts"][0]["name"]),
    "a chunk of zero tokens": lambda s: s["prompts"][1]["mask"].update(chunk_size=0),
    "a mask with a surplus key": lambda s: s["prompts"][1]["mask"].update(anchor=1),
    "a missing prompt": lambda s: s["prompts"].pop(),
    "another dtype": lambda s: s["identity"].update(dtype="float16"),
    "other chunks": lambda s: s["identity"].update(chunks=[8, 2, 1]),
    "other weights": lambda s: s["identity"]["inputs"].update({"model.safetensors": "0" * 64}),
    "another vocabulary": lambda s: s["identity"].update(vocab_size=98),
}


@pytest.mark.parametrize("story", STORIES)
def test_a_wrong_golden_file_is_refused(engine_dir: Path, golden: Path, tmp_path: Path, story: str) -> None:
    (tmp_path / "g").write_bytes(rewritten(golden, STORIES[story]))
    with pytest.raises(ThoughtxError) as caught:
        validate(engine_dir, golden=tmp_path / "g")
    assert caught.value.code == "E150"


def test_a_damaged_golden_file_is_refused(engine_dir: Path, golden: Path, tmp_path: Path) -> None:
    data, path = golden.read_bytes(), tmp_path / "g"
    nan = np.float32(np.nan).tobytes()
    for wrong in (
        b"",
        data[:7],
        data[:100],
        data[:-1],
        data + b"x",
        b"PK\x03\x04" + data,
        data[:-4] + nan,
        data.replace(b"F32", b"I32", 1),
    ):
        path.write_bytes(wrong)
        with pytest.raises(ThoughtxError) as caught:
            validate(engine_dir, golden=path)
        assert caught.value.code == "E150"
    with pytest.raises(ThoughtxError) as caught:
        validate(engine_dir, golden=tmp_path / "absent")
    assert caught.value.code == "E101"
