"""English and code for a calibration without data: the documentation and sources that every Python installation has.

What scales and rounding are fitted to must look like what a model reads: on one kind of text alone, layers are fitted to it at the cost of
all others.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

from trtllm_thoughtx import files
from trtllm_thoughtx.text.text import Text

MODULES = (
    *("argparse", "ast", "bisect", "calendar", "cmd", "configparser", "copy", "csv", "difflib", "doctest", "fractions", "functools"),
    *("glob", "heapq", "imaplib", "inspect", "locale", "mailbox", "optparse", "pickle", "queue", "random", "sched", "shlex", "smtplib"),
    *("statistics", "string", "subprocess", "tarfile", "textwrap", "threading", "trace", "typing", "uuid", "zipfile"),
)
FILE_BYTES = 1 << 20
CHARACTERS = 6  # of a text that are cut out for each token wanted
READS_FROM = 2.5  # characters in a token: one that was made for tasks alone has about one
SAMPLE = "The statement is executed once for each item of the sequence, in the order in which the items were given. " * 4


def reads(text: Text) -> bool:
    """True for a tokenizer that was made for prose: it keeps a text as it is, in few tokens."""
    ids = text.encode(SAMPLE)
    return text.decode(ids) == SAMPLE and len(SAMPLE) >= READS_FROM * len(ids)


def texts() -> list[str]:
    """Documentation and sources in turn; those that this installation lacks are left out."""
    prose: list[str] = []
    if importlib.util.find_spec("pydoc_data.topics") is not None:
        from pydoc_data.topics import topics

        prose = [topics[name] for name in sorted(topics) if len(topics[name]) > 2000]
    code = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            code.append(files.read_named(Path(spec.origin), FILE_BYTES).decode("utf-8", "replace"))
    return [one for pair in zip(prose, code, strict=False) for one in pair] or prose or code


def rows(text: Text, num: int, max_len: int, seed: int) -> list[list[int]]:
    """`num` pieces of at most `max_len` tokens; none where the installation has no texts."""
    rng, found = random.Random(f"prose {seed}"), texts()
    pieces = []
    for place in range(num if found else 0):
        whole = found[place % len(found)]
        at = rng.randrange(max(1, len(whole) - CHARACTERS * max_len))
        pieces.append(text.encode(whole[at : at + CHARACTERS * max_len])[:max_len])
    return [piece for piece in pieces if piece]
