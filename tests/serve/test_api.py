"""The API through OpenAI's own client and through plain HTTP, beside what the engine says in this process."""

from __future__ import annotations

import json

import numpy as np
import openai
import pytest
from places import TINY as SAMPLE
from servers import serving, until

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.text.answer import split_ids

ASK = "x1 = 3 x2 = 5 x3 = x1 + x2 ?"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("api") / "thoughtx"
    sizes = {"max_batch_size": 4, "max_seq_len": 512, "use_chunked_attention": True, "chunk_size": 64, "max_chunk_size": 64}
    build(SAMPLE, root, {"backend": ("onnxruntime",), "dtype": "float32", **sizes})
    return root


@pytest.fixture(scope="module")
def server(engine_dir, tmp_path_factory):
    with serving(engine_dir, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def engine(engine_dir):
    engine = Engine.load(engine_dir, num_threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def alone(engine, **settings):
    ids = engine.text.chat(ASK)
    done = engine.generate([ids], engine.default_params(**settings))[0]
    return done, split_ids(engine.text, done.output_ids, is_open=done.is_open, text_end=done.text_end)


def messages():
    return [{"role": "user", "content": ASK}]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9, "seed": 7, "top_p": 0.9}])
def test_chat_streamed_and_whole_is_what_the_engine_says(client, engine, settings):
    done, reply = alone(engine, max_new_tokens=120, **settings)
    whole = client.chat.completions.create(model="thoughtx", messages=messages(), max_tokens=120, **settings)
    message = whole.choices[0].message
    assert (message.content, message.reasoning, message.reasoning_content) == (reply.answer or "", reply.reasoning, reply.reasoning)
    assert whole.choices[0].finish_reason == {"eos": "stop", "length": "length"}[done.stop_reason]
    assert whole.usage.prompt_tokens == done.num_prompt_tokens and whole.usage.completion_tokens == len(done.output_ids)
    assert whole.usage.completion_tokens_details.reasoning_tokens == done.num_thinking_tokens > 0
    about = whole.usage.thoughtx[0]
    assert (about["num_steps"], about["thinking_stop"], about["chunk_size"]) == (done.num_steps, done.thinking_stop, done.chunk_size)
    stream = client.chat.completions.create(
        model="thoughtx", messages=messages(), max_completion_tokens=120, stream=True, stream_options={"include_usage": True}, **settings
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == message.reasoning
    assert len([delta for delta in deltas if getattr(delta, "reasoning", None)]) > 5
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(done.output_ids)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_stop_n_seed_and_logprobs(client, engine):
    whole, reply = alone(engine, max_new_tokens=60, temperature=0)
    stop = (reply.reasoning or "")[5:8]
    done, cut = alone(engine, max_new_tokens=60, temperature=0, stop=(stop,))
    said = client.chat.completions.create(model="thoughtx", messages=messages(), max_tokens=60, temperature=0, stop=stop)
    assert said.choices[0].message.reasoning == cut.reasoning and len(done.output_ids) < len(whole.output_ids)
    assert said.choices[0].finish_reason == "stop" and said.choices[0].stop_reason == stop
    settings = {"model": "thoughtx", "messages": messages(), "max_tokens": 40, "temperature": 1.0, "seed": 5}
    many = client.chat.completions.create(n=3, **settings)
    again = client.chat.completions.create(n=3, **settings)
    one = client.chat.completions.create(**settings)
    texts = [choice.message.reasoning for choice in many.choices]
    assert texts == [choice.message.reasoning for choice in again.choices] and len(set(texts)) > 1
    assert one.choices[0].message.reasoning == texts[0] and [choice.index for choice in many.choices] == [0, 1, 2]
    free = [client.chat.completions.create(**{**settings, "seed": None}).usage.thoughtx[0]["seed"] for _ in range(2)]
    assert free[0] != free[1]
    told = client.chat.completions.create(**{**settings, "temperature": 0}, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    done, _ = alone(engine, max_new_tokens=40, temperature=0, logprobs=3)
    assert [entry.logprob for entry in told] == pytest.approx(done.logprobs, abs=1e-6)
    assert [[one.logprob for one in entry.top_logprobs] for entry in told] == [[value for _, value in top] for top in done.top_logprobs]


def test_completions_take_texts_and_ids_and_echo_gives_the_prompts_log_probabilities(server, engine):
    ids = engine.text.encode(ASK)
    status, said = server.ask("/v1/completions", {"prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0})
    assert status == 200
    told = said["choices"][0]["logprobs"]
    logits = engine.forward([ids])[0].astype(np.float64)
    values = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    expected = [float(values[place, token]) for place, token in enumerate(ids[1:])]
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-6) and len(told["tokens"]) == len(ids) + 1
    assert [max(top.values()) for top in told["top_logprobs"][1:-1]] == pytest.approx(values[:-1].max(-1).tolist(), abs=1e-6)
    whole = said["choices"][0]["text"]
    assert whole == engine.text.decode(ids) + engine.text.decode([engine.text.encode(told["tokens"][-1], add_special=False)[0]])
    places = zip(told["text_offset"], told["tokens"][:-1], strict=False)
    assert all(whole[at:].lstrip().startswith(token) for at, token in places)
    for prompt, num in ((ASK, 1), ([ASK, "x1 = 4 ?"], 2), ([ids, ids[:5]], 2), (ids, 1)):
        status, said = server.ask("/v1/completions", {"prompt": prompt, "temperature": 0})
        assert status == 200 and [choice["index"] for choice in said["choices"]] == list(range(num))
        assert said["usage"]["completion_tokens"] <= 16 * num
    first = engine.generate([engine.text.raw("x1 = 4 ?")], engine.default_params(max_new_tokens=9, temperature=0))[0]
    said = server.ask("/v1/completions", {"prompt": [ASK, "x1 = 4 ?"], "max_tokens": 9, "temperature": 0})[1]
    assert said["choices"][1]["text"] == engine.text.decode(first.output_ids)[: first.text_end]
    _, text = server.ask("/v1/completions", {"prompt": "x1 = 4 ?", "max_tokens": 9, "temperature": 0, "stream": True})
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == said["choices"][1]["text"] and text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("fields", "num_steps"),
    [
        ({"max_reasoning_depth": 1}, 1),
        ({"reasoning_effort": "none"}, 0),
        ({"thinking": {"type": "disabled"}}, 0),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 0),
        ({"thinking_budget": 0}, 0),
    ],
)
def test_thinking_is_limited_exactly(server, fields, num_steps):
    said = server.ask(CHAT, {"messages": messages(), "temperature": 0, "max_tokens": 100, **fields})[1]
    about = said["usage"]["thoughtx"][0]
    assert about["num_steps"] == num_steps and about["thinking_stop"] in ("depth", "tokens")
    assert ("reasoning" in said["choices"][0]["message"]) == bool(num_steps) and said["choices"][0]["message"]["content"]


def test_a_token_budget_in_any_dialect_is_the_same(server):
    fields = [
        {"max_thinking_tokens": 9},
        {"thinking_token_budget": 9},
        {"reasoning": {"max_tokens": 9}},
        {"thinking": {"budget_tokens": 9}},
    ]
    said = [server.ask(CHAT, {"messages": messages(), "temperature": 0, "max_tokens": 80, **one})[1] for one in fields]
    assert {one["usage"]["completion_tokens_details"]["reasoning_tokens"] for one in said} == {9}
    assert len({one["choices"][0]["message"]["content"] for one in said}) == 1


def test_where_the_reasoning_goes(server, engine):
    body = {"messages": messages(), "temperature": 0, "max_tokens": 200}
    plain = server.ask(CHAT, body)[1]["choices"][0]["message"]
    for hidden in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        assert server.ask(CHAT, {**body, **hidden})[1]["choices"][0]["message"] == {"role": "assistant", "content": plain["content"]}
    inline = server.ask(CHAT, {**body, "separate_reasoning": False})[1]["choices"][0]["message"]
    first, last = engine.text.think_tags
    assert inline["content"] == f"{first}{plain['reasoning']}{last}{plain['content']}" and "reasoning" not in inline
    earlier = [*messages(), {"role": "assistant", **{key: plain[key] for key in ("content", "reasoning")}}, *messages()]
    assert server.ask(CHAT, {**body, "messages": earlier})[0] == 200


def test_responses(client, engine):
    _, reply = alone(engine, max_new_tokens=200, temperature=0)
    whole = client.responses.create(model="thoughtx", input=ASK, temperature=0, max_output_tokens=200)
    assert whole.output_text == reply.answer and whole.status == "completed" and whole.output[0].type == "reasoning"
    assert whole.output[0].content[0].text == reply.reasoning
    events = list(client.responses.create(model="thoughtx", input=messages(), temperature=0, max_output_tokens=200, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == reply.answer
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == reply.reasoning
    assert events[-1].response.output_text == reply.answer
    none = client.responses.create(model="thoughtx", input=ASK, temperature=0, reasoning={"effort": "none"}, max_output_tokens=5)
    assert none.usage.output_tokens_details.reasoning_tokens == 0
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="thoughtx", input=ASK, previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def test_the_small_paths(server, engine):
    ids = engine.text.encode(ASK, add_special=False)
    assert server.ask("/tokenize", {"prompt": ASK, "add_special_tokens": False})[1]["tokens"] == ids
    assert server.ask("/tokenize", {"messages": messages()})[1]["tokens"] == list(engine.text.chat(ASK))
    assert server.ask("/detokenize", {"tokens": ids})[1]["prompt"] == engine.text.decode(ids, skip_special=False)
    info = server.ask("/tokenizer_info")[1]
    assert info["eos_token"] == engine.text.special["eos_token"] and "messages" in info["chat_template"]
    status, models = server.ask("/v1/models")
    assert status == 200 and models["data"][0]["id"] == "thoughtx" and models["data"][0]["max_model_len"] == 512
    assert server.ask("/v1/models/thoughtx")[0] == 200 and server.ask("/v1/models/other")[0] == 404
    assert server.ask("/health") == (200, {"status": "ready"})
    status, page, headers = server.answer("/")
    assert status == 200 and "<title>thoughtx-serve</title>" in page and "default-src 'none'" in headers["content-security-policy"]
    before = server.metric("generation_tokens_total")
    said = server.ask(CHAT, {"messages": messages(), "max_tokens": 7, "temperature": 0})[1]
    assert server.metric("generation_tokens_total") - before == said["usage"]["completion_tokens"] == 7
    assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0
    assert server.metric("time_to_first_token_seconds_count") >= 1
    assert server.metric("kv_cache_bytes") > 0 and 0 <= server.metric("kv_cache_usage_perc") <= 1


def test_the_log_tells_counts_and_no_words(server):
    num_before = len(server.entries())
    server.ask(CHAT, {"messages": [{"role": "user", "content": "x1 = 77 x2 = 5 ?"}], "max_tokens": 3})
    until(lambda: len(server.entries()) > num_before)  # it is written behind the answer's last byte
    entry = server.entries()[-1]
    assert entry["path"] == CHAT and entry["status"] == 200 and entry["num_new_tokens"] == 3 and entry["num_prompt_tokens"] > 5
    assert "77" not in json.dumps({key: value for key, value in entry.items() if key not in ("time", "seconds")})
