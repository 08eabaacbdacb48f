"""The open load: the same requests for the same seed, its arithmetic, and one small load on a server that it starts itself."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from argparse import Namespace

import pytest
from places import ROOT, script
from places import TINY as SAMPLE
from servers import MAIN

from trtllm_thoughtx.build.build import build

BENCH = ROOT / "bench" / "serving_http.py"
bench = script("bench/serving_http.py")


def settings(**own):
    return Namespace(**{"seed": 0, "seconds": 60.0, "burst": 5, "prompts": (3, 9), "answers": (2, 4), **own})


def test_the_load_follows_from_its_seed():
    load = bench.load_of(2.0, settings())
    assert load == bench.load_of(2.0, settings()) != bench.load_of(2.0, settings(seed=1))
    assert 60 < len(load) < 180 and all(a.at <= b.at <= 60 for a, b in itertools.pairwise(load))
    assert {len(one.prompt.split()) for one in load} == set(range(3, 10)) and {one.num_new for one in load} == {2, 3, 4}
    burst = bench.load_of(math.inf, settings())
    assert len(burst) == 5 and {one.at for one in burst} == {0.0}


def test_tokens_count_only_of_requests_that_were_answered():
    done = bench.Answer(1.0, 200, "", [1.5, 1.7, 2.0], 2.0, 30, 4)
    cut = bench.Answer(1.0, 200, "reset", [1.5], 4.0, 30, 0)
    refused = bench.Answer(1.0, 429, "full", [], 1.1)
    row = bench.summary(0.5, [done, cut, refused])
    assert (row["num_requests"], row["num_done"], row["seconds"]) == (3, 1, 4.0)
    assert row["all_tokens_per_second"] == 8.5 and row["new_tokens_per_second"] == 1.0
    assert row["first_token"] == {"p50": 0.5, "p99": 0.5} and row["per_token"]["p50"] == pytest.approx(0.5 / 3, abs=1e-3)
    assert row["between_tokens"]["p50"] == 0.25 and row["errors"] == ["200 reset", "429 full"]
    nothing = bench.summary(math.inf, [refused])
    assert nothing["rate"] == "burst" and nothing["num_done"] == 0 and nothing["first_token"] is None


def test_a_load_on_a_server_that_it_starts(tmp_path):
    build(SAMPLE, tmp_path / "thoughtx", {"backend": ("onnxruntime",), "dtype": "float32", "max_batch_size": 2, "max_seq_len": 256})
    (tmp_path / "serve.py").write_text(MAIN)
    command = f"{sys.executable} {tmp_path / 'serve.py'} --engine_dir {tmp_path / 'thoughtx'} --port {{port}} --num_threads 1"
    words = [sys.executable, str(BENCH), "--system", "ours", command, "--rates", "20,inf", "--seconds", "0.2", "--burst", "5"]
    words += ["--prompts", "2,6", "--answers", "2,5", "--output", str(tmp_path / "load.json"), "--plot", str(tmp_path / "load.png")]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (system,) = json.loads((tmp_path / "load.json").read_text())["systems"]
    assert system["model"] == "thoughtx" and system["memory_loaded"]["resident_mib"] > 0
    for row, rate in zip(system["loads"], (20.0, math.inf), strict=True):
        load = bench.load_of(rate, settings(seconds=0.2, prompts=(2, 6), answers=(2, 5)))
        assert row["num_done"] == row["num_requests"] == len(load) and not row["errors"]
        assert row["num_new_tokens"] == sum(one.num_new for one in load)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    words[3:5] = ["ours", f"{sys.executable} -c pass"]
    assert "does not answer" in subprocess.run(words, capture_output=True, text=True).stderr


def test_what_triton_is_asked_and_what_it_says():
    client = bench.client_of("http://127.0.0.1:1/v2", "m", None, 1.0)
    path, body = client.request(bench.Asked(0.0, "a b", 3))
    assert path == "/v2/models/m/generate_stream" and (body["text_input"], body["max_tokens"], body["stream"]) == ("a b", 3, True)
    answer = bench.Answer(0.0, 200)
    for at, piece in enumerate(("a", "", "b")):
        client.read({"text_output": piece, "num_input_tokens": 4, "num_output_tokens": 1}, answer, float(at))
    assert (answer.events, answer.num_prompt_tokens, answer.num_new_tokens) == ([0.0, 2.0], 4, 3)
    assert type(bench.client_of("http://127.0.0.1:1/v1", None, None, 1.0)) is bench.Client
