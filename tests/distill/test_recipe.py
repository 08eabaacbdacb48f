"""The whole recipe at the size of a test: three stages from the command line, on generated tasks and on a file of traces."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from chat_models import write_chat_model
from places import LONGCOT

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("trl", reason="the [distill] extra is not installed")

from trtllm_thoughtx.cli import commands as cli  # noqa: E402
from trtllm_thoughtx.cli import params as console  # noqa: E402
from trtllm_thoughtx.distill import ablation, loop, models, plan, preference, reward, rows, traces  # noqa: E402
from trtllm_thoughtx.distill.settings import Settings  # noqa: E402
from trtllm_thoughtx.errors import CODES, ThoughtxError  # noqa: E402
from trtllm_thoughtx.tasks import draw, item  # noqa: E402
from trtllm_thoughtx.text.answer import Reply, split_ids, split_text  # noqa: E402
from trtllm_thoughtx.text.tokens import THINK_TAGS  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
TINY = ("--dtype", "float32", "--no_gradient_checkpointing", "--lr", "3e-3", "--tokens_a_batch", "384", "--warmup_steps", "5", "-q")


def run(*args):
    return console.run(cli.COMMANDS["distill"], "thoughtx-distill", [str(arg) for arg in args])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A fifth of a million parameters, random."""
    path = tmp_path_factory.mktemp("recipe") / "start"
    models.new_model(path, num_layers=4, hidden_size=64, intermediate_size=192, max_positions=2048, seed=0)
    assert 180_000 < sum(p.numel() for p in models.load_student(path, "float32").parameters()) < 260_000
    return path


# --- the command ---------------------------------------------------------------------------------------------------------


def test_three_stages_from_the_command_line(start, tmp_path, capsys):
    """Losses fall, every stage leaves a model, the table and the curves are there, and a second call has nothing to do."""
    out = tmp_path / "out"
    args = ("--student_dir", start, "--teacher_dir", start, "--kd_weight", "0.1", "--output_dir", out, *TINY, "--reasoning_steps", "varied")
    args += ("--supervised_steps", 150, "--preference_steps", 12, "--scored_steps", 3, "--batch_size", 16, "--num_generations", 4)
    args += ("--per_device_batch_size", 16, "--preference_lr", "1e-3", "--scored_lr", "1e-4", "--eval_items", 1, "--curriculum", "--json")
    assert run(*args) == 0
    made = json.loads(capsys.readouterr().out)
    log = [row["truth"] for row in loop.read_log(out / "supervised") if "truth" in row]
    assert np.mean(log[-10:]) < 0.6 * np.mean(log[:5])
    pairs = [row["loss"] for row in loop.read_log(out / "preference") if "loss" in row]
    assert np.mean(pairs[-3:]) < np.mean(pairs[:3])
    assert [row["reward"] for row in loop.read_log(out / "scored")] and len(loop.read_log(out / "scored")) >= 3
    assert (
        [row["stage"] for row in made["stages"]] == ["supervised", "preference", "scored"] == [r["stage"] for r in made["ablation"]["rows"]]
    )
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG" and json.loads((out / "ablation.json").read_text())["num_questions"] == 4
    weights = [(out / stage / "model" / "model.safetensors").read_bytes() for stage in ("supervised", "preference", "scored")]
    assert weights[0] != weights[1]  # stage 3 learns only once some path ends in the right answer: see the test on the shipped sample

    times = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    assert run(*args[:-1], "--eval_items", 0) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")} == times
    assert run(*args, "--seed", 1) == CODES["E163"][0]
    assert "seed" in capsys.readouterr().err

    shutil.rmtree(out / "scored" / "model")  # as if it had been killed before the last write
    assert run("scored", *args[:-1]) == 0
    assert (out / "scored" / "model" / "model.safetensors").read_bytes() == weights[2]


def test_scored_paths_change_a_model_that_can_answer(tmp_path, capsys):
    sample = LONGCOT
    args = ("scored", "--student_dir", sample, "--output_dir", tmp_path / "out", *TINY, "--scored_steps", 2, "--scored_lr", "1e-3")
    assert run(*args, "--batch_size", 8, "--per_device_batch_size", 8, "--num_generations", 4, "--reasoning_steps", "varied") == 0
    rewards = [row["reward"] for row in loop.read_log(tmp_path / "out" / "scored") if "reward" in row]
    assert len(rewards) == 2 and max(rewards) > 0.5
    assert (tmp_path / "out" / "scored" / "model" / "model.safetensors").read_bytes() != (sample / "model.safetensors").read_bytes()


def test_a_refused_run_leaves_nothing_in_the_way(start, tmp_path, capsys):
    """Layers that are not there, and a start that is damaged: nothing is written, also with --force over a finished stage."""
    out = tmp_path / "out"
    args = ("supervised", "--student_dir", start, "--output_dir", out, *TINY, "--supervised_steps", 2)
    assert run(*args, "--layers", "0,9") == CODES["E163"][0] and not out.exists()
    assert run(*args) == 0
    before = (out / "supervised" / "model" / "model.safetensors").read_bytes()
    damaged = tmp_path / "damaged"
    shutil.copytree(start, damaged)
    (damaged / "model.safetensors").write_bytes((start / "model.safetensors").read_bytes()[:5000])
    assert run(*args, "--student_dir", damaged, "--force") == CODES["E105"][0]
    assert (out / "supervised" / "model" / "model.safetensors").read_bytes() == before


@pytest.fixture
def written(tmp_path):
    """Traces of a file, chains of two and three steps with a redundant one."""
    path = tmp_path / "traces.jsonl"
    lines = []
    for seed in range(24):
        made = draw("chain", "train", size=2 + seed % 2, seed=seed)
        steps = [*made.steps, *made.rechecks(1)]
        lines.append({"id": seed, "prompt": made.prompt, "steps": steps, "answer": made.answer, "num_sufficient": len(made.steps)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_stages_on_a_file_of_traces(start, written, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "x1 = 07 ?", "answer": "07"}) + "\n")
    args = ("--student_dir", start, "--data", written, "--output_dir", out, *TINY, "--supervised_steps", 6, "--preference_steps", 2)
    args += ("--scored_steps", 1, "--batch_size", 8, "--num_generations", 4, "--max_seq_len", 128, "--eval_data", tmp_path / "held.jsonl")
    assert run(*args, "--json", "--per_device_batch_size", 2) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["stages"][0]["last_loss"] < made["stages"][0]["first_loss"] and made["ablation"]["num_questions"] == 1
    assert run(*args, "--output_dir", tmp_path / "b", "--reasoning_steps", 1) == CODES["E161"][0]
    assert "no row can be used" in capsys.readouterr().err


def test_two_processes_train_one_model(start, tmp_path):
    """accelerate's two CPU processes see different batches and end with one model."""
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    flags = ["supervised", "--student_dir", start, "--output_dir", out, *TINY, "--supervised_steps", "6", "--batch_size", "16"]
    command = [*launch, "-m", "trtllm_thoughtx", "distill", *flags, "--scored_steps", "0", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["stages"][0]["num_steps"] == 6
    assert [row["step"] for row in loop.read_log(out / "supervised")][-1] == 6
    assert (out / "supervised" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2"),
        ('{"prompt": "p", "steps": [], "answer": "a"}', "steps must not be empty"),
        ('{"prompt": "p", "steps": ["s"], "answer": " "}', "answer must be a text"),
        ('{"prompt": "p", "steps": ["s"], "thought": "s", "answer": "a"}', "one of steps and thought"),
        ('{"prompt": "p", "steps": ["s"], "answer": "a", "num_sufficient": 2}', "num_sufficient"),
        ('{"id": "1", "prompt": "p", "steps": ["s"], "answer": "a"}', "line 1 has it too"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_trained(start, tmp_path, capsys, line, why):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"prompt": "x1 = 01 ?", "steps": ["x1 00 + 01 = 01"], "answer": "01"}\n' + line + "\n")
    assert run("--student_dir", start, "--data", path, "--output_dir", tmp_path / "out", "-q") == CODES["E161"][0]
    assert why in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- plan ----------------------------------------------------------------------------------------------------------------

SEVEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip
LARGE = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}


@pytest.fixture
def shapes(tmp_path):
    for name, config in (("student", SEVEN), ("teacher", SEVEN | LARGE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_plan_of_the_real_recipe(shapes, capsys):
    """Parameter counts are those of the published models; memory falls with GPUs; nothing is written."""
    recipe = "build_configs/distill-distilqwen2.5-7b.yaml"
    args = ("--config", recipe, "--student_dir", shapes / "student", "--teacher_dir", shapes / "teacher", "--output_dir", shapes / "out")
    found = {}
    for count in (1, 16):
        assert run(*args, "--dry_run", "--json", "--num_gpus", count) == 0
        found[count] = json.loads(capsys.readouterr().out)
    assert found[16]["parameters"] == {"student": 7_615_616_512, "teacher": 72_706_203_648}
    assert found[16]["fits"] and not found[1]["fits"] and found[1]["fewest_gpus"] == found[16]["fewest_gpus"] <= 16
    supervised = found[16]["stages"][0]
    assert supervised["weights_and_state"] == round((7_615_616_512 * 16 + 72_706_203_648 * 2) / 16)
    assert "--use_fsdp" in found[16]["command"] and "Qwen2DecoderLayer" in found[16]["command"]
    assert not (shapes / "out").exists()


def test_a_plan_that_cannot_be(shapes, capsys):
    other = json.loads((shapes / "teacher" / "config.json").read_text()) | {"vocab_size": 32000}
    (shapes / "teacher" / "config.json").write_text(json.dumps(other))
    given = ("--student_dir", shapes / "student", "--teacher_dir", shapes / "teacher", "--output_dir", shapes / "out", "--dry_run")
    assert run(*given) == CODES["E163"][0] and "vocabular" in capsys.readouterr().err
    settings = Settings(student_dir=shapes / "student", output_dir=shapes / "out", layers=(0, 28))
    with pytest.raises(ThoughtxError, match="E163"):
        plan.plan(settings)


# --- pairs, scores, ablation ---------------------------------------------------------------------------------------------


def test_a_pair_differs_in_one_step_alone(start):
    text, rng = models.load_text(start), random.Random(0)
    for seed in range(60):
        asked = draw(("chain", "lookup", "story", "loan")[seed % 4], "train", size=3, seed=seed)
        made = preference.pair(asked, text, rng)
        sound, unsound = (text.decode(made[key]) for key in ("chosen_ids", "rejected_ids"))
        begun = item.steps_of(text.decode(made["prompt_ids"]).partition("<think>")[2])
        assert all(item.judge(asked, [*begun, *item.steps_of(sound)]))
        assert not item.judge(asked, [*begun, *item.steps_of(unsound)])[-1]


def test_the_tokenizer_is_that_of_the_file(start):
    """AutoTokenizer would split words as Qwen2 does."""
    made = draw("lookup", "train", size=2, seed=0)
    ids = rows.encoder(models.load_text(start))(f"Q {made.prompt} <think> {item.thought(made.steps)} </think> {made.answer} <eos>")
    told = f"Q {made.prompt} <think> {item.thought(made.steps)} </think> {made.answer} <eos>"
    assert ids == models.tokenizer()(told, add_special_tokens=False).input_ids == models.load_tokenizer(start)(told).input_ids
    assert 0 not in ids


@pytest.mark.parametrize("tags", THINK_TAGS, ids=["think", "thought"])
def test_rows_and_scores_follow_the_tags_of_the_student(tmp_path, tags):
    """Its template opens the thinking with one pair of tags or the other; they are special tokens or several tokens."""
    root = write_chat_model(tmp_path / "m", "opens", tags=False)
    template = (root / "chat_template.jinja").read_text().replace("<think>", tags[0])
    (root / "chat_template.jinja").write_text(template)
    text = models.load_text(root)
    row = rows.from_text(text, "2 + 3?", ["2 + 3 = 5"], "5")
    said = text.decode(row.ids, skip_special=False)
    assert (said.count(tags[0]), said.count(tags[1])) == (1, 1) and said.endswith(f"{tags[1]}\n\n5<|im_end|>")
    prompt = sum(part == rows.GIVEN for part in row.parts)
    asked = traces.Trace("1", "2 + 3?", ("2 + 3 = 5",), "5")
    found = reward.score(asked, split_ids(text, row.ids[prompt:], is_open=True), 10, 40, (0.4, 0.3, 0.3))
    assert found.correct and found.coherence == 1 and found.num_steps == 1


def test_the_score_of_a_path():
    asked = draw("chain", "train", size=2, seed=0)
    weights, budget = (0.4, 0.3, 0.3), 40

    def said(text):
        return Reply(*split_text(text, THINK_TAGS[0], is_open=True), None)

    good = f"{item.thought(asked.steps)} </think> {asked.answer}"
    assert reward.score(asked, said(good), 10, budget, weights).reward == pytest.approx(0.4 + 0.3 + 0.3 * 0.75)
    assert reward.score(asked, said(good), 400, budget, weights).reward == pytest.approx(0.7)
    assert reward.score(asked, said(f"{item.thought(asked.steps)} </think> x1"), 10, budget, weights).reward == 0.0
    assert reward.score(asked, said(item.thought(asked.steps)), 10, budget, weights).reward == 0.0
    lucky = reward.score(asked, said(f"no sense {item.BOUNDARY} </think> {asked.answer}"), 10, budget, weights)
    assert lucky.correct and lucky.coherence == 0 and lucky.reward == pytest.approx(0.4 + 0.3 * 0.75)
    assert reward.budget_of(asked, lambda text: len(text.split())) == 2 * sum(len(step.split()) for step in asked.steps) + 1 + 2


def test_the_shortest_trace_that_suffices():
    made = traces.Trace("1", "p", ("a", "b", "c", "d"), "x", 3, (("a", "d"), ("a", "b", "d")))
    assert traces.shortest_sufficient(made, "auto") == ("a", "d")
    assert traces.shortest_sufficient(traces.Trace("1", "p", ("a", "b", "c", "d"), "x", 3), "auto") == ("a", "b", "c")
    assert traces.shortest_sufficient(made, 1) is None and traces.shortest_sufficient(made, 2) == ("a", "d")


def test_only_differences_that_are_shown_are_claimed():
    def row(low, high):
        apart = {name: {"difference": (low + high) / 2, "interval": (low, high)} for name in ablation.COMPARED}
        return {"against_first": {"p_accuracy": 0.5, **apart}}

    assert ablation.bought(row(-1.0, 1.0), "supervised").startswith("nothing")
    assert "+2.00 tokens (1.00 .. 3.00)" in ablation.bought(row(1.0, 3.0), "supervised")
