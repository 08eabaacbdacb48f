"""One step of a release: a command of this package, what it needs, and the key under which its output is kept.

The key is a hash of all that decides the output: the command's words, where paths of inputs stand for the content of the files and paths
of other outputs for their keys; the package's version and the code that the command runs; the versions of packages that compute. So every
key is known before anything runs, and equal keys mean equal work, on whatever machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = "@here"  # the directory of a step's output, in its words
OTHER = re.compile(r"@([0-9a-f]{64})(/.*)?")  # that of another step, and a file in it
SCHEMA = "thoughtx.step/1"


@dataclass(frozen=True, kw_only=True)
class Step:
    """`words`: the command. `inputs`: keys of steps whose output it reads; `after`: of steps that end before it begins. `copies`: an output
    that it changes a copy of. Memory and disk in bytes; `size`: bytes of weights, which its duration goes by."""

    kind: str
    label: str
    key: str
    words: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    copies: str | None = None
    gate: str | None = None  # the engine that must have passed before this step begins
    cores: int = 1
    memory: int = 1
    disk: int = 0
    size: int = 0
    alone: bool = False  # it measures time
    gpu: str | None = None
    resources: tuple[tuple[str, float], ...] = ()
    date: int | None = None
    facts: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.label}"

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.inputs, *self.after)

    @property
    def output(self) -> str:
        """The word that stands for its output directory in the words of other steps."""
        return f"@{self.key}/{self.label}"

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Step:
        raw: dict[str, Any] = json.loads(text)
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
        fields["resources"] = tuple((name, amount) for name, amount in raw["resources"])
        return cls(**fields)


@dataclass(frozen=True)
class Input:
    """A path of the user's, and the hash of what is there."""

    path: Path
    digest: str


Word = str | Input | Step | tuple[Step, str]  # a Step is its output directory; with a name, a file beside that


def make_step(kind: str, label: str, words: Iterable[Word], *, facts: Mapping[str, Any], copies: Step | None = None, **more: Any) -> Step:
    """The step with its key."""
    plain, hashed, inputs = list[str](), list[Any](), list[str]()
    for word in words:
        if isinstance(word, str):
            plain.append(word)
            hashed.append(word)
            continue
        if isinstance(word, Input):
            plain.append(str(word.path))
            hashed.append(["input", word.digest])
            continue
        step, rest = word if isinstance(word, tuple) else (word, word.label)
        plain.append(f"@{step.key}/{rest}")
        hashed.append(["step", step.key, rest])
        inputs.append(step.key)
    if copies is not None:
        inputs.append(copies.key)
    body = {
        "schema": SCHEMA,
        "kind": kind,
        "label": label,
        "words": hashed,
        "copies": copies.key if copies else None,
        "facts": facts,
        "date": more.get("date"),
        "cores": more.get("cores", 1),  # sums of threads round differently
    }
    return Step(
        kind=kind,
        label=label,
        key=digest_of(body),
        words=tuple(plain),
        inputs=tuple(dict.fromkeys(inputs)),
        copies=copies.output if copies else None,
        facts=digest_of(facts) if facts else "",
        **more,
    )


def digest_of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
