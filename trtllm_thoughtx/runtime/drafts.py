"""Self-speculative decoding: the first stages draft tokens, the other stages verify all of them in one pass. Under `verify` the output is
that of the whole model.

A cycle begins with one written token that no layer has seen:

    draft    the first stages read it; their exit adapter drafts the next token, they read that one, and so on, as long as the adapter
             is confident that all of them hold (its threshold is the break-even of a draft) and there is room
    verify   the other stages and the head read all these tokens at once: their KV is computed, never invented
    accept   the sampler picks from the verified logits, token by token; the first that differs from its draft ends the cycle, and the
             drafts behind it are taken back from the cache

Drafts are guessed with the random number that the sampler will use for that very token (common random numbers), so `verify` is lossless
under sampling in the strict sense: the same seed gives the same tokens as `off`, and a draft is accepted whenever both pick the same.
`trust` accepts confident drafts as they are; the verification pass then only catches up their KV.

A bounded cache takes back tokens of the current chunk alone: no draft stands beyond its end. Drafts are for a row that is alone: where
several share a call, reading the weights of the other stages is shared already, and verifying drafts costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trtllm_thoughtx.config import EXIT_POLICIES
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.batch import Batch
from trtllm_thoughtx.runtime.session import Session

OFF, VERIFY, TRUST, _ = EXIT_POLICIES
MAX_DRAFTS = 6  # of one cycle
TRUSTED = 0.9  # confidence that `trust` asks for unless told otherwise

Guess = Callable[[Sequence[int], np.ndarray], int]  # (the drafts so far, logits [V]) -> token
Offer = tuple[list[int], np.ndarray, np.ndarray]  # drafts, logits [1 + drafts, V] and exit probabilities [1 + drafts, 2] behind each token


def check_policy(session: Session, policy: str) -> None:
    """E122 when the policy needs drafts and the engine has none. `auto` then is `off`."""
    if policy in (VERIFY, TRUST) and not session.build.draft_layers:
        why = "no stage of it ends at a layer for which its checkpoint carries an exit adapter"
        fix = "fit an adapter (thoughtx-calibrate --exit_layers N), and build with it: thoughtx-build --early_exit_layers N"
        raise ThoughtxError("E122", f"--exit_policy {policy} needs drafts", where=str(session.directory.root), why=why, fix=fix)


def room(session: Session, batch: Batch) -> int:
    """Tokens that one call can write behind those of the one row, and take back."""
    length = len(batch.tokens[0])
    return min(session.build.max_segment, session.runner.max_logit_rows, batch.section(0, length)[1] - length)


def verified(session: Session, batch: Batch, token: int, drafts: list[int]) -> Offer:
    """Feed one row the token and `drafts`, which came for nothing, through the whole model."""
    num = 1 + len(drafts)
    logits, exit_probs = session.call(batch, [[token, *drafts]], [list(range(num))])
    session.stats.num_cycles += 1
    session.stats.num_drafted += len(drafts)
    return drafts, logits[0], exit_probs[0]


class Drafter:
    """Drafts and verifies for one row at a time."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.layer = session.build.draft_layers[0]
        self.num_first = session.build.stages.index(self.layer) + 1  # parts that draft
        self.num_parts = len(session.directory.parts)

    def cycle(self, batch: Batch, token: int, most: int, threshold: float, guess: Guess) -> Offer:
        """Feed the one row a token, and at most `most` drafts behind it, which it then holds. `threshold`: how confident they must be."""
        self.session.upkeep(batch, [[token]])
        drafts, states = self._draft(batch, token, min(most, room(self.session, batch) - 1), threshold, guess)
        num = 1 + len(drafts)
        feeds = {**batch.refeed(num), "hidden_states": np.stack(states, axis=1)}
        out = self.session.run_parts(batch, feeds, self.num_first, self.num_parts, [num], [num])
        self.session.stats.num_cycles += 1
        self.session.stats.num_drafted += len(drafts)
        return drafts, out["logits"][0], out["exit"][0] if "exit" in out else np.zeros((num, 2), np.float32)

    def _draft(self, batch: Batch, token: int, most: int, threshold: float, guess: Guess) -> tuple[list[int], list[np.ndarray]]:
        """The drafts, and the first stages' hidden states [1, H] of each token in turn."""
        session, drafts, states = self.session, list[int](), list[np.ndarray]()
        confidence = 1.0  # that all drafts so far hold: one behind a wrong one is worth nothing
        while True:
            out = session.run_parts(batch, batch.feed([[token]], [[0]]), 0, self.num_first, [1], [0])
            states.append(out["hidden_states_out"][:, -1])
            confidence *= float(out["draft_confidence"][0, -1])
            if confidence < threshold or len(drafts) >= most:
                return drafts, states
            feeds = {"hidden_states": out["draft_states"][:, -1:], "logit_indices": np.zeros((1, 1), np.int64)}
            logits = session.run_parts(batch, feeds, self.num_parts - 1, self.num_parts, [0], [1])["logits"]
            token = guess(drafts, logits[0, 0])
            drafts.append(token)
