"""Distillation: rows that teach the right tokens, a loss that is what it says, runs that go on where they were killed."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("trl", reason="the [distill] extra is not installed")

from trtllm_thoughtx.distill import loop, mixture, models, rows, supervised, vocabulary  # noqa: E402
from trtllm_thoughtx.distill.rows import ANSWER, EFFICIENCY, GIVEN, THOUGHT  # noqa: E402
from trtllm_thoughtx.distill.settings import Settings  # noqa: E402
from trtllm_thoughtx.errors import ThoughtxError  # noqa: E402
from trtllm_thoughtx.progress import SILENT  # noqa: E402
from trtllm_thoughtx.tasks import TASKS, draw, item  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
TOKENIZER = vocabulary.build()


def encode(text):
    return TOKENIZER.encode(text).ids


@pytest.mark.parametrize("task", TASKS)
def test_the_vocabulary_reads_and_writes_every_task(task):
    unknown = TOKENIZER.token_to_id(vocabulary.PAD)
    for seed in range(200):
        made = draw(task, "test", size=1 + seed % TASKS[task][1], seed=seed)
        for text in (made.prompt, f"{item.thought(made.steps)} {vocabulary.END_THINK} {made.answer}"):
            ids = encode(text)
            assert unknown not in ids
            assert TOKENIZER.decode(ids, skip_special_tokens=False).split() == text.split()


def test_a_row_teaches_decisions_thought_and_answer(monkeypatch):
    monkeypatch.setattr(mixture, "CUT_FRACTION", 0.0)
    made = draw("chain", "train", size=3, seed=1)
    row = rows.Row([], [])
    mixture.add_turn(row, encode, made, "auto", random.Random(0))
    told = [(TOKENIZER.id_to_token(i), part) for i, part in zip(row.ids, row.parts, strict=True)]
    assert [word for word, part in told if part == EFFICIENCY] == ["x2", "x3", vocabulary.END_THINK]
    assert "".join(word for word, part in told if part == ANSWER) == f"{made.answer}{vocabulary.EOS}"
    assert all(part == GIVEN for word, part in told if word in (vocabulary.QUESTION, vocabulary.THINK))
    assert sum(part == THOUGHT for _, part in told) == 3 * 10 - 2


def test_a_cut_thought_teaches_the_answer_alone(monkeypatch):
    monkeypatch.setattr(mixture, "CUT_FRACTION", 1.0)
    answers = set()
    for seed in range(40):
        row = rows.Row([], [])
        mixture.add_turn(row, encode, draw("chain", "train", size=3, seed=seed), "auto", random.Random(seed))
        assert set(row.parts) == {GIVEN, ANSWER}
        answers.add(TOKENIZER.decode([i for i, part in zip(row.ids, row.parts, strict=True) if part == ANSWER]))
    assert item.UNKNOWN in answers and len(answers) > 2


@pytest.mark.parametrize(("reasoning_steps", "low", "high"), [("auto", 0, 0), ("varied", 0, 3), ("full", 4, 6)])
def test_redundancy(reasoning_steps, low, high):
    made, rng = draw("chain", "train", size=6, seed=3), random.Random(0)
    seen = {mixture.num_rechecks(made, reasoning_steps, rng) for _ in range(200)}
    assert (min(seen), max(seen)) == (low, high)


def test_a_batch_depends_on_the_seed_and_its_number_alone():
    def batches(pools):
        made = mixture.Mixture(encode, 5, 64, 512)
        return {i: [[(row.ids, row.parts) for row in batch] for batch in made.pool(i)] for i in pools}

    both = batches([0, 3])
    assert batches([3])[3] == both[3] and both[0] != both[3]
    assert all(len(pool) == mixture.BATCHES_A_POOL and all(pool) for pool in both.values())


def test_contexts_grow_along_the_run():
    made = mixture.Mixture(encode, 0, 160, 1024)
    longest = [max(len(row.ids) for batch in made.pool(i) for row in batch) for i in (0, 9)]
    assert longest[0] < 450 and longest[1] > 900


def test_the_loss_weighs_parts_not_tokens():
    each = torch.tensor([1.0, 1.0, 1.0, 5.0])
    parts = torch.tensor([THOUGHT, THOUGHT, THOUGHT, ANSWER])
    assert supervised.weigh(each, parts, {ANSWER: 0.5, THOUGHT: 0.5, EFFICIENCY: 0.0}).item() == pytest.approx(3.0)
    assert supervised.weigh(each, parts, {ANSWER: 0.4, THOUGHT: 0.3, EFFICIENCY: 0.3}).item() == pytest.approx((0.4 * 5 + 0.3) / 0.7)


def test_divergence_is_kl_and_ignores_padded_vocabulary():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 7, generator=generator), torch.randn(5, 9, generator=generator)
    log_p, log_q = student.log_softmax(-1), teacher[:, :7].log_softmax(-1)
    wanted = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert torch.allclose(supervised.divergence(student, teacher, 1.0), wanted, atol=1e-6)
    assert supervised.divergence(student, student, 2.0).abs().max() < 1e-6


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("distill") / "teacher"
    models.new_model(path, num_layers=3, hidden_size=64, intermediate_size=96, max_positions=2048, seed=0)
    return path


def _train(settings, *, until=None, teacher=True):
    """The model after stage 1; `until` kills the run after that many steps."""
    directory = settings.stage_dir("supervised")
    directory.mkdir(parents=True, exist_ok=True)
    watch = loop.Watch("supervised", directory, SILENT)
    torch.manual_seed(settings.seed)
    model = models.load_student(settings.student_dir, "float32", settings.layers)
    guide = models.load_model(settings.teacher_dir, torch.float32) if teacher else None
    data = mixture.Mixture(encode, 0, settings.supervised_steps, settings.tokens_a_batch)
    if until is not None:
        watch.on_step_end = lambda args, state, control, **_: setattr(control, "should_training_stop", state.global_step >= until)
    supervised.run(settings, model, guide, data, 0, watch)
    return model


def _settings(teacher_dir, out, **changes):
    given = {
        "student_dir": teacher_dir, "teacher_dir": teacher_dir, "output_dir": out, "layers": (0, 2), "lr": 3e-3, "dtype": "float32",
        "supervised_steps": 24, "save_every": 8, "gradient_checkpointing": False, "tokens_a_batch": 256, "warmup_steps": 2,
    }  # fmt: skip
    return Settings(**{**given, **changes})


@pytest.mark.slow
def test_the_loss_falls_and_a_killed_run_ends_where_the_whole_one_does(teacher_dir, tmp_path):
    whole = _settings(teacher_dir, tmp_path / "whole", kd_weight=0.25)
    model = _train(whole)
    losses = [row["truth"] for row in loop.read_log(whole.stage_dir("supervised"))]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert [path.name for path in loop.checkpoints(whole.stage_dir("supervised"))] == ["checkpoint-16", "checkpoint-24"]

    parts = _settings(teacher_dir, tmp_path / "parts", kd_weight=0.25)
    _train(parts, until=13)
    directory = parts.stage_dir("supervised")
    left = loop.checkpoints(directory)[-1]
    shutil.copytree(left, directory / loop.PARTIAL / "checkpoint-20")  # what a kill in the middle of writing leaves
    (directory / loop.PARTIAL / "checkpoint-20" / "trainer_state.json").unlink()
    other = _train(parts)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    steps = [row["step"] for row in loop.read_log(directory)]
    assert steps == sorted(set(steps)) and steps[-1] == 24 and not (directory / loop.PARTIAL).exists()


def test_a_loss_that_is_no_number_stops_with_the_last_checkpoint_named(teacher_dir, tmp_path, monkeypatch):
    settings = _settings(teacher_dir, tmp_path, supervised_steps=10, save_every=3)
    weigh, calls = supervised.weigh, []

    def spoiled(each, parts, weights):
        calls.append(1)
        return weigh(each, parts, weights) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(supervised, "weigh", spoiled)
    with pytest.raises(ThoughtxError, match="E162") as caught:
        _train(settings, teacher=False)
    assert "step 5" in caught.value.where and "checkpoint-3" in caught.value.fix
    assert [path.name for path in loop.checkpoints(settings.stage_dir("supervised"))] == ["checkpoint-3"]


def test_a_student_of_some_layers_is_saved_as_a_stock_model(teacher_dir, tmp_path):
    model = models.load_student(teacher_dir, "float32", (0, 2))
    whole = models.load_model(teacher_dir, torch.float32)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, whole.model.layers[2].mlp.up_proj.weight)
    texts = tmp_path / "texts"
    shutil.copytree(teacher_dir, texts)
    for name in ("LICENSE", "added_tokens.json", "calibration.json", "exits.json"):
        (texts / name).write_text("{}")
    models.save_model(model, model.state_dict(), texts, tmp_path / "out", "float32")
    assert (tmp_path / "out" / "LICENSE").is_file() and (tmp_path / "out" / "added_tokens.json").is_file()
    assert not (tmp_path / "out" / "calibration.json").exists() and not (tmp_path / "out" / "exits.json").exists()
    again = models.load_model(tmp_path / "out", torch.float32)
    ids = torch.tensor([encode("Q x1 = 04 ? <think>")])
    assert torch.allclose(model.eval()(ids).logits, again(ids).logits, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["architectures"] == ["Qwen2ForCausalLM"]
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "chat_template.jinja").is_file()
    with pytest.raises(ThoughtxError, match="E163"):
        models.load_student(teacher_dir, "float32", (0, 3))


@pytest.mark.parametrize(
    "changes",
    [{"loss_weights": (1.0,)}, {"loss_weights": (0.5, 0.6, -0.1)}, {"reasoning_steps": "some"}, {"reasoning_steps": 3}, {"batch_size": 12}],
)
def test_settings_that_cannot_be(teacher_dir, tmp_path, changes):
    with pytest.raises(ThoughtxError, match="E163"):
        _settings(teacher_dir, tmp_path, **changes)
