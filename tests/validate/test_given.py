"""Prompts of the user's own (`--prompts`): compared like the plan's, carried by golden files, or only their hashes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.validate.validate import Report, validate

ROWS = [list(range(3, 40)), [5, 1, 4], [7] * 60]  # the last is longer than the engine's max_seq_len of 48


def written(path: Path, rows: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows))
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("given") / "prompts.jsonl", ROWS)


@pytest.fixture(scope="module")
def private(hf: Path, engine_dir: Path, prompts: Path) -> tuple[Path, Report]:
    path = prompts.with_name("private.safetensors")
    return path, validate(engine_dir, reference=hf, record=path, prompts=prompts, private_data=True)


def test_every_way_to_run_them_is_compared(private: tuple[Path, Report], engine_dir: Path, golden: Path) -> None:
    found, plain = ({check.name: check for check in report.checks} for report in (private[1], validate(engine_dir, golden=golden)))
    assert private[1].ok
    named = {f"onnxruntime: {kind} given_{i}" for kind in ("prefill", "decode") for i in (1, 2, 3)} | {"onnxruntime: layers given_1"}
    assert set(found) - set(plain) == named | {f"onnxruntime: ragged {what} of --prompts" for what in ("prefill", "equals alone", "decode")}
    assert [found[f"onnxruntime: prefill given_{i}"].evidence["num_tokens"] for i in (1, 2, 3)] == [37, 3, 48]


def test_only_hashes_are_stored(private: tuple[Path, Report], engine_dir: Path, prompts: Path, tmp_path: Path) -> None:
    data = private[0].read_bytes()
    assert b"[3, 4, 5" not in data and b"3,4,5" not in data
    assert validate(engine_dir, golden=private[0], prompts=prompts).ok
    for other, why in ((None, "--private_data"), (written(tmp_path / "other.jsonl", [[1, 2], *ROWS[1:]]), "given_1")):
        with pytest.raises(ThoughtxError) as caught:
            validate(engine_dir, golden=private[0], prompts=other)
        assert caught.value.code == "E150" and why in caught.value.why


def test_a_golden_file_carries_them(hf: Path, engine_dir: Path, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    validate(engine_dir, reference=hf, record=path, prompts=prompts)
    names = [check.name for check in validate(engine_dir, golden=path).checks]
    assert "onnxruntime: prefill given_3" in names
    with pytest.raises(ThoughtxError, match="needs no --prompts"):
        validate(engine_dir, golden=path, prompts=prompts)


def test_prompts_that_cannot_be_compared(hf: Path, engine_dir: Path, golden: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "no tokenizer reads this"}\n')
    cases = [
        (written(tmp_path / "vocab.jsonl", [[1], [1 << 20]]), "E140", "not the model's"),
        (written(tmp_path / "many.jsonl", [[1]] * 65), "E140", "at most 64"),
        (texts, "E140", "a text needs a tokenizer"),
        (tmp_path / "absent.jsonl", "E101", "absent"),
    ]
    for path, code, said in cases:
        with pytest.raises(ThoughtxError) as caught:
            validate(engine_dir, reference=hf, prompts=path, record=tmp_path / "golden")
        assert caught.value.code == code and said in str(caught.value), path
    with pytest.raises(ThoughtxError, match="--private_data needs"):
        validate(engine_dir, reference=hf, record=tmp_path / "golden", private_data=True)
    assert not (tmp_path / "golden").exists()
