"""Rows of generated tasks for training: which items, how long, with how much redundancy, in batches of equal cost.

Batch `i` of a `Mixture` depends on the seed and `i` alone, so a run that was killed goes on with the batches that it has not
seen. Batches come in pools: the rows of a pool are sorted by length and parted where the padded tokens are equal.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from trtllm_thoughtx.distill import vocabulary
from trtllm_thoughtx.distill.rows import ANSWER, GIVEN, Encoder, Row
from trtllm_thoughtx.tasks import draw, item, lookup
from trtllm_thoughtx.tasks.item import Item

BATCHES_A_POOL = 16
LONGEST_CONTEXT = 1100  # words
CUT_FRACTION = 0.25
TASK_WEIGHTS = {"chain": 0.18, "lookup": 0.40, "story": 0.28, "loan": 0.14}
MOST_FACTS = 14  # of a context that is not stretched
CHAIN_SIZES = (*range(1, 9), *range(5, 13), 9, 10, 11, 12, 13, 14)
SIZES = (1, 2, 3, 3, 4, 4)  # of all other tasks: what is harder comes more often


def num_rechecks(made: Item, reasoning_steps: str, rng: random.Random) -> int:
    """`auto` none, `varied` none to three, `full` 40 to 50 % of all steps, as in traces of R1."""
    num = len(made.steps)
    if reasoning_steps == "full":
        return rng.randint(-(-2 * num // 3), num)
    return 0 if reasoning_steps == "auto" else min(num, rng.choice((0, 0, 1, 2, 3)))


def add_turn(row: Row, encode: Encoder, made: Item, reasoning_steps: str, rng: random.Random) -> None:
    """Question and completion. A thought that is cut teaches the answer alone, not to cut."""
    row.add(encode(f"{vocabulary.QUESTION} {made.prompt} {vocabulary.THINK}"), GIVEN)
    steps = [*made.steps, *made.rechecks(num_rechecks(made, reasoning_steps, rng))]
    answer = made.answer
    if rng.random() < CUT_FRACTION:
        kept = rng.randint(0, len(steps))
        answer = made.answer_after(kept)
        row.add(encode(f"{item.thought(steps[:kept])} {vocabulary.END_THINK}"), GIVEN)
    else:
        row.add_thought([encode(item.thought([step])) for step in steps], encode(vocabulary.END_THINK))
    row.add(encode(f"{answer} {vocabulary.EOS}"), ANSWER)


def _reach(facts: dict[str, str], start: str) -> int:
    """Hops that lead on from `start`, as many as a question asks for at most."""
    num = 0
    while start in facts and num < max(SIZES):
        start, num = facts[start], num + 1
    return num


def add_lookups(
    row: Row, encode: Encoder, num_words: int, num_facts: int, num_turns: int, reasoning_steps: str, rng: random.Random
) -> None:
    """Several questions about one context."""
    size = rng.choice(SIZES)
    made = draw("lookup", "train", size=size, seed=rng.getrandbits(48), num_facts=max(num_facts, size + 1), num_words=num_words)
    add_turn(row, encode, made, reasoning_steps, rng)
    words = made.prompt.split()
    facts = {word[:-1]: words[i + 1] for i, word in enumerate(words) if word.endswith(">")}
    reach = {start: _reach(facts, start) for start in facts}
    for _ in range(num_turns - 1):
        hops = min(rng.choice(SIZES), max(reach.values()))
        start = rng.choice([start for start, most in reach.items() if most >= hops])
        steps, answer = lookup.follow(facts, start, hops)
        asked = Item("lookup", lookup.question(start, hops), steps, answer, 0 if hops == 1 else hops, hops)
        add_turn(row, encode, asked, reasoning_steps, rng)


@dataclass(frozen=True)
class Mixture:
    """Easy items at first, then all, then contexts that grow; `*_until` and `*_from` are fractions of the run in [0, 1].

    `tokens_a_batch` counts padding.
    """

    encode: Encoder
    seed: int
    num_batches: int
    tokens_a_batch: int
    reasoning_steps: str = "varied"
    easy_until: float = 0.06
    short_until: float = 0.4
    long_share: float = 0.12
    full_from: float = 0.8
    from_length: int = 128

    def row(self, rng: random.Random, progress: float) -> Row:
        row = Row([], [])
        task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
        if task == "lookup":
            longest = self.longest(progress)
            if longest and rng.random() < self.long_share:
                num_words = round(longest * rng.uniform(0.25, 1.0))
                add_lookups(row, self.encode, num_words, rng.randint(6, 40), rng.randint(4, 8), self.reasoning_steps, rng)
            else:
                add_lookups(
                    row,
                    self.encode,
                    rng.choice((0, 0, 0, 64)),
                    rng.randint(2, self.most_facts(progress)),
                    rng.randint(1, 4),
                    self.reasoning_steps,
                    rng,
                )
        else:
            size = rng.choice(CHAIN_SIZES if task == "chain" else SIZES)
            if progress < self.easy_until:
                size = min(size, rng.randint(1, 4))
            add_turn(row, self.encode, draw(task, "train", size=size, seed=rng.getrandbits(48)), self.reasoning_steps, rng)
        return row

    def most_facts(self, progress: float) -> int:
        """Few facts at first: finding one among three comes before finding one among fourteen."""
        return round(min(MOST_FACTS, 4 + (MOST_FACTS - 4) * progress / max(self.short_until / 2, 1e-9)))

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
            batches[(seen + len(row.ids) // 2) * BATCHES_A_POOL // total].append(row)
            seen += len(row.ids)
        batches = [batch or rng.choice([other for other in batches if other]) for batch in batches]
        rng.shuffle(batches)
        return batches
