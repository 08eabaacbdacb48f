"""An open load on servers with OpenAI's API or Triton's: tokens a second, time to the first token and between tokens, by the request rate.

    python bench/serving_http.py --base_url http://127.0.0.1:8000/v1 --output load.json --plot load.png
    python bench/serving_http.py --output load.json --plot load.png \\
      --system thoughtx 'thoughtx-serve --engine_dir ENGINE --port {port} --max_num_seqs 8' \\
      --system llama.cpp 'llama-server -m MODEL.gguf --port {port} -np 8 -c 8192 -t 2' \\
      --system Triton 'python bench/triton_server.py REPOSITORY --http_port {port}' \\
      --system OpenVINO 'OV/bin/python bench/serving_openvino.py MODEL --port {port} --max_num_seqs 8'

Requests arrive as a Poisson process of `--rates` requests a second for `--seconds` (open loop: none waits for another), and at last
`--burst` requests at once. Prompts are drawn from a list of words, `--prompts` of them, and share nothing but their first word by chance;
`--answers` new tokens, greedy, `ignore_eos`. Everything follows from `--seed`: each system gets the same texts at the same times. Each
`--system` is started, asked until it answers, loaded, and ended before the next one. What a token is, the server says (`usage`); the time
between tokens is that between events which carry text, and half characters are held back by some servers: `per_token` is a request's
time behind its first event by its tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

TEXT = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not what all were we
when your can said there use an each which she do how their if will up other about out many then them these so some her would make
like him into time has look two more write go see number no way could people my than first water been call who oil its now find long
down day did get come made may part over new sound take only little work know place year live me back give most very after thing our
just name good sentence man think say great where help through much before line right too mean old any same tell boy follow came
want show also around form three small set put end does another well large must big even such because turn here why ask went men
read need land different home
"""
WORDS = re.findall("[a-z]+", TEXT)
PERCENTILES = (50, 99)
BURST = "burst"
COUNTS = ("return_num_input_tokens", "return_num_output_tokens")


@dataclass(frozen=True)
class Asked:
    """A request of the load: when it comes, its prompt, and how many tokens it wants."""

    at: float
    prompt: str
    num_new: int


@dataclass
class Answer:
    """What became of one. Times are seconds since the load began; `events` of those that carried text."""

    at: float
    status: int = 0
    error: str = ""
    events: list[float] = field(default_factory=list)
    end: float = 0.0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0

    @property
    def is_done(self) -> bool:
        return self.status == 200 and not self.error and self.num_new_tokens > 0 and bool(self.events)


def load_of(rate: float, args: argparse.Namespace) -> list[Asked]:
    """The same for the same seed, whatever the system. An infinite rate: all at once."""
    (low, high), (shortest, longest) = args.prompts, args.answers
    rng, found, at = np.random.default_rng([args.seed, 0 if math.isinf(rate) else round(rate * 1e6)]), list[Asked](), 0.0
    while True:
        at += 0.0 if math.isinf(rate) else float(rng.exponential(1 / rate))
        if len(found) == args.burst if math.isinf(rate) else at > args.seconds:
            return found
        words = rng.choice(WORDS, int(rng.integers(low, high, endpoint=True)))
        found.append(Asked(at, " ".join(words), int(rng.integers(shortest, longest, endpoint=True))))


class Client:
    """Streams completions of one server."""

    def __init__(self, base_url: str, model: str | None, key: str | None, seconds: float) -> None:
        parts = urlsplit(base_url)
        assert parts.hostname is not None, base_url
        self.host, self.port, self.path = parts.hostname, parts.port or 80, parts.path.rstrip("/")
        self.seconds, self.headers = seconds, {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self.model = model

    def named(self) -> str | None:
        """The model that the server has, None while it does not answer."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError, IndexError):
            connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", f"{self.path}/models", headers=self.headers)
                reply = connection.getresponse()
                return str(json.loads(reply.read())["data"][0]["id"]) if reply.status == 200 else None
        return None

    def request(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"prompt": asked.prompt, "max_tokens": asked.num_new, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}, **({"model": self.model} if self.model else {})}
        return f"{self.path}/completions", body

    def ask(self, asked: Asked, answer: Answer, began: float) -> None:
        path, body = self.request(asked)
        try:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=self.seconds)
            with contextlib.closing(connection):
                connection.request("POST", path, json.dumps(body), self.headers)
                reply = connection.getresponse()
                answer.status = reply.status
                if reply.status != 200:
                    answer.error = reply.read(400).decode(errors="replace")
                    return
                self._read(reply, answer, began)
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        finally:
            answer.end = time.monotonic() - began

    def _read(self, reply: http.client.HTTPResponse, answer: Answer, began: float) -> None:
        while line := reply.readline():
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            now, said = time.monotonic() - began, json.loads(line[6:])
            if "error" in said:
                answer.error = json.dumps(said["error"])[:400]
                return
            self.read(said, answer, now)

    def read(self, said: Mapping[str, Any], answer: Answer, now: float) -> None:
        if any(choice.get("text") for choice in said.get("choices", ())):
            answer.events.append(now)
        if said.get("usage"):
            answer.num_prompt_tokens = said["usage"]["prompt_tokens"]
            answer.num_new_tokens = said["usage"]["completion_tokens"]


class TritonClient(Client):
    """The same of the first ready model of a Triton server, through generate_stream."""

    def named(self) -> str | None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, StopIteration):
            connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
            with contextlib.closing(connection):
                connection.request("POST", f"{self.path}/repository/index", headers=self.headers)
                rows = json.loads(connection.getresponse().read())
                return str(next(row["name"] for row in rows if isinstance(row, dict) and row.get("state") == "READY"))
        return None

    def request(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        body = {"text_input": asked.prompt, "max_tokens": asked.num_new, "temperature": 0, "ignore_eos": True, "stream": True}
        return f"{self.path}/models/{self.model}/generate_stream", {**body, **dict.fromkeys(COUNTS, True)}

    def read(self, said: Mapping[str, Any], answer: Answer, now: float) -> None:
        if said.get("text_output"):
            answer.events.append(now)
        answer.num_prompt_tokens = said["num_input_tokens"]
        answer.num_new_tokens += said["num_output_tokens"]


def client_of(url: str, *more: Any) -> Client:
    return (TritonClient if urlsplit(url).path.startswith("/v2") else Client)(url, *more)


def loaded(client: Client, load: Sequence[Asked]) -> list[Answer]:
    """Send each request when its time has come, whatever became of the others."""
    answers, threads, began = [Answer(asked.at) for asked in load], list[threading.Thread](), time.monotonic()
    for asked, answer in zip(load, answers, strict=True):
        time.sleep(max(0.0, asked.at - (time.monotonic() - began)))
        answer.at = time.monotonic() - began
        threads.append(threading.Thread(target=client.ask, args=(asked, answer, began)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return answers


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in PERCENTILES} if values else None


def summary(rate: float, answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens count only of requests that were answered in full."""
    done = [one for one in answers if one.is_done]
    seconds = max((one.end for one in answers), default=0.0)
    num_prompt, num_new = sum(one.num_prompt_tokens for one in done), sum(one.num_new_tokens for one in done)
    return {
        "rate": BURST if math.isinf(rate) else rate,
        "num_requests": len(answers),
        "num_done": len(done),
        "errors": sorted({f"{one.status} {one.error}"[:200] for one in answers if not one.is_done}),
        "seconds": round(seconds, 2),
        "num_prompt_tokens": num_prompt,
        "num_new_tokens": num_new,
        "all_tokens_per_second": round((num_prompt + num_new) / seconds, 1) if seconds else None,
        "new_tokens_per_second": round(num_new / seconds, 1) if seconds else None,
        "first_token": percentiles([one.events[0] - one.at for one in done]),
        "between_tokens": percentiles([float(gap) for one in done for gap in np.diff(one.events)]),
        "per_token": percentiles([(one.events[-1] - one.events[0]) / (one.num_new_tokens - 1) for one in done if one.num_new_tokens > 1]),
    }


def measured(client: Client, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    client.ask(Asked(0.0, " ".join(WORDS[:40]), 8), Answer(0.0), time.monotonic())  # not counted
    for rate in args.rates:
        rows.append(summary(rate, loaded(client, load_of(rate, args))))
        print(f"  {json.dumps(rows[-1])}", flush=True)
    return rows


@contextlib.contextmanager
def started(command: str, args: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[bytes], float]]:
    """A server on a free port, once it names its model; ended behind the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words, began = [word.replace("{port}", str(port)) for word in shlex.split(command)], time.monotonic()
    with open(os.devnull if args.log is None else args.log, "ab") as log:
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:
            raise SystemExit(f"{words[0]} cannot be started: {error.strerror}") from None
    try:
        clients = [client_of(f"http://127.0.0.1:{port}/{version}", None, args.api_key, args.timeout) for version in ("v1", "v2")]
        while (client := next((one for one in clients if one.named() is not None), None)) is None:
            if process.poll() is not None or time.monotonic() - began > args.timeout:
                raise SystemExit(f"{words[0]} does not answer on port {port} (status {process.poll()}); --log FILE keeps what it says")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}{client.path}", process, time.monotonic() - began
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def memory(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """MiB of a process: resident now, and at most so far."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) >> 10 for name, key in (("resident_mib", "VmRSS"), ("peak_mib", "VmHWM"))}


def plot(path: Path, systems: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for color, system in enumerate(systems):
        labels = [str(row["rate"]) for row in system["loads"]]
        values = [row["all_tokens_per_second"] for row in system["loads"]]
        axes[0].plot(labels, values, marker="o", color=f"C{color}", label=system["name"])
        for axis, key in zip(axes[1:], ("first_token", "between_tokens"), strict=True):
            for p, style in zip(PERCENTILES, ("-", ":"), strict=True):
                values = [(row[key] or {}).get(f"p{p}", math.nan) for row in system["loads"]]
                axis.plot(labels, values, style, marker="o", markersize=4, color=f"C{color}", label=f"{system['name']}, p{p}")
    titles = ("prompt and new tokens a second", "seconds to the first token", "seconds between tokens")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="requests a second")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[1:]:
        axis.set_yscale("log")
    figure.savefig(path, dpi=110)


def main() -> None:
    def pair(text: str) -> tuple[int, int]:
        low, high = map(int, text.split(","))
        return low, high

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--base_url", help="a server that runs already, with its /v1, or Triton's /v2")
    where.add_argument("--system", nargs=2, action="append", metavar=("NAME", "COMMAND"), help="one to be started; {port} in its command")
    parser.add_argument("--rates", type=lambda text: [float(part) for part in text.split(",")], default=[0.1, 0.2, math.inf])
    parser.add_argument("--seconds", type=float, default=60, help="of arrivals at each rate")
    parser.add_argument("--burst", type=int, default=16, help="requests at once: the rate inf")
    parser.add_argument("--prompts", type=pair, default=(32, 512), help="words, fewest and most")
    parser.add_argument("--answers", type=pair, default=(16, 256), help="new tokens, fewest and most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="name of the model (default: the first that the server lists)")
    parser.add_argument("--api_key")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a server to answer, and between two events of an answer")
    parser.add_argument("--log", type=Path, help="what the servers say")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    names = ("rates", "seconds", "burst", "prompts", "answers", "seed")
    settings = {name: getattr(args, name) for name in names} | {"rates": [BURST if math.isinf(r) else r for r in args.rates]}
    found: dict[str, Any] = {"settings": settings, "load_before": round(os.getloadavg()[0], 2), "systems": []}
    for name, command in args.system or [(args.base_url, "")]:
        print(name, flush=True)
        with contextlib.ExitStack() as stack:
            url, process, seconds = stack.enter_context(started(command, args)) if command else (args.base_url, None, 0.0)
            client = client_of(url, args.model, args.api_key, args.timeout)
            client.model = args.model or client.named()
            at_load = memory(process) if process else None
            loads = measured(client, args)
            row = {"name": name, "model": client.model, "command": command, "loads": loads}
            if process:
                row |= {"load_seconds": round(seconds, 1), "memory_loaded": at_load, "memory_after": memory(process)}
            found["systems"].append(row)
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        if args.plot:
            plot(args.plot, found["systems"])


if __name__ == "__main__":
    main()
