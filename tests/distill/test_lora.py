"""`--lora_rank`: the student stays, three stages leave one adapter of it, which peft and this package read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("trl", reason="the [distill] extra is not installed")
peft = pytest.importorskip("peft")

from trtllm_thoughtx.checkpoint.opened import Checkpoint  # noqa: E402
from trtllm_thoughtx.checkpoint.weights import open_weights  # noqa: E402
from trtllm_thoughtx.cli import commands as cli  # noqa: E402
from trtllm_thoughtx.cli import params as console  # noqa: E402
from trtllm_thoughtx.distill import loop, models  # noqa: E402
from trtllm_thoughtx.families import tensors_of  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
FLAGS = ("--dtype", "float32", "--saved_dtype", "float32", "--lr", "3e-3", "--tokens_a_batch", 384, "--warmup_steps", 2, "-q", "--json")
STEPS = ("--supervised_steps", 40, "--preference_steps", 3, "--scored_steps", 2, "--batch_size", 4, "--num_generations", 4)


def run(*args):
    return console.run(cli.COMMANDS["distill"], "thoughtx-distill", [str(arg) for arg in args])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "start"
    models.new_model(path, num_layers=2, hidden_size=64, intermediate_size=96, max_positions=1024, seed=0)
    return path


def test_three_stages_leave_one_adapter_that_makes_their_model_of_the_student(start, tmp_path, capsys):
    out, before = tmp_path / "out", (start / "model.safetensors").read_bytes()
    assert run("--student_dir", start, "--output_dir", out, "--lora_rank", 4, *FLAGS, *STEPS, "--eval_items", 0) == 0
    made = json.loads(capsys.readouterr().out)
    assert (start / "model.safetensors").read_bytes() == before
    losses = [row["truth"] for row in loop.read_log(out / "supervised") if "truth" in row]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
    for number, stage in enumerate(made["stages"], 1):
        config = json.loads((out / stage["stage"] / "adapter/adapter_config.json").read_text())
        assert config["r"] == 4 * number and str(tmp_path) not in json.dumps(config)
        wanted = load_file(out / stage["stage"] / "model/model.safetensors")
        with open_weights(Checkpoint.open(start, lora_dir=out / stage["stage"] / "adapter")) as source:
            assert source.config.tied
            for tensor in tensors_of(source.config)[:-1]:
                rows, begin = source.read(tensor.name, "float32"), 0
                for part in tensor.parts:
                    np.testing.assert_allclose(rows[begin : begin + part.shape[0]], wanted[part.source], rtol=0, atol=2e-6)
                    begin += part.shape[0]
    bare = load_file(start / "model.safetensors")
    moved = np.abs(wanted["model.embed_tokens.weight"] - bare["model.embed_tokens.weight"]).max(1) > 0
    assert set(np.flatnonzero(moved)) == set(config["trainable_token_indices"])
    beside = peft.PeftModel.from_pretrained(models.load_model(start, torch.float32), out / "scored/adapter")
    ids = torch.tensor([[2, 9, 11, 4]])
    theirs, ours = beside(ids).logits, models.load_model(out / "scored/model", torch.float32)(ids).logits
    assert torch.allclose(theirs, ours, atol=1e-4) and not torch.allclose(
        ours, models.load_model(start, torch.float32)(ids).logits, atol=0.01
    )


def test_a_killed_run_goes_on_to_the_same_adapter(start, tmp_path, monkeypatch):
    def at(name, *more):
        assert run("supervised", "--student_dir", start, "--output_dir", tmp_path / name, "--lora_rank", 2, *FLAGS, *more) == 0
        return load_file(tmp_path / name / "supervised/adapter/adapter_model.safetensors")

    args = ("--supervised_steps", 8, "--save_every", 4)
    whole = at("whole", *args)
    step = loop.Watch.on_step_end

    def kill(self, args, state, control, **kwargs):
        step(self, args, state, control, **kwargs)
        if state.global_step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Watch, "on_step_end", kill)
    assert run("supervised", "--student_dir", start, "--output_dir", tmp_path / "cut", "--lora_rank", 2, *FLAGS, *args) == 130
    monkeypatch.undo()
    again = at("cut", *args)
    assert whole.keys() == again.keys() and all(np.array_equal(whole[name], again[name]) for name in whole)


def test_an_adapter_of_chosen_layers_is_refused(start, tmp_path):
    assert run("--student_dir", start, "--output_dir", tmp_path / "out", "--lora_rank", 2, "--layers", "0", "-q") == 2
