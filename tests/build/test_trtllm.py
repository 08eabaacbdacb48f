"""`--backend tensorrt-llm`: the command line is right by the table of flags, a stand-in for trtllm-build is run with it, and what 1.2 lacks
is refused. No TensorRT-LLM is needed; where it is installed, its own parser is asked as well."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from places import ROOT
from tiny import write_tiny

from trtllm_thoughtx import report
from trtllm_thoughtx.build import trtllm
from trtllm_thoughtx.build.options import OPTIONS
from trtllm_thoughtx.build.trtllm_flags import FLAGS, parse
from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.cli.recipe import read_recipe
from trtllm_thoughtx.families.trtllm_config import model_config_from_trtllm

COMMON = (
    "--max_beam_width 1 --max_num_tokens {tokens} --kv_cache_type paged --remove_input_padding enable --context_fmha enable"
    " --use_paged_context_fmha enable --gemm_plugin {gemm} --use_fused_mlp {fused} --workers {ranks} --log_level info"
)
LIMITS = "--checkpoint_dir {c} --output_dir {o} --max_batch_size {batch} --max_input_len {input} --max_seq_len {seq} "


def golden(c: object, o: object, batch: int, length: int, seq: int, tokens: int, *, ranks: int = 1, fp8: bool = False) -> list[str]:
    more = {"gemm": "disable" if fp8 else "auto", "fused": "disable" if fp8 else "enable", "ranks": ranks, "tokens": tokens}
    return shlex.split((LIMITS + COMMON).format(c=c, o=o, batch=batch, input=length, seq=seq, **more))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m: a model; one, two: its checkpoint in one piece and in two ranks."""
    work = tmp_path_factory.mktemp("made")
    write_tiny(work / "m", num_layers=2, max_position=256, tokenizer=True)
    convert(work / "m", work / "one")
    convert(work / "m", work / "two", tp_size=2)
    return work


def build(checkpoint: Path, target: Path, *more: object) -> int:
    words = ["--checkpoint_dir", checkpoint, "--output_dir", target, "--backend", "tensorrt-llm", *more, "--json", "-q"]
    return run(cli.build, "thoughtx-build", [str(word) for word in words])


def answer(capsys: Any) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trtllm-build that notes its arguments and writes what FILES names; it fails as BROKEN says."""
    place = tmp_path / "bin" / "trtllm-build"
    place.parent.mkdir()
    place.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/argv"\necho loading\necho "building rank 0" >&2\n'
        'while [ "$1" != --output_dir ]; do shift; done\nfor f in ${FILES:-config.json rank0.engine}; do\n'
        'echo \'{"pretrained_config": {}, "build_config": {}}\' > "$2/$f"; done\n'
        'if [ -n "$BROKEN" ]; then echo "AssertionError: Engine building failed, please check the error log."; exit 1; fi\n'
    )
    place.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place.parent}{os.pathsep}{os.environ['PATH']}")
    return place


# --- the command line -----------------------------------------------------------------------------------------------------


def test_the_command_of_a_checkpoint(made: Path, tmp_path: Path, capsys: Any) -> None:
    assert build(made / "one", tmp_path / "e", "--dry_run") == 0
    document = answer(capsys)
    assert document["trtllm_build"] == ["trtllm-build", *golden(made / "one", tmp_path / "e", 4, 256, 256, 1024)]
    assert document["dry_run"] is True and not (tmp_path / "e").exists()
    more = ("--max_batch_size", 64, "--max_input_len", 200, "--max_seq_len", 250)
    assert build(made / "two", tmp_path / "e", "--dry_run", *more) == 0
    assert answer(capsys)["trtllm_build"][1:] == golden(made / "two", tmp_path / "e", 64, 200, 250, 8192, ranks=2)


def changed(checkpoint: Path, target: Path, **fields: object) -> None:
    """A copy whose config.json says something else; nothing else is looked at before the program runs."""
    shutil.copytree(checkpoint, target)
    raw = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, **fields}))


def test_fp8_keeps_the_scales_of_the_checkpoint(made: Path, tmp_path: Path, capsys: Any) -> None:
    changed(made / "one", tmp_path / "q", quantization={"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"})
    assert build(tmp_path / "q", tmp_path / "e", "--dry_run") == 0
    said = parse(answer(capsys)["trtllm_build"][1:])
    assert (said["gemm_plugin"], said["use_fused_mlp"]) == ("disable", "disable")


RECIPES = ("qwen2.5-0.5b-cpu-fp32.yaml", "qwen2.5-7b-rtx-fp16.yaml", "thoughtx-tiny.yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_the_limits_of_each_recipe_are_understood(name: str, made: Path) -> None:
    context = click.Context(cli.build, info_name="thoughtx-build")
    settings = read_recipe(ROOT / "build_configs" / name, cli.build, context, ())
    limits = {"max_input_len": 512, **{key: int(settings[key]) for key in trtllm.LIMITS if key in settings}}
    limits.setdefault("max_batch_size", 4)
    raw = json.loads((made / "one" / "config.json").read_text())
    words = trtllm.arguments(Path("c"), Path("o"), model_config_from_trtllm(raw, "c"), limits, 1)
    tokens = max(limits["max_input_len"], min(8192, limits["max_batch_size"] * limits["max_input_len"]))
    assert words == golden("c", "o", limits["max_batch_size"], limits["max_input_len"], limits["max_seq_len"], tokens)
    assert parse(words)["max_num_tokens"] == tokens


@pytest.mark.parametrize("wrong", ["--chunk_size 64", "--max_batch_size many", "--kv_cache_type static", "--max_batch 4"])
def test_the_table_refuses_what_the_command_would(wrong: str) -> None:
    with pytest.raises(ValueError):
        parse(wrong.split())


def test_the_table_is_the_parser_of_the_package() -> None:
    module = pytest.importorskip("tensorrt_llm.commands.build", reason="TensorRT-LLM 1.2 is not installed; it needs a GPU")
    theirs = {action.dest: action for action in module.parse_arguments()._actions}
    for flag in FLAGS.values():
        assert flag.name in theirs, flag
        if flag.choices and theirs[flag.name].choices:
            assert set(flag.choices) <= set(map(str, theirs[flag.name].choices)), flag


def test_every_option_of_a_build_is_taken_or_refused() -> None:
    known = {"backend", "dtype", "use_chunked_attention", *trtllm.LIMITS, *trtllm.NOT_HERE}
    assert {name for name, row in OPTIONS.items() if not row.is_of_chunks} <= known


# --- running it -----------------------------------------------------------------------------------------------------------


def test_the_program_is_run_and_what_it_made_is_kept(made: Path, tmp_path: Path, program: Path, capsys: Any, monkeypatch: Any) -> None:
    assert build(made / "one", tmp_path / "e") == 0
    document = answer(capsys)
    argv = (tmp_path / "argv").read_text().splitlines()
    partial = argv[argv.index("--output_dir") + 1]
    assert argv == golden(made / "one", partial, 4, 256, 256, 1024) and Path(partial).parent == tmp_path and not Path(partial).exists()
    assert {"rank0.engine", "config.json", "tokenizer.json", "manifest.json"} <= set(document["files"])
    manifest = report.read_manifest(tmp_path / "e")
    assert {row["name"] for row in manifest["outputs"]} == {path.name for path in (tmp_path / "e").iterdir()} - {"manifest.json"}
    assert "--backend tensorrt-llm" in manifest["command"] and str(tmp_path) not in json.dumps(manifest)
    (tmp_path / "argv").unlink()
    assert build(made / "one", tmp_path / "e") == 0 and answer(capsys)["up_to_date"] is True
    assert not (tmp_path / "argv").exists()
    assert run(cli.COMMANDS["bench"], "thoughtx-bench", ["--engine_dir", str(tmp_path / "e"), "--json"]) == 3
    assert "TensorRT-LLM's own engine" in answer(capsys)["error"]["why"]
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    assert run(cli.COMMANDS["run"], "thoughtx-run", ["--engine_dir", str(tmp_path / "e"), "--prompt", "x", "--json"]) == 4
    assert "TensorRT-LLM 1.2 cannot be imported here" in answer(capsys)["error"]["what"]  # behind its manifest, which is right


def test_a_failure_is_told_with_its_last_lines(made: Path, tmp_path: Path, program: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("BROKEN", "1")
    assert build(made / "one", tmp_path / "e") == 4
    error = answer(capsys)["error"]
    assert error["code"] == "E205" and "Engine building failed" in error["why"] and "building rank 0" in error["why"]
    assert not (tmp_path / "e").exists() and not list(tmp_path.glob(".e.*"))


def test_an_engine_of_each_rank_is_wanted(made: Path, tmp_path: Path, program: Path, capsys: Any, monkeypatch: Any) -> None:
    assert build(made / "two", tmp_path / "e") == 4
    assert "rank1.engine" in answer(capsys)["error"]["why"]
    monkeypatch.setenv("FILES", "config.json rank0.engine rank1.engine")
    assert build(made / "two", tmp_path / "e") == 0


def test_where_it_is_not_installed_the_command_is_told(made: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build(made / "one", tmp_path / "e") == 4
    error = answer(capsys)["error"]
    assert error["code"] == "E201"
    assert shlex.split(error["fix"].partition("1.2: ")[2]) == ["trtllm-build", *golden(made / "one", tmp_path / "e", 4, 256, 256, 1024)]


def test_another_release_is_refused(made: Path, tmp_path: Path, program: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(trtllm.importlib.metadata, "version", lambda name: "1.4.0")
    assert build(made / "one", tmp_path / "e") == 4
    assert "1.4.0" in answer(capsys)["error"]["why"]


# --- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("--use_chunked_attention", "--chunk_size", "64"), "E103", "no chunk mask"),
        (("--use_chunked_attention",), "E103", "no chunk mask"),
        (("--sink_tokens", "4"), "E001", "only with chunked attention"),
        (("--early_exit_layers", "1"), "E001", "one plan a rank"),
        (("--compute_capabilities", "8.9"), "E001", "the GPU that builds it"),
        (("--optimization_level", "3"), "E001", "no such flag"),
        (("--dtype", "float16"), "E001", "in the checkpoint's type"),
        (("--max_seq_len", "100000"), "E001", "256 positions"),
        (("--backend", "onnxruntime"), "E001", "a directory of its own kind"),
    ],
)
def test_what_it_cannot_do_is_refused(more: tuple, code: str, says: str, made: Path, tmp_path: Path, program: Path, capsys: Any) -> None:
    assert build(made / "one", tmp_path / "e", *more) in (2, 3)
    error = answer(capsys)["error"]
    assert error["code"] == code and says in error["what"] + error["why"], error
    assert not (tmp_path / "e").exists() and not (tmp_path / "argv").exists()


def test_a_chunk_that_holds_everything_is_full_attention(made: Path, tmp_path: Path, capsys: Any) -> None:
    assert build(made / "one", tmp_path / "e", "--use_chunked_attention", "--chunk_size", "256", "--dry_run") == 0


def test_a_hugging_face_directory_is_converted_first(made: Path, tmp_path: Path, capsys: Any) -> None:
    assert build(made / "m", tmp_path / "e") == 3
    error = answer(capsys)["error"]
    assert error["code"] == "E101" and f"thoughtx-convert --model_dir {made / 'm'}" in error["fix"]


def test_formats_in_another_order_are_refused(made: Path, tmp_path: Path, capsys: Any) -> None:
    changed(made / "one", tmp_path / "q", quantization={"quant_algo": "W8A16", "kv_cache_quant_algo": None})
    assert build(tmp_path / "q", tmp_path / "e") == 3
    error = answer(capsys)["error"]
    assert error["code"] == "E103" and "W8A16" in error["why"]


def test_experts_whose_shares_do_not_sum_to_one_are_refused(tmp_path: Path, capsys: Any) -> None:
    hf_models = pytest.importorskip("hf_models", reason="the model is made by transformers")
    convert(hf_models.save(tmp_path / "m", "qwen3_moe"), tmp_path / "right")
    assert build(tmp_path / "right", tmp_path / "e", "--dry_run") == 0
    capsys.readouterr()
    raw = json.loads((tmp_path / "right" / "config.json").read_text())
    changed(tmp_path / "right", tmp_path / "x", moe={**raw["moe"], "normalization_mode": 0})
    assert build(tmp_path / "x", tmp_path / "e") == 3
    assert "not normalized" in answer(capsys)["error"]["what"]
