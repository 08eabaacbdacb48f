"""What is evaluated: an engine, or a Hugging Face model beside it (`models`), behind one interface; `opened` opens either.

Both decode with the project's own sampler from the same random streams, so a difference between their answers is one of the
models, not of the sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.answers import sha256_of
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.generation import CANCELLED, check
from trtllm_thoughtx.runtime.jobs import engine_sha256
from trtllm_thoughtx.runtime.logits import Score
from trtllm_thoughtx.runtime.row import Request
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.text import Text

TRUNCATED = ("length", "capacity")
IsDone = Callable[[int, list[int]], bool]  # (row, its new ids so far)
Job = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]  # a context, and continuations that differ in their last token at most


@dataclass(frozen=True)
class Written:
    """New tokens, the natural log-probability of each, why they end, and seconds to the last: of an engine from when the prompt began to be
    read, beside whatever else ran; of a model from the start of its batch.

    `thinking_stop` says why the thinking ended where the system knows (`text.thinking`), `num_layer_tokens` what the answer cost.
    `is_open`: the thinking was open where `ids` begin; None: as the prompt left it."""

    ids: list[int]
    logprobs: list[float]
    stop_reason: str
    seconds: float
    thinking_stop: str | None = None
    num_layer_tokens: int = 0
    is_open: bool | None = None
    text_end: int | None = None  # as in `Completion`


class System(Protocol):
    """`max_length` prompt and answer together; `description` is what a result keeps of it. Prompts and rows are token ids. `is_grouped`:
    prompts share batches in the order in which they are given, and answers round as their batch does."""

    text: Text
    max_length: int
    batch_size: int
    is_grouped: bool
    description: dict[str, Any]

    def check(self, params: GenerationParams) -> None:
        """E001 or E122 for settings that the system cannot follow."""
        ...

    def write(
        self, prompts: Sequence[Sequence[int]], params: Sequence[GenerationParams], streams: Sequence[int], is_done: IsDone | None = None
    ) -> Iterable[tuple[int, Written | ThoughtxError]]:
        """Places of prompts with their answers, each as soon as it is there; `params` and `streams`: the settings and the random stream of
        each. An answer ends early once `is_done` says so. `batch_size` run at a time."""
        ...

    def sha256(self) -> str:
        """Of what its answers depend on."""
        ...

    def score(self, jobs: Sequence[Job]) -> Iterable[tuple[int, list[Score]]]:
        """Places of jobs with the scores of their continuations, each as soon as it is there. E123 where a logit is not finite."""
        ...

    def close(self) -> None: ...


class EngineSystem:
    """An engine; `batch_size` answers are written at a time, and the next prompt begins when one of them ends."""

    is_grouped = False

    def __init__(
        self,
        engine: Path | Engine,
        backend: str | None = None,
        num_threads: int | None = None,
        batch_size: int | None = None,
        chunk_size: int | str | None = None,
        *,
        exact: bool = False,
        verify_key: Path | None = None,
    ) -> None:
        loaded = engine if isinstance(engine, Engine) else Engine.load(engine, backend, num_threads, exact=exact, verify_key=verify_key)
        self.engine = loaded
        self.chunk_size, path = chunk_size, self.engine.directory.root if isinstance(engine, Engine) else engine
        build = self.engine.build
        self.text = need_text(self.engine.text, path)
        self.max_length, self.batch_size = build.max_seq_len, min(batch_size or 1, build.max_batch_size)
        self.description: dict[str, Any] = {
            "name": path.name,
            "path": str(path),
            "kind": "engine",
            "backend": self.engine.backend,
            "dtype": build.dtype,
        }
        if exact:
            self.description["exact"] = True
        if chunk_size is not None:
            self.description["chunk_size"] = chunk_size

    def check(self, params: GenerationParams) -> None:
        check(self.engine.session, self.engine.text, params)

    def sha256(self) -> str:
        return sha256_of([engine_sha256(self.engine), self.chunk_size])

    def write(
        self, prompts: Sequence[Sequence[int]], params: Sequence[GenerationParams], streams: Sequence[int], is_done: IsDone | None = None
    ) -> Iterator[tuple[int, Written | ThoughtxError]]:
        new: list[list[int]] = [[] for _ in prompts]

        def on_token(row: int, token: int) -> bool:
            new[row].append(token)
            return is_done is not None and is_done(row, new[row])

        requests = [
            Request(ids, own, row, stream, keeps_logprobs=is_done is None, chunk_size=self.chunk_size)
            for row, (ids, own, stream) in enumerate(zip(prompts, params, streams, strict=True))
        ]
        for row, one in self.engine.complete(requests, on_token, num_slots=self.batch_size):
            if isinstance(one, ThoughtxError):
                yield row, one
                continue
            reason = "stop" if one.stop_reason == CANCELLED else one.stop_reason
            said = one.thinking_stop, one.num_layer_tokens, one.is_open, one.text_end
            yield row, Written(one.output_ids, one.logprobs or [], reason, one.seconds, *said)

    def score(self, jobs: Sequence[Job]) -> Iterator[tuple[int, list[Score]]]:
        params = GenerationParams(max_new_tokens=1)
        requests = [
            Request(context, params, place, 0, chunk_size=self.chunk_size, continuations=continuations)
            for place, (context, continuations) in enumerate(jobs)
        ]
        for place, one in self.engine.complete(requests, num_slots=self.batch_size):
            if isinstance(one, ThoughtxError):
                raise one
            assert one.scores is not None
            yield place, one.scores

    def close(self) -> None:
        self.engine.close()


def need_text(text: Text | None, path: Path) -> Text:
    if text is None:
        fix = "copy the model's tokenizer.json there, or, of an engine, into its checkpoint, and build again"
        raise ThoughtxError("E112", "questions need a tokenizer", where=str(path), why="there is none beside the model", fix=fix)
    return text
