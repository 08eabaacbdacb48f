"""What the server refuses, and what it survives: hostile bodies, a full queue, clients that go away, and its own end."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from places import TINY as SAMPLE
from servers import serving, until

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli import params as console
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.serve.serve import read_efforts, read_keys

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "x1 = 3 x2 = 5 x3 = x1 + x2 ?"}]
LONG = {"messages": MESSAGES, "max_tokens": 1900, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults") / "thoughtx"
    build(SAMPLE, root, {"backend": ("onnxruntime",), "dtype": "float32", "max_batch_size": 4, "max_seq_len": 2048})
    return root


@pytest.fixture(scope="module")
def server(engine_dir, tmp_path_factory):
    flags = ("--max_num_seqs", 1, "--max_queued_requests", 2, "--max_body_bytes", 20_000)
    with serving(engine_dir, tmp_path_factory.mktemp("log") / "log", *flags) as running:
        yield running


def opened(server, body, *, stream=True):
    """A socket that has sent a request and, of a stream, received its first event."""
    data = json.dumps({**body, "stream": stream}).encode()
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(data), data))
    if stream:
        received = b""
        while b"data: " not in received and b'"error"' not in received:
            received += client.recv(4096)
    return client


def parts(said):
    error = said["error"]
    return all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code", "what", "where", "why", "fix"))


def test_bodies_that_are_no_requests(server):
    """A valid body, changed at random places, and bodies of other kinds: 4xx with the four parts, or an answer; never a fault."""
    rng = random.Random(11)
    good = json.dumps({"messages": MESSAGES, "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "n": 1, "logprobs": True}).encode()
    odd = [
        b"",
        b"[]",
        b"null",
        b'"x"',
        b"{",
        b'{"messages": 1}',
        b"\xff\xfe",
        b'{"a":1,"a":2}',
        b'{"x":NaN}',
        b"[" * 5000,
        b'{"messages":[]}',
    ]
    odd += [json.dumps({"messages": [{"role": "user", "content": part}]}).encode() for part in (1, [1], [{"type": "image_url"}], None, "")]
    for name in ("max_tokens", "temperature", "top_p", "seed", "n", "stop"):
        odd += [json.dumps({"messages": MESSAGES, "max_tokens": 2, name: value}).encode() for value in ("x", -1, [], {}, 1e300, True)]
    for _ in range(470):
        body = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(body))
            body[at : at + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
        odd.append(bytes(body))
    statuses = []
    for body in odd:
        status, said = server.ask(CHAT, body)
        statuses.append(status)
        assert status == 200 or (status == 400 and parts(said)), (status, body, said)
    assert statuses.count(400) >= 300 and len(odd) >= 500
    assert server.ask("/health")[0] == 200 and server.metric("num_requests_running") == 0


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {"messages": MESSAGES, "tools": [{}]}, 400, "tools"),
        (CHAT, {"messages": MESSAGES, "model": "gpt-5"}, 404, "model"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 5000}, 400, "max_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 4000}]}, 400, "messages"),
        (CHAT, {"messages": MESSAGES, "exit_threshold": 0.5}, 400, None),
        (CHAT, {"messages": MESSAGES, "chunk_size": 8}, 400, None),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 30_000}]}, 413, None),
        ("/v1/completions", {"prompt": [[999999]]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "echo": True, "stream": True}, 400, "echo"),
        ("/v1/responses", {"input": "a", "tools": [{}]}, 400, "tools"),
        ("/v1/embeddings", {"input": "a"}, 404, None),
        ("/health", {"input": "a"}, 405, None),
    ],
)
def test_what_is_refused_and_how(server, path, body, status, param):
    found, said = server.ask(path, body)
    assert found == status and parts(said) and said["error"]["param"] == param


def test_a_full_queue_is_429_and_the_client_that_tries_again_gets_its_answer(server):
    holding = [opened(server, LONG)]
    until(lambda: server.metric("num_requests_running") == 1)
    waiting = [opened(server, LONG, stream=False) for _ in range(2)]
    until(lambda: server.metric("num_requests_waiting") == 2)
    status, said, headers = server.answer(CHAT, {"messages": MESSAGES, "max_tokens": 2})
    assert status == 429 and headers["retry-after"] == "1" and parts(said) and said["error"]["type"] == "rate_limit_error"
    assert server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 2, "n": 3, "temperature": 1})[0] == 429  # all or none
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=20)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(client.chat.completions.create, model="thoughtx", messages=MESSAGES, max_tokens=3)
        until(lambda: sum(entry["status"] == 429 for entry in server.entries()) >= 3)
        for one in (*waiting, *holding):
            one.close()
        assert asked.result().usage.completion_tokens == 3
    until(lambda: server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0)


def test_a_body_that_does_not_arrive_is_408(engine_dir, tmp_path):
    with serving(engine_dir, tmp_path / "log", "--body_timeout", 0.3) as server:
        client = socket.create_connection(("127.0.0.1", server.port))
        client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{" % CHAT.encode())
        received = b""
        while block := client.recv(4096):  # until the server closes the connection
            received += block
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408") and b"connection: close" in head.lower() and parts(json.loads(body))
        client.close()
        assert server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 2})[0] == 200


KILLED = """
import socket, sys
client = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
client.sendall(sys.stdin.buffer.read())
while b"data: " not in client.recv(4096):
    pass
print("begun", flush=True)
while client.recv(4096):
    pass
"""


def test_clients_that_are_killed_in_mid_stream_give_their_slots_back(engine_dir, tmp_path):
    body = json.dumps({**LONG, "stream": True}).encode()
    request = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body)
    with serving(engine_dir, tmp_path / "log", "--max_num_seqs", 3) as server:
        clients = [
            subprocess.Popen([sys.executable, "-c", KILLED, str(server.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(3)
        ]
        for client in clients:
            client.stdin.write(request)
            client.stdin.close()
        for client in clients:
            assert client.stdout.readline() == b"begun\n"
        assert server.metric("num_requests_running") == 3
        for client in clients:
            client.kill()
            client.wait()
            client.stdout.close()
        until(lambda: server.metric("num_requests_running") == 0)
        assert server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 2})[0] == 200
        assert server.metric("request_failure_total") == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_closes_its_sending_half_has_gone_away(server, stream):
    """As curl and every HTTP client keep both halves open until the answer is there."""
    client = opened(server, LONG, stream=stream)
    until(lambda: server.metric("num_requests_running") == 1)
    client.shutdown(socket.SHUT_WR)
    until(lambda: server.metric("num_requests_running") == 0)
    while client.recv(1 << 16):
        pass
    client.close()
    assert server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 2})[0] == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_goes_away_gives_its_slot_back(server, stream, how):
    client = opened(server, LONG, stream=stream)
    until(lambda: server.metric("num_requests_running") == 1)
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.close()
    until(lambda: server.metric("num_requests_running") == 0)
    assert server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 2})[0] == 200


def test_a_reader_that_stops_reading_holds_up_nobody(server):
    slow = opened(server, {**LONG, "max_tokens": 300})
    assert server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 2})[0] == 200  # waits for the only slot
    until(lambda: server.metric("num_requests_running") == 0)
    received = b""
    while b"[DONE]" not in received:
        received += slow.recv(1 << 16)
    slow.close()


def test_many_clients_on_few_slots_all_get_their_own_answer(engine_dir, tmp_path):
    with serving(engine_dir, tmp_path / "log", "--max_num_seqs", 4, "--max_queued_requests", 100) as server:

        def ask(number):
            question = [{"role": "user", "content": f"x1 = {number} x2 = 5 x3 = x1 + x2 ?"}]
            return server.ask(CHAT, {"messages": question, "max_tokens": 20, "temperature": 0})[1]["choices"][0]["message"]

        serial = [ask(number) for number in range(16)]
        with ThreadPoolExecutor(64) as pool:
            together = list(pool.map(ask, [number % 16 for number in range(64)]))
        assert together == serial * 4
        assert server.metric("request_success_total") == 80 and server.metric("num_requests_running") == 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat_over_a_thousand_requests(engine_dir, tmp_path):
    """Whole, streamed, given up and refused ones. Behind the first ones nothing is kept of a request: 2 KiB of each of 1,000 would show."""
    with serving(engine_dir, tmp_path / "log") as server:

        def resident():
            return next(
                int(line.split()[1]) for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines() if "VmRSS" in line
            )

        def ask(number):
            question = [{"role": "user", "content": f"x1 = {number % 90} x2 = 5 ?"}]
            if number % 10 == 0:
                return opened(server, {**LONG, "messages": question}).close()
            body = {"messages": question, "max_tokens": 4, "stream": number % 2 == 0, "tools": [{}] if number % 10 == 1 else None}
            assert server.ask(CHAT, body)[0] == (400 if number % 10 == 1 else 200)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(300)))
            before = resident()
            list(pool.map(ask, range(1000)))
        until(lambda: server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0)
        assert resident() - before < 2000  # KiB


def test_who_may_be_overtaken_is_not_overtaken_for_ever(engine_dir, tmp_path):
    """Clients that never stop asking fill every slot; one of the lowest rank gets its answer among them."""
    with serving(engine_dir, tmp_path / "log", "--max_num_seqs", 2, "--max_queued_requests", 100) as server:
        body, is_answered, num_answered = {"messages": MESSAGES, "max_tokens": 20}, threading.Event(), []

        def ask_on():
            while not is_answered.is_set():
                num_answered.append(server.ask(CHAT, {**body, "priority": 1})[0])

        with ThreadPoolExecutor() as pool:
            asking = [pool.submit(ask_on) for _ in range(6)]
            until(lambda: server.metric("num_requests_waiting") >= 3)
            assert server.ask(CHAT, {**body, "priority": -1})[0] == 200
            is_answered.set()
            for one in asking:
                one.result()
        assert set(num_answered) == {200}


def test_a_key_is_asked_for_everywhere_but_at_health(engine_dir, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# of the team\n" + "k" * 20 + "\n" + "j" * 20 + "\n")
    keys.chmod(0o600)
    with serving(engine_dir, tmp_path / "log", "--api_key_file", keys) as server:
        body = {"messages": MESSAGES, "max_tokens": 2}
        for path, sent in ((CHAT, body), ("/metrics", None), ("/v1/models", None), ("/tokenize", {"prompt": "a"}), ("/nowhere", None)):
            for headers in (
                {},
                {"Authorization": "Bearer " + "k" * 19},
                {"Authorization": "k" * 20},
                {"Authorization": "Basic " + "k" * 20},
            ):
                status, said, got = server.answer(path, sent, headers)
                assert status == 401 and parts(said) and got["www-authenticate"] == "Bearer"
        assert server.ask("/health")[0] == 200
        for key in ("k" * 20, "j" * 20):
            assert server.ask(CHAT, body, {"Authorization": f"Bearer {key}"})[0] == 200


def test_told_to_stop_it_ends_what_runs_and_takes_no_more(engine_dir, tmp_path):
    with serving(engine_dir, tmp_path / "log") as server:
        client = opened(server, {**LONG, "max_tokens": 400})
        server.process.send_signal(signal.SIGTERM)
        received = b""
        while block := client.recv(1 << 16):
            received += block
        assert b'"finish_reason":"length"' in received and b"data: [DONE]" in received
        client.close()
        assert server.process.wait() == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port))


def test_an_address_that_cannot_be_listened_on(engine_dir, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["--engine_dir", str(engine_dir), "--port", str(taken.getsockname()[1])]
        assert console.run(cli.serve_command, "thoughtx-serve", words) == 4
    said = capsys.readouterr().err
    assert "E206" in said and "--port" in said
    assert console.run(cli.serve_command, "thoughtx-serve", ["--engine_dir", str(engine_dir), "--host", "no host"]) == 2
    assert "--host" in capsys.readouterr().err


def test_more_slots_than_the_engine_has_are_refused(engine_dir, capsys):
    words = ["--engine_dir", str(engine_dir), "--port", "0", "--max_num_seqs", "99"]
    assert console.run(cli.serve_command, "thoughtx-serve", words) == 3
    said = capsys.readouterr().err
    assert "E122" in said and "at most 4" in said


@pytest.mark.parametrize(
    ("content", "mode", "named"),
    [("", 0o600, "no key"), ("short\n", 0o600, "16 characters"), ("k" * 20, 0o644, "others may read"), ("k" * 20 + "é", 0o600, "ASCII")],
)
def test_keys_that_are_no_good(tmp_path, content, mode, named):
    path = tmp_path / "keys"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ThoughtxError) as caught:
        read_keys(path)
    assert caught.value.code == "E001" and named in caught.value.what


def test_reasoning_efforts():
    assert read_efforts("low=5, high=unlimited")["low"] == 5 and read_efforts("high=unlimited")["high"] is None
    assert read_efforts(None)["none"] == 0
    for wrong in ("low", "none=4", "tiny=3", "low=-1", "low=1e3"):
        with pytest.raises(ThoughtxError):
            read_efforts(wrong)


def test_threads_of_clients_meet_one_engine(server):
    """Whole and streamed requests at once, some of them given up."""
    errors = []

    def work(number):
        try:
            if number % 3 == 0:
                opened(server, {**LONG, "max_tokens": 30}).close()
            else:
                status, _ = server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 5, "stream": number % 2 == 0})
                assert status in (200, 429)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    until(lambda: server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0)
