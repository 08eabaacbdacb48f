"""The door that every request passes: its key, the headers and the log line of its answer, and what an error looks like on the wire."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.serve.answering import Answering, Limits
from trtllm_thoughtx.serve.metrics import Metrics
from trtllm_thoughtx.text.body import EFFORTS

OPEN = ("/", "/health")  # without a key: the page is a static file that holds nothing
SAFE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass
class Server:
    """What the routes share. `names` of the model, the first its own; `keys` that clients may show, none: no key is asked for."""

    answering: Answering
    names: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    keys: tuple[str, ...] = ()
    efforts: Mapping[str, int | None] = field(default_factory=lambda: dict(EFFORTS))
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings of a request that does not say otherwise
    log: Callable[[dict[str, Any]], None] = lambda entry: None
    metrics: Metrics = field(default_factory=Metrics)
    is_draining: bool = False

    def __post_init__(self) -> None:
        self.began = int(time.time())

    @property
    def engine(self) -> Any:
        return self.answering.engine

    @property
    def problem(self) -> str | None:
        """Why no request is taken now."""
        if self.is_draining:
            return "the server is shutting down"
        return self.answering.problem


class Refusal(Exception):
    """An answer that is an error: status, and what stands in the body."""

    def __init__(self, status: int, error: ThoughtxError, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error.what)
        self.status, self.error, self.headers = status, error, dict(headers or {})


def error_document(error: ThoughtxError, status: int) -> dict[str, Any]:
    """As OpenAI's clients read it, with the four parts beside it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"message": f"{error.what}: {error.why}. {error.fix}", "type": kind, "param": getattr(error, "param", None), "code": error.code}
    return {"error": {**body, "what": error.what, "where": error.where, "why": error.why, "fix": error.fix}}


def status_of(error: ThoughtxError) -> int:
    """What a client did is 400, or 404 for a model that is not there; E123 and what the machine does is 500."""
    return getattr(error, "status", 400) if error.code in ("E001", "E122", "E140") else 500


class Door:
    """Key, headers and log of every request."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        entry: dict[str, Any] = scope.setdefault("state", {}).setdefault("entry", {})

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *((k.lower().encode(), v.encode()) for k, v in SAFE.items())]
            await send(message)

        try:
            if scope["path"] not in OPEN and not self._has_key(scope):
                what, why = "the API key is missing or wrong", "this server was started with --api_key_file"
                error = ThoughtxError("E207", what, where="the Authorization header", why=why, fix="send Authorization: Bearer KEY")
                await JSONResponse(error_document(error, 401), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        finally:
            if status >= 400:
                self.server.metrics.refused.labels(str(status)).inc()
            self.server.log(
                {
                    "time": round(time.time(), 3),
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(time.monotonic() - began, 4),
                    **entry,
                }
            )

    def _has_key(self, scope: Any) -> bool:
        if not self.server.keys:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), one.encode()) for one in self.server.keys]  # all of them, whatever the first says
        return kind.lower() == b"bearer" and any(matches)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is no such path", 405: "the path does not take this method"}.get(error.status_code, str(error.detail))
    found = ThoughtxError(
        "E207", what, where=f"{request.method} {request.url.path}", why="see docs/serve.md", fix="POST /v1/chat/completions"
    )
    return JSONResponse(error_document(found, error.status_code), error.status_code, error.headers)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error_document(error.error, error.status), error.status, error.headers)


async def _thoughtx_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ThoughtxError)
    return JSONResponse(error_document(error, status_of(error)), status_of(error))


HANDLERS: dict[Any, Any] = {HTTPException: _http_error, Refusal: _refusal, ThoughtxError: _thoughtx_error}
