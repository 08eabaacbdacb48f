"""Multi-hop lookup: follow `k> v ;` facts for a number of hops, among distractor facts and sentences that say nothing.

`num_words` stretches the context with such sentences, and an item records how far back
from the question its farthest needed fact stands. `?` asks for the start and the hops: `? a 3` is three hops from a.
"""

from __future__ import annotations

import itertools
import random
import string

from trtllm_thoughtx.tasks.item import Item

GREEK = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu",
    "nu", "xi", "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega",
)  # fmt: skip
NODES = tuple(string.ascii_lowercase) + GREEK
KEYS = {node: f"{node}>" for node in NODES}  # a node as a key is a word of its own: induction needs no third word then
MAX_HOPS, MAX_FACTS = 8, len(NODES) - 1
ADJECTIVES = ("old", "new", "grey", "calm", "warm", "dark", "small", "long")
NOUNS = ("river", "garden", "road", "tower", "market", "forest", "window", "harbour")
VERBS = ("meets", "faces", "follows", "leaves", "shades", "passes")
FILLER_WORDS, FACT_WORDS = 8, 3


def filler(rng: random.Random) -> str:
    return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} ."


def facts_and_chain(rng: random.Random, hops: int, num_facts: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Every key has one fact; the first `hops` of the returned facts make the chain, the rest distract."""
    names = rng.sample(NODES, num_facts + 1)
    chain = names[: hops + 1]
    facts = list(itertools.pairwise(chain))
    facts += [(key, rng.choice([name for name in names if name != key])) for key in names[hops + 1 :]]
    return facts, chain


def question(start: str, hops: int) -> str:
    return f"? {start} {hops}"


def follow(facts: dict[str, str], start: str, hops: int) -> tuple[tuple[str, ...], str]:
    """The steps from `start`, and where they end."""
    steps, here = [], start
    for _ in range(hops):
        steps.append(f"{KEYS[here]} {facts[here]}")
        here = facts[here]
    return tuple(steps), here


def make(rng: random.Random, size: int, num_facts: int | None = None, num_words: int = 0) -> Item:
    num_facts = num_facts or rng.randint(size + 1, 12)
    facts, chain = facts_and_chain(rng, size, num_facts)
    steps, answer = follow(dict(facts), chain[0], size)
    sentences = [(f"{KEYS[key]} {value} ;", i < size) for i, (key, value) in enumerate(facts)]
    room = max(0, num_words - FACT_WORDS * len(facts)) // FILLER_WORDS
    sentences += [(filler(rng), False) for _ in range(room)]
    rng.shuffle(sentences)
    after = [len(" ".join(text for text, _ in sentences[i:]).split()) for i, (_, needed) in enumerate(sentences) if needed]
    context = " ".join(text for text, _ in sentences)
    traits = {"distance": max(after), "num_words": len(context.split())}
    return Item("lookup", f"{context} {question(chain[0], size)}", steps, answer, 0 if size == 1 else size, size, traits)
