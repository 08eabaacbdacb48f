"""`thoughtx-serve` as a process, and the means to talk to it without a client library."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAIN = "import sys; from trtllm_thoughtx.cli.entry import serve_main; sys.exit(serve_main())"


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None) -> tuple[int, Any]:
        """Status and document (or text) of one request; bytes as a body go out as they are."""
        status, said, _ = self.answer(path, body, headers, method)
        return status, said

    def answer(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
            reply = connection.getresponse()
            said, kind = reply.read(), reply.headers.get_content_type()
            return reply.status, json.loads(said) if kind == "application/json" else said.decode(), dict(reply.headers)

    def metric(self, name: str) -> float:
        """Of all labels together."""
        lines = self.ask("/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition(" ")[0].partition("{")[0] == f"thoughtx_{name}")

    def entries(self) -> list[dict[str, Any]]:
        """Of the access log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def until(is_so: Callable[[], bool]) -> None:
    """Waits for as long as it takes; a suite-wide limit ends a test that hangs."""
    while not is_so():
        time.sleep(0.01)


@contextlib.contextmanager
def serving(engine: Path, log: Path, *flags: object) -> Iterator[Server]:
    """A server on a free port, told to stop at the end; its stderr goes to `log`."""
    words = [sys.executable, "-c", MAIN, "--engine_dir", str(engine), "--port", "0", "--json", "--num_threads", "1", *map(str, flags)]
    with log.open("w") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        rest = line
        while True:
            try:
                port = json.loads(rest)["port"]
                break
            except ValueError:
                line = process.stdout.readline()
                assert line, rest
                rest += line
        yield Server(process, port, log)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
