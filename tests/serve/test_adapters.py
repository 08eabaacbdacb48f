"""The `model` field picks an adapter; a name that is neither the model nor an adapter is status 404, as OpenAI's clients expect."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from places import TINY as SAMPLE
from safetensors.numpy import save_file
from servers import serving

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.cli.run import run_requests
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families import tensors_of

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
MESSAGES = [{"role": "user", "content": "x1 = 3 x2 = 5 x3 = x1 + x2 ?"}]
GREEDY = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    """An engine of the sample, with two adapters beside it."""
    root = tmp_path_factory.mktemp("lora") / "thoughtx"
    options = {"backend": ("onnxruntime",), "dtype": "float32", "max_batch_size": 4, "max_seq_len": 256, "max_lora_rank": 4}
    build(SAMPLE, root, options)
    engine = Engine.load(root)
    shapes = {part.source: part.shape for tensor in tensors_of(engine.config) for part in tensor.parts}
    engine.close()
    for seed, name in enumerate(("one", "two")):
        (root.parent / name).mkdir()
        rng, tensors = np.random.default_rng(seed), {}
        for source, shape in shapes.items():
            if source.endswith(("down_proj.weight", "v_proj.weight")):
                module = f"base_model.model.{source.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = rng.normal(0, 0.3, (4, shape[1])).astype(np.float32)
                tensors[f"{module}.lora_B.weight"] = rng.normal(0, 0.3, (shape[0], 4)).astype(np.float32)
        save_file(tensors, root.parent / name / "adapter_model.safetensors")
        (root.parent / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return root


@pytest.fixture(scope="module")
def server(engine_dir, tmp_path_factory):
    flags = [word for name in ("one", "two") for word in ("--lora_modules", f"{name}={engine_dir.parent / name}")]
    with serving(engine_dir, tmp_path_factory.mktemp("log") / "log", *flags) as running:
        yield running


def test_clients_pick_an_adapter_by_model_and_get_what_it_gives_alone(server, engine_dir):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    asked = ["thoughtx", "one", "two", "one", "two", "thoughtx"]
    with ThreadPoolExecutor() as pool:
        replies = list(pool.map(lambda model: client.chat.completions.create(model=model, **GREEDY), asked))
    texts = [str(reply.choices[0].message) for reply in replies]
    assert [reply.model for reply in replies] == asked and len(set(texts)) == 3
    assert [texts[i] for i in (0, 1, 2)] == [texts[i] for i in (5, 3, 4)]
    engine = Engine.load(engine_dir, num_threads=1)
    engine.load_adapter(engine_dir.parent / "one")
    ids = engine.text.chat(MESSAGES[0]["content"])
    done = engine.generate([ids], engine.default_params(max_new_tokens=8, temperature=0.0), adapter="one")[0]
    engine.close()
    status, said = server.ask("/v1/completions", {"model": "one", "prompt": ids, "max_tokens": 8, "temperature": 0})
    assert status == 200 and said["model"] == "one"
    for lora_dir, wanted in ((engine_dir.parent / "one", True), (None, False)):
        found = run_requests(engine_dir=engine_dir, prompt=MESSAGES[0]["content"], lora_dir=lora_dir, **SHORT)["results"][0]
        assert (found["output_ids"] == done.output_ids) is wanted


SHORT = {"max_new_tokens": 8, "temperature": 0.0, "num_threads": 1}


def test_models_are_listed_and_an_unknown_one_is_not_found(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["thoughtx", "one", "two"]
    assert client.models.retrieve("two").parent == "thoughtx"
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="three", **GREEDY)
    assert error.value.param == "model" and "one, two" in error.value.message
    for path, body in (("/v1/completions", {"model": "three", "prompt": "a"}), ("/v1/responses", {"model": "three", "input": "a"})):
        assert server.ask(path, body)[0] == 404


def test_a_name_that_is_taken_and_a_directory_that_is_none_stop_the_server_before_it_listens(engine_dir, tmp_path):
    from trtllm_thoughtx.serve.serve import serve

    for pair, code in ((("thoughtx", engine_dir.parent / "one"), "E001"), (("x", tmp_path), "E101")):
        with warnings.catch_warnings(), pytest.raises(ThoughtxError) as error:
            serve(engine_dir, port=0, lora_modules=(pair,))
        assert error.value.code == code
