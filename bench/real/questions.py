"""Questions for small instruction-tuned models: word problems, and cloze and code items, drawn by seed.

    python bench/real/questions.py [--num 200] [--seed 0] > FILE.jsonl
    thoughtx-eval --engine_dir ENGINE --dataset FILE.jsonl --max_new_tokens 96 --json > FORMAT.json
    thoughtx-eval --engine_dir ENGINE --dataset FILE.jsonl --max_new_tokens 96 --compare FLOAT32_ENGINE

`--num` of each kind, no two alike. Word problems take one to three steps, with small whole numbers and no negative result on the way.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from typing import Any

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Kim", "Lena", "Mei", "Noah", "Olga", "Paul")
THINGS = ("apples", "books", "stamps", "marbles", "pencils", "cards", "shells", "coins", "buttons", "stickers", "candles", "plums")
BOXES = ("boxes", "bags", "baskets", "crates", "jars", "shelves")
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("day", "night"), ("up", "down"), ("open", "closed"), ("early", "late"),
    ("empty", "full"), ("left", "right"), ("young", "old"), ("wet", "dry"), ("light", "dark"), ("strong", "weak"), ("rich", "poor"),
    ("true", "false"), ("first", "last"), ("near", "far"), ("high", "low"), ("hard", "soft"), ("begin", "end"),
)  # fmt: skip
CAPITALS = (
    ("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome"), ("Egypt", "Cairo"), ("Spain", "Madrid"), ("Germany", "Berlin"),
    ("Norway", "Oslo"), ("Greece", "Athens"), ("Portugal", "Lisbon"), ("Cuba", "Havana"), ("Austria", "Vienna"), ("Poland", "Warsaw"),
    ("Ireland", "Dublin"), ("Russia", "Moscow"), ("China", "Beijing"), ("Kenya", "Nairobi"), ("Peru", "Lima"), ("Sweden", "Stockholm"),
    ("Finland", "Helsinki"), ("Hungary", "Budapest"),
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
PLURALS = {"child": "children", "foot": "feet", "mouse": "mice", "tooth": "teeth", "man": "men", "woman": "women", "leaf": "leaves"}
WORDS = ("stone", "river", "garden", "window", "silver", "engine", "planet", "bridge", "forest", "candle", "winter", "market")


def word_problem(draw: random.Random) -> tuple[str, int]:
    name, other = draw.sample(NAMES, 2)
    thing, box = draw.choice(THINGS), draw.choice(BOXES)
    a, b, c = draw.randint(12, 40), draw.randint(2, 9), draw.randint(2, 9)
    form = draw.randrange(8)
    if form == 0:
        text, answer = f"{name} has {a} {thing} and gets {b} more from {other}. How many {thing} does {name} have now?", a + b
    elif form == 1:
        text, answer = f"{name} has {a} {thing} and gives {b} to {other}. How many {thing} does {name} have left?", a - b
    elif form == 2:
        text, answer = f"There are {b} {box} with {c} {thing} in each. How many {thing} are there in all?", b * c
    elif form == 3:
        text = f"{name} buys {b} {box} with {c} {thing} in each and already has {a} {thing}. How many {thing} does {name} have now?"
        answer = a + b * c
    elif form == 4:
        text, answer = f"{name} shares {b * c} {thing} equally among {b} friends. How many {thing} does each friend get?", c
    elif form == 5:
        text = f"{name} has {a} {thing}, finds {b} more and then loses {c}. How many {thing} does {name} have at the end?"
        answer = a + b - c
    elif form == 6:
        text = f"A ticket costs {b} dollars. {name} buys {c} tickets and pays with {b * c + a} dollars. How many dollars come back?"
        answer = a
    else:
        text = f"{name} reads {b} pages on each of {c} days, and {other} reads {a} pages in all. How many pages do they read together?"
        answer = a + b * c
    return f"{text} End with the number.", answer


def code_item(draw: random.Random) -> tuple[str, int]:
    numbers, word = [draw.randint(1, 20) for _ in range(draw.randint(3, 5))], draw.choice(WORDS)
    a, b = draw.randint(10, 60), draw.randint(2, 9)
    choices = (
        (f"{a} // {b}", a // b), (f"{a} % {b}", a % b), (f"{b} ** 2", b**2), (f"len({word!r})", len(word)),
        (f"max({numbers})", max(numbers)),
        (f"min({numbers})", min(numbers)), (f"len({numbers})", len(numbers)), (f"sorted({numbers})[0]", min(numbers)),
        (f"{numbers}[1]", numbers[1]), (f"{numbers}[-1]", numbers[-1]), (f"sum({numbers[:3]})", sum(numbers[:3])),
        (f"{word!r}.index({word[2]!r})", word.index(word[2])), (f"abs({b} - {a})", a - b), (f"int('{a}') + {b}", a + b),
    )  # fmt: skip
    text, answer = draw.choice(choices)
    return f"In Python, what does {text} evaluate to? Answer with the number only.", answer


def cloze_item(draw: random.Random) -> tuple[str, Any]:
    kind, gap = draw.randrange(6), "Fill in the gap with one word:"
    if kind == 0:
        first, second = draw.choice(OPPOSITES)
        return f"{gap} The opposite of {first} is ___.", second
    if kind == 1:
        country, city = draw.choice(CAPITALS)
        return f"{gap} The capital of {country} is ___.", city
    if kind == 2:
        at, names = draw.randrange(1, 12), draw.choice((DAYS, MONTHS))
        return f"{gap} {names[(at - 1) % len(names)]}, {names[at % len(names)]}, ___.", names[(at + 1) % len(names)]
    start, step = draw.randint(1, 30), draw.randint(2, 10)
    if kind == 3:
        return f"Continue with one number: {', '.join(str(start + i * step) for i in range(4))},", start + 4 * step
    if kind == 4:
        one = draw.choice(sorted(PLURALS))
        return f"{gap} One {one}, but two ___.", PLURALS[one]
    country, city = draw.choice(CAPITALS)
    return f"{gap} {city} is a city in the country of ___.", country


def draw_all(num: int, seed: int) -> Iterator[dict[str, Any]]:
    """`num` word problems, then `num` cloze and code items in turn; no prompt twice."""
    draw, seen = random.Random(seed), set[str]()
    for kind, makers in (("problem", (word_problem,)), ("item", (code_item, cloze_item))):
        for number in range(num):
            make = makers[number % len(makers)]
            prompt, answer = make(draw)
            while prompt in seen:
                prompt, answer = make(draw)
            seen.add(prompt)
            yield {"id": f"{kind}-{number + 1}", "prompt": prompt, "answer": answer}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for row in draw_all(args.num, args.seed):
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
