"""Answer probing at the end of a reasoning step: is the answer known already?

The end tag is fed, the likeliest answer is read for a few tokens, and everything is taken back from the KV cache. The thinking may end
when the probe answer is confident (geometric mean of its tokens' probabilities, as DEER has it, arXiv 2504.15895) and the last few agree
(as Dynasor has it, arXiv 2412.20993). An answer that only says that it is not known never counts.

A cache that is bounded forgets what it overwrites, so a probe must fit into the chunk that is being written; one that does not is left
out and counted. All tokens of probes are work (`Work`, `Completion.num_layer_tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.batch import Batch
from trtllm_thoughtx.runtime.logits import log_probability
from trtllm_thoughtx.runtime.session import Session

UNKNOWN = ("?", "")  # answers that say nothing is known yet


@dataclass
class ProbeAnswers:
    """The probe answers of one row. `num_skipped` probes did not fit."""

    num_done: int = 0
    num_skipped: int = 0
    agreeing: list[tuple[int, ...]] = field(default_factory=list)

    def settles(self, answer: tuple[int, ...], confidence: float, text: str, *, threshold: float, num_agreeing: int) -> bool:
        """Note an answer, and say whether it and those before it end the thinking."""
        self.num_done += 1
        is_known = confidence >= threshold and text.strip() not in UNKNOWN
        self.agreeing = [*self.agreeing, answer] if is_known and self.agreeing[-1:] == [answer] else [answer] if is_known else []
        return len(self.agreeing) >= num_agreeing


def check_room(session: Session, num_tokens: int) -> None:
    """E122 when no probe of `num_tokens` tokens, tag included, could ever be taken back."""
    build = session.build
    if build.is_bounded and num_tokens >= build.max_chunk_size:
        why = f"a probe takes {num_tokens} tokens, and the cache can only take back tokens of a chunk of at most {build.max_chunk_size}"
        fix = f"lower --probe_tokens, or build with thoughtx-build --max_chunk_size {num_tokens + 1} or more"
        raise ThoughtxError("E122", "--exit_probe cannot be used", where=str(session.directory.root), why=why, fix=fix)


def room(batch: Batch, row: int) -> int:
    """How many tokens can be fed to a row and taken back again."""
    length = len(batch.tokens[row])
    return batch.section(row, length - 1)[1] - length


def ask(
    session: Session, batch: Batch, closings: Mapping[int, Sequence[int]], num_tokens: int, stops: frozenset[int]
) -> dict[int, tuple[tuple[int, ...], float]]:
    """Row -> its likeliest answer, at most `num_tokens` ids, and the geometric mean of their probabilities, in [0, 1].

    `closings`: the ids that end the thinking of the rows that are probed; there must be `room` for them and the answer.
    """
    lengths = {row: len(batch.tokens[row]) for row in closings}
    pending = [list(closings.get(row, ())) for row in range(len(batch.tokens))]
    answers: dict[int, list[int]] = {row: [] for row in closings}
    logs: dict[int, list[float]] = {row: [] for row in closings}
    going = set(closings)
    while going:
        logits = session.extend(batch, pending)
        pending = [[] for _ in batch.tokens]
        for row in sorted(going):
            token = int(logits[row].argmax())
            logs[row].append(log_probability(logits[row], token))
            if token not in stops:
                answers[row].append(token)
            if token in stops or len(answers[row]) == num_tokens:
                going.discard(row)
            else:
                pending[row] = [token]
    for row, length in lengths.items():
        batch.forget(row, length)
    return {row: (tuple(answers[row]), float(np.exp(np.mean(logs[row])))) for row in closings}
