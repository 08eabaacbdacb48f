"""Rows of generated tasks for training: which items, how long, with how much redundancy, in batches of equal cost.

Batch `i` of a `Mixture` depends on the seed and `i` alone, so a run that was killed goes on with the batches that it has not
seen. Batches come in pools: the rows of a pool are sorted by length and parted where the padded tokens are equal.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from trtllm_thoughtx.distill import vocabulary
from trtllm_thoughtx.tasks import draw, item, lookup
from trtllm_thoughtx.tasks.item import Item

IGNORED = -100  # label of a token without loss, as in torch
BATCHES_A_POOL = 16
LONGEST_CONTEXT = 1100  # words
CUT_SHARE = 0.25
TASK_SHARES = {"chain": 0.34, "lookup": 0.34, "story": 0.18, "loan": 0.14}
CHAIN_SIZES = (*range(1, 9), *range(5, 13), 9, 10, 11, 12, 13, 14)
Redundancy = Literal["varied", "full"]


@dataclass(frozen=True)
class Row:
    """Token ids, and for each the id itself where a loss is wanted, else `IGNORED`."""

    ids: list[int]
    labels: list[int]


def num_rechecks(made: Item, redundancy: Redundancy, rng: random.Random) -> int:
    """`varied`: none to three; `full`: 40 to 50 % of all steps, as in traces of R1."""
    num = len(made.steps)
    if redundancy == "full":
        return rng.randint(-(-2 * num // 3), num)
    return min(num, rng.choice((0, 0, 1, 2, 3)))


def completion(made: Item, redundancy: Redundancy, rng: random.Random) -> tuple[str, str]:
    """The text without a loss and the text with one. A thought that was cut teaches the answer alone, not the cut."""
    steps = [*made.steps, *made.rechecks(num_rechecks(made, redundancy, rng))]
    if rng.random() >= CUT_SHARE:
        return "", f"{item.thought(steps)} {vocabulary.END_THINK} {made.answer} {vocabulary.EOS}"
    kept = rng.randint(0, len(steps))
    return f"{item.thought(steps[:kept])} {vocabulary.END_THINK}", f"{made.answer_after(kept)} {vocabulary.EOS}"


def turn(made_prompt: str, made: Item, redundancy: Redundancy, rng: random.Random) -> list[tuple[str, bool]]:
    given, learned = completion(made, redundancy, rng)
    return [(f"{vocabulary.QUESTION} {made_prompt} {vocabulary.THINK} {given}", False), (learned, True)]


def lookup_turns(rng: random.Random, num_words: int, num_facts: int, num_turns: int, redundancy: Redundancy) -> list[tuple[str, bool]]:
    """Several questions about one context."""
    size = rng.randint(1, 4)
    made = draw("lookup", "train", size=size, seed=rng.getrandbits(48), num_facts=max(num_facts, size + 1), num_words=num_words)
    turns = turn(made.prompt, made, redundancy, rng)
    words = made.prompt.split()
    facts = {words[i - 1]: words[i + 1] for i, word in enumerate(words) if word == ">"}
    for _ in range(num_turns - 1):
        start = rng.choice([key for key in facts if facts[key] in facts] or [words[-2]])
        reach, here = 1, start
        while facts[here] in facts and reach < 4:
            here, reach = facts[here], reach + 1
        hops = rng.randint(1, reach)
        steps, answer = lookup.follow(facts, start, hops)
        asked = Item("lookup", lookup.question(start, hops), steps, answer, 0 if hops == 1 else hops, hops)
        turns += turn(asked.prompt, asked, redundancy, rng)
    return turns


@dataclass(frozen=True)
class Mixture:
    """`tokens_a_batch` counts padding; `longest` is how many words a context has at most, as a function of progress in [0, 1]."""

    tokenizer: Tokenizer
    seed: int
    num_batches: int
    tokens_a_batch: int
    redundancy: Redundancy = "varied"
    easy_until: float = 0.06
    short_until: float = 0.4
    long_share: float = 0.12
    full_from: float = 0.8
    from_length: int = 128

    def row(self, rng: random.Random, progress: float) -> Row:
        task = rng.choices(list(TASK_SHARES), list(TASK_SHARES.values()))[0]
        if task == "lookup":
            longest = self.longest(progress)
            if longest and rng.random() < self.long_share:
                num_words = round(longest * rng.uniform(0.25, 1.0))
                parts = lookup_turns(rng, num_words, rng.randint(6, 40), rng.randint(4, 8), self.redundancy)
            else:
                parts = lookup_turns(rng, rng.choice((0, 0, 0, 64)), rng.randint(2, 14), rng.randint(1, 4), self.redundancy)
        else:
            size = rng.choice(CHAIN_SIZES) if task == "chain" else rng.randint(1, 4)
            if progress < self.easy_until:
                size = min(size, rng.randint(1, 4))
            made = draw(task, "train", size=size, seed=rng.getrandbits(48))
            parts = turn(made.prompt, made, self.redundancy, rng)
        ids: list[int] = []
        labels: list[int] = []
        for text, learned in parts:
            new = self.tokenizer.encode(text).ids
            ids += new
            labels += new if learned else [IGNORED] * len(new)
        return Row(ids, labels)

    def longest(self, progress: float) -> int:
        """Words of the longest context: none before `short_until`, then doubling at even intervals until `full_from`."""
        if progress < self.short_until:
            return 0
        part = min(1.0, (progress - self.short_until) / max(self.full_from - self.short_until, 1e-9))
        return min(LONGEST_CONTEXT, round(self.from_length * (LONGEST_CONTEXT / self.from_length) ** part))

    def pool(self, index: int) -> list[list[Row]]:
        rng = random.Random(f"{self.seed} {index}")
        progress = index * BATCHES_A_POOL / self.num_batches
        rows: list[Row] = []
        wanted = BATCHES_A_POOL * self.tokens_a_batch
        while wanted > 0:
            rows.append(self.row(rng, progress))
            wanted -= len(rows[-1].ids)
        rows.sort(key=lambda row: len(row.ids))
        total = sum(len(row.ids) for row in rows)
        batches: list[list[Row]] = [[] for _ in range(BATCHES_A_POOL)]
        seen = 0
        for row in rows:
            batches[min(BATCHES_A_POOL - 1, (seen + len(row.ids) // 2) * BATCHES_A_POOL // total)].append(row)
            seen += len(row.ids)
        batches = [batch for batch in batches if batch]
        while len(batches) < BATCHES_A_POOL:
            batches.append(batches[rng.randrange(len(batches))])
        rng.shuffle(batches)
        return batches


def collate(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """ids and labels, both int64 [B, T], padded on the right: under a causal mask that needs no attention mask."""
    width = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), width), np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], labels[i, : len(row.ids)] = row.ids, row.labels
    return ids, labels
