"""An engine inside Triton's Python backend, with a stand-in for Triton's own module: answers, refusals, cancellation, the end."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from places import TINY

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.serve.triton import Served, read_parameters
from trtllm_thoughtx.ship.export.triton import ENGINE, OUTPUTS, PARAMETERS

PROMPT = "Q x1 = 38 x2 = 75 ? <think>"
FINAL = 1


class StandIn:
    """What of `triton_python_backend_utils` is used."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL

    class TritonModelException(Exception):
        pass

    class TritonError(Exception):
        INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "internal", "invalid", "unavailable", "cancelled"

        def __init__(self, message: str, kind: str) -> None:
            super().__init__(message)
            self.kind = kind

    class Tensor:
        def __init__(self, name: str, values: np.ndarray) -> None:
            self.name, self.values = name, values

        def as_numpy(self) -> np.ndarray:
            return self.values

    class InferenceResponse:
        def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
            self.outputs, self.error = {one.name: one.values.item() for one in output_tensors}, error

    @staticmethod
    def get_input_tensor_by_name(request: Request, name: str) -> Any:
        return request.tensors.get(name)


class Request:
    """It is its own sender; `responses` has what was sent, with its flags."""

    def __init__(self, parameters: dict[str, Any] | None = None, **inputs: Any) -> None:
        self.own, self.responses, self.cancelled, self.breaks = parameters or {}, queue.SimpleQueue[Any](), False, False
        kinds = {str: object, bool: bool, int: np.int32, float: np.float32, list: object, bytes: object}
        self.tensors = {}
        for name, value in {"text_input": PROMPT, "temperature": 0.0, "stream": True, **inputs}.items():
            raw = [one.encode() if isinstance(one, str) else one for one in (value if isinstance(value, list) else [value])]
            self.tensors[name] = StandIn.Tensor(name, np.array([raw], dtype=kinds[type(value)]))

    def parameters(self) -> str:
        return json.dumps(self.own)

    def requested_output_names(self) -> list[str]:
        return [one.name for one in OUTPUTS]

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: Any, flags: int = 0) -> None:
        if self.breaks:
            raise RuntimeError("the client has gone")
        self.responses.put((response, flags))

    def all(self) -> list[Any]:
        """Until the last, which alone is final."""
        found = []
        while True:
            response, flags = self.responses.get()
            found.append(response)
            if flags == FINAL:
                return found

    def refused(self, kind: str) -> str:
        (response,) = self.all()
        assert response.error.kind == kind and not response.outputs
        return str(response.error)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository") / "m"
    (root / "1").mkdir(parents=True)
    build(TINY, root / "1" / ENGINE, {"backend": ("onnxruntime",), "dtype": "float32", "max_batch_size": 2})
    return root


def opened(model: Path, **parameters: object) -> Served:
    given = {name: {"string_value": str(value)} for name, value in {**PARAMETERS, "num_threads": 1, **parameters}.items()}
    config = json.dumps({"parameters": given})
    return Served(StandIn, {"model_repository": str(model), "model_version": "1", "model_name": "m", "model_config": config})


@pytest.fixture(scope="module")
def served(model: Path) -> Any:
    served = opened(model)
    yield served
    served.close()


@pytest.fixture(scope="module")
def alone(model: Path) -> tuple[str, Completion]:
    engine = Engine.load(model / "1" / ENGINE)
    assert engine.text is not None
    (completion,) = engine.generate([engine.text.raw(PROMPT)], engine.default_params(temperature=0.0, max_new_tokens=100))
    return engine.text.decode(completion.output_ids), completion


def test_streams_and_whole_answers(served: Served, alone: tuple[str, Completion]) -> None:
    text, completion = alone
    counted = {"return_num_input_tokens": True, "return_num_output_tokens": True}
    streamed, whole = Request(max_tokens=100, **counted), Request(max_tokens=100, stream=False)
    served.execute([streamed, whole])
    pieces = streamed.all()
    assert b"".join(one.outputs["text_output"] for one in pieces).decode() == text and len(pieces) > 10
    assert sum(one.outputs["num_output_tokens"] for one in pieces) == len(completion.output_ids)
    assert {one.outputs["num_input_tokens"] for one in pieces} == {completion.num_prompt_tokens}
    assert [one.outputs["finish_reason"] for one in pieces] == [*[b""] * (len(pieces) - 1), b"stop"]
    assert [one.outputs for one in whole.all()] == [{"text_output": text.encode(), "finish_reason": b"stop"}]
    few = Request(stream=False, max_tokens=3)
    served.execute([few])
    assert few.all()[0].outputs["finish_reason"] == b"length"


def test_every_setting_arrives(served: Served, alone: tuple[str, Completion]) -> None:
    cut = Request({"exit_policy": "off", "triton_own": "x"}, max_tokens=100, stream=False, stop_words=["75", "nothing"])
    served.execute([cut])
    said = cut.all()[0].outputs["text_output"].decode()
    assert alone[0].startswith(said) and "75" not in said and said
    none = Request(max_tokens=100, stream=False, max_thinking_tokens=0)
    served.execute([none])
    assert none.all()[0].outputs["text_output"].decode() != alone[0]


@pytest.mark.parametrize(
    ("request_of", "said"),
    [
        (lambda: Request({"bad_words": "x"}), "bad_words would change the answer"),
        (lambda: Request(top_k=-1), "--top_k must be"),
        (lambda: Request(max_tokens=5000), "no room for 5000 new tokens"),
        (lambda: Request(text_input=b"\xff"), "text_input is no text"),
        (lambda: Request(text_input=["a", "b"]), "text_input must hold one value"),
        (lambda: Request({"n": 2}, temperature=1.0), "2 answers are asked for"),
        (lambda: Request(chunk_size=16), "chunk"),
    ],
)
def test_what_cannot_be_followed_is_refused(served: Served, request_of: Any, said: str) -> None:
    request = request_of()
    served.execute([request])
    error = request.refused("invalid")
    assert said in error and all(part in error for part in ("where:", "why:", "fix:"))


def test_a_cancelled_request_gives_its_slot_up(model: Path) -> None:
    served = opened(model, max_num_seqs=1, max_queued_requests=0)
    try:
        endless = {"max_tokens": 1900, "ignore_eos": True}
        first, gone = Request(**endless), Request(**endless)
        for running in (first, gone):
            served.execute([running])
            running.responses.get()
            second = Request()
            served.execute([second])
            assert "no room" in second.refused("unavailable")
            running.cancelled, running.breaks = running is first, running is gone  # its client says so, or nothing takes what is sent
            if running is first:
                assert running.all()[-1].error.kind == "cancelled"
            while (again := Request(stream=False)).responses.empty():
                served.execute([again])
                if (response := again.all()[0]).error is None:
                    break
                assert response.error.kind == "unavailable"
    finally:
        served.close()


def test_a_text_that_cannot_be_made_ends_its_own_request(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = opened(model, max_num_seqs=1, max_queued_requests=0)

    def push(token: int) -> str:
        raise RuntimeError("no such character")

    try:
        with monkeypatch.context() as patch:
            broken = Request(max_tokens=1900, ignore_eos=True)
            patch.setattr(served._engine.text, "stop_stream", lambda params: SimpleNamespace(push=push))
            served.execute([broken])
            assert "RuntimeError: no such character" in broken.refused("internal")
        while True:  # its slot is free again
            served.execute([again := Request(stream=False)])
            if (response := again.all()[0]).error is None:
                break
            assert response.error.kind == "unavailable"
    finally:
        served.close()


def test_the_end_cancels_what_runs(model: Path) -> None:
    served = opened(model)
    running = Request(max_tokens=1900, ignore_eos=True)
    served.execute([running])
    running.responses.get()
    served.close()
    assert running.all()[-1].error.kind == "cancelled"
    assert not served._thread.is_alive() and not served._front._thread.is_alive()


def test_an_engine_that_does_not_load_says_why(model: Path) -> None:
    for parameters, code in (({"num_threads": 0}, "E002"), ({"backend": "tensorrt"}, "E101"), ({"verify_key": "/none.pem"}, "E1")):
        with pytest.raises(StandIn.TritonModelException, match=rf"error\[{code}"):
            opened(model, **parameters)


def test_parameters_are_read_strictly() -> None:
    given = {name: {"string_value": value} for name, value in PARAMETERS.items()}
    assert read_parameters({**given, "EXECUTION_ENV_PATH": {"string_value": "x"}}, "c") == {
        "max_queued_requests": 64,
        "prefill_segment": 512,
    }
    for name, value in (("max_num_seqs", "0"), ("num_threads", "2.5"), ("backend", "none"), ("num_slots", "4"), ("num_slots", "")):
        with pytest.raises(ThoughtxError, match="E002"):
            read_parameters({name: {"string_value": value}}, "c")
