"""Every step that writes an output directory gives the same guarantees, and records the command that makes it again.

One table of steps, each through its command; what holds for one must hold for all. Exits go on, or what became of them is said.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tiny import write_tiny

from trtllm_thoughtx import files
from trtllm_thoughtx.build.flags import PATH, FilePath
from trtllm_thoughtx.build.options import OPTIONS
from trtllm_thoughtx.checkpoint import outputs, recorded
from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.checkpoint.exits import ExitAdapter, ExitHead, ExitWeights, read_exits, write_exits
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run

torch = pytest.importorskip("torch", reason="torch is needed to quantize and to look at attention")

LINEARS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
RECIPE = "use_chunked_attention: true\nmax_seq_len: 96\nchunk_size: auto\nmax_chunk_size: 32\nbase_size: 8.5\nearly_exit_layers: [1]\n"
CALIBRATE = "thoughtx-calibrate --model_dir m --output_dir out"
# step -> a command line whose flags are not the defaults
STEPS = {
    "convert": "thoughtx-convert --model_dir m --output_dir out --dtype float16 --tp_size 2",
    "import": "thoughtx-convert --model_dir q --output_dir out",
    "quantize": f"{CALIBRATE} --qformat int4_awq --calib_data rows.txt --calib_size 12 --calib_seq_len 40 --group_size 32 --seed 3 "
    "--exclude 'transformer.layers.0.*' --accuracy_budget kl=0.5 --quant_lm_head",
    "exits": f"{CALIBRATE} --exit_layers 1 --adapter_rank 4 --task chain,loan --num_items 2 --max_new_tokens 6 --seed 5",
    "chunks": f"{CALIBRATE} --chunk_report --context 128 --calib_size 2 --eval_items 0 --target_capture 0.2",
    "build": "thoughtx-build --checkpoint_dir m --output_dir out --backend onnxruntime --compute_capabilities 8.9,12.0 "
    "--optimization_level 2 --max_batch_size 3 --max_seq_len 80 --num_stages 2 --dtype float32",
    "recipe": "thoughtx-build --config recipe.yaml --checkpoint_dir m --output_dir out --backend onnxruntime --max_seq_len 64",
}
Place = namedtuple("Place", "root words")


def quantized(root: Path) -> None:
    """FP8 with a scale per matrix, as compressed-tensors writes it."""
    plain = write_tiny(root)
    changed: dict[str, np.ndarray] = {}
    for name in (f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS):
        scale = np.abs(plain[f"{name}.weight"]).max().reshape(1) / 448
        changed |= {f"{name}.weight": (plain[f"{name}.weight"] / scale).astype(ml_dtypes.float8_e4m3fn)}
        changed |= {f"{name}.weight_scale": scale.astype(np.float32), f"{name}.input_scale": np.array([0.05], np.float32)}
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    group = {"weights": inputs, "input_activations": inputs, "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    write_tiny(root, tensors=changed, config={"quantization_config": config})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_tiny(root / "m", tokenizer=True)
    quantized(root / "q")
    (root / "rows.txt").write_text("\n\n".join(f"x{i} = {i} and y = {i * 7} and what is the sum of both" for i in range(40)))
    (root / "recipe.yaml").write_text(RECIPE)
    return root


@pytest.fixture(scope="module", params=STEPS)
def once(request, inputs, tmp_path_factory):
    """The inputs and what the step made of them, and its words."""
    root, words = tmp_path_factory.mktemp("once") / "w", shlex.split(STEPS[request.param])
    shutil.copytree(inputs, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert status(words) == 0
    return Place(root, words)


@pytest.fixture(params=STEPS)
def place(request, inputs, tmp_path, monkeypatch):
    """A directory with all inputs, which is the working directory, and the words of the step's command."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, shlex.split(STEPS[request.param]))


@pytest.fixture
def finished(once, tmp_path, monkeypatch):
    """The same behind a run of the step."""
    shutil.copytree(once.root, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, once.words)


def status(words: list[str], *more: str) -> int:
    return run(cli.COMMANDS[words[0].removeprefix("thoughtx-")], words[0], [*words[1:], "--quiet", *more])


def contents(root: Path, *but: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir()) if path.name not in but}


def manifest(root: Path) -> dict:
    return json.loads((root / "manifest.json").read_text())


@pytest.mark.slow
def test_a_second_run_finds_its_output_up_to_date(finished, capsys):
    before = contents(finished.root / "out")
    capsys.readouterr()
    assert status(finished.words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["up_to_date"] is True
    assert contents(finished.root / "out") == before
    assert status(finished.words) == 0
    assert "up to date" in capsys.readouterr().out
    assert status(finished.words, "--force") == 0
    varying = ("manifest.json", "calibration.json", "report.html", "chunks.png")
    assert contents(finished.root / "out", *varying) == {n: data for n, data in before.items() if n not in varying}


@pytest.mark.slow
def test_a_damaged_output_is_not_up_to_date(finished, capsys):
    name = next(row["name"] for row in manifest(finished.root / "out")["outputs"] if row["name"] != "config.json")
    with (finished.root / "out" / name).open("ab") as out:
        out.write(b"x")
    assert status(finished.words) == 3
    assert "E130" in capsys.readouterr().err
    assert status(finished.words, "--force") == 0


def test_a_disk_that_is_too_small_is_seen_before_any_work(place, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: namedtuple("usage", "total used free")(1, 1, 0))
    assert status(place.words) == 4
    assert "E203" in capsys.readouterr().err and not (place.root / "out").exists()


def test_an_input_that_changes_during_the_work_is_refused(place, monkeypatch, capsys):
    model = place.root / ("q" if "q" in place.words else "m")
    real = files.atomic_dir

    def touching(target, *, force):
        if target.name == "out":
            os.utime(model / "config.json", ns=(1, 1))
        return real(target, force=force)

    monkeypatch.setattr(files, "atomic_dir", touching)
    assert status(place.words) == 3
    assert "E111" in capsys.readouterr().err and not (place.root / "out").exists()


def test_the_manifest_has_inputs_versions_and_settings(finished):
    made = manifest(finished.root / "out")
    assert set(outputs.PACKAGES) < set(made["environment"]) and made["environment"]["numpy"] == np.__version__
    model = finished.root / ("q" if "q" in finished.words else "m")
    assert {row["name"] for row in made["inputs"]} == {path.name for path in model.iterdir()}
    assert made["config"] and {row["name"] for row in made["outputs"]} == set(contents(finished.root / "out", "manifest.json"))


def parsed(words: list[str]) -> dict:
    """What the parser makes of a command line, recipe included."""
    command = cli.COMMANDS[words[0].removeprefix("thoughtx-")]
    with command.make_context(words[0], words[1:]) as context:
        flat = {name: value for name, value in context.params.items() if value not in (None, False, ())}
    if "backend" in flat:
        flat["backend"] = tuple(name for names in flat["backend"] for name in names)
    return flat


def library_functions():
    from trtllm_thoughtx.build.build import build
    from trtllm_thoughtx.calibrate.chunks.job import chunk_report
    from trtllm_thoughtx.calibrate.exits.calibrate import calibrate_exits
    from trtllm_thoughtx.calibrate.quantize.job import calibrate
    from trtllm_thoughtx.checkpoint.quantized import import_quantized

    return {"convert": [convert, import_quantized], "calibrate": [calibrate, chunk_report, calibrate_exits], "build": [build]}


@pytest.mark.parametrize("name", ["convert", "calibrate", "build"])
def test_every_flag_is_an_argument_and_every_argument_a_flag(name):
    """What a manifest records are the arguments of one call: a flag that is not among them would be lost."""
    made_of = [set(inspect.signature(function).parameters) for function in library_functions()[name]]
    arguments = set().union(*made_of) - recorded.NOT_RECORDED
    if name == "build":
        arguments = arguments - {"options"} | set(OPTIONS)
    flags = {max(param.opts, key=len).lstrip("-"): param for param in cli.COMMANDS[name].params}
    theirs = set(flags) - {"config", "json", "quiet", "debug", "version", "chunk_report"} - recorded.NOT_RECORDED
    assert {recorded.FLAGS.get(one, one) for one in arguments} == theirs
    paths = {flag for flag in theirs if isinstance(flags[flag].type, FilePath)}
    assert paths <= {*recorded.PATHS, *(one for one, row in OPTIONS.items() if name == "build" and row.takes is PATH)}


@pytest.mark.slow
def test_the_recorded_command_makes_the_same_output(finished):
    words = shlex.split(manifest(finished.root / "out")["command"])
    assert words[0] == finished.words[0] and "--config" not in words
    again, asked = parsed(words), parsed(finished.words)
    assert {name: again.get(name) for name in asked} == asked, "a flag was lost"
    os.rename(finished.root / "out", finished.root / "first")
    assert status(words) == 0
    one, other = (manifest(finished.root / name) for name in ("first", "out"))
    assert one["command"] == other["command"] and one["config"] == other["config"]
    varying = ("manifest.json", "calibration.json", "report.html", "chunks.png")
    assert contents(finished.root / "first", *varying) == contents(finished.root / "out", *varying)
    if finished.words[0] == "thoughtx-build":
        first, second = (json.loads((finished.root / name / "config.json").read_text())["thoughtx"]["parts"] for name in ("first", "out"))
        assert [(part["graph_sha256"], part["weights_sha256"]) for part in first] == [
            (part["graph_sha256"], part["weights_sha256"]) for part in second
        ]


# --- exits ----------------------------------------------------------------------------------------------------------------


def with_exits(root: Path, **options: object) -> Path:
    """A TensorRT-LLM checkpoint with an exit head and an adapter."""
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) / np.float32(4)

    write_tiny(root / "hf", tokenizer=True, **options)
    convert(root / "hf", root / "c")
    adapter = ExitAdapter(1, 1 + noise(64), noise(4, 64), noise(64, 4), noise(1, 64), noise(1), 0.5)
    with open_weights(root / "c") as source:
        write_exits(root / "c", ExitWeights(ExitHead(noise(2, 64), noise(2), 0.75), (adapter,), {"made": "up"}), source.config)
    return root / "c"


EXIT_FILES = ("exits.json", "exits.safetensors")


@pytest.mark.parametrize("words", [[], ["--dtype", "float16"], ["--pp_size", "2"]])
def test_converting_again_keeps_the_exits(tmp_path, words, capsys):
    path = with_exits(tmp_path)
    assert status(["thoughtx-convert", "--model_dir", str(path), "--output_dir", str(tmp_path / "o"), *words, "--json"]) == 0
    assert "exit head" in json.loads(capsys.readouterr().out)["exits"]
    for name in EXIT_FILES:
        assert (tmp_path / "o" / name).read_bytes() == (path / name).read_bytes()
    assert set(EXIT_FILES) <= {row["name"] for row in manifest(tmp_path / "o")["inputs"]}


def test_quantizing_keeps_the_exits_and_says_when_their_thresholds_were_calibrated(tmp_path, capsys):
    path = with_exits(tmp_path)
    words = ["thoughtx-calibrate", "--model_dir", str(path), "--output_dir", str(tmp_path / "o"), "--qformat", "int8_wo"]
    assert run(cli.calibrate, words[0], [*words[1:], "--calib_size", "8", "--calib_seq_len", "32"]) == 0
    said = "thresholds calibrated before the layers were quantized"
    assert said in " ".join(capsys.readouterr().err.split())
    assert any(said in one for one in json.loads((tmp_path / "o" / "calibration.json").read_text())["warnings"])
    with open_weights(tmp_path / "o") as source:
        kept, was = read_exits(tmp_path / "o", source.config), read_exits(path, source.config)
    assert kept.head.threshold == was.head.threshold and len(kept.adapters) == 1
    assert status(["thoughtx-build", "--checkpoint_dir", str(tmp_path / "o"), "--output_dir", str(tmp_path / "e"),
                   "--backend", "onnxruntime", "--max_seq_len", "64", "--early_exit_layers", "1"]) == 0  # fmt: skip
    assert json.loads((tmp_path / "e" / "config.json").read_text())["thoughtx"]["build"]["exit_threshold"] == 0.75


def test_exits_that_a_build_leaves_out_are_named(tmp_path, capsys):
    path = with_exits(tmp_path)
    words = ["thoughtx-build", "--checkpoint_dir", str(path), "--output_dir", str(tmp_path / "e"), "--backend", "onnxruntime"]
    assert run(cli.build, words[0], [*words[1:], "--max_seq_len", "64", "--json"]) == 0
    done = capsys.readouterr()
    notes = json.loads(done.out)["notes"]
    assert len(notes) == 1 and "before layers 1 are left out" in notes[0] and notes[0] in " ".join(done.err.split())
    assert run(cli.build, words[0], [*words[1:], "--max_seq_len", "64", "--early_exit_layers", "1", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


@pytest.mark.parametrize("step", ["convert", "calibrate"])
def test_damaged_exits_are_refused_before_anything_is_written(tmp_path, step, capsys):
    path = with_exits(tmp_path)
    (path / "exits.safetensors").unlink()
    words = ["--model_dir", str(path), "--output_dir", str(tmp_path / "o"), *(["--qformat", "int8_wo"] if step == "calibrate" else [])]
    assert status([f"thoughtx-{step}", *words]) == 3
    assert "E106" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_quantized_checkpoint_is_not_converted_again(tmp_path, capsys):
    quantized(tmp_path / "q")
    assert status(["thoughtx-convert", "--model_dir", str(tmp_path / "q"), "--output_dir", str(tmp_path / "c")]) == 0
    assert status(["thoughtx-convert", "--model_dir", str(tmp_path / "c"), "--output_dir", str(tmp_path / "d")]) == 3
    assert "E103" in capsys.readouterr().err and not (tmp_path / "d").exists()
