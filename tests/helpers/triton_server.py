"""A real Triton server for tests, in an environment of its own, and Triton's client there.

`make triton` makes `.triton`; THOUGHTX_TRITON names another place. Tests are skipped, and say so, where there is none.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, script

PLACE = Path(os.environ.get("THOUGHTX_TRITON", ROOT / ".triton"))


def need() -> None:
    """Skip the test where there is no such server, or its Python is not built as a shared library."""
    stubs = sorted(PLACE.glob("lib/python*/site-packages/pytriton/tritonserver/python_backend_stubs/*/triton_python_backend_stub"))
    stubs = [stub for stub in stubs if f"python{stub.parent.name}" in stub.parts]
    if not stubs:
        pytest.skip(f"no Triton server in {PLACE.name}: make triton")
    linked = subprocess.run(["ldd", stubs[0]], capture_output=True, text=True).stdout
    if "not found" in linked:
        pytest.skip(f"Triton's stub lacks {linked[: linked.index(' => not found')].split()[-1]}: install Python's shared library")


def python(code: str, *arguments: object) -> str:
    """Run code in that environment, where tritonclient is."""
    words = [str(PLACE / "bin" / "python"), "-c", code, *map(str, arguments)]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Triton:
    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    log: Path

    def ask(self, path: str, body: Any = None, method: str = "POST") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.http)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body).encode())
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

    def state(self, model: str) -> str:
        """READY, UNAVAILABLE, UNLOADING ..."""
        rows = json.loads(self.ask("/v2/repository/index")[1])
        return str(next(row.get("state", "UNAVAILABLE") for row in rows if row["name"] == model))

    def children(self) -> list[str]:
        """The processes of the Python backend."""
        found = subprocess.run(["ps", "-ww", "-eo", "args="], capture_output=True, text=True).stdout
        return [line for line in found.splitlines() if "python_backend_stub" in line and str(self.log.parent) in line]


@contextlib.contextmanager
def started(repository: Path, work: Path, *, packages: Sequence[Path] = (ROOT,), flags: Sequence[str] = ()) -> Iterator[Triton]:
    """Until it takes requests, or has ended. Models are loaded by hand (`--load-model` among `flags`, or later)."""
    module = script("bench/triton_server.py")
    program, backends, environment = module.prepared(PLACE, work, packages)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = one.getsockname()[1], other.getsockname()[1]
    words = [*module.words(program, backends, repository, *ports), "--model-control-mode=explicit", "--exit-on-error=false", *flags]
    log = work / "triton.log"
    with log.open("wb") as out:
        process = subprocess.Popen(words, cwd=work, env={**environment, "OMP_NUM_THREADS": "1"}, stdout=out, stderr=out)
    triton = Triton(process, *ports, log)
    try:
        while True:
            with contextlib.suppress(OSError):
                if triton.ask("/v2/health/live", method="GET")[0] == 200:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield triton
        process.terminate()
        assert process.wait() == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
