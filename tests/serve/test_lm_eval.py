"""lm-eval's own HTTP models against the server: what they send is answered, with the numbers of the adapter that runs in this process."""

from __future__ import annotations

import pytest
from places import TINY as SAMPLE
from servers import serving

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.evaluate.scorer import Scorer
from trtllm_thoughtx.evaluate.systems import EngineSystem
from trtllm_thoughtx.runtime.engine import Engine

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: harness)")
for module in ("aiohttp", "tenacity"):
    pytest.importorskip(module, reason=f"lm-eval's HTTP models need {module}")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI  # noqa: E402

ASKED = ["x1 = 3 x2 = 5 x3 = x1 + x2 ?", "x1 = 41 ?", "x1 = 7 x2 = 30 ?"]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("lm") / "thoughtx"
    build(SAMPLE, root, {"backend": ("onnxruntime",), "dtype": "float32", "max_batch_size": 4, "max_seq_len": 512})
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


def instances(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


@pytest.mark.parametrize("num_concurrent", [1, 3])
def test_local_chat_completions(server, engine, num_concurrent):
    model = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", model="thoughtx", num_concurrent=num_concurrent)
    settings = {"until": ["</s>", "\n\n\n"], "max_gen_toks": 60, "do_sample": False}
    chats = [model.apply_chat_template([{"role": "user", "content": text}]) for text in ASKED]
    found = model.generate_until(instances("generate_until", *((chat, settings) for chat in chats)), disable_tqdm=True)
    params = engine.default_params(max_new_tokens=60, temperature=0.0, stop=("</s>", "\n\n\n"))
    for text, answer in zip(ASKED, found, strict=True):
        done = engine.generate([engine.text.chat(text)], params)[0]
        whole = server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 60, "temperature": 0})
        assert answer == whole[1]["choices"][0]["message"]["content"] and len(done.output_ids) == whole[1]["usage"]["completion_tokens"]


def test_local_completions_scores_as_the_adapter_in_this_process(server, engine):
    model = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="thoughtx", tokenizer_backend="remote")
    pairs = [(text, end) for text in ASKED for end in (" x1", " ?", " 3 x2 = 5")]
    theirs = model.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    ids = [[tuple(engine.text.encode(part, add_special=False)) for part in (pair[0], pair[0] + pair[1])] for pair in pairs]
    ours = Scorer(EngineSystem(engine, batch_size=4)).score([(before, whole[len(before) :]) for before, whole in ids])
    for (score, is_greedy), (wanted, greedy) in zip(theirs, ours, strict=True):
        assert score == pytest.approx(wanted, abs=1e-6) and is_greedy == greedy
