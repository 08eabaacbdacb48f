"""`thoughtx-export --triton`: a repository that a real Triton server loads, whose streams are those of thoughtx-run."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import triton_server
from places import TINY

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.ship.export.triton import INPUTS, OUTPUTS

PROMPTS = ("Q x1 = 38 x2 = 75 ? <think>", "Q x1 = 5 x2 = 61 x3 = 17 ? <think>")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine") / "e"
    build(TINY, root, {"backend": ("onnxruntime",), "dtype": "float32", "max_batch_size": 4})
    return root


def export(*words: object) -> int:
    return run(cli.COMMANDS["export"], "thoughtx-export", [*map(str, words), "-q", "--json"])


def test_the_model_is_added_to_the_repository(engine: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("a", "b"):
        assert export("--engine_dir", engine, "--triton", tmp_path / "r", "--model_name", name) == 0
    assert json.loads(capsys.readouterr().out.split("}\n{")[0].rstrip("\n}") + "}")["model"] == "a"
    for name in ("a", "b"):
        model = tmp_path / "r" / name
        assert sorted(path.name for path in model.iterdir()) == ["1", "config.pbtxt"]
        assert sorted(path.name for path in (model / "1").iterdir()) == ["engine", "model.py"]
        for path in engine.iterdir():
            assert (model / "1" / "engine" / path.name).read_bytes() == path.read_bytes()
    config = (tmp_path / "r" / "a" / "config.pbtxt").read_text()
    assert config == (tmp_path / "r" / "b" / "config.pbtxt").read_text().replace('name: "b"', 'name: "a"')
    compile((tmp_path / "r" / "a" / "1" / "model.py").read_text(), "model.py", "exec")


PARSED = """
import json, sys
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
config = text_format.Parse(open(sys.argv[1]).read(), ModelConfig())
kinds = lambda rows: {row.name: [DataType.Name(row.data_type), *row.dims] for row in rows}
print(json.dumps([config.name, config.backend, config.max_batch_size, config.model_transaction_policy.decoupled, kinds(config.input),
    kinds(config.output), [row.name for row in config.input if not row.optional]]))
"""


def test_the_configuration_is_tritons(engine: Path, tmp_path: Path) -> None:
    triton_server.need()
    assert export("--engine_dir", engine, "--triton", tmp_path / "r", "--model_name", "m") == 0
    name, backend, most, is_decoupled, inputs, outputs, needed = json.loads(triton_server.python(PARSED, tmp_path / "r/m/config.pbtxt"))
    assert (name, backend, most, is_decoupled, needed) == ("m", "python", 1, True, ["text_input"])
    assert inputs == {one.name: [one.kind, -1 if one.is_list else 1] for one in INPUTS}
    assert outputs == {one.name: [one.kind, 1] for one in OUTPUTS}


# As Triton's OpenAI front end sends them to every backend but vLLM: shapes, types, and one response where nothing is streamed.
CLIENT = """
import json, queue, sys
import numpy as np, tritonclient.grpc as grpc
port, jobs = sys.argv[1], json.loads(sys.argv[2])
client, events = grpc.InferenceServerClient("127.0.0.1:" + port), queue.Queue()
KINDS = {"stream": ("BOOL", bool), "max_tokens": ("INT32", np.int32), "temperature": ("FP32", np.float32), "seed": ("UINT64", np.uint64),
    "top_p": ("FP32", np.float32), "frequency_penalty": ("FP32", np.float32), "presence_penalty": ("FP32", np.float32),
    "ignore_eos": ("BOOL", bool), "return_num_output_tokens": ("BOOL", bool), "return_num_input_tokens": ("BOOL", bool)}
def tensor(name, value):
    kind, dtype = KINDS.get(name, ("BYTES", object))
    array = np.array([value] if isinstance(value, list) else [[value]], dtype=dtype)
    found = grpc.InferInput(name, array.shape, kind)
    found.set_data_from_numpy(array)
    return found
streams, said, order, running = {}, {}, [], set()
def send(index):
    job = jobs[index]
    if index in streams:
        streams[index].stop_stream()
    streams[index] = grpc.InferenceServerClient("127.0.0.1:" + port)
    streams[index].start_stream(lambda result, error: events.put((index, result, error)))
    inputs = [tensor(*pair) for pair in job["inputs"].items()]
    streams[index].async_stream_infer(job["model"], inputs, enable_empty_final_response=True)
    said[index] = {"pieces": [], "finish": "", "counts": [0, 0], "error": None, "cancelled": False}
    running.add(index)
for index, job in enumerate(jobs):
    if "behind" not in job:
        send(index)
while running:
    index, result, error = events.get()
    own = said[index]
    if error is not None:
        if index in running and jobs[index].get("again") and "no room" in error.message():
            send(index)  # until there is room
            continue
        own["error"] = error.message()
    else:
        outputs = {one.name: result.as_numpy(one.name) for one in result.get_response().outputs}
        if outputs:
            own["pieces"].append(outputs["text_output"].item().decode())
            own["finish"] += outputs["finish_reason"].item().decode()
            for place, name in enumerate(("num_input_tokens", "num_output_tokens")):
                own["counts"][place] += int(outputs[name].item()) if name in outputs else 0
            order.append(index)
    for other, job in enumerate(jobs):
        if job.get("behind") == index and other not in said:
            send(other)
    if error is not None or result.get_response().parameters["triton_final_response"].bool_param:
        running.discard(index)
    for other in list(running):
        once = jobs[other].get("cancel_once")
        if once in said and said[once]["error"]:
            said[other]["cancelled"] = True
            streams[other].stop_stream(cancel_requests=True)
            running.discard(other)
for index, stream in streams.items():
    if not said[index]["cancelled"]:
        stream.stop_stream()
print(json.dumps([[said[index] for index in range(len(jobs))], order]))
"""


def ask(triton: triton_server.Triton, *jobs: dict[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
    jobs = tuple({"model": "m", **job} for job in jobs)
    rows, order = json.loads(triton_server.python(CLIENT, triton.grpc, json.dumps(jobs)))
    return rows, order


def wait_for(triton: triton_server.Triton, state: str) -> None:
    while triton.state("m") != state:
        time.sleep(0.05)


def set_parameter(config: Path, name: str, old: str, new: object) -> None:
    before, after = (f'parameters {{ key: "{name}", value {{ string_value: "{value}" }} }}' for value in (old, new))
    text = config.read_text()
    assert before in text
    config.write_text(text.replace(before, after))


@pytest.mark.slow
def test_a_real_server_serves_it(engine: Path, tmp_path: Path, capsys: Any) -> None:
    """Two streams beside each other, a whole answer, errors, a cancelled request whose slot is free again, a clean unload."""
    triton_server.need()
    wanted = []
    for prompt in PROMPTS:
        words = ["--engine_dir", engine, "--prompt", prompt, "--no_chat_template", "--max_new_tokens", 200, "--seed", 7, "--json", "-q"]
        assert run(cli.COMMANDS["run"], "thoughtx-run", [*map(str, words), "--temperature", "0.6", "--top_p", "0.95"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["results"]
        wanted.append((row["text"], row["num_prompt_tokens"], len(row["output_ids"])))
    assert export("--engine_dir", engine, "--triton", tmp_path / "r", "--model_name", "m") == 0
    config = tmp_path / "r" / "m" / "config.pbtxt"
    for name, old, new in (("max_num_seqs", "", 2), ("max_queued_requests", "64", 0), ("num_threads", "", 1)):
        set_parameter(config, name, old, new)
    with triton_server.started(tmp_path / "r", tmp_path, flags=["--load-model=m"]) as triton:
        wait_for(triton, "READY")
        inputs = [
            {"text_input": prompt, "stream": True, "max_tokens": 200, "temperature": 0.6, "top_p": 0.95, "seed": 7} for prompt in PROMPTS
        ]
        counted = {"return_num_input_tokens": True, "return_num_output_tokens": True}
        rows, order = ask(triton, *({"inputs": {**one, **counted}} for one in inputs))
        for row, (text, num_prompt, num_new) in zip(rows, wanted, strict=True):
            assert "".join(row["pieces"]) == text and len(row["pieces"]) > 10 and row["finish"] == "stop" and row["error"] is None
            assert row["counts"] == [num_prompt * len(row["pieces"]), num_new]
        switches = sum(a != b for a, b in itertools.pairwise(order))
        assert switches > 5  # neither waited for the other
        zeros = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "stop_words": ["nothing", "such"]}
        (row,), _ = ask(triton, {"inputs": {**inputs[0], **zeros, "stream": False}})
        assert row["pieces"] == [wanted[0][0]] and row["counts"] == [0, 0]
        (row,), _ = ask(triton, {"inputs": {**inputs[0], "stop_words": [" 75"]}})
        assert wanted[0][0].startswith("".join(row["pieces"])) and " 75" not in "".join(row["pieces"]) and row["finish"] == "stop"

        (row,), _ = ask(triton, {"inputs": {**inputs[0], "max_tokens": 5000}})
        assert "error[E140]: there is no room for 5000 new tokens" in row["error"] and "fix:" in row["error"]
        status, said = triton.ask("/v2/models/m/generate", {"text_input": "x", "bad_words": "y"})
        assert status == 400 and "bad_words would change the answer" in said and "fix:" in json.loads(said)["error"]
        status, said = triton.ask("/v2/models/m/generate", {"text_input": PROMPTS[0], "temperature": 0, "max_thinking_tokens": 4})
        assert status == 200 and 0 < json.loads(said)["text_output"].index("</think>") < 12

        endless = {"stream": True, "max_tokens": 1900, "temperature": 0.0, "ignore_eos": True, "text_input": PROMPTS[0]}
        jobs: list[dict[str, Any]] = [{"inputs": endless}, {"inputs": endless, "behind": 0, "cancel_once": 2}]
        jobs += [{"inputs": inputs[0], "behind": 1}, {"inputs": inputs[1], "behind": 2, "again": True}]  # each behind another's first event
        rows, _ = ask(triton, *jobs)
        assert "no room for this request now" in rows[2]["error"]
        assert rows[1]["cancelled"] and 0 < len(rows[1]["pieces"]) < 1900
        assert "".join(rows[3]["pieces"]) == wanted[1][0] and rows[3]["error"] is None  # in the slot that was given up
        assert rows[0]["finish"] == "length" and len("".join(rows[0]["pieces"])) > 1900

        assert triton.children() and triton.ask("/v2/repository/models/m/unload")[0] == 200
        wait_for(triton, "UNAVAILABLE")
        assert triton.children() == [] and "Non-graceful" not in triton.log.read_text()
        assert triton.ask("/v2/repository/models/m/load")[0] == 200  # and again


@pytest.mark.slow
def test_a_real_server_says_why_it_does_not_load(engine: Path, tmp_path: Path) -> None:
    """A damaged engine, a parameter that is none, an engine that the key did not sign; and a Triton whose Python lacks the package."""
    triton_server.need()
    pytest.importorskip("cryptography", reason='signatures need it: pip install ".[sign]"')
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", tmp_path / "k.pem"], check=True)
    (tmp_path / "k.pem").chmod(0o600)
    subprocess.run(["openssl", "pkey", "-in", tmp_path / "k.pem", "-pubout", "-out", tmp_path / "k.pub"], check=True)
    signed = Path(shutil.copytree(engine, tmp_path / "signed"))
    for source, name in ((engine, "damaged"), (engine, "odd"), (engine, "unsigned"), (signed, "signed")):
        if source is signed:
            assert run(cli.COMMANDS["sign"], "thoughtx-sign", ["--engine_dir", str(signed), "--key", str(tmp_path / "k.pem")]) == 0
        assert export("--engine_dir", source, "--triton", tmp_path / "r", "--model_name", name) == 0
    (tmp_path / "r" / "damaged" / "1" / "engine" / "rank0.data").write_bytes(b"another")
    given = {
        "odd": ("max_queued_requests", "64", "many"),
        **{name: ("verify_key", "", tmp_path / "k.pub") for name in ("signed", "unsigned")},
    }
    for name, (key, old, new) in given.items():
        set_parameter(tmp_path / "r" / name / "config.pbtxt", key, old, new)
    with triton_server.started(tmp_path / "r", tmp_path) as triton:
        for name, code, why in (
            ("damaged", "E120", "rank0.data"),
            ("odd", "E002", "max_queued_requests"),
            ("unsigned", "E124", "unsigned"),
        ):
            status, said = triton.ask(f"/v2/repository/models/{name}/load")
            assert status == 400 and f"error[{code}" in said and why in said and "fix:" in said, said
            assert triton.children() == []
        assert triton.ask("/v2/repository/models/signed/load")[0] == 200
    (tmp_path / "two").mkdir()
    with triton_server.started(tmp_path / "r", tmp_path / "two", packages=()) as triton:
        status, said = triton.ask("/v2/repository/models/signed/load")
        assert status == 400 and "error[E201]" in said and "pip install trtllm-thoughtx==" in said, said


def test_refusals_leave_nothing(engine: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(code: str, *words: object, status: int = 3) -> dict[str, str]:
        before = sorted(path for path in tmp_path.rglob("*"))
        capsys.readouterr()
        assert export("--engine_dir", words[0], *words[1:]) == status
        error = dict(json.loads(capsys.readouterr().out)["error"])
        assert error["code"] == code and all(error[part] for part in ("what", "where", "why", "fix")), error
        assert sorted(path for path in tmp_path.rglob("*")) == before
        return error

    own = Path(shutil.copytree(engine, tmp_path / "own"))
    assert export("--engine_dir", own, "--triton", tmp_path / "r") == 0
    error = refused("E130", own, "--triton", tmp_path / "r")
    assert "has a model own" in error["what"] and "--model_name" in error["fix"]
    assert export("--engine_dir", own, "--triton", tmp_path / "r", "--model_name", "other") == 0
    refused("E130", own, "--triton", own / "r")
    refused("E130", own, "--triton", tmp_path / "none" / "r")
    (tmp_path / "file").write_text("x")
    refused("E130", own, "--triton", tmp_path / "file")
    refused("E001", own, "--triton", tmp_path / "r", "--model_name", "../out", status=2)
    refused("E001", own, "--triton", tmp_path / "r", "--tag", "x", status=2)
    refused("E001", own, "--oci", tmp_path / "o", "--model_name", "x", status=2)
    refused("E001", own, "--oci", tmp_path / "o", "--triton", tmp_path / "q", status=2)
    refused("E001", own, status=2)
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        assert "cannot be written" in refused("E130", own, "--triton", tmp_path / "r", "--model_name", "new")["what"]
    (own / "tokenizer.json").rename(tmp_path / "kept")
    assert "tokenizer" in refused("E122", own, "--triton", tmp_path / "q")["what"]
    (tmp_path / "kept").rename(own / "tokenizer.json")
    (own / "rank0.data").write_bytes(b"another")
    refused("E120", own, "--triton", tmp_path / "q")
