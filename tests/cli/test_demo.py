"""`make demo` judges the answer that stands behind the thinking, whatever tags the sample has."""

from __future__ import annotations

import pytest

from trtllm_thoughtx.cli.demo import ANSWER, _answered, _proved
from trtllm_thoughtx.report import junit
from trtllm_thoughtx.text.tokens import THINK_TAGS


@pytest.mark.parametrize("tags", THINK_TAGS, ids=["think", "thought"])
def test_the_answer_stands_behind_the_end_tag(tags):
    begin, end = tags
    for opened in (begin, ""):  # a chat template may have opened the thinking
        assert _answered(f"{opened}01 38\n\n02 13{end}22 .\n") == "22"
        assert _answered(f"{opened}22 22") == _answered(f"{opened}22{end}") == "nothing"


def test_a_wrong_answer_is_a_failed_demo(tmp_path):
    junit(tmp_path / "checks.xml", [], "thoughtx-validate")
    for said, is_right in ((ANSWER, True), (ANSWER + "0", False)):
        assert _proved(tmp_path / "checks.xml", f"<think>1</think>{said}")[1] is is_right
