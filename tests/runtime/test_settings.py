"""Penalties, stops and several answers on an engine, beside transformers' `generate` on the same tiny models."""

from __future__ import annotations

import json
import random
import shutil

import hf_models
import numpy as np
import pytest
import tiny
import torch

from trtllm_thoughtx import Engine, report
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli import params as console
from trtllm_thoughtx.evaluate.job import evaluation
from trtllm_thoughtx.evaluate.models import ModelSystem
from trtllm_thoughtx.evaluate.scorer import Scorer
from trtllm_thoughtx.evaluate.systems import EngineSystem
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.stream import StopStream

PROMPTS = [[40, 66, 7, 7, 9], [13, 80, 2], [5, 33, 61, 20, 70, 8, 1]]
OPTIONS = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 160, "max_batch_size": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("settings")
    hf_models.save(root / "m", seed=3)
    tiny.write_tokenizer(root / "m")
    build(root / "m", root / "e", OPTIONS)
    return root


@pytest.fixture(scope="module")
def engine(root):
    return Engine.load(root / "e", num_threads=1)


@pytest.fixture(scope="module")
def theirs(root):
    model = hf_models.transformers.AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float32).eval()
    model.generation_config = hf_models.transformers.GenerationConfig(pad_token_id=96)
    return model


def generated(model, prompt, **settings):
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), pad_token_id=96, **settings)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.1, 1.5, 0.8])
@pytest.mark.slow
def test_greedy_with_a_repetition_penalty_is_transformers_token_for_token(engine, theirs, penalty):
    params = GenerationParams(max_new_tokens=60, repetition_penalty=penalty, ignore_eos=True)
    done = engine.generate(PROMPTS, params)
    for prompt, one in zip(PROMPTS, done, strict=True):
        assert one.output_ids == generated(theirs, prompt, max_new_tokens=60, do_sample=False, repetition_penalty=penalty)
    assert penalty == 1.0 or [one.output_ids for one in done] != [
        one.output_ids for one in engine.generate(PROMPTS, GenerationParams(max_new_tokens=60, ignore_eos=True))
    ]


def test_stop_strings_end_where_transformers_ends_and_are_no_part_of_the_text(engine, root, theirs):
    tokenizer = hf_models.transformers.AutoTokenizer.from_pretrained(root / "m")
    for prompt in PROMPTS:
        whole = engine.generate([prompt], GenerationParams(max_new_tokens=40, ignore_eos=True))[0].output_ids
        said = engine.text.decode(whole)
        stop = said[11:14]  # three tokens: a token is a character here
        params = GenerationParams(max_new_tokens=40, ignore_eos=True, stop=("not in it", stop))
        one = engine.generate([prompt], params)[0]
        wanted = generated(theirs, prompt, max_new_tokens=40, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
        assert one.output_ids == wanted and (one.stop_reason, one.stop_string) == ("stop", stop)
        assert engine.text.decode(one.output_ids)[: one.text_end] == said[: said.index(stop)]
        ids = engine.generate([prompt], GenerationParams(max_new_tokens=40, ignore_eos=True, stop_token_ids=(whole[9],)))[0]
        assert ids.output_ids == whole[: whole.index(whole[9]) + 1] and ids.stop_reason == "stop" and ids.stop_string is None
        assert engine.text.decode(ids.output_ids)[: ids.text_end] == said[: whole.index(whole[9])]


def test_batches_drafts_and_numbers_of_answers_change_no_answer(engine):
    """The first of several answers is the only one of one, the others differ, and the company in a batch does not matter."""
    settings = {"max_new_tokens": 20, "temperature": 1.3, "seed": 6, "ignore_eos": True}
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.2, "min_p": 0.01}
    one = engine.generate(PROMPTS, GenerationParams(**settings, **penalties))
    params = [GenerationParams(**settings, **penalties, num_return_sequences=num) for num in (3, 1, 2)]
    many = engine.generate(PROMPTS, params)
    assert [each.index for each in many] == [0, 1, 2, 0, 0, 1]
    assert [many[i].output_ids for i in (0, 3, 4)] == [each.output_ids for each in one]
    assert len({tuple(each.output_ids) for each in many}) == 6
    alone = engine.generate(PROMPTS[1:2], params[1:2], streams=[1])
    assert alone[0].output_ids == one[1].output_ids
    assert engine.generate(PROMPTS, GenerationParams(**settings))[0].output_ids != one[0].output_ids


def test_logprobs_are_those_of_the_model(engine, theirs):
    one = engine.generate(PROMPTS[:1], GenerationParams(max_new_tokens=6, ignore_eos=True, logprobs=4, repetition_penalty=1.4))[0]
    ids = torch.tensor([[*PROMPTS[0], *one.output_ids]])
    with torch.inference_mode():
        wanted = theirs(ids).logits[0].log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    np.testing.assert_allclose(one.logprobs, wanted[range(6), one.output_ids], atol=1e-4)
    for likeliest, row in zip(one.top_logprobs, wanted, strict=True):
        assert [i for i, _ in likeliest] == row.topk(4).indices.tolist()
        np.testing.assert_allclose([value for _, value in likeliest], row.topk(4).values, atol=1e-4)


def test_a_stop_stream_shows_no_more_than_the_text_that_counts(engine):
    """Random texts and stops, cut into tokens of one character: what was shown is the text before the first stop."""
    rng = random.Random(1)
    for _ in range(300):
        said = "".join(rng.choice("ab c") for _ in range(rng.randrange(1, 25)))
        stops = tuple("".join(rng.choice("ab c") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3)))
        stream = StopStream(engine.text.stream(), stops)
        shown, num = "", 0
        for token in engine.text.encode(said):
            if stream.is_done:
                break
            shown, num = shown + stream.push(token), num + 1
        shown += stream.end()
        ends = min((said.index(stop) + len(stop) for stop in stops if stop in said), default=None)
        assert stream.is_done == (ends is not None) and stream.num_chars == len(shown)
        if ends is None:
            assert shown == said
        else:
            assert num == ends and shown == said[: min(said.index(stop) for stop in stops if stop in said[:ends])]
            assert said[len(shown) :].startswith(stream.found)


def command(capsys, *words):
    status = console.run(cli.run_command, "thoughtx-run", [str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_run_takes_all_of_them(root, capsys, tmp_path):
    words = ("--engine_dir", root / "e", "--prompt", "abc", "--max_new_tokens", 30, "--ignore_eos")
    status, out, _ = command(capsys, *words, "--temperature", 0, "--json")
    said = json.loads(out)["results"][0]["text"]
    assert status == 0
    stop = said[8:11]
    status, out, _ = command(capsys, *words, "--temperature", 0, "--stop", "zzzz", "--stop", stop)
    assert status == 0 and out == said[: said.index(stop)] + "\n"
    status, out, _ = command(capsys, *words, "--temperature", 0, "--stop", stop, "--logprobs", 2, "--json")
    row = json.loads(out)["results"][0]
    assert (row["text"], row["answer"], row["stop_reason"], row["stop_string"]) == (said[: said.index(stop)],) * 2 + ("stop", stop)
    assert [one["id"] for one in row["logprobs"]] == row["output_ids"] and len(row["logprobs"][0]["top_logprobs"]) == 2
    assert row["logprobs"][0]["token"] == said[0]
    assert "not applied: --logprobs" in command(capsys, *words, "--temperature", 0, "--logprobs", 2)[2]
    sampled = (*words, "--temperature", 1.5, "--min_p", 0.02, "--repetition_penalty", 1.1, "--presence_penalty", 0.5, "--json")
    first, several = (json.loads(command(capsys, *sampled, "--num_return_sequences", num)[1])["results"] for num in (1, 3))
    assert [row["index"] for row in several] == [0, 1, 2] and {row["id"] for row in several} == {"1"}
    assert several[0] == first[0] and len({row["text"] for row in several}) == 3
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"stop": ["zzzz", stop], "temperature": 0, "frequency_penalty": 0}))
    assert command(capsys, *words, "--config", recipe)[1] == said[: said.index(stop)] + "\n"
    status, _, err = command(capsys, *words, "--temperature", 0, "--num_return_sequences", 2)
    assert status == 2 and "needs sampling" in err
    status, _, err = command(capsys, *words, "--stop", "")
    assert status == 2 and "--stop must be" in err


def test_the_checkpoints_settings_count_and_odd_ones_stop_nothing(root, capsys, tmp_path):
    """An engine whose generation_config.json has every kind of oddity runs, greedy and sampled, and says what it passed over, once."""
    shutil.copytree(root / "e", tmp_path / "e")
    odd = {"eos_token_id": [None, 95], "temperature": "hot", "top_k": None, "top_p": [0.9], "do_sample": True, "num_beams": 4}
    (tmp_path / "e" / "generation_config.json").write_text(json.dumps({**odd, "repetition_penalty": 1.3, "stop_strings": "q"}))
    made = report.read_manifest(tmp_path / "e")
    report.write_manifest(tmp_path / "e", command="x", inputs=made["inputs"], config={}, checks=[], environment={})
    words = ("--engine_dir", tmp_path / "e", "--prompt", "abc", "--max_new_tokens", 12, "--json")
    for flags, names in (
        ((), ["temperature", "top_p", "eos_token_id", "num_beams"]),
        (("--temperature", 0), ["top_p", "eos_token_id", "num_beams"]),
    ):
        status, out, err = command(capsys, *words, *flags)
        document = json.loads(out)
        assert status == 0 and document["not_applied"] == names and err.count("not applied") == 1
        assert (document["sampling"]["repetition_penalty"], document["sampling"]["stop"]) == (1.3, ["q"])
        assert "q" not in document["results"][0]["text"]


def test_a_stop_string_needs_a_tokenizer(root, capsys, tmp_path):
    hf_models.save(tmp_path / "m", seed=3)
    build(tmp_path / "m", tmp_path / "e", OPTIONS)
    words = ("--engine_dir", tmp_path / "e", "--input_ids", "4,5", "--max_new_tokens", 9)
    status, _, err = command(capsys, *words, "--stop", "x")
    assert status == 3 and "--stop needs a tokenizer" in err and "--stop_token_ids" in err
    status, out, _ = command(capsys, *words, "--json")
    ids = json.loads(out)["results"][0]["output_ids"]
    row = json.loads(command(capsys, *words, "--stop_token_ids", ids[3], "--json")[1])["results"][0]
    assert status == 0 and row["output_ids"] == ids[: ids.index(ids[3]) + 1] and row["stop_reason"] == "stop"


def test_eval_takes_penalties_and_stops_of_flags_and_checkpoint_on_both_sides(root, tmp_path):
    """The engine and transformers give the same answers, up to the stop string; what the checkpoint has that is odd is named."""
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps({"prompt": said, "answer": "x"}) + "\n" for said in ("abc", "Z?", "9 of 10")))

    def answers(path, **settings):
        found = evaluation(path, dataset=questions, max_new_tokens=24, output=tmp_path / "r.json", **settings)
        records = json.loads((tmp_path / "r.json").read_text())["records"]
        return [row["answer"] for row in records], [row["num_tokens"] for row in records], found.summary.conditions

    plain, _, conditions = answers(root / "e")
    assert answers(root / "m")[0] == plain and conditions["not_applied"] == [] and "repetition_penalty" not in conditions
    stop = next(said[5] for said in plain if said[5] != " ")
    given, lengths, conditions = answers(root / "e", stop=(stop,), repetition_penalty=1.3, frequency_penalty=0.2)
    assert answers(root / "m", stop=(stop,), repetition_penalty=1.3, frequency_penalty=0.2)[:2] == (given, lengths)
    assert given != plain and not any(stop in said for said in given) and conditions["repetition_penalty"] == 1.3
    shutil.copytree(root / "m", tmp_path / "m")
    odd = {"repetition_penalty": 1.3, "stop_strings": [stop], "eos_token_id": [95, "x"], "num_beams": 3, "temperature": []}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(odd))
    build(tmp_path / "m", tmp_path / "e", OPTIONS)
    own = answers(tmp_path / "e")
    assert own[:2] == answers(tmp_path / "m")[:2] == answers(root / "e", stop=(stop,), repetition_penalty=1.3)[:2]
    assert own[2]["not_applied"] == ["eos_token_id", "num_beams"] and list(own[2]["stop"]) == [stop]


def test_the_harness_applies_the_checkpoints_repetition_penalty(root, tmp_path):
    """As lm-eval does on transformers, whose generate reads it from the checkpoint; odd values are in nobody's way."""
    shutil.copytree(root / "m", tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5, "top_p": None, "temperature": "x"}))
    build(tmp_path / "m", tmp_path / "e", OPTIONS)
    asked = [("abc", {"until": [], "max_gen_toks": 20})]
    said = [Scorer(EngineSystem(path, num_threads=1)).complete(asked) for path in (root / "e", tmp_path / "e")]
    engine = Engine.load(tmp_path / "e", num_threads=1)
    prompt = engine.text.encode("abc")
    wanted = engine.generate([prompt], GenerationParams(max_new_tokens=20, repetition_penalty=1.5, stop_ids=engine.text.eos_ids))[0]
    assert said[1] == [engine.text.decode(wanted.output_ids)] != said[0]
    assert Scorer(ModelSystem(tmp_path / "m")).complete(asked) == said[1]
