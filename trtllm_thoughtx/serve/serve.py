"""`thoughtx-serve`: load the engine, listen, answer until told to stop.

SIGTERM and Ctrl-C drain: no new connection, requests that run go on to their end (at most `drain_seconds`), then the process ends with
status 0. The access log is a JSON line for each request on stderr, without a word of what was asked or answered.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import read_named
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.front import Front
from trtllm_thoughtx.serve.answering import Limits

KEY_BYTES = 1 << 16
MIN_KEY = 16  # characters
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and those that begin with # are skipped. E001 for keys that are no good."""
    where = f"--api_key_file {path}"

    def refuse(what: str, why: str, fix: str) -> ThoughtxError:
        return ThoughtxError("E001", what, where=where, why=why, fix=fix)

    if path.exists() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise refuse("others may read the key file", "its permission bits say so", f"chmod 600 {path}")
    try:
        lines = [line.strip() for line in read_named(path, KEY_BYTES, code="E001").decode("ascii").splitlines()]
    except UnicodeDecodeError:
        raise refuse("a key is not ASCII", "a header cannot carry it", "write letters, digits and punctuation") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise refuse("there is no key in the file", "it is empty, or holds comments alone", "write one key a line")
    if any(len(key) < MIN_KEY or not key.isprintable() or " " in key for key in keys):
        fix = "make one with: openssl rand -hex 32"
        raise refuse(f"a key is shorter than {MIN_KEY} characters, or holds blanks", "it could be guessed", fix)
    return keys


def read_efforts(given: str | None) -> dict[str, int | None]:
    """`low=256,high=4096`, over the defaults; `none` stays 0. E001 for anything else."""
    from trtllm_thoughtx.text.body import EFFORTS

    efforts = dict(EFFORTS)
    for part in (given or "").split(",") if given else ():
        name, _, number = part.strip().partition("=")
        if name not in EFFORTS or name == "none" or not (number == "unlimited" or (number.isdecimal() and len(number) < 10)):
            what, fix = f"{shown(part, 40)} is no reasoning effort with its thinking tokens", "write low=256,medium=1024,high=unlimited"
            why = f"the efforts are {', '.join(name for name in EFFORTS if name != 'none')}"
            raise ThoughtxError("E001", what, where="--reasoning_efforts", why=why, fix=fix)
        efforts[name] = None if number == "unlimited" else int(number)
    return efforts


def serve(
    engine_dir: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: tuple[str, ...] = (),
    lora_modules: tuple[tuple[str, Path], ...] = (),
    max_num_seqs: int | None = None,
    prefill_segment: int = 512,
    prompt_lookup: int = 0,
    api_key_file: Path | None = None,
    reasoning_efforts: str | None = None,
    limits: Limits | None = None,
    drain_seconds: float = 30.0,
    backend: str | None = None,
    num_threads: int | None = None,
    exact: bool = False,
    verify_key: Path | None = None,
    progress: Progress = SILENT,
    access_log: bool = True,
    ready: Any = None,
) -> None:
    """Answer until a signal comes. `ready` is called with the port once requests are taken. E201 without the packages, E001 and E206
    for an address that cannot be listened on."""
    try:
        import uvicorn

        from trtllm_thoughtx.serve.answering import Answering
        from trtllm_thoughtx.serve.app import build_app
        from trtllm_thoughtx.serve.door import Server
    except ImportError as error:
        what, why = f"{error.name} is not installed", "the server needs starlette, uvicorn and prometheus-client"
        raise ThoughtxError("E201", what, where="thoughtx-serve", why=why, fix="pip install 'trtllm-thoughtx[serve]'") from None
    keys = () if api_key_file is None else read_keys(api_key_file)
    efforts = read_efforts(reasoning_efforts)
    with _listening(host, port) as listener:
        if host not in LOOPBACK and not keys:
            progress.note(f"note: everyone who reaches {host} may use this server; --api_key_file asks for a key")
        engine = Engine.load(engine_dir, backend, num_threads, exact=exact, verify_key=verify_key)
        try:
            if backend is None and engine.overlooked:
                progress.note(f"note: {engine.overlooked}")
            _check(engine, engine_dir, max_num_seqs)
            names = served_model_name or (engine_dir.resolve().name,)
            for name, path in lora_modules:
                if name in names:
                    what, why = f"--lora_modules {name}: the model itself has that name", "clients could not tell the two apart"
                    raise ThoughtxError("E001", what, where="--lora_modules", why=why, fix="choose another name")
                engine.load_adapter(path, name)
            front = Front(engine, max_num_seqs, prefill_segment=prefill_segment)
            try:
                defaults = {"prompt_lookup": prompt_lookup} if prompt_lookup else {}
                log = _log if access_log else _no_log
                server = Server(Answering(engine, front), names, limits or Limits(), keys, efforts, defaults, log)
                config = uvicorn.Config(
                    build_app(server),
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    lifespan="off",
                    timeout_keep_alive=75,
                    timeout_graceful_shutdown=max(1, round(drain_seconds)),
                    h11_max_incomplete_event_size=64 << 10,
                )
                _uvicorn_server()(config, server, ready, progress).run([listener])
            finally:
                front.close()
        finally:
            engine.close()


def _check(engine: Engine, engine_dir: Path, max_num_seqs: int | None) -> None:
    """E122 for an engine that cannot serve what is asked."""
    if (most := engine.build.max_batch_size) < (max_num_seqs or 1):
        what, why = f"--max_num_seqs {max_num_seqs} is too many", f"the engine was built for {most} sequences at a time"
        fix = f"give at most {most}, or build with a larger one: thoughtx-build --max_batch_size {max_num_seqs}"
        raise ThoughtxError("E122", what, where=str(engine_dir), why=why, fix=fix)
    if engine.text is None:
        what, why = "this engine has no tokenizer, and clients send texts", "it was built from files without a tokenizer.json"
        raise ThoughtxError("E122", what, where=str(engine_dir), why=why, fix="build it from a checkpoint with its tokenizer files")


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Before the engine is loaded: a port that is taken is known at once."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        what, why = f"{shown(host, 80)} is no address of this machine", shown(str(error))
        raise ThoughtxError("E001", what, where="--host", why=why, fix="give 127.0.0.1, or 0.0.0.0 for all") from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            what, why = f"port {port} of {shown(host, 80)} cannot be listened on", shown(str(error.strerror))
            raise ThoughtxError("E206", what, where="--port", why=why, fix="choose another --port (0: any free one)") from None
        yield listener


def _uvicorn_server() -> Any:
    """uvicorn's server with our end; a class made late, because the package is optional."""
    import uvicorn

    class Uvicorn(uvicorn.Server):
        """Tells `server` that it drains, and ends with status 0 then."""

        def __init__(self, config: Any, server: Any, ready: Any, progress: Progress) -> None:
            super().__init__(config)
            self.server, self.ready, self.progress = server, ready, progress

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            host, port = sockets[0].getsockname()[:2]
            self.progress.note(f"ready: http://{host}:{port} (model {self.server.names[0]}, {self.server.answering.num_slots} slots)")
            if self.ready is not None:
                self.ready(port)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            signals = (signal.SIGTERM, signal.SIGINT)
            before = {one: signal.signal(one, self.handle_exit) for one in signals}
            try:
                yield
            finally:
                for one, handler in before.items():
                    signal.signal(one, handler)

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.server.is_draining = True
            super().handle_exit(sig, frame)

    return Uvicorn


def _log(entry: Mapping[str, Any]) -> None:
    print(json.dumps(entry), file=sys.stderr, flush=True)


def _no_log(entry: Mapping[str, Any]) -> None:
    pass
