"""`--export_check`: the files are Polygraphy's, a good engine passes there and a wrong one fails, where this package is not installed."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracles
import planned
import pytest
from tiny import write_tiny

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run

COMMON = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stages": {"early_exit_layers": (1,)},
    "chunked": {"use_chunked_attention": True, "chunk_size": 16, "sink_tokens": 2},
    "any chunk": {"use_chunked_attention": True, "chunk_size": 16, "max_chunk_size": 64},
    "float16": {"dtype": "float16"},
    "short": {"max_seq_len": 2, "max_input_len": 2},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each engine with its check beside it."""
    work = tmp_path_factory.mktemp("made")
    write_tiny(work / "m", num_layers=2, max_position=256, tokenizer=True)
    for name, options in ENGINES.items():
        build(work / "m", work / name, {**COMMON, **options})
        assert validate("--engine_dir", work / name, "--export_check", work / f"{name}-check") == 0
    return work


def validate(*words: object) -> int:
    return run(cli.COMMANDS["validate"], "thoughtx-validate", [*map(str, words), "-q"])


def check(engine: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """check.sh as a host without this package runs it."""
    clean = {"PATH": f"{oracles.PLACE / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
    return subprocess.run(["sh", folder / "check.sh", engine, *more], env=clean, capture_output=True, text=True, check=False)


def stored(path: Path) -> dict[str, np.ndarray]:
    raw = json.loads(path.read_text())
    rows = raw[0] if isinstance(raw, list) else {name: one["values"] for name, one in raw["lst"][0][1][0]["outputs"].items()}
    return {name: np.load(io.BytesIO(base64.b64decode(one["array"])), allow_pickle=False) for name, one in rows.items()}


def loader(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("loader_of_a_check", folder / "data_loader.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def off_by_one_percent(engine: Path, tensor: str, *, whole: bool) -> None:
    """One weight, or all of one tensor, in the weights beside the graph."""
    graph = onnx.load(engine / "rank0.onnx", load_external_data=False).graph
    found = next(one for one in graph.initializer if one.name == tensor)
    place = {entry.key: entry.value for entry in found.external_data}
    values = np.memmap(engine / place["location"], np.float32, "r+", int(place.get("offset", 0)), (int(place["length"]) // 4,))
    moved = slice(None) if whole else slice(5, 6)
    values[moved] *= np.float32(1.01)
    values.flush()


# --- beside Polygraphy --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_a_good_engine_passes(name: str, made: Path) -> None:
    oracles.need("polygraphy.comparator")
    assert oracles.run("python", "-c", "import trtllm_thoughtx", cwd=made).returncode != 0, "this package must not be there"
    done = check(made / name, made / f"{name}-check")
    assert done.returncode == 0, done.stdout[-2000:]
    parts = len(list((made / name).glob("*.onnx")))
    assert done.stdout.count("Pass Rate: 100.00%") == 2 * parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "whole"),
    [
        ("transformer.layers.0.input_layernorm.weight", False),
        ("transformer.layers.0.mlp.proj.weight", True),
        ("transformer.ln_f.weight", False),
    ],
)
def test_one_weight_that_is_off_by_one_percent_fails(tensor: str, whole: bool, made: Path, tmp_path: Path) -> None:
    oracles.need("polygraphy.comparator")
    engine = Path(shutil.copytree(made / "plain", tmp_path / "e"))
    off_by_one_percent(engine, tensor, whole=whole)
    done = check(engine, made / "plain-check")
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
def test_polygraphys_tools_take_the_files(made: Path) -> None:
    oracles.need("polygraphy.comparator")
    graph, folder = made / "stages" / "rank0.stage0.onnx", made / "stages-check"
    done = oracles.run("polygraphy", "check", "lint", graph)
    assert done.returncode == 0, done.stdout[-2000:]
    done = oracles.run("polygraphy", "inspect", "model", graph, "--show", "layers")
    assert done.returncode == 0 and "past_key_0" in done.stdout
    for file in sorted(folder.glob("*.json")):
        done = oracles.run("polygraphy", "inspect", "data", file)
        assert done.returncode == 0, done.stdout[-2000:]


# --- the files ----------------------------------------------------------------------------------------------------------


FAILS = """
import sys, onnx
graph = onnx.load("polygraphy_debug.onnx", load_external_data=False).graph
sys.exit(any(node.op_type == "Swish" and node.output[0].startswith("layers.1.") for node in graph.node))
"""


@pytest.mark.slow
def test_a_graph_is_reduced_to_the_node_that_fails(made: Path, tmp_path: Path) -> None:
    """reduce.sh with a check that needs no TensorRT: it fails as long as one node is there."""
    oracles.need("polygraphy")
    folder = Path(shutil.copytree(made / "plain-check", tmp_path / "check"))
    (folder / "fails.py").write_text(FAILS)
    assert "--onnxrt --trt --load-inputs layers.json" in (folder / "reduce.sh").read_text()
    clean = {"PATH": f"{oracles.PLACE / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
    words = ["sh", folder / "reduce.sh", made / "plain", "python", "fails.py"]
    done = subprocess.run(words, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    nodes = onnx.load(folder / "reduced.onnx", load_external_data=False).graph.node
    assert [node.output[0] for node in nodes if node.op_type == "Swish"] == ["layers.1.mlp.active"] and len(nodes) < 10


@pytest.mark.parametrize("name", ENGINES)
def test_the_golden_values_are_those_of_a_request(name: str, made: Path) -> None:
    """Prefill and decode of the head part are the logits that the engine gives for the same tokens."""
    folder = made / f"{name}-check"
    first, last = (sorted(folder.glob(f"*.{step}.inputs.json")) for step in ("prefill", "decode"))
    feeds = [next(iter(one for one in (stored(path) for path in paths) if "input_ids" in one)) for paths in (first, last)]
    ids = [int(token) for one in feeds for token in one["input_ids"][0]]
    size = int(feeds[0]["chunk_size"][0]) if "chunk_size" in feeds[0] else None
    engine = Engine.load(made / name, "onnxruntime", exact=True)
    wanted = engine.forward([ids], chunk_size=size)[0]
    engine.close()
    golden = {}
    for step in ("prefill", "decode"):
        golden[step] = next(one for one in map(stored, folder.glob(f"*.{step}.golden.json")) if "logits" in one)
    rows = golden["prefill"]["logits"][0]
    close = {"rtol": 0, "atol": (1e-5 if name != "float16" else 4e-3) * float(np.abs(wanted).max())}
    np.testing.assert_allclose(rows, wanted[len(ids) - 1 - len(rows) : -1], **close)
    np.testing.assert_allclose(golden["decode"]["logits"][0, 0], wanted[-1], **close)


def test_the_kv_cache_is_stored_as_far_as_it_is_written(made: Path) -> None:
    folder, module = made / "plain-check", loader(made / "plain-check")
    assert stored(folder / "rank0.prefill.inputs.json")["past_key_0"].shape[2] == 0
    held = stored(folder / "rank0.decode.inputs.json")["past_key_0"]
    assert held.shape[2] == 17 and np.abs(held).max() > 0
    (full,) = module.rank0_decode()
    assert full["past_key_0"].shape == (1, 2, 64, 16)
    np.testing.assert_array_equal(full["past_key_0"][:, :, :17], held)
    assert not full["past_key_0"][:, :, 17:].any()
    (empty,) = module.rank0_prefill()
    assert empty["past_value_1"].shape == (1, 2, 64, 16) and not empty["past_value_1"].any()


def test_commands_of_plans(made: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(made / "plain", tmp_path / "e"))
    planned.add_plans(engine, {"tensorrt-rtx": b"plan", "tensorrt": b"plan"}, {}, library=b"\x7fELF")
    assert validate("--engine_dir", engine, "--export_check", tmp_path / "c") == 0
    script = (tmp_path / "c" / "check.sh").read_text()
    rtx = script.partition("tensorrt-rtx)")[2]
    assert (
        "export POLYGRAPHY_USE_TENSORRT_RTX=1" in rtx and '"$engine/rank0.engine" --trt --model-type engine --optimization-profile 0' in rtx
    )
    plain = script.partition("tensorrt)")[2].partition(";;")[0]
    assert "POLYGRAPHY_USE_TENSORRT_RTX" not in plain and plain.count("--plugins") == 2
    assert '"$engine/rank0.trt.engine" --trt --model-type engine --optimization-profile 1' in plain
    assert subprocess.run(["sh", "-n", tmp_path / "c" / "check.sh"], check=False).returncode == 0
    done = check(engine, tmp_path / "c", "tensorrt-llm")
    assert done.returncode == 2 and "backends: onnxruntime tensorrt tensorrt-rtx" in done.stderr


def test_the_export_repeats(made: Path, tmp_path: Path) -> None:
    assert validate("--engine_dir", made / "stages", "--export_check", tmp_path / "c") == 0
    for path in sorted((tmp_path / "c").iterdir()):
        assert path.read_bytes() == (made / "stages-check" / path.name).read_bytes(), path.name


# --- refusals -----------------------------------------------------------------------------------------------------------


def refused(capsys: Any, *words: object) -> dict[str, str]:
    capsys.readouterr()
    assert validate(*words, "--json") == 3
    return dict(json.loads(capsys.readouterr().out)["error"])


def test_refusals_come_before_any_work(made: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build(made / "m", tmp_path / "bf16", {**COMMON, "dtype": "bfloat16"})
    monkeypatch.setattr("trtllm_thoughtx.validate.polygraphy.Engine.load", lambda *a, **k: pytest.fail("work was done"))
    monkeypatch.setattr("trtllm_thoughtx.validate.validate.run_reference", lambda *a, **k: pytest.fail("work was done"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    words = ("--engine_dir", made / "plain", "--reference", made / "m", "--export_check")
    for target in (tmp_path / "full", made / "plain" / "c", tmp_path / "none" / "c"):
        assert refused(capsys, *words, target)["code"] == "E130"
    error = refused(capsys, "--engine_dir", tmp_path / "bf16", "--export_check", tmp_path / "c")
    assert error["code"] == "E103" and "--dtype float32" in error["fix"]
    assert not (tmp_path / "c").exists()


def test_an_engine_without_its_weights_is_refused(made: Path, tmp_path: Path, capsys: Any) -> None:
    engine = Path(shutil.copytree(made / "plain", tmp_path / "e"))
    planned.add_plans(engine, {"tensorrt-rtx": b"plan"}, {})
    raw = json.loads((engine / "config.json").read_text())
    raw["thoughtx"]["build"]["backends"] = ["tensorrt-rtx"]
    for part in raw["thoughtx"]["parts"]:
        (engine / part["data"]).unlink()
        part |= {"data": None, "weights_sha256": None}
    (engine / "config.json").write_text(json.dumps(raw))
    planned.again(engine)
    error = refused(capsys, "--engine_dir", engine, "--export_check", tmp_path / "c")
    assert error["code"] == "E101" and "--backend tensorrt-rtx,onnxruntime" in error["fix"]


def test_a_changed_engine_exports_nothing(made: Path, tmp_path: Path, capsys: Any) -> None:
    engine = Path(shutil.copytree(made / "plain", tmp_path / "e"))
    off_by_one_percent(engine, "transformer.ln_f.weight", whole=True)
    assert validate("--engine_dir", engine, "--export_check", tmp_path / "c") == 1
    assert not (tmp_path / "c").exists()
