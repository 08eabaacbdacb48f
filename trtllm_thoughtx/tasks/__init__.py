"""Generated reasoning tasks whose chains, and the point at which each suffices, are known exactly.

    draw("lookup", "test", size=3, seed=7, num_words=1024)

is always the same item, and no item (of stories: no template) of one split is ever drawn for another.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from trtllm_thoughtx.tasks import chain, loan, lookup, story
from trtllm_thoughtx.tasks.item import SPLITS, Item

# task -> how to make an item, and the largest size
TASKS: dict[str, tuple[Callable[..., Item], int]] = {
    "chain": (chain.make, chain.MAX_OPERANDS),
    "lookup": (lookup.make, lookup.MAX_HOPS),
    "story": (story.make, story.MAX_OPERATIONS),
    "loan": (loan.make, loan.MAX_RULES),
}


def draw(task: str, split: str, *, size: int, seed: int, num_facts: int | None = None, num_words: int = 0) -> Item:
    """The item of this seed. `num_facts` and `num_words` stretch the context of a lookup. ValueError for what cannot be made."""
    if task not in TASKS or split not in SPLITS:
        raise ValueError(f"task {task!r} of split {split!r}: the tasks are {', '.join(TASKS)}, the splits {', '.join(SPLITS)}")
    make, largest = TASKS[task]
    if not 1 <= size <= largest:
        raise ValueError(f"{task} has sizes 1 to {largest}, not {size}")
    if task != "lookup" and (num_facts is not None or num_words):
        raise ValueError(f"only a lookup has a context to stretch, {task} has none")
    if num_facts is not None and not size < num_facts <= lookup.MAX_FACTS:
        raise ValueError(f"a lookup of {size} hops has {size + 1} to {lookup.MAX_FACTS} facts, not {num_facts}")
    stretch = {"num_facts": num_facts, "num_words": num_words} if task == "lookup" else {}
    rng = random.Random(f"{task} {split} {size} {seed}")
    while (item := make(rng, size, **stretch)).split != split:
        pass
    return item
