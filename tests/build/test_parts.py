"""Parts that are built apart make the engine that is built at once, to the byte."""

from __future__ import annotations

import json

import pytest
from tiny import write_tiny

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.errors import ThoughtxError

OPTIONS = {"backend": ("onnxruntime",), "num_stages": 2, "max_seq_len": 64, "max_batch_size": 2}


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """m, and its parts p0, p1, p2."""
    root = tmp_path_factory.mktemp("parts")
    write_tiny(root / "m", tokenizer=True)
    for index in range(3):
        build(root / "m", root / f"p{index}", OPTIONS, only_part=index)
    return root


def contents(path):
    return {one.name: one.read_bytes() for one in path.iterdir()}


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("tensorrt-rtx", marks=[pytest.mark.rtx, pytest.mark.slow])])
def test_parts_make_the_same_engine(backend, apart, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    parts, options = [apart / f"p{index}" for index in (2, 0, 1)], {**OPTIONS, "backend": (backend,)}
    if backend != "onnxruntime":
        pytest.importorskip("tensorrt_rtx", reason="it builds plans")
        parts = [tmp_path / f"p{index}" for index in range(3)]
        for index, part in enumerate(parts):
            build(apart / "m", part, options, only_part=index)
    build(apart / "m", _made(tmp_path / "once") / "e", options)
    made = build(apart / "m", _made(tmp_path / "apart") / "e", options, built_part=parts)
    assert [part["name"] for part in made["parts"]] == ["rank0.stage0", "rank0.stage1", "rank0.head"]
    assert contents(tmp_path / "apart" / "e") == contents(tmp_path / "once" / "e")


def _made(path):
    path.mkdir()
    return path


def refused(code, root, tmp_path, parts, options=OPTIONS, model="m"):
    with pytest.raises(ThoughtxError) as found:
        build(root / model, tmp_path / "e", options, built_part=[root / part for part in parts])
    assert found.value.code == code and not (tmp_path / "e").exists()
    return found.value


def test_what_does_not_belong_is_refused(apart, tmp_path):
    assert "part 1 (rank0.stage1)" in refused("E101", apart, tmp_path, ["p0", "p2"]).why
    refused("E120", apart, tmp_path, ["p0", "p1", "p2"], {**OPTIONS, "max_seq_len": 32})
    refused("E121", apart, tmp_path, ["p0", "p1", "m"])
    write_tiny(tmp_path / "other", tokenizer=True, seed=7)
    with pytest.raises(ThoughtxError) as found:
        build(tmp_path / "other", tmp_path / "e", OPTIONS, built_part=[apart / f"p{index}" for index in range(3)])
    assert found.value.code == "E120" and not (tmp_path / "e").exists()


def test_a_damaged_part_is_refused(apart, tmp_path):
    build(apart / "m", tmp_path / "p0", OPTIONS, only_part=0)
    data = bytearray((tmp_path / "p0" / "rank0.stage0.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "p0" / "rank0.stage0.data").write_bytes(bytes(data))
    with pytest.raises(ThoughtxError) as found:
        build(apart / "m", tmp_path / "e", OPTIONS, built_part=[tmp_path / "p0", apart / "p1", apart / "p2"])
    assert found.value.code == "E120" and not (tmp_path / "e").exists()


FLAGS = ["--backend", "onnxruntime", "--num_stages", "2", "--max_seq_len", "64"]
BAD = [
    (["--only_part", "3", *FLAGS], "use 0 to 2"),
    (["--only_part", "1", "--built_part", "x", *FLAGS], "give one"),
    (["--only_part", "0", "--backend", "tensorrt-llm"], "leave the flag out"),
]


@pytest.mark.parametrize(("words", "fix"), BAD)
def test_flags_that_do_not_fit(words, fix, apart, tmp_path, capsys):
    words = ["--checkpoint_dir", str(apart / "m"), "--output_dir", str(tmp_path / "e"), *words, "--json", "-q"]
    assert run(cli.build, "thoughtx-build", words) == 2
    assert fix in json.loads(capsys.readouterr().out)["error"]["fix"] and not (tmp_path / "e").exists()
