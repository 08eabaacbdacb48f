"""Log-likelihoods and answers of texts, from an engine or from the reference: what a benchmark harness asks of a model.

`Source` is the seam: `EngineSource` and `ModelSource` give logits and new token ids, `Scorer` turns texts into them and back. The
rules are lm-eval's (prompts lose their beginning when they are too long, a continuation's score is the sum over its tokens), with
two deliberate differences: the thought is cut off before stop strings are looked for and before an answer is scored, and a
thought that never ends is no answer, where lm-eval would score the thought. No benchmark package is imported here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.progress import Stage
from trtllm_thoughtx.runtime.engine import Engine
from trtllm_thoughtx.runtime.logits import log_softmax
from trtllm_thoughtx.runtime.sampling import GenerationParams, Sampler
from trtllm_thoughtx.text.answer import split_text
from trtllm_thoughtx.text.text import Text

STEPPED = 32  # continuations up to this long are fed token by token: the logits of a whole prompt may take gigabytes
LOOK_EVERY = 8  # tokens between two looks for a stop string
MAX_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
IsDone = Callable[[int, list[int]], bool]  # (row, its new ids so far)


# --- where logits come from ----------------------------------------------------------------------------------------------


class Source(Protocol):
    """A model as the harness needs it. Rows are token ids, at most `max_length` of them."""

    text: Text | None
    max_length: int
    batch_size: int

    def logits(self, rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> list[np.ndarray]:
        """For each of at most `batch_size` rows: float [length - first, vocab], the logits of positions first .. length - 1."""
        ...

    def generate(self, rows: Sequence[Sequence[int]], params: GenerationParams, is_done: IsDone) -> list[list[int]]:
        """New ids of each of any number of rows; a row ends early once `is_done` says so."""
        ...


class _Enough(Exception):
    """Every row of a batch is done."""


class EngineSource:
    """An engine, at its own batch size. `chunk_size` as in `Engine.forward`."""

    def __init__(self, engine: Engine, chunk_size: int | None = None) -> None:
        self.engine, self.text, self.chunk_size = engine, engine.text, chunk_size
        self.max_length, self.batch_size = engine.build.max_seq_len, engine.build.max_batch_size

    def logits(self, rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> list[np.ndarray]:
        if max(len(row) - first for row, first in zip(rows, firsts, strict=True)) <= STEPPED:
            return self.engine.decode_logits(rows, [first + 1 for first in firsts], chunk_size=self.chunk_size)
        whole = self.engine.forward(rows, chunk_size=self.chunk_size)
        return [logits[first:] for logits, first in zip(whole, firsts, strict=True)]

    def generate(self, rows: Sequence[Sequence[int]], params: GenerationParams, is_done: IsDone) -> list[list[int]]:
        size = self.batch_size if params.is_greedy else len(rows)  # a draw depends on a row's place in the call
        return [ids for start in range(0, len(rows), size) for ids in self._generate(rows[start : start + size], params, is_done, start)]

    def _generate(self, rows: Sequence[Sequence[int]], params: GenerationParams, is_done: IsDone, start: int) -> list[list[int]]:
        new: list[list[int]] = [[] for _ in rows]
        running = set(range(len(rows)))

        def on_token(row: int, token: int) -> None:
            if row not in running:
                return  # it goes on because others of its batch do; what it writes now must not count
            new[row].append(token)
            if token in params.stops or len(new[row]) >= params.max_new_tokens or is_done(start + row, new[row]):
                running.discard(row)
                if not running:
                    raise _Enough

        with contextlib.suppress(_Enough):
            self.engine.generate(rows, params, on_token, chunk_size=self.chunk_size)
        return new


class ModelSource:
    """A Hugging Face directory through the reference: row by row, without a KV cache. A measure for small models, and slow."""

    batch_size = 1

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        from trtllm_thoughtx.validate.reference import Reference

        with open_weights(path, allow_nonfinite=True) as source:
            self.max_length = source.config.max_position
        self.text, self.reference = Text.load(path), Reference(path, dtype)

    def logits(self, rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> list[np.ndarray]:
        return [self.reference.run(row, rows=range(first, len(row)))[0] for row, first in zip(rows, firsts, strict=True)]

    def generate(self, rows: Sequence[Sequence[int]], params: GenerationParams, is_done: IsDone) -> list[list[int]]:
        done = []
        for index, row in enumerate(rows):
            sampler, new = Sampler(params, 1, streams=[index], prompts=[row]), list[int]()
            while len(new) < params.max_new_tokens and len(row) + len(new) < self.max_length:
                ids = [*row, *new]
                new.append(int(sampler.pick(self.reference.run(ids, rows=[len(ids) - 1])[0])[0]))
                sampler.note(0, new[-1])
                if new[-1] in params.stops or is_done(index, new):
                    break
            done.append(new)
        return done


# --- what lm-eval asks of a model ----------------------------------------------------------------------------------------


class Scorer:
    """Log-likelihoods and answers of texts. `think_tags`: (start, end) of a thought, None: nothing is cut, "auto": the model's own.

    `num_truncated` counts the requests whose prompt lost its beginning, to fit into the model, as lm-eval does it; `num_alike` those
    that are another one's tokens exactly: choices that the tokenizer cannot tell apart, whose accuracy means nothing.
    """

    def __init__(
        self, source: Source, *, is_chat: bool = False, think_tags: tuple[str, str] | str | None = "auto", max_new_tokens: int = 256
    ) -> None:
        if source.text is None:
            why = "there is no tokenizer.json beside the model"
            raise ThoughtxError(
                "E140",
                "texts need a tokenizer",
                where="the harness",
                why=why,
                fix="copy the model's tokenizer.json into its directory, and build again",
            )
        self.source, self.text, self.is_chat, self.max_new_tokens = source, source.text, is_chat, max_new_tokens
        tags = self.text.think_tags if think_tags == "auto" else think_tags
        self.think_tags = tags if isinstance(tags, tuple) else None
        named = {self.text.decode([i], skip_special=False).strip() for i in self.text.eos_ids} | set(self.text.special.values())
        self._special = sorted(named - {""}, key=len, reverse=True)
        self.num_truncated = self.num_alike = 0
        self.stage: Stage | None = None

    @property
    def prefix_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, or EOS where there is none."""
        found = [i for i in (self.text.bos_id, *self.text.eos_ids) if i is not None]
        if not found:
            why = "an empty prompt needs one of them in its place"
            raise ThoughtxError(
                "E112",
                "neither BOS nor EOS",
                where="the tokenizer",
                why=why,
                fix='name one in the model\'s tokenizer_config.json ("eos_token"), and build again',
            )
        return found[0]

    def encode(self, text: str, add_special: bool | None = None) -> list[int]:
        """Token ids. A rendered chat holds its special tokens already, and so may a text that begins with BOS."""
        if add_special is None:
            bos = self.text.special.get("bos_token")
            add_special = not self.is_chat and not (bos and text.startswith(bos))
        return self.text.encode(text, add_special=add_special)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """(context, continuation) ids -> (sum of log-probabilities in nats, whether greedy decoding would write it)."""
        room = self.source.max_length
        jobs: dict[tuple[tuple[int, ...], int], list[int]] = {}  # choices of one token share a row
        for index, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                why = "the tokenizer drops it, or joins it to the last word before it"
                fix = "use a model whose tokenizer knows the words of this task, or leave out --chat_template if it was given"
                raise ThoughtxError("E140", "a text to be scored has no tokens", where=f"request {index}", why=why, fix=fix)
            if len(continuation) > room:
                raise _too_long(f"a continuation of {len(continuation)} tokens", room)
            whole = (*context, *continuation)[-room - 1 :]
            self.num_truncated += len(context) + len(continuation) > room + 1
            jobs.setdefault((whole[:-1], len(whole) - len(continuation) - 1), []).append(index)
        self.num_alike += len(pairs) - len({(tuple(context), tuple(continuation)) for context, continuation in pairs})
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(jobs, key=lambda job: -len(job[0]))
        for start in range(0, len(order), self.source.batch_size):
            batch = order[start : start + self.source.batch_size]
            for job, logits in zip(batch, self.source.logits([row for row, _ in batch], [first for _, first in batch]), strict=True):
                for index in jobs[job]:
                    scores[index] = _log_likelihood(logits, pairs[index][1])
                self._advance(len(jobs[job]))
        return scores

    def complete(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """(prompt, lm-eval's generation settings) -> the answer: after the thought, up to the first stop string."""
        groups: dict[tuple[GenerationParams, tuple[str, ...]], list[int]] = {}
        for index, (_, settings) in enumerate(requests):
            groups.setdefault(self._settings(settings), []).append(index)
        answers = [""] * len(requests)
        for (params, until), members in groups.items():
            rows = {index: self._prompt(requests[index][0], params.max_new_tokens) for index in members}
            if params.is_greedy:
                members = sorted(members, key=lambda index: -len(rows[index]))
            prompts = [requests[index][0] for index in members]
            is_done = functools.partial(self._is_done, prompts, until)
            step = self.source.batch_size if params.is_greedy else len(members)
            for start in range(0, len(members), step):
                part = members[start : start + step]
                done = self.source.generate([rows[index] for index in part], params, functools.partial(_shifted, is_done, start))
                for index, ids in zip(part, done, strict=True):
                    answers[index] = self.answer(requests[index][0], ids, until)
                self._advance(len(part))
        return answers

    def answer(self, prompt: str, ids: Sequence[int], until: Sequence[str] = ()) -> str:
        """The text of new ids behind the last thought, "" when a thought began and did not end; cut before the first stop string."""
        text = self._after_thought(prompt, ids)
        return text[: min((text.find(stop) for stop in until if stop and stop in text), default=len(text))]

    def _after_thought(self, prompt: str, ids: Sequence[int]) -> str:
        if self.think_tags is None:
            return self.text.decode(ids)
        raw = self.text.decode(ids, skip_special=False)  # the tags may be special tokens
        reasoning, answer = split_text(raw, self.think_tags, is_open=prompt.rstrip().endswith(self.think_tags[0]))
        if reasoning is None:
            return self.text.decode(ids)
        return functools.reduce(lambda rest, token: rest.replace(token, ""), self._special, answer or "").strip()

    def _is_done(self, prompts: Sequence[str], until: Sequence[str], row: int, ids: list[int]) -> bool:
        if not until or len(ids) % LOOK_EVERY:
            return False
        text = self._after_thought(prompts[row], ids)
        return any(stop in text for stop in until if stop)

    def _settings(self, given: dict[str, Any]) -> tuple[GenerationParams, tuple[str, ...]]:
        until = given.get("until") or ()
        temperature = float(given.get("temperature") or (1.0 if given.get("do_sample") else 0.0))
        params = GenerationParams(
            max_new_tokens=int(next((given[name] for name in MAX_NEW if given.get(name) is not None), self.max_new_tokens)),
            temperature=0.0 if given.get("do_sample") is False else temperature,
            top_k=int(given.get("top_k") or 0),
            top_p=float(given.get("top_p") or 1.0),
            seed=int(given.get("seed") or 0),
            repetition_penalty=float(given.get("repetition_penalty") or self.text.default_params().repetition_penalty),
            stop_ids=self.text.eos_ids,
        )
        return params, (until,) if isinstance(until, str) else tuple(until)

    def _prompt(self, prompt: str, num_new: int) -> list[int]:
        room = self.source.max_length - num_new
        if room < 1:
            raise _too_long(f"{num_new} new tokens and a prompt", self.source.max_length)
        ids = self.encode(prompt) or [self.prefix_id]
        self.num_truncated += len(ids) > room
        return ids[-room:]

    def _advance(self, num: int) -> None:
        if self.stage is not None:
            self.stage.advance(num)


def _shifted(is_done: IsDone, start: int, row: int, ids: list[int]) -> bool:
    return is_done(start + row, ids)


def _log_likelihood(logits: np.ndarray, ids: Sequence[int]) -> tuple[float, bool]:
    """Of `ids` under float [len(ids), vocab]. E123 when a logit is not finite."""
    values = np.asarray(logits, np.float64)
    if not np.isfinite(values).all():
        why = "the numbers left the range of the engine's type, or the weights are damaged"
        fix = "build the engine with more range (thoughtx-build --dtype float32) and compare it with its checkpoint (thoughtx-validate)"
        raise ThoughtxError("E123", "logits are not finite", where="a text to be scored", why=why, fix=fix)
    log_probs = log_softmax(values)[np.arange(len(ids)), list(ids)]
    return float(log_probs.sum()), bool((values.argmax(axis=1) == np.array(ids)).all())


def _too_long(what: str, room: int) -> ThoughtxError:
    fix = "ask for fewer new tokens, or build an engine with more room: thoughtx-build --max_seq_len"
    return ThoughtxError("E122", f"{what} do not fit", where="the harness", why=f"the model takes {room} tokens in all", fix=fix)
