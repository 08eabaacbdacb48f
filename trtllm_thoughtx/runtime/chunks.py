"""How large a request's chunks are: as it asks, or from how unsure the model is of the prompt.

    prompt entropy = mean over the prompt of H(next token), in nats
    prompt entropy < threshold_low  the answer is given in a single step, without a chain of thought
    otherwise                       chunk_size = base_size * prompt entropy, rounded to a multiple of 16, from 16 to max_chunk_size

The entropy comes from the prefill itself. The largest chunk that the engine takes is read first, at most; as far as the chosen
chunk reaches, these tokens saw what it shows them, so only those behind it are fed once more. At most `NUM_ROWS` positions of a
call are projected to logits, evenly spaced, and each call counts by its tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from trtllm_thoughtx.config import AUTO, CHUNK_STEP, BuildConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.batch import Batch
from trtllm_thoughtx.runtime.logits import entropy
from trtllm_thoughtx.runtime.session import Session

NUM_ROWS = 32


@dataclass(frozen=True)
class Choice:
    """What was chosen for one request. `prompt_entropy` in nats; None when the chunk size was given."""

    chunk_size: int
    prompt_entropy: float | None = None
    single_step: bool = False


def check(session: Session, chunk_size: int | str | None) -> None:
    """E122 for one that this engine cannot follow, or choose."""
    if is_chosen(session.build, chunk_size) and not session.build.base_size:
        why = "the engine was built without tokens of chunk per nat (thoughtx-build --base_size), so it cannot choose"
        fix = "name a chunk size, or build with the settings that thoughtx-calibrate --chunk_report writes (build.yaml)"
        raise ThoughtxError("E122", "no chunk size can be chosen", where=str(session.directory.root), why=why, fix=fix)
    session.check_chunk_size(chunk_size)


def is_chosen(build: BuildConfig, chunk_size: int | str | None) -> bool:
    """Whether it comes from the prompt."""
    return chunk_size == AUTO or (chunk_size is None and build.adaptive_chunks)


def read(session: Session, batch: Batch, prompt: Sequence[int], most: int) -> Generator[None, None, Choice]:
    """Choose the chunks of the one row, which is empty. It holds the beginning of the prompt then, as far as that is of use, and at
    least one token is left to be fed. Stops between two calls of the model; a call takes at most `most` tokens."""
    nats = yield from _first_chunk_entropy(session, batch, prompt, most)
    choice, num_fed = choose(nats, session.build), len(batch.tokens[0])
    assert batch.chunk_size is not None
    batch.chunk_size[0] = choice.chunk_size
    kept = min(len(prompt) - 1, choice.chunk_size, num_fed)
    session.stats.num_read_again += num_fed - kept
    batch.forget(0, kept)
    yield
    return choice


def prompt_entropies(session: Session, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Of any number of prompts, in nats."""
    found = []
    for prompt in prompts:
        steps = _first_chunk_entropy(session, session.start([prompt], None), prompt, session.build.max_input_len)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found.append(end.value)
                break
    return found


def _first_chunk_entropy(session: Session, batch: Batch, prompt: Sequence[int], most: int) -> Generator[None, None, float]:
    """Feed the largest chunk that the engine takes, at most; the mean entropy, in nats, of what the model expects after its tokens."""
    head, total = list(prompt[: session.build.max_chunk_size or None]), 0.0
    if batch.chunk_size is not None:
        batch.chunk_size[0] = session.build.max_chunk_size
    rows = min(NUM_ROWS, session.runner.max_logit_rows)
    while rest := head[len(batch.tokens[0]) :]:
        if batch.tokens[0]:
            yield
        num = batch.segment(len(rest), most)
        total += num * float(entropy(session.step(batch, [rest[:num]], [spread(num, min(rows, num))])[0]).mean())
    return total / len(head)


def choose(prompt_entropy: float, build: BuildConfig) -> Choice:
    """The rule at the top of this file, with the engine's thresholds."""
    size = CHUNK_STEP * round(build.base_size * prompt_entropy / CHUNK_STEP)
    return Choice(min(max(CHUNK_STEP, size), build.max_chunk_size), prompt_entropy, prompt_entropy < build.threshold_low)


def spread(num_tokens: int, num_rows: int) -> list[int]:
    """`num_rows` of the places 0 .. num_tokens - 1, evenly spaced, the last one among them; with repeats where there are fewer."""
    return [max(0, (i + 1) * num_tokens // num_rows - 1) for i in range(num_rows)]
