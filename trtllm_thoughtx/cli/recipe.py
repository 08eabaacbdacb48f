"""A recipe: flags of one command, kept in a YAML file (`--config`). Flags on the command line win over it.

Keys are flag names without the dashes. The file is data and is read strictly: an unknown or repeated key, a value of the
wrong type, an anchor, or a tag that would build a Python object is refused (E002) with its line number, because a setting
that is silently ignored is worse than none.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from trtllm_thoughtx.build.flags import Count, FiniteFloat
from trtllm_thoughtx.errors import ThoughtxError, shown

LIMIT_BYTES = 64 << 10
LIMIT_BRACKETS = 200  # the YAML parser needs seconds for thousands of nested ones
NOT_IN_RECIPES = frozenset({"config", "json", "quiet", "debug", "help", "version"})


def _refuse(path: Path, line: int | None, what: str, why: str, fix: str) -> ThoughtxError:
    where = shown(str(path)) + (f" line {line}" if line else "")
    return ThoughtxError("E002", what, where=where, why=why, fix=f"{fix}. Nothing was read or written.")


def _entries(path: Path, text: bytes) -> list[tuple[str, Any, int]]:
    """(key, value, line) of every entry of the file."""
    import yaml

    if sum(map(text.count, (b"[", b"{"))) > LIMIT_BRACKETS:
        why = f"more than {LIMIT_BRACKETS} brackets; a recipe is a flat list of flags"
        raise _refuse(path, None, "too many lists", why, "see build_configs/")
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise _refuse(
                path,
                node.start_mark.line + 1,
                "a recipe must be a list of `flag: value` lines",
                "its top level is not a mapping",
                "see build_configs/",
            )
        if any(isinstance(token, (yaml.AliasToken, yaml.AnchorToken)) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise _refuse(
                path, None, "anchors and aliases are not read", "they can make a small file expand without bound", "write the values out"
            )
        entries = []
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            entries.append(
                (key if isinstance(key, str) else repr(key), loader.construct_object(value_node, deep=True), key_node.start_mark.line + 1)
            )
        return entries
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise _refuse(
            path, mark.line + 1 if mark else None, "not a plain YAML file", shown(problem), "correct the line; only plain values are read"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _flag(param: click.Parameter) -> str:
    """The flag's name as one types it, without dashes."""
    return max(param.opts, key=len).lstrip("-")


def _wanted(param: click.Option) -> tuple[str, tuple[type, ...]]:
    """What a YAML value for `param` must be: in words, and as Python types."""
    if param.is_flag:
        return "true or false", (bool,)
    if isinstance(param.type, (Count, FiniteFloat)):
        what, types = ("a whole number", (int,)) if isinstance(param.type, Count) else ("a number", (int, float))
        return (what, types) if param.type.word is None else (f"{what} or {param.type.word}", (*types, str))
    if getattr(param.type, "is_list", False):
        return "a list, or its items joined by commas", (str, list, int)
    if param.multiple:
        return "a text, or a list of texts", (str, list)
    return "text (in quotes if it looks like a number)", (str,)


def read_recipe(path: Path, command: click.Command, ctx: click.Context, others: Iterable[click.Command] = ()) -> dict[str, Any]:
    """Settings for `command` from the YAML file `path`, type-checked; E002 otherwise, E101 when there is no such file.

    `others` are the sibling commands, only used to say where a misplaced key belongs.
    """
    from trtllm_thoughtx.files import read_named

    params = {
        flag: option for option in command.params if isinstance(option, click.Option) and (flag := _flag(option)) not in NOT_IN_RECIPES
    }
    settings: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value, line in _entries(path, read_named(path, LIMIT_BYTES)):
        if key in lines:
            raise _refuse(path, line, f"{shown(key)} is set twice", f"it is also set in line {lines[key]}", "keep one of the two")
        if key not in params:
            have = [other for other in others if other is not command and any(_flag(param) == key for param in other.params)]
            home = [f"thoughtx-{other.name}" for other in have]
            near = difflib.get_close_matches(key, params, n=1)
            fix = f"perhaps {near[0]} is meant" if near else f"thoughtx-{command.name} --help lists the flags"
            why = f"no flag of thoughtx-{command.name} has this name"
            if home:
                why, fix = f"it is a flag of {' and '.join(home)}", f"remove it here, and give it to {' or '.join(home)}"
            raise _refuse(path, line, f"unknown key {shown(key)}", why, fix)
        words, types = _wanted(params[key])
        if types == (int, float) and isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, re.ASCII | re.IGNORECASE):
            value = float(value)  # YAML 1.1 reads 5e-6 as text: it wants a point in the number
        items = value if isinstance(value, list) else [value]
        is_right = isinstance(value, types) and (
            bool in types or not any(isinstance(item, (bool, list, dict)) or item is None for item in items)
        )
        if not is_right:
            raise _refuse(path, line, f"{key} must be {words}", f"it is {shown(repr(value))} ({type(value).__name__})", f"give {words}")
        try:
            for one in value if params[key].multiple and isinstance(value, list) else [value]:
                params[key].type.convert(one, params[key], ctx)
        except click.BadParameter as error:
            raise _refuse(
                path, line, f"{key} has an impossible value", shown(error.message), f"thoughtx-{command.name} --help shows what it takes"
            ) from None
        settings[params[key].name or key] = [value] if params[key].multiple and not isinstance(value, list) else value
        lines[key] = line
    return settings
