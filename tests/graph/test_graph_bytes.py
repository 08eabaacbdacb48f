"""Graphs repeat byte for byte, from one commit to the next: a change that moves a byte of one must rewrite the record, and say why."""

from __future__ import annotations

import importlib.util
import json

import onnx
import pytest
from graph_cases import CASES, COMMAND, RECORD, hashes_of

WRITTEN = json.loads(RECORD.read_text(encoding="utf-8"))
HAS_TORCH = importlib.util.find_spec("torch") is not None


def test_the_record_has_every_case():
    assert list(WRITTEN["graphs"]) == list(CASES), f"rewrite {RECORD.name}: {COMMAND}"
    assert len({tuple(parts.values()) for parts in WRITTEN["graphs"].values()}) == len(CASES), "each case has a graph of its own"


@pytest.mark.parametrize("case", CASES)
def test_no_byte_moved(case, tmp_path):
    if WRITTEN["onnx"] != onnx.__version__:
        pytest.skip(
            f"{RECORD.name} was written with onnx {WRITTEN['onnx']}, this is {onnx.__version__}: another version may serialize otherwise"
        )
    if case.startswith("calibrated") and not HAS_TORCH:
        pytest.skip("calibration needs torch, which is not installed")
    moved = f"the graph of {case!r} is another one: if that is meant, {COMMAND} rewrites {RECORD.name}, and the commit says why"
    assert hashes_of(case, tmp_path) == WRITTEN["graphs"].get(case), moved
