"""Budgets of thinking: exact, whichever token the cut falls on, whatever the tags are made of, alone and in batches."""

from __future__ import annotations

import json
import random

import pytest
from click.testing import CliRunner
from places import LONGCOT as SAMPLE
from tiny import write_tiny
from tokenizer_kinds import PIECES, several_token_text

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.cli.commands import thoughtx
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.tasks.item import steps_of
from trtllm_thoughtx.text import thinking
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.text import Text
from trtllm_thoughtx.text.thinking import Thinking


def written(text: Text, choices: list[int], params: GenerationParams) -> tuple[list[int], Thinking]:
    """What is written when a model wants to write `choices` behind an open tag: the rule of `generation`, without an engine."""
    thought = Thinking(text, text.encode("<think>"), params)
    out: list[int] = []
    for choice in choices:
        why = None if thought.is_end_tag(choice) else thought.budget_spent or (None if thought.admits(choice) else thinking.DEPTH)
        if why:
            out += thought.closing()
            thought.end(why)
            break
        out.append(choice)
        thought.push(choice)
        if thought.state != thinking.INSIDE:
            break
    return out, thought


@pytest.mark.parametrize("seed", range(300))
def test_no_cut_exceeds_its_budget_and_every_cut_closes_the_tag(seed):
    """Random tokens, pieces of tags and boundaries among them; the text itself is the judge."""
    text, rng = several_token_text(), random.Random(seed)
    ids = [text._id_of(piece) for piece in dict.fromkeys(PIECES)]
    choices = [rng.choice(ids) for _ in range(rng.randint(1, 60))]
    depth, tokens = rng.choice([None, 1, 2, 3]), rng.choice([None, 1, 2, 5, 17])
    out, thought = written(text, choices, GenerationParams(max_reasoning_depth=depth, max_thinking_tokens=tokens))
    said = text.decode(out)
    inside, tag, _ = said.partition("</think>")
    steps = len(steps_of(inside)) if tag else thought.num_steps
    assert thought.num_steps == steps
    assert depth is None or steps <= depth
    assert tokens is None or thought.num_tokens <= tokens
    if thought.stop in (thinking.DEPTH, thinking.TOKENS):
        assert tag and said.endswith("</think>")
        num_tag = len(out) - thought.num_tokens
        assert "</think>" not in text.decode(out[: thought.num_tokens]) and num_tag <= 3 + 1
        if thought.stop == thinking.TOKENS:
            # Exact: the model had more to say, and nothing but an end tag that it had begun stands between budget and cut.
            rest = text.decode(out[thought.num_tokens :])
            assert thought.num_tokens == tokens or "</think>".startswith(rest[:1]) or rest.startswith(".</")
    elif len(choices) == len(out) and not tag:
        assert thought.state == thinking.INSIDE


def test_a_token_that_ends_a_step_and_begins_another_is_not_written():
    text = several_token_text()
    ids = text.encode("a\n\nNowb")
    assert [text.decode([i]) for i in ids] == ["a", "\n\nNow", "b"]
    out, thought = written(text, ids, GenerationParams(max_reasoning_depth=1))
    assert text.decode(out) == "a</think>" and thought.num_steps == 1 and thought.stop == "depth"
    out, thought = written(text, ids, GenerationParams(max_reasoning_depth=2))
    assert text.decode(out) == "a\n\nNowb" and thought.num_steps == 2 and thought.state == thinking.INSIDE


@pytest.mark.parametrize("budget", range(1, 9))
def test_a_cut_within_the_models_own_end_tag_completes_it(budget):
    text = several_token_text()
    ids = [*text.encode("aba")[:3], *(text._id_of(piece) for piece in (".</", "think", ">\n"))]
    out, thought = written(text, ids, GenerationParams(max_thinking_tokens=budget))
    said = text.decode(out)
    assert said.count("</think>") == 1 and said.count("</") == 1
    assert thought.num_tokens <= budget
    assert thought.stop == ("tokens" if budget < 6 else "end")


@pytest.mark.parametrize(
    ("prompt", "state"),
    [
        ("ab", thinking.BEFORE),
        ("ab<think>", thinking.INSIDE),
        ("<think>a</think>b", thinking.BEFORE),
        ("<think>a</think>b<think>\n", thinking.INSIDE),
    ],
)
def test_the_prompt_says_whether_the_thinking_is_open(prompt, state):
    text = several_token_text()
    assert Thinking(text, text.encode(prompt), GenerationParams()).state == state


def test_thinking_that_begins_again_does_not_get_a_second_budget():
    text = several_token_text()
    thought = Thinking(text, text.encode("a"), GenerationParams(max_thinking_tokens=2))
    for token in text.encode("<think>ab"):
        thought.push(token)
    assert thought.budget_spent == "tokens"
    thought.end("tokens")
    for token in text.encode("a<think>"):
        assert thought.budget_spent is None
        thought.push(token)
    assert thought.budget_spent == "tokens"


# --- on the sample --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    out = tmp_path_factory.mktemp("thinking") / "engine"
    build(SAMPLE, out, {"backend": ("onnxruntime",), "max_seq_len": 512, "max_batch_size": 8})
    with_engine = Engine.load(out, num_threads=1)
    yield with_engine
    with_engine.close()


def chain(rng: random.Random, size: int) -> str:
    return " ".join(f"x{i + 1} = {rng.randrange(100):02d}" for i in range(size)) + " ?"


def thought_of(engine: Engine, ids: list[int]) -> list[int]:
    end = engine.text.think_ids[1][0]
    return ids[: ids.index(end)] if end in ids else ids


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5])
@pytest.mark.slow
def test_depth_is_obeyed_in_batches_and_when_streaming(engine, depth):
    rng = random.Random(depth)
    prompts = [engine.text.chat(chain(rng, size)) for size in (1, 2, 3, 4, 5, 6)]
    free = engine.generate(prompts, GenerationParams(max_new_tokens=200, stop_ids=engine.text.eos_ids))
    params = GenerationParams(max_new_tokens=200, stop_ids=engine.text.eos_ids, max_reasoning_depth=depth)
    streamed: dict[int, list[int]] = {row: [] for row in range(6)}
    done = engine.generate(prompts, params, lambda row, token: streamed[row].append(token), return_logprobs=True, return_logits=True)
    for row, (one, other) in enumerate(zip(done, free, strict=True)):
        assert streamed[row] == one.output_ids and len(one.logprobs) == len(one.logits) == len(one.output_ids)
        if depth == 0:
            assert one.num_steps == one.num_thinking_tokens == 0 and one.thinking_stop == "depth"
            closed = engine.generate([[*prompts[row], *engine.text.think_ids[1]]], GenerationParams(max_new_tokens=200, stop_ids=(1,)))
            assert closed[0].output_ids == one.output_ids
            continue
        thought = thought_of(engine, one.output_ids)
        assert one.num_steps == len(steps_of(engine.text.decode(thought))) == min(depth, other.num_steps)
        assert one.num_thinking_tokens == len(thought)
        assert one.thinking_stop == ("end" if other.num_steps <= depth else "depth")
        assert thought == thought_of(engine, other.output_ids)[: len(thought)]
        alone = engine.generate([prompts[row]], params)[0]
        assert alone.output_ids == one.output_ids


@pytest.mark.parametrize("tokens", [1, 7, 11, 12, 30])
def test_tokens_are_obeyed_exactly(engine, tokens):
    rng = random.Random(tokens)
    prompts = [engine.text.chat(chain(rng, size)) for size in (2, 4, 6)]
    params = GenerationParams(max_new_tokens=200, stop_ids=engine.text.eos_ids, max_thinking_tokens=tokens)
    for one in engine.generate(prompts, params):
        assert len(thought_of(engine, one.output_ids)) == one.num_thinking_tokens
        assert one.num_thinking_tokens == tokens if one.thinking_stop == "tokens" else one.num_thinking_tokens <= tokens
    assert {one.thinking_stop for one in engine.generate(prompts, params)} <= {"tokens", "end"}


def test_an_answer_that_ends_inside_the_thinking_says_so(engine):
    one = engine.generate([engine.text.chat("x1 = 10 x2 = 20 x3 = 30 ?")], GenerationParams(max_new_tokens=3))[0]
    assert one.thinking_stop == "cut" and one.stop_reason == "length"


def test_work_is_counted(engine):
    prompt = engine.text.chat("x1 = 10 x2 = 20 x3 = 30 ?")
    one = engine.generate([prompt], GenerationParams(max_new_tokens=9, ignore_eos=True))[0]
    num_fed = len(prompt) + 8  # the last token is not fed
    assert one.num_layer_tokens == engine.stats.work.num_layer_tokens == num_fed * engine.config.num_layers
    assert engine.stats.work.num_calls == 9 and engine.stats.work.num_head_rows == 9


@pytest.mark.parametrize("flag", ["max_reasoning_depth", "max_thinking_tokens"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "6", float("nan")])
def test_wrong_budgets_are_refused_by_name(flag, value):
    with pytest.raises(ThoughtxError, match=f"--{flag}"):
        GenerationParams(**{flag: value})


def test_a_budget_needs_tags(tmp_path):
    write_tiny(tmp_path / "model", tokenizer=True)
    build(tmp_path / "model", tmp_path / "e", {"backend": ("onnxruntime",), "max_seq_len": 64})
    engine = Engine.load(tmp_path / "e", num_threads=1)
    with pytest.raises(ThoughtxError, match="--max_reasoning_depth needs thinking tags") as raised:
        engine.generate([[1, 2]], GenerationParams(max_reasoning_depth=3))
    assert raised.value.code == "E122"


def test_run_and_eval_report_and_obey(engine, tmp_path):
    root = str(engine.directory.root)
    words = ["--engine_dir", root, "--max_reasoning_depth", "2", "--json"]
    ran = CliRunner().invoke(thoughtx, ["run", *words, "--prompt", "x1 = 38 x2 = 75 x3 = 11 ?", "--max_new_tokens", "100"])
    row = json.loads(ran.stdout)["results"][0]
    assert (row["num_steps"], row["thinking_stop"]) == (2, "depth") and row["num_thinking_tokens"] > 4
    saved = tmp_path / "answers.json"
    asked = [
        "--task",
        "chain",
        "--num_items",
        "4",
        "--sizes",
        "3,4",
        "--batch_size",
        "2",
        "--max_new_tokens",
        "200",
        "--output",
        str(saved),
    ]
    ran = CliRunner().invoke(thoughtx, ["eval", *words, *asked])
    assert ran.exit_code == 0, ran.output
    records = json.loads(saved.read_text())["records"]
    assert {record["num_steps"] for record in records} == {2} and {record["thinking_stop"] for record in records} == {"depth"}
    words = ["eval", "--model_dir", str(SAMPLE), "--task", "chain", "--num_items", "1", "--max_thinking_tokens", "4"]
    ran = CliRunner().invoke(thoughtx, words)
    assert isinstance(ran.exception, ThoughtxError) and "--max_thinking_tokens is for engines" in str(ran.exception)


def test_the_presets_are_recipes_of_run_and_of_eval(engine, tmp_path):
    root = str(engine.directory.root)
    preset = "build_configs/thoughtx-tiny-batch.yaml"
    words = ["--config", preset, "--engine_dir", root, "--json"]
    ran = CliRunner().invoke(thoughtx, ["run", *words, "--prompt", chain(random.Random(1), 9)])
    found = json.loads(ran.stdout)
    assert found["sampling"]["temperature"] == 0.3 and found["sampling"]["max_reasoning_depth"] == 6
    assert (found["results"][0]["num_steps"], found["results"][0]["thinking_stop"]) == (6, "depth")
    ran = CliRunner().invoke(thoughtx, ["eval", *words, "--task", "chain", "--num_items", "3", "--sizes", "8"])
    summary = json.loads(ran.stdout)["summary"]
    assert summary["overall"]["steps"] == 6 and summary["overall"]["thinking_stops"] == {"depth": 3}
    assert summary["conditions"]["max_reasoning_depth"] == 6 and summary["overall"]["layer_tokens"] > 0


def test_eval_compares_the_work_of_two_settings(engine, tmp_path):
    root, saved = str(engine.directory.root), tmp_path / "cut.json"
    words = ["eval", "--engine_dir", root, "--task", "chain", "--num_items", "4", "--sizes", "6", "--max_new_tokens", "250"]
    assert CliRunner().invoke(thoughtx, [*words, "--max_reasoning_depth", "3", "--output", str(saved)]).exit_code == 0
    ran = CliRunner().invoke(thoughtx, [*words, "--compare", str(saved), "--memory_context", "0", "--json"])
    comparison = json.loads(ran.stdout)["comparison"]
    whole, cut = (json.loads(ran.stdout)[key]["overall"]["layer_tokens"] for key in ("summary", "other_summary"))
    assert 0.2 < comparison["layer_tokens_saved"] == pytest.approx(1 - cut / whole)
