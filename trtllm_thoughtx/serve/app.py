"""The HTTP side of `thoughtx-serve`: routes, limits, keys, streams. One engine behind it, stepped by a thread of its own (`runtime.front`).

A request passes these doors in order: the key (401), the size of the body and the time it takes to arrive (413, 408), whether the server
takes requests at all (503), the body itself (400), room in the queue (429, with Retry-After). Behind them nothing is refused any more.
A client that goes away gives its slots back at the next tick.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.front import Full
from trtllm_thoughtx.serve import responses
from trtllm_thoughtx.serve.answering import Answers
from trtllm_thoughtx.serve.documents import DONE, Choice, Documents, event
from trtllm_thoughtx.serve.door import HANDLERS, Door, Refusal, Server, error_document, status_of
from trtllm_thoughtx.serve.wire import BadRequest, Wanted, object_of, read_request
from trtllm_thoughtx.text.body import CHAT, COMPLETIONS
from trtllm_thoughtx.text.chat import plain_messages, template_settings
from trtllm_thoughtx.text.prompts import token_ids
from trtllm_thoughtx.text.text import Text

PAGE = Path(__file__).with_name("page.html")
RETRY_SECONDS = 1


def build_app(server: Server) -> Starlette:
    """The application; its life is `server`'s."""
    routes = [
        Route("/", functools.partial(_page, server)),
        Route("/health", functools.partial(_health, server)),
        Route("/metrics", functools.partial(_metrics, server)),
        Route("/v1/models", functools.partial(_models, server)),
        Route("/v1/models/{name:path}", functools.partial(_model, server)),
        Route(CHAT, functools.partial(_answer, server), methods=["POST"]),
        Route(COMPLETIONS, functools.partial(_answer, server), methods=["POST"]),
        Route(responses.URL, functools.partial(_respond, server), methods=["POST"]),
        Route("/tokenize", functools.partial(_tokenize, server), methods=["POST"]),
        Route("/detokenize", functools.partial(_detokenize, server), methods=["POST"]),
        Route("/tokenizer_info", functools.partial(_tokenizer_info, server)),
    ]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    app.add_middleware(Door, server=server)
    return app


async def _page(server: Server, request: Request) -> Response:
    return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-cache"})


async def _health(server: Server, request: Request) -> Response:
    problem = server.problem
    return JSONResponse({"status": problem or "ready"}, 200 if problem is None else 503)


async def _metrics(server: Server, request: Request) -> Response:
    load = server.answering.load()
    server.metrics.running.set(load.num_running)
    server.metrics.waiting.set(load.num_waiting)
    server.metrics.kv_usage.set(load.kv_usage)
    server.metrics.kv_bytes.set(load.kv_bytes)
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _described(server: Server, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": server.began,
        "owned_by": "thoughtx",
        "max_model_len": server.engine.build.max_seq_len,
        **({"parent": server.names[0]} if name in server.engine.session.adapters else {}),
    }


async def _models(server: Server, request: Request) -> Response:
    build = server.engine.build
    about = {
        "max_num_seqs": server.answering.num_slots,
        "use_chunked_attention": build.use_chunked_attention,
        "chunk_size": build.chunk_size if build.use_chunked_attention else None,
        "exit_head": bool(build.exit_head),
        "has_thinking": server.engine.text is not None and server.engine.text.think_ids is not None,
        "reasoning_efforts": dict(server.efforts),
    }
    found = [{**_described(server, name), "thoughtx": about} for name in (*server.names, *server.engine.session.adapters)]
    return JSONResponse({"object": "list", "data": found})


async def _model(server: Server, request: Request) -> Response:
    if (name := request.path_params["name"]) not in (*server.names, *server.engine.session.adapters):
        raise HTTPException(404)
    return JSONResponse(_described(server, name))


async def _body(server: Server, request: Request) -> dict[str, Any]:
    """The object that was sent, once all of it is there."""
    limits, kept = server.limits, bytearray()

    async def read() -> bytes:
        async for block in request.stream():
            kept.extend(block)
            if len(kept) > limits.body_bytes:
                what, why = f"the body has more than {limits.body_bytes:,} bytes", "the server's limit (--max_body_bytes)"
                raise Refusal(413, BadRequest(what, why, fix="send less"), {"Connection": "close"})
        return bytes(kept)

    try:
        return object_of(await asyncio.wait_for(read(), limits.body_seconds))
    except asyncio.TimeoutError:
        what, why = f"the body did not arrive within {limits.body_seconds:g} s", "the server's limit (--body_timeout)"
        raise Refusal(408, BadRequest(what, why, fix="send it at once"), {"Connection": "close"}) from None


def _unready(server: Server) -> None:
    if (problem := server.problem) is not None:
        error = ThoughtxError("E207", "no request is taken now", where="the server", why=problem, fix="try again later, or another server")
        raise Refusal(503, error, {"Retry-After": "5"})


async def _read(server: Server, body: Mapping[str, Any], url: str) -> Wanted:
    """Templates and tokenizers take milliseconds: not in the loop's thread."""
    _unready(server)
    return await asyncio.to_thread(read_request, body, url, server.engine, server.names, server.efforts, server.defaults)


def _admitted(server: Server, wanted: Wanted, entry: dict[str, Any]) -> Answers:
    """The answers of a request, all of them or none admitted."""
    try:
        answers = server.answering.begin(wanted, server.limits, server.metrics)
    except Full as full:
        error = ThoughtxError("E207", "the queue is full", where="the server", why=str(full), fix=f"try again in {RETRY_SECONDS} s")
        raise Refusal(429, error, {"Retry-After": str(RETRY_SECONDS)}) from None
    entry |= {"num_prompt_tokens": wanted.num_prompt_tokens, "num_answers": len(wanted.asks), "stream": wanted.is_streamed}
    return answers


def _released(answers: Answers, entry: dict[str, Any]) -> None:
    """Nobody reads on: what has not ended is given up."""
    answers.close()
    done = [one for one in answers.completions if one is not None]
    entry |= {"num_new_tokens": sum(len(one.output_ids) for one in done), "stop_reasons": [one.stop_reason for one in done]}


class _Events(StreamingResponse):
    """A stream of server-sent events that gives its slots back however it ends, also before its first byte."""

    def __init__(self, answers: Answers, entry: dict[str, Any], content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._release = functools.partial(_released, answers, entry)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer(server: Server, request: Request) -> Response:
    """Chat and completions."""
    wanted = await _read(server, await _body(server, request), request.url.path)
    made = Documents(wanted, wanted.adapter or server.names[0], _text(server))
    answers = _admitted(server, wanted, request.state.entry)
    if wanted.is_streamed:
        return _Events(answers, request.state.entry, _events(made, answers))
    try:
        return JSONResponse(made.whole(await _unless_gone(request, _collected(made, answers))))
    finally:
        _released(answers, request.state.entry)


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """What `work` gives, unless the client goes away first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _collected(made: Documents, answers: Answers) -> list[Choice]:
    choices = made.choices()
    async for piece in answers.pieces():
        for index, part, said in made.shown(piece):
            choices[index].add(part, said)
        if piece.done is not None:
            choices[piece.index].done = piece.done
    return choices


async def _events(made: Documents, answers: Answers) -> AsyncIterator[bytes]:
    """Once the status has gone out, an error can only be an event with `error`."""
    choices = made.choices()
    if made.is_chat:
        for choice in choices:
            yield event(made.first(choice.index))
    try:
        async for piece in answers.pieces():
            for index, part, said in made.shown(piece):
                yield event(made.delta(index, part, said))
            if piece.done is not None:
                choices[piece.index].done = piece.done
                yield event(made.last(choices[piece.index]))
        if made.wanted.has_usage:
            yield event(made.totals(choices))
    except ThoughtxError as error:
        yield event(error_document(error, status_of(error)))
    yield DONE


async def _respond(server: Server, request: Request) -> Response:
    """`/v1/responses`, text alone, nothing stored."""
    body = await _body(server, request)
    chat, made = responses.read(body)
    wanted = await _read(server, chat, CHAT)
    text = _text(server)
    documents = Documents(wanted, wanted.adapter or server.names[0], text)
    answers = _admitted(server, wanted, request.state.entry)
    if wanted.is_streamed:
        return _Events(answers, request.state.entry, _response_events(made, documents, answers))
    try:
        choices = await _unless_gone(request, _collected(documents, answers))
        return JSONResponse(made.whole(documents, choices[0]))
    finally:
        _released(answers, request.state.entry)


async def _response_events(made: responses.Reply, documents: Documents, answers: Answers) -> AsyncIterator[bytes]:
    choice = documents.choices()[0]
    try:
        for one in made.begin(documents):
            yield responses.event(one)
        async for piece in answers.pieces():
            for _, part, said in documents.shown(piece):
                choice.add(part, said)
                for one in made.delta(part, said):
                    yield responses.event(one)
            choice.done = piece.done or choice.done
        for one in made.end(documents, choice):
            yield responses.event(one)
    except ThoughtxError as error:
        yield responses.event(made.failed(documents, error_document(error, status_of(error))["error"]))


def _text(server: Server) -> Text:
    if server.engine.text is None:
        what, why = "this engine has no tokenizer", "it was built from files without one"
        raise BadRequest(what, why, fix="build it from a checkpoint with a tokenizer.json")
    return server.engine.text


async def _tokenize(server: Server, request: Request) -> Response:
    body, text = await _body(server, request), _text(server)
    messages, prompt, special = body.get("messages"), body.get("prompt"), body.get("add_special_tokens", True)
    if (messages is None) == (prompt is None) or not isinstance(special, bool):
        raise BadRequest("give prompt or messages", "one text, or one chat, is tokenized", "prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise BadRequest("prompt must be a text", "one text is tokenized", "prompt")
    if prompt is not None:
        ids = await asyncio.to_thread(text.encode, prompt, special)
    else:
        kwargs = template_settings(None, body.get("chat_template_kwargs"), "the request's body", "E140")
        ids = await asyncio.to_thread(functools.partial(text.chat, plain_messages(messages, "the request's body"), template_kwargs=kwargs))
    return JSONResponse({"count": len(ids), "max_model_len": server.engine.build.max_seq_len, "tokens": list(ids)})


async def _detokenize(server: Server, request: Request) -> Response:
    body, text = await _body(server, request), _text(server)
    try:
        ids = token_ids(body.get("tokens"))
    except ValueError as error:
        raise BadRequest(str(error), "tokens is a list of ids", "tokens") from None
    return JSONResponse({"prompt": await asyncio.to_thread(text.decode, ids, False)})


async def _tokenizer_info(server: Server, request: Request) -> Response:
    text = _text(server)
    return JSONResponse({"tokenizer_class": "PreTrainedTokenizerFast", **text.special, "chat_template": text.template_source})
