"""Typed, bounded access to a parsed config.json, which is hostile input.

JSON gives `True` where an integer is wanted, and numbers of any size; every field is checked for type and range here,
before anything is computed or allocated from it. `null` counts as missing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from trtllm_thoughtx.errors import ThoughtxError, shown

# Upper bounds of sizes; a real model stays far below, and a product of them fits 64 bits.
BOUNDS = {
    "layers": 1024,
    "hidden": 65_536,
    "intermediate": 1_048_576,
    "vocab": 4 << 20,
    "context": 16 << 20,
    "heads": 4096,
    "head_dim": 8192,
    "experts": 4096,
    "experts_in_all_layers": 1 << 15,
}


class Fields:
    """One JSON object with its place in the file, for messages."""

    def __init__(self, raw: object, where: str, prefix: str = "") -> None:
        self.where, self.prefix = where, prefix
        if not isinstance(raw, Mapping):
            self.wrong(prefix.rstrip(".") or "the file", f"is {_kind(raw)}, wanted an object")
        self.raw: Mapping[str, Any] = raw

    def wrong(self, key: str, why: str, fix: str = "") -> NoReturn:
        raise ThoughtxError(
            "E102",
            f"{self.prefix}{shown(key)} {why}",
            where=self.where,
            why="the value is missing, has the wrong type, or is out of range",
            fix=fix or f"correct it in {os.path.basename(self.where)}, or download that file again if it was changed",
        )

    def unsupported(self, what: str, why: str, fix: str = "use another checkpoint: this model was trained with it") -> NoReturn:
        raise ThoughtxError("E103", what, where=self.where, why=why, fix=fix)

    def get(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            self.wrong(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            self.wrong(key, f"is {_kind(value)}, wanted an integer")
        if not low <= value <= high:
            self.wrong(key, f"is {shown(value)}, wanted {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]."""
        value = self.get(key, default)
        if value is None:
            self.wrong(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.wrong(key, f"is {_kind(value)}, wanted a number")
        if not low <= value <= high or not math.isfinite(value):
            self.wrong(key, f"is {shown(value)}, wanted {low:g} to {high:g}")
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        return None if self.get(key) is None else self.number(key, low, high)

    def boolean(self, key: str, default: bool | None) -> bool:
        value = self.get(key, default)
        if value is None:
            self.wrong(key, "is missing")
        if not isinstance(value, bool):
            self.wrong(key, f"is {_kind(value)}, wanted true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key, default)
        if value is None:
            self.wrong(key, "is missing")
        if not isinstance(value, str):
            self.wrong(key, f"is {_kind(value)}, wanted a string")
        return value

    def table(self, key: str) -> Fields | None:
        value = self.get(key)
        return None if value is None else Fields(value, self.where, f"{self.prefix}{key}.")


def check_experts(fields: Fields, num_experts: int, num_layers: int) -> None:
    """E102 for more experts than any model has: the table of tensors has rows for each of them."""
    if num_experts * num_layers > BOUNDS["experts_in_all_layers"]:
        fields.wrong("num_experts", f"is {num_experts}, too many for {num_layers} layers")


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), "something else")
