"""Self-speculative decoding: the first stages draft tokens, the other stages verify all of them in one pass. Under `verify` the output is
that of the whole model.

A cycle begins with one written token per row that no layer has seen:

    draft    the first stages read it; their exit adapter drafts the next token, they read that one, and so on, as long as the adapter
             is confident that all of them hold (its threshold is the break-even of a draft) and there is room
    verify   the other stages and the head read all these tokens at once: their KV is computed, never invented
    accept   the sampler picks from the verified logits, token by token; the first that differs from its draft ends the row's cycle, and
             the drafts behind it are taken back from the cache

Drafts are guessed with the random number that the sampler will use for that very token (common random numbers), so `verify` is lossless
under sampling in the strict sense: the same seed gives the same tokens as `off`, and a draft is accepted whenever both pick the same.
`trust` accepts confident drafts as they are; the verification pass then only catches up their KV.

A bounded cache takes back tokens of the current chunk alone, and one call writes equally far in each row: no row drafts beyond the end
of the chunk that any row is in.
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

Guess = Callable[[int, Sequence[int], np.ndarray], int]  # (row, its drafts so far, logits [V]) -> token


def check_policy(session: Session, policy: str) -> None:
    """E122 when the policy needs drafts and the engine has none. `auto` then is `off`."""
    if policy in (VERIFY, TRUST) and not session.build.draft_layers:
        why = "no stage of it ends at a layer for which its checkpoint carries an exit adapter"
        fix = "fit an adapter (thoughtx-calibrate --exit_layers N), and build with it: thoughtx-build --early_exit_layers N"
        raise ThoughtxError("E122", f"--exit_policy {policy} needs drafts", where=str(session.directory.root), why=why, fix=fix)


class Drafter:
    """Drafts and verifies for one batch. `thresholds`: how confident the drafts of each row must be."""

    def __init__(self, session: Session, batch: Batch, thresholds: Sequence[float]) -> None:
        self.session, self.batch = session, batch
        self.layer = session.build.draft_layers[0]
        self.thresholds = list(thresholds)
        self.num_first = session.build.stages.index(self.layer) + 1  # parts that draft
        self.num_parts = len(session.directory.parts)

    def cycle(self, new: Sequence[Sequence[int]], most: Sequence[int], guess: Guess) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
        """Feed one token to each row that has one, and drafts behind it, at most `most` of them.

        Returns the drafts of each row; logits float32 [B, W, V], of a row with d drafts its first d + 1, behind each token; and what an
        exit head says there, [B, W, 2], zeros without one. The batch then holds all drafts.
        """
        self.session.upkeep(self.batch, new)
        drafts, states = self._draft(new, most, guess)
        counts = [1 + len(drafted) if fed else 0 for drafted, fed in zip(drafts, new, strict=True)]
        out = self._verify(states, counts)
        self.session.stats.num_cycles += 1
        self.session.stats.num_drafted += sum(map(len, drafts))
        logits = out["logits"]
        return drafts, logits, out.get("exit", np.zeros((*logits.shape[:2], 2), np.float32))

    def _draft(self, new: Sequence[Sequence[int]], most: Sequence[int], guess: Guess) -> tuple[list[list[int]], list[np.ndarray]]:
        """The drafts of each row, and the first stages' hidden states [B, H] of each token in turn."""
        session, batch = self.session, self.batch
        width = self._width(new)
        room = [min(number, width - 1) if fed else 0 for number, fed in zip(most, new, strict=True)]
        drafts: list[list[int]] = [[] for _ in new]
        states: list[np.ndarray] = []
        feeding, none = [list(row) for row in new], [0] * len(new)
        confidence = np.ones(len(new))  # that all drafts so far hold: one behind a wrong one is worth nothing
        while any(feeding):
            feeds = batch.feed(feeding, [[0]] * len(new))
            out = session.run_parts(batch, feeds, 0, self.num_first, [len(row) for row in feeding], none)
            states.append(out["hidden_states_out"][:, -1])
            confidence *= out["draft_confidence"][:, -1]
            goes_on = [
                row for row, fed in enumerate(feeding) if fed and confidence[row] >= self.thresholds[row] and len(drafts[row]) < room[row]
            ]
            feeding = [[] for _ in new]
            if goes_on:
                feeds = {"hidden_states": out["draft_states"][:, -1:], "logit_indices": np.zeros((len(new), 1), np.int64)}
                rows = [int(row in goes_on) for row in range(len(new))]
                logits = session.run_parts(batch, feeds, self.num_parts - 1, self.num_parts, none, rows)["logits"][:, 0]
                for row in goes_on:
                    feeding[row] = [guess(row, drafts[row], logits[row])]
                    drafts[row] += feeding[row]
        return drafts, states

    def _verify(self, states: Sequence[np.ndarray], counts: Sequence[int]) -> dict[str, np.ndarray]:
        """The other stages and the head read the last `counts` tokens of each row."""
        feeds = self.batch.refeed(counts)
        num = feeds["logit_indices"].shape[1]
        hidden = np.stack([states[min(i, len(states) - 1)] for i in range(num)], axis=1)
        for row, count in enumerate(counts):
            hidden[row, count:] = hidden[row, max(count - 1, 0)]  # padding, or a row that has ended
        return self.session.run_parts(self.batch, {**feeds, "hidden_states": hidden}, self.num_first, self.num_parts, counts, counts)

    def _width(self, new: Sequence[Sequence[int]]) -> int:
        """Tokens of each row that one call can verify: what is written lies within every row's section."""
        limits = [self.session.build.max_segment, self.session.runner.max_logit_rows]
        for row, (history, fed) in enumerate(zip(self.batch.tokens, new, strict=True)):
            base = len(history)
            first, end = self.batch.section(row, base if fed else max(base - 1, 0))
            limits.append(end - base if fed else end - first)
        return max(1, min(limits))
