"""Layer exit: the first stages draft tokens, the others check all of them in one pass. What is written is what the whole model writes.

A cycle begins with one written token per row that no layer has seen:

    draft    the first stages read it; their exit adapter drafts the next token, they read that one, and so on, as long as the adapter
             is confident that all of them hold (its threshold is the break-even of a draft) and there is room
    check    the other stages and the head read all these tokens at once: their KV is computed, never invented
    write    the sampler picks from the checked logits, token by token; what differs from the draft ends the row's cycle, and the tokens
             behind it are taken back from the cache

Drafts are guessed with the random number that the sampler will use for that very token (common random numbers), so `verify` is lossless
under sampling in the strict sense: the same seed gives the same tokens as `off`, and a draft holds whenever both pick the same.
`trust` writes confident drafts as they are; the check then only catches up their KV.

A bounded cache takes back tokens of the current chunk alone, and one call writes equally far in each row: no row drafts beyond the end
of the chunk that any row is in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trtllm_thoughtx.config import EXIT_POLICIES
from trtllm_thoughtx.errors import ThoughtxError

if TYPE_CHECKING:
    from trtllm_thoughtx.runtime.batch import Batch
    from trtllm_thoughtx.runtime.engine import Engine

OFF, VERIFY, TRUST, _ = EXIT_POLICIES
MAX_DRAFTS = 6  # of one cycle
TRUSTED = 0.9  # confidence that `trust` asks for unless told otherwise
NUM_TRIED = 12  # cycles of each kind that `auto` times before it decides, and then now and again ...
NUM_AT_ONCE = 4  # ... in turns, so many at a time
TRY_AGAIN = 400  # cycles

Guess = Callable[[int, Sequence[int], np.ndarray], int]  # (row, its drafts so far, logits [V]) -> token


@dataclass
class Pace:
    """Seconds and tokens of cycles with and without drafts, for one batch size: what `auto` goes by.

    Tokens are those of a row that goes on, since a cycle takes about as long however many rows have ended.
    """

    seconds: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    num_tokens: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    num_cycles: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def pays(self) -> bool:
        """Whether drafts write more tokens in a second; both are tried first."""
        if min(self.num_cycles.values()) < NUM_TRIED:
            return self.num_cycles[True] // NUM_AT_ONCE <= self.num_cycles[False] // NUM_AT_ONCE
        if sum(self.num_cycles.values()) > TRY_AGAIN:
            for counts in (self.seconds, self.num_tokens, self.num_cycles):
                counts.update({True: 0, False: 0})
            return True
        rates = {drafts: self.num_tokens[drafts] / max(self.seconds[drafts], 1e-9) for drafts in (True, False)}
        return rates[True] > rates[False]

    def note(self, drafts: bool, seconds: float, num_tokens: float) -> None:
        self.seconds[drafts] += seconds
        self.num_tokens[drafts] += num_tokens
        self.num_cycles[drafts] += 1


def check_policy(engine: Engine, policy: str) -> None:
    """E122 when the policy needs drafts and the engine has none. `auto` then is `off`."""
    if policy in (VERIFY, TRUST) and not engine.build.draft_layers:
        why = "no stage of it ends at a layer for which its checkpoint carries an exit adapter"
        fix = "fit an adapter (thoughtx-calibrate --exit_layers N), and build with it: thoughtx-build --early_exit_layers N"
        raise ThoughtxError("E122", f"--exit_policy {policy} needs drafts", where=str(engine.directory.root), why=why, fix=fix)


class Drafter:
    """Drafts and checks of one batch. `thresholds`: how confident the drafts of each row must be."""

    def __init__(self, engine: Engine, batch: Batch, thresholds: Sequence[float]) -> None:
        self.engine, self.batch = engine, batch
        self.layer = engine.build.draft_layers[0]
        self.thresholds = list(thresholds)
        self.num_first = engine.build.stages.index(self.layer) + 1  # parts that draft
        self.num_parts = len(engine.directory.parts)

    def cycle(
        self, new: Sequence[Sequence[int]], most: Sequence[int], guess: Guess
    ) -> tuple[list[list[int]], np.ndarray, np.ndarray | None]:
        """Feed one token to each row that has one, and drafts behind it, at most `most` of them.

        Returns the drafts of each row; logits float32 [B, W, V], of a row with d drafts its first d + 1, behind each token; and the exit
        head's [B, W, 2], if there is one. The batch then holds all drafts.
        """
        engine, batch = self.engine, self.batch
        engine.keep(batch, new)
        is_live = [bool(row) for row in new]
        bases = [len(tokens) for tokens in batch.tokens]  # without the new token
        width = self._width(bases, is_live)
        room = [min(number, width - 1) if live else 0 for number, live in zip(most, is_live, strict=True)]
        drafts: list[list[int]] = [[] for _ in new]
        states: list[np.ndarray] = []
        feeding = [list(row) for row in new]
        hope = np.ones(len(new))  # probability that all drafts so far hold: one behind a wrong one is worth nothing
        while any(feeding):
            feeds = batch.feed(feeding, [[0]] * len(new))
            out = engine.run_parts(batch, feeds, 0, self.num_first, [len(row) for row in feeding], [0] * len(new))
            states.append(out["hidden_states_out"][:, -1])
            hope *= out["draft_confidence"][:, -1]
            goes_on = [
                bool(fed) and bool(hope[row] >= self.thresholds[row]) and len(drafts[row]) < room[row] for row, fed in enumerate(feeding)
            ]
            feeding = [[] for _ in new]
            if any(goes_on):
                rows = np.zeros((len(new), 1), np.int64)
                asked = {"hidden_states": out["draft_states"][:, -1:], "logit_indices": rows}
                none, one = [0] * len(new), [int(row) for row in goes_on]
                logits = engine.run_parts(batch, asked, self.num_parts - 1, self.num_parts, none, one)["logits"][:, 0]
                for row in np.flatnonzero(goes_on).tolist():
                    token = guess(row, drafts[row], logits[row])
                    drafts[row].append(token)
                    feeding[row] = [token]
        counts = [1 + len(row) if live else 0 for row, live in zip(drafts, is_live, strict=True)]
        feeds = batch.refeed(counts)
        num = feeds["logit_indices"].shape[1]
        hidden = np.stack([states[min(i, len(states) - 1)] for i in range(num)], axis=1)
        for row, count in enumerate(counts):
            hidden[row, count:] = hidden[row, max(count - 1, 0)]  # padding, or a row that has ended
        out = engine.run_parts(batch, {**feeds, "hidden_states": hidden}, self.num_first, self.num_parts, counts, counts)
        engine.stats.num_cycles += 1
        engine.stats.num_drafted += sum(map(len, drafts))
        return drafts, out["logits"], out.get("exit")

    def _width(self, bases: Sequence[int], is_live: Sequence[bool]) -> int:
        """Tokens that the check can take of each row: what is written lies within every row's section."""
        limits = [self.engine.build.max_piece, self.engine.runner.max_logit_rows]
        for row, (base, live) in enumerate(zip(bases, is_live, strict=True)):
            first, end = self.batch.section(row, base if live else max(base - 1, 0))
            limits.append(end - base if live else end - first)
        return max(1, min(limits))


class Timer:
    """Times cycles for `auto`."""

    def __init__(self, pace: Pace | None) -> None:
        self.pace, self.drafts, self.began, self.before, self.num_rows = pace, True, 0.0, 0, 1

    def start(self, num_tokens: int, num_rows: int) -> bool:
        """A cycle of `num_rows` rows begins, with so many tokens written; whether it is to draft."""
        now = time.perf_counter()
        if self.pace is None:
            return True
        if self.began:
            self.pace.note(self.drafts, now - self.began, (num_tokens - self.before) / self.num_rows)
        self.drafts, self.began, self.before, self.num_rows = self.pace.pays(), now, num_tokens, num_rows
        return self.drafts
