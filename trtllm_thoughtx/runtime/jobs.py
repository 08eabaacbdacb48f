"""Many requests as one job: all are checked before the first one runs, each answer is written when it is done, one bad request costs
nothing but itself.

An answer does not depend on what runs beside it, nor on where a stopped job went on: a request draws from the random stream of its line
number, and one with a seed of its own draws as if it were alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, counted, listed
from trtllm_thoughtx.jsonl import Bad
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.runtime.adapters import digest_of
from trtllm_thoughtx.runtime.answers import Answers, Stamp, sha256_of, stamp
from trtllm_thoughtx.runtime.completion import Completion
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.generation import OnToken, check
from trtllm_thoughtx.runtime.row import STREAMS_APART, Request
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.text.prompts import Prompt

STOP, ROW = ON_ERROR = ("stop", "row")
COUNTED = ("prefill_seconds", "decode_seconds", "num_decoded", "num_reused", "num_read_again", "num_drafted", "num_accepted")


@dataclass(frozen=True)
class Todo:
    """A request that is ready to run."""

    request: Prompt
    ids: Sequence[int]
    params: GenerationParams
    chunk_size: int | str | None
    stream: int

    @property
    def num_answers(self) -> int:
        return self.params.num_return_sequences


class Job:
    """`is_file`: the requests are lines of a file, and errors name them. `adapter`: of all requests, by name."""

    def __init__(
        self, engine: Engine, answers: Answers | None, on_error: str, progress: Progress, *, is_file: bool, adapter: str | None = None
    ) -> None:
        self.adapter = adapter
        self.engine, self.answers, self.on_error, self.progress, self.is_file = engine, answers, on_error, progress, is_file
        self.stats: dict[str, float] = dict.fromkeys(COUNTED, 0)
        self.num_kept = 0
        self.last: Sequence[Completion] = ()

    def run(
        self,
        requests: Sequence[Prompt],
        bad: Sequence[Bad],
        todo: Callable[[Prompt], Todo],
        done: Callable[[Todo, Sequence[Completion]], list[dict[str, Any]]],
        on_token: OnToken | None,
        *,
        return_logits: bool,
    ) -> list[dict[str, Any]]:
        """Rows of all requests: errors of lines that cannot be read (with on_error `row`), then the others in the order of the file."""
        ready, refused = self._checked(requests, todo)
        rows, unread = refused, [error_row(one.line.id, one.error) for one in bad]
        num_errors, stamps, kept = len(rows), dict[str, Stamp](), dict[tuple[str, int], dict[str, Any]]()
        if self.answers is not None:
            stamps, kept = self._stamps(ready), self.answers.done
            self.answers.check(stamps)
        for one in ready:
            names = [(one.request.id, k) for k in range(one.num_answers)]
            if all(name in kept for name in names):
                rows[one.request.id] = [kept[name] for name in names]
        self.num_kept = len(rows) - num_errors
        left = [one for one in ready if one.request.id not in rows]
        stage = self.progress.stage("answering", len(left)) if self.is_file else contextlib.nullcontext()
        with self.answers.writing(self.progress, rows) if self.answers else contextlib.nullcontext(), stage as running:
            self._write([*unread, *(row for made in list(rows.values())[:num_errors] for row in made)])
            for one, answered in self._answered(left, on_token, return_logits):
                if isinstance(answered, ThoughtxError):
                    made = [error_row(one.request.id, answered)]
                else:
                    self.last, extra = answered, stamps[one.request.id]._asdict() if stamps else {}
                    made = [{**row, **extra} for row in done(one, answered)]
                rows[one.request.id] = made
                self._write(made)
                if running is not None:
                    running.advance(1)
        return [*unread, *(row for request in requests for row in rows[request.id])]

    def _checked(self, requests: Sequence[Prompt], todo: Callable[[Prompt], Todo]) -> tuple[list[Todo], dict[str, list[dict[str, Any]]]]:
        """The requests that can be answered, and error rows of the others."""
        ready, refused = [], dict[str, ThoughtxError]()
        for request in requests:
            try:
                one = todo(request)
                if self.is_file and (what := self.engine.session.problem(one.ids)) is not None:
                    why, fix = f"it {what}", "shorten it, or build an engine with other limits (thoughtx-build --help)"
                    raise ThoughtxError("E122", "the prompt does not fit the engine", where=request.where, why=why, fix=fix)
                check(self.engine.session, self.engine.text, one.params)
                self.engine.session.check_chunk_size(one.chunk_size)
                ready.append(one)
            except ThoughtxError as error:
                if not self.is_file:
                    raise
                refused[request.id] = error.at(request.where)
        if refused and self.on_error == STOP:
            raise together(list(refused.values()))
        return ready, {name: [error_row(name, error)] for name, error in refused.items()}

    def _stamps(self, ready: Sequence[Todo]) -> dict[str, Stamp]:
        engine = engine_sha256(self.engine)
        more = {} if self.adapter is None else {"adapter": digest_of(self.engine.session.adapters[self.adapter])}
        settings = [{**settings_of(one.params, one.stream), "chunk_size": one.chunk_size, **more} for one in ready]
        return {one.request.id: stamp(engine, one.ids, own) for one, own in zip(ready, settings, strict=True)}

    def _answered(
        self, todo: Sequence[Todo], on_token: OnToken | None, return_logits: bool
    ) -> Iterator[tuple[Todo, Sequence[Completion] | ThoughtxError]]:
        """Each request with its completions, or why it has none, as soon as it is done. An error stops the job where it is to."""
        places = [(i, k) for i, one in enumerate(todo) for k in range(one.num_answers)]
        requests = [
            Request(
                *(one.ids, one.params, index, one.stream + k * STREAMS_APART, return_logits),
                chunk_size=one.chunk_size,
                adapter=self.adapter,
            )
            for index, (one, k) in enumerate((todo[i], k) for i, k in places)
        ]
        found: dict[int, dict[int, Completion]] = {}
        failed = set[int]()
        for index, outcome in self.engine.complete(requests, on_token):
            i, k = places[index]
            if isinstance(outcome, ThoughtxError):
                if self.on_error == STOP:
                    raise outcome
                if i not in failed:
                    yield todo[i], outcome
                failed.add(i)
                continue
            answers = found.setdefault(i, {})
            answers[k] = dataclasses.replace(outcome, index=k)
            if len(answers) == todo[i].num_answers:
                yield todo[i], [found[i][k] for k in range(todo[i].num_answers)]
                del found[i]
        self.stats = {name: getattr(self.engine.stats, name) for name in COUNTED}

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.answers is not None:
            self.answers.write(rows)


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a person should know of all answers together, in a few lines."""
    good = [row for row in rows if "error" not in row]
    lines = []
    nats = [row["complexity"] for row in good if row["complexity"] is not None]
    if nats:
        how = f"{sum(row['single_step'] for row in good)} of {len(good)} answered in a single step"
        sizes = _counted(Counter(str(row["chunk_size"]) for row in good))
        lines.append(f"prompt entropy {min(nats):.3f} to {max(nats):.3f} nats, chunks of {sizes}; {how}")
    stops = Counter(row["thinking_stop"] for row in good if row["thinking_stop"] is not None)
    if stops:
        steps, tokens = (sum(row[name] for row in good) for name in ("num_steps", "num_thinking_tokens"))
        lines.append(f"{counted(steps, 'step')}, {counted(tokens, 'token')} of thinking, ended by {_counted(stops)}")
    if good:
        num_new = sum(row["num_output_tokens"] for row in good)
        lines.append(f"{counted(num_new, 'token')}, stopped by {_counted(Counter(row['stop_reason'] for row in good))}")
    if len(good) < len(rows):
        lines.append(f"{len(rows) - len(good)} of {len(rows)} rows are errors")
    return lines


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{name} ({num})" if len(found) > 1 else name for name, num in found.most_common())


def error_row(name: str, error: ThoughtxError) -> dict[str, Any]:
    return {"id": name, "error": error.as_dict()}


def together(refused: Sequence[ThoughtxError]) -> ThoughtxError:
    """One error that names each of `refused`."""
    first, *others = refused
    if not others:
        return first
    why = listed([f"{one.where.rpartition(', line ')[2]}: {one.what}: {one.why}" for one in refused])
    what = f"{len(refused)} requests cannot be answered"
    return ThoughtxError(first.code, what, where=f"{first.where} and {len(others)} more", why=f"line {why}", fix=first.fix)


def engine_sha256(engine: Engine) -> str:
    """Of what an engine's answers depend on."""
    return sha256_of([engine.directory.manifest["outputs"], engine.backend, engine.is_exact])


def settings_of(params: GenerationParams, stream: int) -> dict[str, Any]:
    """What a stamp keeps of them: greedy answers draw from no stream, and what is looked up changes none."""
    kept = dataclasses.asdict(params)
    del kept["prompt_lookup"]
    return {**kept, "stream": None if params.is_greedy else stream}
