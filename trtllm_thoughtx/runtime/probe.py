"""Answer probing at the end of a reasoning step: is the answer known already?

The end tag is fed, the likeliest answer is read for a few tokens, and everything is taken back from the KV cache. The thinking may end
when the probe answer is confident (geometric mean of its tokens' probabilities, as DEER has it, arXiv 2504.15895) and the last few agree
(as Dynasor has it, arXiv 2412.20993). An answer that only says that it is not known never counts.

A cache that is bounded forgets what it overwrites, so a probe must fit into the chunk that is being written; one that does not is left
out and counted. All tokens of probes are work (`Work`, `Completion.num_layer_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
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


def room(batch: Batch) -> int:
    """How many tokens can be fed to the one row and taken back again."""
    length = len(batch.tokens[0])
    return batch.section(0, length - 1)[1] - length


def ask(session: Session, batch: Batch, closing: Sequence[int], num_tokens: int, stops: frozenset[int]) -> tuple[tuple[int, ...], float]:
    """The likeliest answer of the one row behind `closing`, the ids that end its thinking: at most `num_tokens` ids, and the geometric
    mean of their probabilities, in [0, 1]. There must be `room` for both."""
    length, pending = len(batch.tokens[0]), list(closing)
    answer: list[int] = []
    logs: list[float] = []
    while True:
        logits = session.extend(batch, pending)
        token = int(logits.argmax())
        logs.append(log_probability(logits, token))
        if token not in stops:
            answer.append(token)
        if token in stops or len(answer) == num_tokens:
            break
        pending = [token]
    batch.forget(0, length)
    return tuple(answer), float(np.exp(np.mean(logs)))
