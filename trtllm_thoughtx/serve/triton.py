"""An engine inside Triton's Python backend: what the model.py of `ship.export.triton` calls.

Triton's thread hands requests over and goes on at once; the engine's thread writes tokens; a third one turns them into texts and sends
them, looks for requests that were cancelled, and ends. Triton's own module comes as an argument, so that nothing here needs Triton.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.errors import Exit, ThoughtxError, shown
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.front import Done, Event, Failed, Front, Full, Ticket, Token
from trtllm_thoughtx.serve.wire import Ask, read_request
from trtllm_thoughtx.ship.export.triton import CONFIG, ENGINE, INPUTS, PARAMETERS
from trtllm_thoughtx.text.body import COMPLETIONS
from trtllm_thoughtx.text.text import Text

POLL_SECONDS = 0.1  # between two looks for cancelled requests
NUMBERS = ("max_num_seqs", "max_queued_requests", "prefill_segment", "num_threads")
OF_TRITON = "triton_"  # parameters of a request that are Triton's own begin with it


def read_parameters(given: Mapping[str, Mapping[str, str]], where: str) -> dict[str, Any]:
    """The parameters of a config.pbtxt that are set; E002 for wrong ones. Those in capitals are the Python backend's own."""
    found: dict[str, Any] = {}
    for name, holder in given.items():
        value = holder.get("string_value", "")
        if name.isupper() or (name in PARAMETERS and not value):
            continue
        is_good = value in BACKENDS if name == "backend" else name in PARAMETERS
        if name in NUMBERS:
            is_good = value.isdecimal() and len(value) < 10 and int(value) >= (name != "max_queued_requests")
        if not is_good:
            what, why = f"parameter {shown(name, 60)}: {shown(value, 60)} cannot be used", f"the parameters are {', '.join(PARAMETERS)}"
            fix = f"write a whole number for {', '.join(NUMBERS)}, one of {', '.join(BACKENDS)} for backend, a file for verify_key"
            raise ThoughtxError("E002", what, where=where, why=why, fix=fix)
        found[name] = int(value) if name in NUMBERS else value
    return found


class Served:
    """`pb`: Triton's `triton_python_backend_utils`; `args`: what `initialize` is given."""

    def __init__(self, pb: Any, args: Mapping[str, str]) -> None:
        self._pb, root = pb, Path(args["model_repository"])
        try:
            given = read_parameters(json.loads(args["model_config"]).get("parameters", {}), str(root / CONFIG))
            queued, seqs, segment = (given.pop(name, None) for name in ("max_queued_requests", "max_num_seqs", "prefill_segment"))
            self._engine = Engine.load(root / args["model_version"] / ENGINE, **given)
        except ThoughtxError as error:
            raise pb.TritonModelException(error.render()) from None
        if "backend" not in given and self._engine.overlooked:
            print(f"{args['model_name']}: {self._engine.overlooked}", file=sys.stderr, flush=True)  # goes to Triton's log
        self._name = args["model_name"]
        self._front = Front(self._engine, seqs, most_waiting=queued, **({} if segment is None else {"prefill_segment": segment}))
        self._events: queue.SimpleQueue[tuple[_Answer, Event | Ticket] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="thoughtx-triton", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._begin(request, sender)
            except ThoughtxError as error:
                kind = "INTERNAL" if error.exit in (Exit.ENVIRONMENT, Exit.BUG) else "INVALID_ARG"
                _fail(self._pb, sender, error.render(), kind)
            except Full as error:
                _fail(self._pb, sender, f"no room for this request now: {error}; send it again later", "UNAVAILABLE")
            except Exception as error:  # the sender must end, whatever happens
                _fail(self._pb, sender, f"{type(error).__name__}: {shown(str(error), 300)}", "INTERNAL")

    def close(self) -> None:
        """What still runs is cancelled; no thread is left."""
        self._front.close()
        self._events.put(None)
        self._thread.join()
        self._engine.close()

    def _begin(self, request: Any, sender: Any) -> None:
        body, reports = _body(self._pb, request)
        wanted = read_request(body, COMPLETIONS, self._engine, (self._name,))
        if len(wanted.asks) != 1:
            what, why, fix = f"{len(wanted.asks)} answers are asked for", "a request to Triton has one", "send one request for each"
            raise ThoughtxError("E140", what, where="the request", why=why, fix=fix)
        (ask,), text = wanted.asks, self._engine.text
        assert text is not None
        answer = _Answer(
            self._pb, sender, ask, text, is_streamed=wanted.is_streamed, outputs=reports & set(request.requested_output_names())
        )
        ticket = self._front.submit(
            ask.ids, ask.params, chunk_size=ask.chunk_size, stream=ask.stream, on_event=lambda event: self._events.put((answer, event))
        )
        self._events.put((answer, ticket))

    def _send(self) -> None:
        """The sending thread."""
        live: dict[_Answer, Ticket] = {}
        looked = time.monotonic()
        while True:
            try:
                item = self._events.get(timeout=POLL_SECONDS if live else None)
            except queue.Empty:
                pass
            else:
                if item is None:
                    return
                answer, event = item
                if isinstance(event, Ticket):
                    if answer.is_over:
                        event.cancel()
                    else:
                        live[answer] = event
                else:
                    answer.take(event)
                    if answer.is_over and (ticket := live.pop(answer, None)) is not None:
                        ticket.cancel()  # of no effect where it has ended by itself
            if time.monotonic() - looked >= POLL_SECONDS:
                looked = time.monotonic()
                for answer, ticket in live.items():
                    if answer.is_unwanted():
                        ticket.cancel()


class _Answer:
    """One request that was begun, and what is sent of it."""

    def __init__(self, pb: Any, sender: Any, ask: Ask, text: Text, *, is_streamed: bool, outputs: set[str]) -> None:
        self._pb, self._sender, self._is_streamed, self._outputs = pb, sender, is_streamed, outputs
        self._stream = text.stop_stream(ask.params)
        self._num_prompt, self._num_new, self._said = len(ask.ids), 0, ""
        self._is_deaf = False  # nobody takes what is sent
        self.is_over = False

    def is_unwanted(self) -> bool:
        return self._is_deaf or bool(self._sender.is_cancelled())

    def take(self, event: Event) -> None:
        """Send what an event means for this request. Whatever goes wrong is its own: the others go on."""
        if self.is_over:
            return
        try:
            self._take(event)
        except Exception as error:
            self.is_over = self._is_deaf = True
            _fail(self._pb, self._sender, f"{type(error).__name__}: {shown(str(error), 300)}", "INTERNAL")

    def _take(self, event: Event) -> None:
        if isinstance(event, Token):
            self._num_new += 1
            self._said += self._stream.push(event.token)
            if self._is_streamed and self._said:
                self._give("", is_last=False)
            return
        self.is_over = True
        if isinstance(event, Failed):
            _fail(self._pb, self._sender, event.error.render(), "INTERNAL")
        elif isinstance(event, Done) and event.completion.stop_reason == "cancelled":
            _fail(self._pb, self._sender, "the request was cancelled", "CANCELLED")
        else:
            self._said += self._stream.end()
            self._give(event.completion.finish_reason, is_last=True)

    def _give(self, finish_reason: str, *, is_last: bool) -> None:
        pb, values = self._pb, {"text_output": self._said.encode(), "finish_reason": finish_reason.encode()}
        counts = {"num_input_tokens": self._num_prompt, "num_output_tokens": self._num_new}
        tensors = [pb.Tensor(name, np.array([[value]], dtype=object)) for name, value in values.items() if name in self._outputs]
        tensors += [pb.Tensor(name, np.array([[value]], dtype=np.uint32)) for name, value in counts.items() if name in self._outputs]
        self._said, self._num_new = "", 0
        try:
            flags = {"flags": pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL} if is_last else {}
            self._sender.send(pb.InferenceResponse(output_tensors=tensors), **flags)
        except Exception:  # the others go on
            self._is_deaf = True


def _fail(pb: Any, sender: Any, why: str, kind: str) -> None:
    """End a request by an error."""
    try:
        response = pb.InferenceResponse(error=pb.TritonError(why, getattr(pb.TritonError, kind)))
        sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception:  # nobody takes it
        return


def _body(pb: Any, request: Any) -> tuple[dict[str, Any], set[str]]:
    """A request as a body to completions, and the outputs that it wants. Parameters count as fields, so that none is passed over."""
    own = json.loads(request.parameters() or "{}")
    body = {name: value for name, value in own.items() if not name.startswith(OF_TRITON)}
    wanted = {"text_output", "finish_reason"}
    for tensor in INPUTS:
        given = pb.get_input_tensor_by_name(request, tensor.name)
        if given is None:
            continue
        values = list(_values(given.as_numpy().reshape(-1), tensor.name))
        if len(values) != 1 and not tensor.is_list:
            why, fix = f"it holds {len(values)} values", "send one request for each text"
            raise ThoughtxError("E140", f"{tensor.name} must hold one value", where="the request", why=why, fix=fix)
        if tensor.field:
            body[tensor.field] = values if tensor.is_list else values[0]
        elif values[0]:
            wanted.add(tensor.name.removeprefix("return_"))
    if body.get("chunk_size") == 0:
        body["chunk_size"] = "auto"
    return body, wanted


def _values(array: np.ndarray, name: str) -> Iterator[Any]:
    """As JSON would have them: a float32 is the shortest number that means it."""
    for value in array:
        try:
            yield value.decode() if isinstance(value, bytes) else float(str(value)) if isinstance(value, np.float32) else value.item()
        except UnicodeDecodeError:
            why, fix = "its bytes are not UTF-8", "send texts as UTF-8"
            raise ThoughtxError("E140", f"{name} is no text", where="the request", why=why, fix=fix) from None
