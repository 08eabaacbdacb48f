"""Jobs: many requests, bad ones among them, stopped and gone on with."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import TINY as SAMPLE

from trtllm_thoughtx import jsonl
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli import params as console

MAIN = "import sys; from trtllm_thoughtx.cli.entry import run_main; sys.exit(run_main())"
EVAL = MAIN.replace("run_main", "eval_main")
# A command that ends itself as soon as so many lines of its answers are written: an event, on a machine however busy.
STRUCK = """
import os, signal
from trtllm_thoughtx.runtime.answers import Answers

def write(self, rows, inner=Answers.write):
    inner(self, rows)
    if self.path.read_bytes().count(b"\\n") >= {least}:
        os.kill(os.getpid(), signal.{kill})

Answers.write = write
"""
ASK = "x1 = {} x2 = 5 x3 = x1 + x2 ?"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("jobs")
    words = ("--checkpoint_dir", str(SAMPLE), "--output_dir", str(root / "engine"), "--backend", "onnxruntime", "-q")
    sizes = ("--max_batch_size", "2", "--max_seq_len", "512", "--use_chunked_attention", "--chunk_size", "16", "--max_chunk_size", "64")
    assert console.run(cli.build, "thoughtx-build", [*words, *sizes]) == 0
    return root / "engine"


def command(engine: Path, *words: object, main: str = MAIN) -> list[str]:
    return [sys.executable, "-c", main, "--engine_dir", str(engine), "--num_threads", "1", *map(str, words)]


def done(engine: Path, *words: object, given: str = "", status: int = 0, main: str = MAIN) -> dict[str, Any]:
    """What a command in this process says, `given` on its stdin; only what is struck needs a process of its own."""
    name, out, err = "eval" if main == EVAL else "run", io.StringIO(), io.StringIO()
    args = [*command(engine, *words, "--json")[3:]]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(jsonl, "_stdin", lambda: given.encode())  # which reads it once in a process
        made = console.run(cli.COMMANDS[name], f"thoughtx-{name}", args)
    assert made == status, err.getvalue()
    return json.loads(out.getvalue()) | {"stderr": err.getvalue()}


def struck(engine: Path, *words: object, least: int, kill: signal.Signals, main: str = MAIN) -> str:
    """Of a command that ends itself: what it said."""
    line = command(engine, *words, main=STRUCK.format(least=least, kill=kill.name) + main)
    made = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    assert made.returncode == (-signal.SIGKILL if kill == signal.SIGKILL else 130), made.stderr
    return made.stderr


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(rows: list[dict[str, Any]]) -> dict[tuple[str, int], Any]:
    return {(row["id"], row["index"]): row["output_ids"] for row in rows}


@pytest.mark.slow
def test_a_killed_job_goes_on_and_gives_the_same_answers(engine, tmp_path):
    """Killed behind several lines, one of them torn; sampled, so that a stream that depended on the start would show."""
    rows = [{"prompt": ASK.format(i), "id": f"q{i}", "num_return_sequences": 1 + i % 2} for i in range(12)]
    flags = ("--prompts", write(tmp_path / "p.jsonl", rows), "--temperature", 0.9, "--max_new_tokens", 150, "--ignore_eos", "--seed", 3)
    whole = done(engine, *flags)
    assert len(whole["results"]) == 18
    out = tmp_path / "a.jsonl"
    for least in (1, 5, 11):
        struck(engine, *flags, "--output", out, "--resume", least=least, kill=signal.SIGKILL)
        assert out.read_bytes().count(b"\n") in (least, least + 1)
        with out.open("ab") as file:
            file.write(b'{"id": "q11", "index": 0, "outp')
    num_before = out.read_bytes().count(b"\n")
    last = done(engine, *flags, "--output", out, "--resume")
    assert told(last["results"]) == told(whole["results"]) == told(read(out))
    assert len(read(out)) == 18 and 0 < last["num_kept"] <= num_before
    again = done(engine, *flags, "--output", out, "--resume")
    assert again["num_kept"] == 12 and told(again["results"]) == told(whole["results"])


@pytest.mark.parametrize(("main", "given", "to"), [(MAIN, "--prompts", "--output"), (EVAL, "--dataset", "--answers")], ids=["run", "eval"])
def test_ctrl_c_keeps_the_answers_and_says_how_to_go_on(main, given, to, engine, tmp_path):
    rows = [{"prompt": ASK.format(i), "answer": i + 5} for i in range(6)]
    flags = (given, write(tmp_path / "p.jsonl", rows), "--max_new_tokens", 8, to, tmp_path / "a.jsonl")
    said = struck(engine, *flags, least=2, kill=signal.SIGINT, main=main)
    assert said.count("--resume goes on with the others") == 1 and "Traceback" not in said
    assert len(read(tmp_path / "a.jsonl")) == int(re.search(r"(\d+) requests? done", said)[1]) == 2
    done(engine, *flags, "--resume", main=main)
    assert len(read(tmp_path / "a.jsonl")) == 6


def test_what_differs_is_named_before_anything_runs(engine, tmp_path):
    path, out = (
        write(tmp_path / "p.jsonl", [{"prompt": ASK.format(1), "id": "a"}, {"prompt": ASK.format(2), "id": "b"}]),
        tmp_path / "o.jsonl",
    )
    flags = ("--prompts", path, "--max_new_tokens", 4, "--output", out)
    done(engine, *flags)
    before = out.read_bytes()
    refused = done(engine, *flags, status=3)["error"]
    assert refused["code"] == "E130" and "--resume" in refused["fix"]
    refused = done(engine, *flags[:3], 5, *flags[4:], "--temperature", 0.5, "--resume", status=3)["error"]
    assert (
        refused["code"] == "E160"
        and "max_new_tokens is 4 there, 5 now" in refused["why"]
        and "temperature is 0.0 there, 0.5" in refused["why"]
    )
    write(path, [{"prompt": ASK.format(1), "id": "a"}, {"prompt": ASK.format(3), "id": "b"}])
    assert "the prompt of id b" in done(engine, *flags, "--resume", status=3)["error"]["why"]
    write(path, [{"prompt": ASK.format(1), "id": "a"}])
    assert "id b is not among" in done(engine, *flags, "--resume", status=3)["error"]["why"]
    assert out.read_bytes() == before
    assert done(engine, "--prompts", path, "--resume", status=2)["error"]["code"] == "E001"
    (tmp_path / "other.jsonl").write_text('{"id": "a", "text": "mine"}\n')
    assert done(engine, *flags[:5], tmp_path / "other.jsonl", "--resume", status=3)["error"]["code"] == "E160"
    assert (tmp_path / "other.jsonl").read_text() == '{"id": "a", "text": "mine"}\n'


BAD = [
    {"prompt": ASK.format(1), "id": "good1"},
    "not JSON",
    {"prompt": "x1 = 3 " * 400, "id": "long"},
    {"prompt": ASK.format(1), "id": "hot", "temperature": "warm"},
    {"input_ids": [999_999], "id": "far"},
    {"prompt": ASK.format(1), "chunk_size": 4096, "id": "wide"},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "id": "image"},
    {"prompt": ASK.format(2), "id": "good2"},
    {"prompt": ASK.format(2), "id": "good1"},
]


def test_bad_rows_stop_the_job_before_it_starts_or_become_rows(engine, tmp_path):
    path, out = write(tmp_path / "p.jsonl", BAD), tmp_path / "a.jsonl"
    first = done(engine, "--prompts", path, "--output", out, status=3)["error"]
    assert first["code"] == "E140" and all(f"line {n}" in first["why"] for n in (2, 7, 9)) and not out.exists()
    only_long = write(tmp_path / "l.jsonl", [BAD[0], BAD[2]])
    error = done(engine, "--prompts", only_long, "--output", out, status=3)["error"]
    assert error["code"] == "E122" and error["where"] == f"{only_long}, line 2 (id long)" and "tokens" in error["why"] and not out.exists()
    found = done(engine, "--prompts", path, "--output", out, "--on_error", "row", "--max_new_tokens", 6, status=1)
    assert found["num_errors"] == 7 and not found["ok"]
    errors = {row["id"]: row["error"]["code"] for row in found["results"] if "error" in row}
    assert errors == {"2": "E140", "long": "E122", "hot": "E001", "far": "E122", "wide": "E122", "image": "E140", "9": "E140"}
    alone = done(engine, "--prompts", write(tmp_path / "g.jsonl", [BAD[0], BAD[7]]), "--max_new_tokens", 6)
    good = [row for row in found["results"] if "error" not in row]
    assert told(good) == told(alone["results"]) and len(read(out)) == 9
    mended = write(path, [*BAD[:1], "", {**BAD[2], "prompt": ASK.format(7)}, *[""] * 4, BAD[7]])
    last = done(engine, "--prompts", mended, "--output", out, "--resume", "--max_new_tokens", 6)
    assert last["num_kept"] == 2 and {row["id"] for row in read(out)} == {"good1", "long", "good2"}


def test_settings_of_a_line_are_those_of_the_same_request_alone(engine, tmp_path):
    own = [
        {},
        {"max_new_tokens": 3},
        {"temperature": 1.2, "seed": 11},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "seed": 4},
        {"chunk_size": 32},
        {"max_reasoning_depth": 1},
        {"stop": ["="]},
        {"repetition_penalty": 1.7},
        {"temperature": 1.5, "seed": 2, "num_return_sequences": 2},
    ]
    path = write(tmp_path / "p.jsonl", [{"prompt": ASK.format(8), "id": str(i), **settings} for i, settings in enumerate(own)])
    together = done(engine, "--prompts", path, "--max_new_tokens", 20, "--temperature", 0)["results"]
    for i, settings in enumerate(own):
        flags = {"max_new_tokens": 20, "temperature": 0, **settings}
        words = [word for name, value in flags.items() for word in (f"--{name}", value[0] if isinstance(value, list) else value)]
        alone = done(engine, "--prompt", ASK.format(8), *words)["results"]
        assert [row["output_ids"] for row in together if row["id"] == str(i)] == [row["output_ids"] for row in alone], settings
    assert len({json.dumps(row["output_ids"]) for row in together}) >= 5


def test_stdin_and_lines_of_a_server_batch(engine):
    message = [{"role": "user", "content": [{"type": "text", "text": ASK.format(4)}]}]
    body = {"model": "x", "messages": message, "max_tokens": 5, "temperature": 0, "n": 1, "stream": False, "logit_bias": {}}
    raw = {"prompt": ASK.format(4), "max_tokens": 5, "temperature": 0}
    lines = [
        {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {
            "custom_id": "r2",
            "method": "POST",
            "url": "/v1/completions",
            "body": raw,
        },
        {"prompt": ASK.format(4), "id": "plain", "max_new_tokens": 5, "temperature": 0},
        {"messages": [{"role": "user", "content": ASK.format(4)}], "id": "m", "max_new_tokens": 5, "temperature": 0},
    ]
    rows = {row["id"]: row for row in done(engine, "--prompts", "-", given="\n".join(map(json.dumps, lines)))["results"]}
    assert rows["r1"]["output_ids"] == rows["plain"]["output_ids"] == rows["m"]["output_ids"] and len(rows["r1"]["output_ids"]) <= 5
    assert rows["r2"]["num_prompt_tokens"] != rows["r1"]["num_prompt_tokens"]  # a completion has no chat template
    for change, named in (
        ({"tools": [{"type": "function"}]}, "body.tools"),
        ({"response_format": {"type": "json_object"}}, "body.response_format"),
        ({"logit_bias": {"5": -100}}, "body.logit_bias"),
        ({"reasoning_effort": "odd"}, "body.reasoning_effort"),
        ({"max_completion_tokens": 7}, "max_completion_tokens"),
    ):
        line = json.dumps({**lines[0], "body": {**body, **change}})
        error = done(engine, "--prompts", "-", given=line, status=3)["error"]
        assert error["where"] == "stdin, line 1 (id r1)" and named in error["why"]
    error = done(engine, "--prompts", "-", given=json.dumps({**lines[0], "url": "/v1/embeddings"}), status=3)["error"]
    assert "/v1/embeddings" in error["why"]


def test_stderr_does_not_grow_with_the_prompts(engine, tmp_path):
    paths = [write(tmp_path / f"{num}.jsonl", [{"prompt": ASK.format(i)} for i in range(num)]) for num in (2, 20)]
    few, many = (done(engine, "--prompts", path, "--max_new_tokens", 3)["stderr"] for path in paths)
    assert len(few.splitlines()) == len(many.splitlines()) and "answering (20 steps)" in many and "60 tokens" in many


def test_a_request_that_fails_costs_only_itself(engine, tmp_path, monkeypatch):
    from trtllm_thoughtx.cli.run import run_requests
    from trtllm_thoughtx.errors import ThoughtxError
    from trtllm_thoughtx.runtime.sampling import Sampler

    real = Sampler.pick

    def damaged(self, logits, rows=None):
        return real(self, logits * np.nan if self.params[0].max_new_tokens == 7 and self._steps[0] == 2 else logits, rows)

    monkeypatch.setattr(Sampler, "pick", damaged)
    path = write(tmp_path / "p.jsonl", [{"prompt": ASK.format(i), "id": f"{i}x", "max_new_tokens": 7 if i == 2 else 4} for i in range(4)])
    found = run_requests(engine_dir=engine, prompts=path, on_error="row")
    assert [row.get("error", {}).get("code") for row in found["results"]] == [None, None, "E123", None]
    assert found["results"][2]["error"]["where"] == "row 2, new token 2"
    with pytest.raises(ThoughtxError, match="not finite"):
        run_requests(engine_dir=engine, prompts=path)


def test_eval_names_every_question_that_does_not_fit_before_it_asks(engine, tmp_path, capsys):
    rows = [{"prompt": ASK.format(1), "answer": 6, "id": "a"}, *({"prompt": "x1 = 3 " * 400, "answer": 3, "id": name} for name in "bc")]
    path = write(tmp_path / "q.jsonl", rows)
    words = ["--engine_dir", str(engine), "--dataset", str(path), "--output", str(tmp_path / "r.json"), "--json"]
    assert console.run(cli.COMMANDS["eval"], "thoughtx-eval", words) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "E122" and all(f"{n} (id {name}): a question needs" in error["why"] for n, name in ((2, "b"), (3, "c")))
    assert not (tmp_path / "r.json").exists()


def document(path: Path) -> dict[str, Any]:
    """A finished evaluation, its times left out."""
    body = json.loads(path.read_text())
    body["records"] = [{**row, "seconds": 0} for row in body["records"]]
    body["conditions"]["machine"] = None
    return body


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["task", "dataset"])
def test_a_killed_evaluation_goes_on_to_the_same_document(engine, tmp_path, kind):
    """Sampled, in batches, so that a stream or a batch that depended on the start would show."""
    rows = [{"prompt": ASK.format(i), "answer": i + 5, "id": f"q{i}", **({"seed": i} if i % 3 else {})} for i in range(18)]
    what = ("--dataset", write(tmp_path / "q.jsonl", rows)) if kind == "dataset" else ("--task", "chain,lookup", "--num_items", 6)
    more = () if kind == "dataset" else ("--cut_share", 0.5)
    flags = (*what, *more, "--temperature", 0.9, "--max_new_tokens", 150, "--seed", 3, "--batch_size", 2)
    whole = done(engine, *flags, "--output", tmp_path / "whole.json", main=EVAL)
    out, last = tmp_path / "a.jsonl", tmp_path / "last.json"
    for least in (1, 5, 11):
        struck(engine, *flags, "--answers", out, "--resume", "--output", last, least=least, kill=signal.SIGKILL, main=EVAL)
        assert out.read_bytes().count(b"\n") >= least
        with out.open("ab") as file:
            file.write(b'{"id": "q11", "index": 0, "outp')
    found = done(engine, *flags, "--answers", out, "--resume", "--output", last, main=EVAL)
    assert "answers found" in found["stderr"]
    assert document(last) == document(tmp_path / "whole.json")
    assert found["summary"]["overall"]["accuracy"] == whole["summary"]["overall"]["accuracy"]
    assert len(read(out)) == len(document(last)["records"]) == 18 and all(row["text"] and row["output_ids"] for row in read(out))
    refused = done(engine, *flags, "--max_new_tokens", 151, "--answers", out, "--resume", main=EVAL, status=3)["error"]
    assert refused["code"] == "E160" and "max_new_tokens is 150 there, 151 now" in refused["why"]
    if kind == "dataset":
        refused = done(engine, *flags, "--match", "exact", "--answers", out, "--resume", main=EVAL, status=3)["error"]
        assert refused["code"] == "E160" and "match is last_number there, exact now" in refused["why"]
    assert done(engine, *flags, "--answers", out, main=EVAL, status=3)["error"]["code"] == "E130"
    assert done(engine, *flags, "--resume", main=EVAL, status=2)["error"]["code"] == "E001"
    words = (*flags, "--answers", tmp_path / "b.jsonl", "--compare", engine)
    assert "two systems" in done(engine, *words, main=EVAL, status=2)["error"]["what"]


def test_questions_that_cannot_be_asked_stop_the_evaluation_or_become_rows(engine, tmp_path):
    bad = [row if isinstance(row, str) else {**row, "answer": "5"} for row in BAD if "chunk_size" not in row]
    path, out, result = write(tmp_path / "q.jsonl", bad), tmp_path / "a.jsonl", tmp_path / "r.json"
    first = done(engine, "--dataset", path, "--answers", out, main=EVAL, status=3)["error"]
    assert first["code"] == "E140" and all(f"line {n}" in first["why"] for n in (2, 4, 6, 8)) and not out.exists()
    flags = ("--max_new_tokens", 30, "--memory_context", 0)
    found = done(engine, "--dataset", path, "--answers", out, "--output", result, "--on_error", "row", *flags, main=EVAL, status=1)
    errors = {row["id"]: row["error"]["code"] for row in found["summary"]["conditions"]["errors"]}
    assert errors == {"2": "E140", "long": "E122", "hot": "E001", "far": "E122", "image": "E140", "8": "E140"}
    assert found["num_errors"] == 6 and not found["ok"] and found["summary"]["overall"]["num_items"] == 2
    assert {row["id"] for row in read(out) if "error" in row} == set(errors) and len(read(out)) == 8
    good = write(tmp_path / "g.jsonl", [bad[0], bad[6]])
    alone = done(engine, "--dataset", good, "--output", tmp_path / "g.json", *flags, main=EVAL)
    told = [[{**row, "task": ""} for row in document(one)["records"]] for one in (result, tmp_path / "g.json")]
    assert told[0] == told[1] and alone["num_errors"] == 0
    again = done(engine, "--dataset", path, "--on_error", "row", "--compare", result, *flags, main=EVAL, status=1)["comparison"]
    assert again["num_items"] == 2 and again["num_errors"] == 6
    only = write(tmp_path / "o.jsonl", [bad[2]])
    assert done(engine, "--dataset", only, "--on_error", "row", main=EVAL, status=3)["error"]["code"] == "E122"


def test_a_question_is_asked_as_its_line_says(engine, tmp_path):
    own: list[dict[str, Any]] = [
        {},
        {"max_new_tokens": 3},
        {"temperature": 1.2, "seed": 11},
        {"max_reasoning_depth": 1},
        {"stop": ["="]},
        {"repetition_penalty": 1.7},
    ]
    rows = [{"prompt": ASK.format(8), "answer": "13", "id": str(i), **settings} for i, settings in enumerate(own)]
    message = [{"role": "user", "content": [{"type": "text", "text": ASK.format(8)}]}]
    body = {"model": "x", "messages": message, "max_tokens": 3}
    raw = {"url": "/v1/completions", "body": {"prompt": ASK.format(8), "max_tokens": 3}}
    rows += [{"messages": message, "answer": 13, "id": "m"}, {"custom_id": "b", "body": body, "answer": 13}]
    rows += [{**raw, "custom_id": "c", "answer": 13}]
    out = tmp_path / "a.jsonl"
    done(engine, "--dataset", write(tmp_path / "q.jsonl", rows), "--max_new_tokens", 60, "--answers", out, "--batch_size", 2, main=EVAL)
    ids = {row["id"]: row["output_ids"] for row in read(out)}
    for i, settings in enumerate(own):
        flags = {"max_new_tokens": 60, "temperature": 0, **settings}
        words = [word for name, value in flags.items() for word in (f"--{name}", value[0] if isinstance(value, list) else value)]
        assert ids[str(i)] == done(engine, "--prompt", ASK.format(8), *words)["results"][0]["output_ids"], settings
    assert ids["m"] == ids["0"] and ids["b"] == ids["1"] and len(ids["c"]) <= 3
    prompts = {row["id"]: row["num_prompt_tokens"] for row in read(out)}
    assert prompts["c"] < prompts["b"] == prompts["0"]
    many = write(tmp_path / "n.jsonl", [{"custom_id": "n", "body": {**body, "n": 2}, "answer": 13}])
    assert "a question gets one answer" in done(engine, "--dataset", many, main=EVAL, status=3)["error"]["why"]
