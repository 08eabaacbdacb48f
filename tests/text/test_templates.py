"""Templates that open the thinking, leave it to the model, close it, or never think; and tags in what people write."""

from __future__ import annotations

import itertools
import json

import pytest
from chat_models import write_chat_model
from click.testing import CliRunner

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.chunks.data import sequences_of
from trtllm_thoughtx.calibrate.data import read_data
from trtllm_thoughtx.cli.commands import thoughtx
from trtllm_thoughtx.config import AUTO
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.evaluate.questions import Question
from trtllm_thoughtx.evaluate.run import evaluate, prompt_of
from trtllm_thoughtx.evaluate.systems import Written
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.generation import Generation
from trtllm_thoughtx.text.opening import BEFORE, BEHIND, INSIDE, closed, opened, state_of
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.text import Text

KINDS = ("opens", "hybrid", "early", "instruct")
ASKED = {
    "plain": "What is 2 + 3?",
    "tag inside": "What does <think> mean?",
    "tag at the end": "Write <think>",
    "closing tag": "And </think>?",
    "system": [{"role": "system", "content": "Use <think> a lot."}, {"role": "user", "content": "Hi"}],
    "dialogue": [
        {"role": "user", "content": "a <think>"},
        {"role": "assistant", "content": "<think>b</think>c"},
        {"role": "user", "content": "d"},
    ],
    "tool behind": [{"role": "user", "content": "a"}, {"role": "tool", "content": "found: <think>"}],
}


@pytest.fixture(scope="module", params=[True, False], ids=["one token", "several tokens"])
def models(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("templates")
    return {kind: write_chat_model(root / kind, kind, tags=request.param) for kind in (*KINDS, "bare")}


def loaded(root) -> Text:
    text = Text.load(root)
    assert text is not None
    return text


@pytest.fixture(scope="module")
def texts(models):
    return {kind: loaded(root) for kind, root in models.items()}


@pytest.mark.parametrize("asked", ASKED)
def test_only_the_template_opens_the_thinking(texts, asked):
    for kind, text in texts.items():
        assert text.chat(ASKED[asked]).state == (INSIDE if kind == "opens" else BEFORE), kind


@pytest.mark.parametrize("asked", ASKED)
def test_not_thinking_in_the_templates_own_way(texts, asked):
    for kind in KINDS:
        text = texts[kind]
        prompt = text.chat(ASKED[asked])
        off = text.chat(ASKED[asked], enable_thinking=False)
        first, last = text.think_ids
        wanted = {"opens": [*prompt, *last], "instruct": [*prompt, *first, *last]}.get(kind, off)
        assert list(closed(text, prompt)) == list(wanted) and state_of(text, closed(text, prompt)) == BEHIND
        assert list(closed(text, closed(text, prompt))) == list(wanted)
        assert off.state == {"opens": INSIDE, "instruct": BEFORE}.get(kind, BEHIND)


def test_ids_and_raw_texts_speak_for_themselves(models):
    text = loaded(models["opens"])
    for said, state in [
        ("<|im_start|>assistant\n<think>\n", INSIDE),
        ("<|im_start|>assistant\n<think>\nOkay, so", INSIDE),
        ("<|im_start|>user\nA <think>?<|im_end|>\n<|im_start|>assistant\n", BEFORE),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", BEHIND),
        ("<think>a</think>b", BEFORE),
        ("nothing", BEFORE),
    ]:
        assert state_of(text, text.encode(said)) == state, said
    assert text.raw("a <think> b").state == BEFORE and text.raw("a <think>\n").state == INSIDE and text.raw("a</think> ").state == BEHIND


def count(text: Text, ids, which: int) -> int:
    return text.decode(ids, skip_special=False).count(text.think_tags[which])


def test_no_row_has_a_tag_twice(models, tmp_path):
    """Cut questions, calibration rows and captured traces: one opening tag, one closing tag."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What is 2 + 3?", "steps": ["2 + 3 = 5", "so 5"], "answer": "5"}) + "\n")
    for kind in KINDS:
        text = loaded(models[kind])
        cut = prompt_of(Question(id="1", task="t", prompt="1 + 1?", expected="2", thought="1 + 1 = 2"), text)
        data = read_data(rows, text, vocab_size=400, num_samples=1, max_len=400, seed=0, pad_id=None)
        (seen,) = sequences_of(text, None, 1, 2000, seed=0)
        for ids in (cut, data.rows[0], seen, opened(text, opened(text, text.chat("a")))):
            assert count(text, ids, 0) == 1, (kind, text.decode(ids, skip_special=False))
            assert count(text, ids, 1) <= 1


# --- engines --------------------------------------------------------------------------------------------------------------


OPTIONS = {"backend": ("onnxruntime",), "max_seq_len": 256, "max_batch_size": 4}


@pytest.fixture(scope="module")
def engines(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    made = {}
    for kind in KINDS:
        build(models[kind], root / kind, OPTIONS)
        made[kind] = Engine.load(root / kind, num_threads=1)
    yield made
    for engine in made.values():
        engine.close()


@pytest.mark.parametrize("budget", [{"max_thinking_tokens": 0}, {"max_reasoning_depth": 0}])
def test_a_budget_of_nothing_is_the_templates_own_way(engines, budget):
    prompts = ["What is 2 + 3?", "Write <think>"]
    for kind, engine in engines.items():
        text = engine.text
        done = engine.generate([text.chat(one) for one in prompts], GenerationParams(max_new_tokens=12, **budget))
        for one, asked in zip(done, prompts, strict=True):
            fed = text.chat(asked, enable_thinking=False)
            if kind in ("opens", "instruct"):
                first, last = text.think_ids
                fed = [*text.chat(asked), *(first if kind == "instruct" else ()), *last]
            wanted = engine.generate([fed], GenerationParams(max_new_tokens=12))[0]
            assert one.output_ids == wanted.output_ids and not one.is_open, kind
            assert one.thinking_stop in ("depth", "tokens") or one.num_thinking_tokens


@pytest.mark.parametrize("kind", ["opens", "early"])
def test_a_single_step_answer_is_one_too(models, kind, tmp_path, monkeypatch):
    settings = {"use_chunked_attention": True, "chunk_size": AUTO, "max_chunk_size": 64, "base_size": 16, "threshold_low": 19.0}
    build(models[kind], tmp_path / "e", OPTIONS | settings)
    engine = Engine.load(tmp_path / "e", num_threads=1)
    fed: list[list[int]] = []
    advance = Generation._advance
    monkeypatch.setattr(Generation, "_advance", lambda self, row: (row.output or fed.append(row.prompt), advance(self, row))[1])
    try:
        prompts = [engine.text.chat("What is 2 + 3?"), engine.text.chat("Why? " * 30)]
        done = engine.generate(prompts, GenerationParams(max_new_tokens=8))
        assert all(one.single_step and not one.is_open for one in done)
        assert fed == [list(closed(engine.text, prompt)) for prompt in prompts]
        alone = engine.generate([list(fed[0])], GenerationParams(max_new_tokens=8), chunk_size=done[0].chunk_size)
        assert alone[0].output_ids == done[0].output_ids
    finally:
        engine.close()


def test_an_instruct_model_answers_with_its_whole_text(engines, tmp_path):
    """No budget may force a closing tag into an answer whose thinking was never opened, and the row says what is what."""
    engine = engines["instruct"]
    words = ["run", "--engine_dir", str(engine.directory.root), "--json", "--max_new_tokens", "24", "--max_thinking_tokens", "3"]
    free = engine.generate([engine.text.chat("Write <think>")], GenerationParams(max_new_tokens=24, stop_ids=engine.text.eos_ids))[0]
    assert not count(engine.text, free.output_ids, 0)
    row = json.loads(CliRunner().invoke(thoughtx, [*words, "--prompt", "Write <think>"]).stdout)["results"][0]
    assert row["output_ids"] == free.output_ids
    assert (row["reasoning"], row["answer"]) == (None, row["text"]) and row["thinking_stop"] is None
    row = json.loads(CliRunner().invoke(thoughtx, [*words, "--prompt", "Write", "--no_chat_template"]).stdout)["results"][0]
    assert row["answer"] == row["text"]


def test_a_template_that_opens_the_thinking_has_a_reasoning(engines):
    engine = engines["opens"]
    words = ["run", "--engine_dir", str(engine.directory.root), "--json", "--max_new_tokens", "24", "--prompt", "Hi"]
    row = json.loads(CliRunner().invoke(thoughtx, [*words, "--max_thinking_tokens", "3"]).stdout)["results"][0]
    assert row["num_thinking_tokens"] <= 3 and row["text"] == row["reasoning"] + "</think>" + row["answer"]
    row = json.loads(CliRunner().invoke(thoughtx, words).stdout)["results"][0]
    reasoning, closes, answer = row["text"].partition("</think>")
    assert (row["reasoning"], row["answer"]) == (reasoning, answer if closes else None)


class Said:
    """A system that says what it is told, behind the prompts of a real tokenizer."""

    batch_size, max_length, is_grouped = 2, 400, False

    def __init__(self, text, replies):
        self.text, self.replies = text, iter(replies)
        self.description = {"name": "said", "path": "/said", "kind": "model", "backend": "script", "dtype": "none"}

    def check(self, params):
        pass

    def write(self, prompts, params, streams):
        rows = [self.text.encode(reply, add_special=False) for reply in itertools.islice(self.replies, len(prompts))]
        return enumerate(Written(row, [-0.1] * len(row), "eos", 0.1) for row in rows)


@pytest.mark.parametrize(
    ("kind", "said", "answer"),
    [
        ("instruct", "Paris", "Paris"),
        ("instruct", "the tag </think> it is", "the tag </think> it is"),
        ("instruct", "<think>hm</think>\n\nParis", "Paris"),
        ("hybrid", "Paris", "Paris"),
        ("hybrid", "<think>\nLondon", None),
        ("opens", "hm</think>Paris", "Paris"),
        ("opens", "Paris", None),
    ],
)
def test_what_is_scored_is_the_answer(models, kind, said, answer):
    asked = Question(id="1", task="t", prompt="Where is <think>?", expected="Paris")
    found = evaluate(Said(loaded(models[kind]), [said]), [asked], GenerationParams(max_new_tokens=40)).records[0]
    assert found.answer == answer and found.correct == (answer == "Paris")


# --- what the user tells the template -------------------------------------------------------------------------------------


def run(*words) -> dict:
    ran = CliRunner().invoke(thoughtx, ["run", "--json", "--max_new_tokens", "4", *map(str, words)])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    return json.loads(ran.stdout)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--enable_thinking", "false"], {"enable_thinking": False}),
        (["--enable_thinking", "true"], {"enable_thinking": True}),
        (["--chat_template_kwargs", '{"enable_thinking": false}'], {"enable_thinking": False}),
        (["--chat_template_kwargs", '{"other": 1}'], {}),
    ],
)
@pytest.mark.slow
def test_run_tells_the_template(engines, monkeypatch, words, told, tmp_path):
    fed = []
    complete = Engine.complete
    monkeypatch.setattr(
        Engine, "complete", lambda self, requests, *rest: (fed.extend(one.prompt for one in requests), complete(self, requests, *rest))[1]
    )
    asked = tmp_path / "asked.jsonl"
    lines = [
        {"prompt": "Hi"},
        {"prompt": "Hi", "enable_thinking": True},
        {"prompt": "Hi", "chat_template_kwargs": {"enable_thinking": False}},
    ]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind in ("hybrid", "early"):
        engine, text = engines[kind], loaded(engines[kind].directory.root)
        found = run("--engine_dir", engine.directory.root, "--prompts", asked, *words)
        assert found["not_applied"] == ([] if told else ["other (the chat template does not read it)"])
        assert fed == [text.chat("Hi", **told), text.chat("Hi", enable_thinking=True), text.chat("Hi", enable_thinking=False)]
        fed.clear()
    found = run("--engine_dir", engines["instruct"].directory.root, "--prompt", "Hi", "--enable_thinking", "false")
    assert found["not_applied"] == ["enable_thinking (the chat template does not read it)"]


@pytest.mark.parametrize(
    "words",
    [
        ["--chat_template_kwargs", "[1]"],
        ["--chat_template_kwargs", '{"messages": []}'],
        ["--chat_template_kwargs", "{"],
        ["--chat_template_kwargs", '{"enable_thinking": true}', "--enable_thinking", "false"],
    ],
)
def test_what_a_template_cannot_be_told_is_refused(engines, words):
    with pytest.raises(ThoughtxError) as caught:
        run("--engine_dir", engines["hybrid"].directory.root, "--prompt", "Hi", *words)
    assert caught.value.code == "E001"


def test_eval_and_calibrate_tell_the_template(models, engines, tmp_path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "Hi", "answer": "x"}\n')
    words = ["eval", "--engine_dir", str(engines["hybrid"].directory.root), "--dataset", str(asked), "--max_new_tokens", "4"]
    sizes = []
    for more in ([], ["--enable_thinking", "false"]):
        saved = tmp_path / f"saved{len(more)}.json"
        ran = CliRunner().invoke(thoughtx, [*words, *more, "--output", str(saved)])
        assert ran.exit_code == 0, ran.output
        sizes.append(json.loads(saved.read_text())["records"][0]["num_prompt_tokens"])
    text = loaded(models["hybrid"])
    assert sizes == [len(text.chat("Hi")), len(text.chat("Hi", enable_thinking=False))]
    pytest.importorskip("torch", reason="torch is not installed")
    from trtllm_thoughtx.calibrate.quantize.job import calibrate

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi"}\n' * 2)
    more = {"qformat": "int8_wo", "calib_data": rows, "calib_size": 2}
    tokens = [
        calibrate(models["hybrid"], tmp_path / str(switch), **more, enable_thinking=switch)["data"]["num_tokens"]
        for switch in (None, "false")
    ]
    assert tokens == sizes


def test_a_missing_template_is_said(tmp_path):
    root = write_chat_model(tmp_path / "model", None)
    build(root, tmp_path / "e", OPTIONS)
    found = run("--engine_dir", tmp_path / "e", "--prompt", "Hi")
    assert found["not_applied"] == ["chat template (the checkpoint has none: the prompt went in as it is)"]
    assert run("--engine_dir", tmp_path / "e", "--prompt", "Hi", "--no_chat_template")["not_applied"] == []
    assert run("--engine_dir", tmp_path / "e", "--input_ids", "5,6")["not_applied"] == []
    ran = CliRunner().invoke(thoughtx, ["run", "--engine_dir", str(tmp_path / "e"), "--prompt", "Hi", "--max_new_tokens", "2"])
    assert "the checkpoint has none" in ran.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.json": None}, "there is no tokenizer.json"),
        ({"chat_template.jinja": None}, "there is no chat template"),
        ({"chat_template.jinja": "{% for %}"}, "cannot be put into the chat template"),
        ({"tokenizer.json": "{}"}, "no engine will load with this tokenizer"),
        ({"config.json": 300}, "no engine will load with this tokenizer: the tokenizer's highest token id is"),
        ({}, None),
    ],
)
def test_what_the_tokenizer_lacks_is_said_before_run(change, said, tmp_path):
    small = change.get("config.json")
    root = write_chat_model(tmp_path / "model", "opens", **({"vocab_size": small} if small else {}))
    for name, content in change.items():
        (root / name).unlink() if content is None else (root / name).write_text(content) if isinstance(content, str) else None
    words = {
        "convert": ["--model_dir", root, "--output_dir", tmp_path / "checkpoint"],
        "build": ["--checkpoint_dir", root, "--output_dir", tmp_path / "engine", "--backend", "onnxruntime", "--max_seq_len", "64"],
        "inspect": [tmp_path / "engine"],
    }
    for command, flags in words.items():
        ran = CliRunner().invoke(thoughtx, [command, *map(str, flags), "--json"])
        assert ran.exit_code == 0, ran.output
        notes = [note for note in json.loads(ran.stdout)["notes"] if "token" in note or "template" in note]
        assert len(notes) == (said is not None) and all(said in note for note in notes), command
        assert command == "inspect" or (said or "") in ran.stderr
