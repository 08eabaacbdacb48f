"""A release document: what to make, for what, and what must hold. Read strictly into the dataclasses below.

The file is data: an unknown or repeated key, a value that a flag would not take, an anchor, or a tag that would build a Python object is
refused (E002) with its line, because a setting that is silently ignored is worse than none. Formats, exits, attention, targets, evaluate
and bench hold flags of the command that they are given to, spelled and checked as that command does. Paths are relative to the file.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import read_named

LIMIT_BYTES = 256 << 10
LIMIT_BRACKETS = 4000  # the YAML parser needs seconds for tens of thousands of nested ones
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]{0,39}(-[A-Za-z0-9._]{1,40})*")
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
KINDS = ("convert", "calibrate", "fit", "part", "build", "validate", "evaluate", "bench", "sign", "export")
AXES = ("models", "formats", "attention", "exits", "targets")

T = TypeVar("T")
Flags = Mapping[str, Mapping[str, click.Parameter]]  # of each command, by name


@dataclass(frozen=True)
class Flag:
    """A flag of a command with its words; `file`: the path that it names, resolved."""

    name: str
    words: tuple[str, ...]
    file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Flagged:
    """A part of the document that holds flags of one command."""

    flags: tuple[Flag, ...] = ()

    def value(self, name: str) -> str | None:
        """Of a flag that is set: its words joined by commas, "" for a bare one."""
        return next((",".join(flag.words) for flag in self.flags if flag.name == name), None)


def _by(reads: Callable[[Reader, yaml.Node, str], Any]) -> dict[str, Any]:
    """What reads the value of a field."""
    return {"reads": reads}


class Reader:
    """The file, its parsed YAML, and the words of a refusal."""

    def __init__(self, path: Path, flags: Flags) -> None:
        self.path, self.flags = path, flags

    def refuse(self, node: yaml.Node | int | None, what: str, why: str, fix: str) -> ThoughtxError:
        line = node.start_mark.line + 1 if isinstance(node, yaml.Node) else node
        where = shown(str(self.path), 400) + (f" line {line}" if line else "")
        return ThoughtxError("E002", what, where=where, why=why, fix=f"{fix}. Nothing was read or written.")

    def root(self) -> yaml.Node:
        text = read_named(self.path, LIMIT_BYTES)
        if sum(map(text.count, (b"[", b"{"))) > LIMIT_BRACKETS:
            raise self.refuse(None, "too many lists", f"more than {LIMIT_BRACKETS} brackets", "see build_configs/releases/")
        loader = None
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            if any(isinstance(token, (yaml.AliasToken, yaml.AnchorToken)) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
                why = "they can make a small file expand without bound"
                raise self.refuse(None, "anchors and aliases are not read", why, "write the values out")
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
            fix = "correct the line; only plain values are read"
            raise self.refuse(mark.line + 1 if mark else None, "not a plain YAML file", shown(problem), fix) from None
        finally:
            if loader is not None:
                loader.dispose()
        if node is None:
            raise self.refuse(None, "the file is empty", "a release names models, formats and targets", "see build_configs/releases/")
        return node

    def mapping(self, node: yaml.Node, name: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key and value nodes by key, in the file's order."""
        if not isinstance(node, yaml.MappingNode):
            raise self.refuse(node, f"{name} must be a list of `key: value` lines", "it is none", "see build_configs/releases/")
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if key in found:
                first = found[key][0].start_mark.line + 1
                raise self.refuse(key_node, f"{shown(key)} is set twice", f"it is also set in line {first}", "keep one of the two")
            found[key] = (key_node, value_node)
        return found

    def plain(self, node: yaml.Node, name: str) -> Any:
        """A value of plain types."""
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            why = shown(getattr(error, "problem", None) or str(error))
            raise self.refuse(node, f"{name} is no plain value", why, "only plain values are read") from None
        finally:
            loader.dispose()

    def fields(self, node: yaml.Node, kind: type[T], name: str, command: str | None = None) -> T:
        """A dataclass from a mapping: its fields by name, and flags of `command` for other keys."""
        known = {one.name: one.metadata["reads"] for one in dataclasses.fields(kind) if "reads" in one.metadata}  # type: ignore[arg-type]
        flags = self.flags[command] if command else {}
        values, taken = dict[str, Any](), list[Flag]()
        for key, (key_node, value_node) in self.mapping(node, name).items():
            if key in known:
                values[key] = known[key](self, value_node, f"{name}.{key}")
            elif key in flags:
                taken += self.flag(flags[key], key, value_node)
            else:
                raise self._unknown(key_node, key, name, [*known, *flags], command)
        missing = [
            one.name
            for one in dataclasses.fields(kind)  # type: ignore[arg-type]
            if one.name in known and one.name not in values and one.default is one.default_factory is dataclasses.MISSING
        ]
        if missing:
            why = "a release cannot be made without"
            raise self.refuse(node, f"{name} lacks {', '.join(missing)}", why, f"add {', '.join(missing)}; see build_configs/releases/")
        if command:
            values["flags"] = tuple(taken)
        return kind(**values)

    def _unknown(self, node: yaml.Node, key: str, name: str, known: list[str], command: str | None) -> ThoughtxError:
        near = difflib.get_close_matches(key, known, n=1)
        why = f"{name} has {', '.join(known)}" if command is None else f"it is no flag of thoughtx-{command} that a release may set"
        fix = f"perhaps {near[0]} is meant" if near else "leave it out" if command is None else f"thoughtx-{command} --help lists the flags"
        return self.refuse(node, f"unknown key {shown(key)} in {name}", why, fix)

    def flag(self, param: click.Parameter, key: str, node: yaml.Node) -> list[Flag]:
        """The flag as it would be typed; none for a bare one that is false."""
        value = self.plain(node, key)
        if getattr(param, "is_flag", False):
            if not isinstance(value, bool):
                raise self.refuse(node, f"{key} must be true or false", f"it is {shown(repr(value))}", "give true or false")
            return [Flag(key, ())] if value else []
        items = value if isinstance(value, list) else [value]
        if not items or any(isinstance(item, (bool, list, dict)) or item is None for item in items):
            raise self.refuse(node, f"{key} has an impossible value", f"it is {shown(repr(value))}", "give a text or a number, or a list")
        text = ",".join(map(str, items))
        try:
            made = param.type.convert(text, param, None)
        except click.BadParameter as error:
            why = shown(error.message)
            raise self.refuse(node, f"{key} has an impossible value", why, "the command's --help shows what it takes") from None
        if isinstance(made, Path):
            file = self.place(made)
            return [Flag(key, (str(file),), file)]
        return [Flag(key, (text,))]

    def place(self, path: Path) -> Path:
        """`path` relative to the file, absolute."""
        return (self.path.absolute().parent / path.expanduser()).resolve()


# --- values ------------------------------------------------------------------------------------------------------------


def _checked(good: Callable[[Any], bool], words: str) -> Callable[[Reader, yaml.Node, str], Any]:
    def read(reader: Reader, node: yaml.Node, name: str) -> Any:
        value = reader.plain(node, name)
        if not good(value):
            raise reader.refuse(node, f"{name} must be {words}", f"it is {shown(repr(value))}", f"give {words}")
        return value

    return read


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_text = _checked(lambda value: isinstance(value, str) and bool(value) and value.isprintable(), "a text")
_name = _checked(lambda v: isinstance(v, str) and bool(NAME.fullmatch(v)), "a name of letters, digits, points, _ and -")
_bool = _checked(lambda value: isinstance(value, bool), "true or false")
_positive = _checked(lambda value: _is_number(value) and 0 < value < 1e12, "a positive number")
_from_zero = _checked(lambda value: _is_number(value) and 0 <= value < 1e12, "a number from 0")
_share = _checked(lambda value: isinstance(value, dict) and all(map(_is_number, value.values())), "resources with numbers")


def _path(reader: Reader, node: yaml.Node, name: str) -> Path:
    return reader.place(Path(_text(reader, node, name)))


def _bytes(reader: Reader, node: yaml.Node, name: str) -> int:
    """`5 GiB`, or a number of bytes."""
    value = reader.plain(node, name)
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|KiB|MiB|GiB|TiB)", str(value))
    if match is None or isinstance(value, bool):
        raise reader.refuse(node, f"{name} must be a size", f"it is {shown(repr(value))}", "give bytes, or a size such as 5 GiB")
    return int(float(match[1]) * UNITS[match[2]])


def _date(reader: Reader, node: yaml.Node, name: str) -> int:
    """Seconds since 1970."""
    value = reader.plain(node, name)
    if not isinstance(value, datetime.date):
        raise reader.refuse(node, f"{name} must be a date", f"it is {shown(repr(value))}", "give a date such as 2026-11-30")
    if not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    return int((value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)).timestamp())


def _cores(reader: Reader, node: yaml.Node, name: str) -> Mapping[str, int]:
    made = {}
    for key, (key_node, value_node) in reader.mapping(node, name).items():
        if key not in KINDS:
            raise reader.refuse(key_node, f"unknown step {shown(key)} in {name}", f"the steps are {', '.join(KINDS)}", "name one of them")
        made[key] = _checked(lambda value: type(value) is int and 1 <= value <= 1024, "a whole number from 1")(reader, value_node, key)
    return made


def _named(kind: type[T], command: str | None) -> Callable[[Reader, yaml.Node, str], Mapping[str, T]]:
    def read(reader: Reader, node: yaml.Node, name: str) -> Mapping[str, T]:
        found = reader.mapping(node, name)
        if not found:
            raise reader.refuse(node, f"{name} is empty", "there is nothing to make", "name one, or leave the key out")
        for key, (key_node, _) in found.items():
            if not NAME.fullmatch(key):
                why = "it becomes part of file names"
                raise reader.refuse(key_node, f"{shown(key)!r} cannot be a name", why, "use letters, digits, points, _ and -")
        return {key: reader.fields(value, kind, f"{name}.{key}", command) for key, (_, value) in found.items()}

    return read


def _one(kind: type[T], command: str | None) -> Callable[[Reader, yaml.Node, str], T]:
    return lambda reader, node, name: reader.fields(node, kind, name, command)


def _left_out(reader: Reader, node: yaml.Node, name: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(node, yaml.SequenceNode):
        raise reader.refuse(node, f"{name} must be a list", "it is none", "write lines such as - {formats: fp8, targets: cpu}")
    rules = []
    for item in node.value:
        rule = {}
        for key, (key_node, value_node) in reader.mapping(item, name).items():
            if key not in AXES:
                raise reader.refuse(key_node, f"unknown key {shown(key)} in {name}", f"it has {', '.join(AXES)}", "name one of them")
            rule[key] = str(_text(reader, value_node, key))
        if not rule:
            raise reader.refuse(item, "a rule that leaves everything out", "it names nothing", "remove it")
        rules.append(rule)
    return tuple(rules)


# --- the document ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    path: Path = field(metadata=_by(_path))
    lora_dir: Path | None = field(default=None, metadata=_by(_path))  # a PEFT directory that is merged
    dtype: str = field(
        default="auto",
        metadata=_by(_checked(lambda v: v in ("auto", "float32", "float16", "bfloat16"), "auto, float32, float16 or bfloat16")),
    )


@dataclass(frozen=True, kw_only=True)
class Target(Flagged):
    """Flags of thoughtx-build, and the machine that runs the engine (and builds it, where plans need that)."""

    gpu: str | None = field(default=None, metadata=_by(_text))  # part of its name, and Ray's accelerator_type unless there are
    resources: Mapping[str, float] | None = field(default=None, metadata=_by(_share))  # of a Ray cluster, which stand for it


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What must hold of every engine; what cannot be judged is reported as skipped, and fails with `strict`."""

    max_kl: float | None = field(default=None, metadata=_by(_from_zero))  # nats, from the reference
    max_points_lost: float | None = field(default=None, metadata=_by(_from_zero))  # of right answers, against the first format
    max_bytes: int | None = field(default=None, metadata=_by(_bytes))
    min_tokens_per_second: float | None = field(default=None, metadata=_by(_positive))  # decoding
    strict: bool = field(default=False, metadata=_by(_bool))


@dataclass(frozen=True, kw_only=True)
class Sign:
    key: Path = field(metadata=_by(_path))


@dataclass(frozen=True, kw_only=True)
class Export:
    tag: str = field(default="latest", metadata=_by(_name))


NONE: Mapping[str, Flagged] = {"none": Flagged()}


@dataclass(frozen=True, kw_only=True)
class Release:
    name: str = field(metadata=_by(_name))
    models: Mapping[str, Model] = field(metadata=_by(_named(Model, None)))
    formats: Mapping[str, Flagged] = field(metadata=_by(_named(Flagged, "calibrate")))
    targets: Mapping[str, Target] = field(metadata=_by(_named(Target, "build")))
    attention: Mapping[str, Flagged] = field(default_factory=lambda: NONE, metadata=_by(_named(Flagged, "build")))
    exits: Mapping[str, Flagged] = field(default_factory=lambda: NONE, metadata=_by(_named(Flagged, "calibrate")))
    date: int | None = field(default=None, metadata=_by(_date))  # that outputs carry, so that they repeat byte for byte
    cores: Mapping[str, int] | None = field(default=None, metadata=_by(_cores))
    validate: Flagged | None = field(default=Flagged(), metadata=_by(_one(Flagged, "validate")))
    evaluate: Flagged | None = field(default=None, metadata=_by(_one(Flagged, "eval")))
    bench: Flagged | None = field(default=None, metadata=_by(_one(Flagged, "bench")))
    limits: Limits = field(default=Limits(), metadata=_by(_one(Limits, None)))
    sign: Sign | None = field(default=None, metadata=_by(_one(Sign, None)))
    export: Export | None = field(default=None, metadata=_by(_one(Export, None)))
    leave_out: tuple[Mapping[str, str], ...] = field(default=(), metadata=_by(_left_out))


def read_release(path: Path, flags: Flags) -> Release:
    """The document at `path`; `flags` are those that it may hold, by command. E002 for what is not one, E101 without a file."""
    reader = Reader(path, flags)
    root = reader.root()
    release = reader.fields(root, Release, "the release")
    lines = {key: value for key, (_, value) in reader.mapping(root, "the release").items()}
    for rule in release.leave_out:
        for axis, name in rule.items():
            if name not in getattr(release, axis):
                known = ", ".join(getattr(release, axis))
                raise reader.refuse(lines["leave_out"], f"leave_out names {shown(name)}", f"{axis} has {known}", "correct the name")
    for name, one in release.formats.items():
        if one.flags and one.value("qformat") is None:
            raise reader.refuse(lines["formats"], f"formats.{name} has no qformat", "its flags quantize to nothing", "add qformat")
    for name, one in release.exits.items():
        if one.flags and one.value("fit_exit_head") is None and one.value("exit_layers") is None:
            raise reader.refuse(lines["exits"], f"exits.{name} fits nothing", "it needs fit_exit_head or exit_layers", "add one of them")
    for axis in ("attention", "targets"):
        for name, one in getattr(release, axis).items():
            twice = {flag.name for flag in one.flags} & {
                flag.name for other in release.targets.values() for flag in other.flags if axis == "attention"
            }
            if twice:
                why = f"targets set {', '.join(sorted(twice))} too"
                raise reader.refuse(lines[axis], f"attention.{name} sets a flag twice", why, "set it in one place")
    return release
