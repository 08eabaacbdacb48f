"""How large a request's chunks are: as it asks, or from how unsure the model is of the prompt.

    prompt entropy = mean over the prompt of H(next token), in nats
    prompt entropy < threshold_low  the answer is given in a single step, without a chain of thought
    otherwise                       chunk_size = base_size * prompt entropy, rounded to a multiple of 16, from 16 to max_chunk_size

The entropy comes from the prefill itself. The largest chunk that the engine takes is read first, at most; as far as the chosen
chunk reaches, these tokens saw what it shows them, so only those behind it are fed once more. At most `NUM_ROWS` positions of a
call are projected to logits, evenly spaced, and each call counts by its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


def start(session: Session, prompts: Sequence[Sequence[int]], chunk_size: int | str | None) -> tuple[Batch, Sequence[Choice | None]]:
    """A batch, and the chunks of each of its rows (None: full attention). Rows whose chunks were chosen are fed in part."""
    build = session.build
    if chunk_size != AUTO and (chunk_size is not None or not build.adaptive_chunks):
        assert not isinstance(chunk_size, str)
        batch = session.start(prompts, chunk_size)
        return batch, [None] * len(prompts) if batch.chunk_size is None else [Choice(int(size)) for size in batch.chunk_size]
    if not build.base_size:
        why = "the engine was built without tokens of chunk per nat (thoughtx-build --base_size), so it cannot choose"
        fix = "name a chunk size, or build with the settings that thoughtx-calibrate --chunk_report writes (build.yaml)"
        raise ThoughtxError("E122", "no chunk size can be chosen", where=str(session.directory.root), why=why, fix=fix)
    batch = session.start(prompts, build.max_chunk_size)
    assert batch.chunk_size is not None
    choices = [choose(nats, build) for nats in _first_chunk_entropy(session, batch, prompts)]
    for row, choice in enumerate(choices):
        num_fed = len(batch.tokens[row])
        kept = min(len(prompts[row]) - 1, choice.chunk_size, num_fed)
        session.stats.num_read_again += num_fed - kept
        batch.chunk_size[row] = choice.chunk_size
        batch.forget(row, kept)
    return batch, choices


def prompt_entropies(session: Session, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Of any number of prompts, in nats."""
    size, found = session.build.max_batch_size, []
    for first in range(0, len(prompts), size):
        rows = prompts[first : first + size]
        found += _first_chunk_entropy(session, session.start(rows, session.build.max_chunk_size or None), rows)
    return found


def _first_chunk_entropy(session: Session, batch: Batch, rows: Sequence[Sequence[int]]) -> list[float]:
    """Feed the first chunk of each row at most; the mean entropy, in nats, of what the model expects after its tokens."""
    heads = [list(row[: session.build.max_chunk_size or None]) for row in rows]
    most, sums = min(NUM_ROWS, session.runner.max_logit_rows), [0.0] * len(rows)
    for new in batch.segments(heads, session.build.max_input_len):
        places = [spread(max(1, len(extra)), min(most, max(map(len, new)))) for extra in new]
        nats = entropy(session.step(batch, new, places))
        for row, extra in enumerate(new):
            if extra:
                sums[row] += len(extra) * float(nats[row, np.unique(places[row], return_index=True)[1]].mean())
    return [total / len(head) for total, head in zip(sums, heads, strict=True)]


def choose(prompt_entropy: float, build: BuildConfig) -> Choice:
    """The rule at the top of this file, with the engine's thresholds."""
    size = CHUNK_STEP * round(build.base_size * prompt_entropy / CHUNK_STEP)
    return Choice(min(max(CHUNK_STEP, size), build.max_chunk_size), prompt_entropy, prompt_entropy < build.threshold_low)


def spread(num_tokens: int, num_rows: int) -> list[int]:
    """`num_rows` of the places 0 .. num_tokens - 1, evenly spaced, the last one among them; with repeats where there are fewer."""
    return [max(0, (i + 1) * num_tokens // num_rows - 1) for i in range(num_rows)]
