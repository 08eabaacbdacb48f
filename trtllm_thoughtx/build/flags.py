"""What a flag takes: the option types of the commands, and of the table of build options.

`admits` says whether a value from Python, or from a file, is one that the type could have given; `wanted` says in words what it takes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtllm_thoughtx.config import AUTO
from trtllm_thoughtx.errors import shown

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class CommaList(click.ParamType):
    """`8,16` as a tuple. Each item must match `pattern` in full and goes through `item`."""

    is_list = True

    def __init__(self, name: str, pattern: str, item: Callable[[str], Any], wanted: str) -> None:
        self.name, self.pattern, self.item, self.wanted = name, re.compile(pattern, re.ASCII), item, wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        parts = [str(part).strip() for part in (value if isinstance(value, list) else str(value).split(","))]
        bad = [part for part in parts if not self.pattern.fullmatch(part)]
        if bad:
            self.fail(f"{shown(bad[0])!r} is not {self.wanted}", param, ctx)
        return tuple(self.item(part) for part in parts)

    def admits(self, value: object) -> bool:
        return isinstance(value, tuple) and all(self.pattern.fullmatch(str(part)) for part in value)


class OneOf(click.Choice[str]):
    """A choice among names; dashes and underscores are the same. Help and messages spell the names as they are."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        return str(choice).replace("-", "_")

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(self.choices)}]"

    def get_invalid_choice_message(self, value: object, ctx: click.Context | None) -> str:
        return f"{shown(str(value))!r} is not {self.wanted}."

    @property
    def wanted(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def admits(self, value: object) -> bool:
        return value in self.choices


class FiniteFloat(click.FloatRange):
    """A number in a range, or the one `word`; NaN is in no range."""

    def __init__(self, min: float | None = None, max: float | None = None, *, min_open: bool = False, word: str | None = None) -> None:
        super().__init__(min, max, min_open=min_open)
        self.word, self.name = word, f"number|{word}" if word else "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == self.word:
            return value
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number

    @property
    def wanted(self) -> str:
        return f"a number {'above' if self.min_open else 'from'} {self.min:g} {'and at most' if self.min_open else 'to'} {self.max:g}"

    def admits(self, value: object) -> bool:
        low, high = self.min or 0.0, self.max or math.inf
        return type(value) in (int, float) and low <= value <= high and not (self.min_open and value == low)  # type: ignore[operator]


class Count(click.ParamType):
    """A whole number from `min` to `max`, or the one `word`. The upper bound only stops typing errors, so help does not show it."""

    def __init__(self, min: int, max: int, *, word: str | None = None) -> None:
        self.min, self.max, self.word, self.name = min, max, word, f"N|{word}" if word else "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == self.word:
            return value
        is_number = re.fullmatch(r"-?\d{1,19}", str(value), re.ASCII) is not None
        if not is_number or not self.min <= int(value) <= self.max:
            self.fail(f"{shown(str(value))!r} is not {self.wanted}", param, ctx)
        return int(value)

    @property
    def wanted(self) -> str:
        return f"a whole number from {self.min} to {self.max}"

    def admits(self, value: object) -> bool:
        return type(value) is int and self.min <= value <= self.max


class FilePath(click.ParamType):
    """A path. The empty string and NUL are refused: `Path("")` would silently be the current directory."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        if not value or "\0" in value:
            self.fail(f"{shown(value)!r} is not a path", param, ctx)
        return Path(os.path.expanduser(value))  # a shell leaves the tilde of --flag=~/model, and YAML has no shell

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


PATH = FilePath()
MAX_LEN = 1 << 24
POSITIVE = Count(min=1, max=MAX_LEN)
COUNT = Count(min=0, max=MAX_LEN)
CHUNK_SIZE = Count(min=1, max=MAX_LEN, word=AUTO)
NATS = FiniteFloat(min=0, max=20, min_open=True)
PROBABILITY = FiniteFloat(min=0, max=1)
PROBABILITY_OR_AUTO = FiniteFloat(min=0, max=1, word=AUTO)
TOKENS = CommaList("IDS", r"\d{1,9}", int, "a token id")
PENALTY = FiniteFloat(min=-2, max=2)
LAYERS = CommaList("LAYERS", r"\d{1,4}", int, "a layer number")
