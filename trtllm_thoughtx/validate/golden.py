"""What an engine is expected to say, and the golden file that carries it to machines without torch or transformers.

`Expected` is made by `validate` from the reference, or read from a golden file; the checks cannot tell which. A golden
file is safetensors: float32 truth per prompt (`NAME.logits` [rows, vocab], `NAME.hidden` [layers + 1, rows, hidden]) and
one metadata key with the rest as JSON: identity of the model, prompts, rounding bands. Bands are taken before the truth is
rounded to float32; that rounding is a twentieth of a float32 band. Reading goes through the same strict header parser as a
downloaded checkpoint, every size is checked, and a file made for another model or other settings is refused (E150).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx.checkpoint import tensor_file
from trtllm_thoughtx.checkpoint.header import MAX_MARKS, parse_header
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.files import atomic_file, read_named
from trtllm_thoughtx.strictjson import parse_json

SCHEMA = "thoughtx.golden/1"
KEY = "thoughtx.golden"
MAX_BYTES = 4 << 30
GIVEN = "given_"  # how the names of prompts that a user gave begin


@dataclass(frozen=True)
class ChunkSpec:
    """The mask of chunked attention. Sizes in tokens, except `left`, whole chunks behind the current one."""

    chunk_size: int
    sink: int
    left: int
    anchors: int = 0


@dataclass(frozen=True)
class Prompt:
    """One token sequence and where to look at it. `rows` are positions; only those are kept and compared."""

    name: str
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    chunk_size: int | None  # what the engine is given; None without chunked attention
    mask: ChunkSpec | None  # what the reference is given; None is full causal attention
    layers: bool = False  # compare every layer's hidden state too

    @property
    def is_given(self) -> bool:
        return self.name.startswith(GIVEN)

    @property
    def sha256(self) -> str:
        """Of the token ids, which a golden file may have in their place."""
        return hashlib.sha256(np.array(self.ids, "<i4").tobytes()).hexdigest()


@dataclass(frozen=True)
class Band:
    """Rounding of one tensor: error of the reference in the engine's dtype. `scale` and `top` are rms and max of the truth."""

    rms: float
    peak: float
    scale: float
    top: float


@dataclass(frozen=True)
class Truth:
    """Reference results at the rows of one prompt, widest precision available. `hidden` and its bands are empty without layers."""

    logits: np.ndarray  # [rows, vocab]
    logits_band: Band
    hidden: tuple[np.ndarray, ...] = ()  # embedding, then each layer: [rows, hidden]
    hidden_bands: tuple[Band, ...] = ()


@dataclass(frozen=True)
class Expected:
    """Everything that the checks of one engine need. `identity` says whose it is, see `validate.identity_of`."""

    identity: dict[str, Any]
    source: str  # how it was made, for the report
    prompts: tuple[Prompt, ...]
    truths: Mapping[str, Truth]


def write_golden(path: Path, expected: Expected, *, is_private: bool = False) -> None:
    """Write `expected` to `path` at once or not at all. `is_private`: prompts that a user gave are stored by hash only."""
    tensors: dict[str, np.ndarray] = {}
    rows = []
    for prompt in expected.prompts:
        truth = expected.truths[prompt.name]
        tensors[f"{prompt.name}.logits"] = np.ascontiguousarray(truth.logits, dtype="<f4")
        if truth.hidden:
            tensors[f"{prompt.name}.hidden"] = np.stack(truth.hidden).astype("<f4")
        bands = [dataclasses.astuple(band) for band in (truth.logits_band, *truth.hidden_bands)]
        hidden = {"ids": prompt.sha256} if is_private and prompt.is_given else {}
        rows.append({**dataclasses.asdict(prompt), **hidden, "bands": bands})
    story = {"schema": SCHEMA, "source": expected.source, "identity": expected.identity, "prompts": rows}
    metadata = {KEY: json.dumps(story, sort_keys=True, allow_nan=False)}
    ordered = {name: tensors[name] for name in sorted(tensors)}
    with atomic_file(path) as out:
        tensor_file.write_to(out, tensor_file.entries_of(ordered), ordered.values(), metadata)


def read_golden(path: Path, identity: dict[str, Any], given: Sequence[Prompt] = ()) -> Expected:
    """Read a golden file for the engine with this `identity`; E150 when it is malformed or another's. `given`: prompts of the user, for
    those that the file has by hash only."""
    where = shown(str(path), 400)
    data = read_named(path, MAX_BYTES, code="E150")
    try:
        header = parse_header(data, len(data), where)
        outer = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip(b" "), where, "E150", max_marks=MAX_MARKS)
    except ThoughtxError as error:
        raise _malformed(where, f"{error.what}: {error.why}") from error
    story = _story(outer.get("__metadata__"), where)
    _reveal(story["prompts"], given, where)
    prompts, bands = _prompts(story, where)
    _same_identity(story["identity"], identity, where)
    arrays = {}
    for name, (dtype, shape, begin, end) in header.items():
        if dtype != "F32":
            raise _malformed(where, f"tensor {shown(name)} is {dtype}, not F32")
        arrays[name] = np.frombuffer(data[begin:end], "<f4").reshape(shape)
    truths = _truths(arrays, prompts, bands, identity, where)
    return Expected(story["identity"], f"golden file {path.name}, recorded from {story['source']}", prompts, truths)


def _malformed(where: str, why: str) -> ThoughtxError:
    return ThoughtxError(
        "E150", "this is not a golden file of this package", where=where, why=why,
        fix="record one: thoughtx-validate --engine_dir ENGINE --reference HF --record FILE",
    )  # fmt: skip


def _story(metadata: Any, where: str) -> dict[str, Any]:
    """The JSON behind the one metadata key, with the types of its top level checked."""
    if not isinstance(metadata, dict) or set(metadata) != {KEY}:
        raise _malformed(where, f"its metadata is not the one key {KEY}")
    story = parse_json(metadata[KEY].encode(), where, "E150")
    kinds = {"schema": str, "source": str, "identity": dict, "prompts": list}
    if not isinstance(story, dict) or set(story) != set(kinds) or not all(isinstance(story[k], t) for k, t in kinds.items()):
        raise _malformed(where, f"{KEY} does not hold exactly {', '.join(kinds)}")
    if story["schema"] != SCHEMA:
        raise _malformed(where, f"schema is {shown(story['schema'])}, this version reads {SCHEMA}")
    return story


def _reveal(rows: list[Any], given: Sequence[Prompt], where: str) -> None:
    """Put the token ids of `given` where the file has their hash."""
    known = {prompt.sha256: prompt.ids for prompt in given}
    hidden = [row for row in rows if isinstance(row, dict) and isinstance(row.get("ids"), str)]
    missing = [row.get("name") for row in hidden if row["ids"] not in known]
    if missing:
        why = f"their sha256 is no prompt's of this engine's tokenizer: {listed([shown(name) for name in missing])}"
        what = "the golden file has prompts by hash only, and they are not at hand"
        fix = "give the file that it was recorded with: --prompts FILE.jsonl"
        raise ThoughtxError("E150", what, where=where, why=why if given else "it was recorded with --private_data", fix=fix)
    if given and not hidden:
        why = "it holds the token ids of all its prompts, and values for no others"
        raise ThoughtxError("E001", "this golden file needs no --prompts", where=where, why=why, fix="leave --prompts out, or record again")
    for row in hidden:
        row["ids"] = list(known[row["ids"]])


def _prompts(story: dict[str, Any], where: str) -> tuple[tuple[Prompt, ...], dict[str, tuple[Band, ...]]]:
    prompts: list[Prompt] = []
    bands: dict[str, tuple[Band, ...]] = {}
    for row in story["prompts"]:
        try:
            if set(row) != {field.name for field in dataclasses.fields(Prompt)} | {"bands"}:
                raise ValueError("unexpected fields")
            ids, rows = (tuple(_count(n) for n in row[key]) for key in ("ids", "rows"))
            mask = None if row["mask"] is None else ChunkSpec(**{k: _count(v) for k, v in row["mask"].items()})
            size = None if row["chunk_size"] is None else _count(row["chunk_size"])
            if not ids or not rows or list(rows) != sorted(set(rows)) or rows[-1] >= len(ids):
                raise ValueError("rows are not ascending positions of ids")
            if size == 0 or (mask is not None and mask.chunk_size == 0):
                raise ValueError("a chunk of 0 tokens")
            if not isinstance(row["name"], str) or not row["name"].isidentifier() or row["name"] in bands:
                raise ValueError("its name")
            if not isinstance(row["layers"], bool):
                raise ValueError("layers")
            prompts.append(Prompt(row["name"], ids, rows, size, mask, row["layers"]))
            bands[row["name"]] = tuple(Band(*(_size(number) for number in numbers)) for numbers in row["bands"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _malformed(where, f"prompt {len(prompts)} is not well formed ({shown(str(error))})") from error
    if not prompts:
        raise _malformed(where, "it holds no prompts")
    return tuple(prompts), bands


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"{value!r} is not a count")
    return value


def _size(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e30:
        raise ValueError(f"{value!r} is not a band")
    return float(value)


def _same_identity(recorded: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    keys = sorted(set(recorded) | set(wanted))
    differ = [f"{shown(key)}: golden {shown(recorded.get(key))}, engine {shown(wanted.get(key))}" for key in keys
              if recorded.get(key) != wanted.get(key)]  # fmt: skip
    if differ:
        raise ThoughtxError(
            "E150",
            "the golden file belongs to another model or other settings",
            where=where,
            why=listed(differ),
            fix="record one for this engine: thoughtx-validate --engine_dir ENGINE --reference HF --record FILE",
        )


def _truths(
    found: dict[str, np.ndarray], prompts: tuple[Prompt, ...], bands: dict[str, tuple[Band, ...]], identity: dict[str, Any], where: str
) -> dict[str, Truth]:
    """The tensors, each of exactly the shape that identity and prompts say, all finite."""
    vocab, width, depth = identity["vocab_size"], identity["hidden_size"], identity["num_layers"] + 1
    wanted: dict[str, tuple[int, ...]] = {f"{p.name}.logits": (len(p.rows), vocab) for p in prompts}
    wanted |= {f"{p.name}.hidden": (depth, len(p.rows), width) for p in prompts if p.layers}
    if {name: array.shape for name, array in found.items()} != wanted:
        raise _malformed(where, "its tensors are not the ones that its prompts need")
    if any(len(bands[p.name]) != 1 + depth * p.layers for p in prompts):
        raise _malformed(where, "it does not hold one band per compared tensor")
    if any(not np.isfinite(array).all() for array in found.values()):
        raise _malformed(where, "it holds numbers that are not finite")
    if any(max(p.ids) >= vocab for p in prompts):
        raise _malformed(where, f"a token id is outside the vocabulary of {vocab}")
    return {
        p.name: Truth(found[f"{p.name}.logits"], bands[p.name][0], tuple(found.get(f"{p.name}.hidden", ())), bands[p.name][1:])
        for p in prompts
    }
