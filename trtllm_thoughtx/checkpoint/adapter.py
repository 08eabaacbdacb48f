"""A PEFT LoRA directory as changes of the tensors of its base model: read, checked against the model's table, applied row by row.

A merged weight is computed in float64 from the stored one, and rounded to the type that it is stored in: the one checkpoint that
all commands see, and that peft's own merge in float64 gives. Rows are independent, so nothing is held but a block and the factors of
one layer. Names of fused modules (qkv_proj, gate_up_proj) stand for their parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trtllm_thoughtx.checkpoint.adapter_config import EMBEDDING, AdapterConfig, read_adapter_config
from trtllm_thoughtx.checkpoint.directory import ADAPTER_CONFIG
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.tensor_check import STORED_DTYPES
from trtllm_thoughtx.checkpoint.tensor_file import DTYPES
from trtllm_thoughtx.errors import ThoughtxError, counted, listed, shown
from trtllm_thoughtx.families import Part, Tensor

HEAD = "lm_head"
PREFIX = "base_model.model."
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<what>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"|lora_embedding_(?P<table>[AB]))"
)
_FIELDS = {
    **{"lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "up_bias", "lora_magnitude_vector": "magnitude"},
    **{"token_adapter.trainable_tokens_delta": "rows", "embedding_A": "down", "embedding_B": "up"},
}
Change = Callable[[np.ndarray, int], np.ndarray]  # (rows in float64, number of the first) -> the rows as they become


@dataclass
class Module:
    """The stored names of what an adapter holds for one module, which may be a fused one."""

    down: str | None = None  # lora_A: [rank, inputs], of the embedding [rank, vocabulary]
    up: str | None = None  # lora_B: [outputs, rank]
    up_bias: str | None = None
    magnitude: str | None = None
    rows: str | None = None
    is_table: bool = False  # names of the embedding's factors


class Adapter:
    """A PEFT directory on a model whose tensors are `table`: `changes` by Hugging Face names, and whether a `tied` model stays so, which
    it does not where the embedding is changed and the head otherwise. E102, E103, E105 and E107 for one that cannot be used."""

    def __init__(self, stored: Checkpoint, table: Sequence[Tensor], tied: bool) -> None:
        self.stored, self.where = stored, str(stored.path)
        self.config: AdapterConfig = read_adapter_config(stored.raw, str(stored.path / ADAPTER_CONFIG))
        self.modules: dict[str, Module] = {}
        self.replaced: dict[str, str] = {}  # a tensor of the model -> the stored name of what replaces it
        self.products: dict[str, tuple[str, int, int]] = {}  # a module of the model -> (name in `modules`, its first output there, the end)
        self.changes: dict[str, list[Change]] = {}
        self._problems: list[str] = []
        for name, info in stored.stored.items():
            self._place(name)
            if info.dtype not in STORED_DTYPES:
                self._problems.append(f"{shown(name)}: has type {info.dtype}, wanted {', '.join(STORED_DTYPES)}")
        for wanted in self.config.whole:
            if not any(re.search(rf"(^|\.){re.escape(wanted)}\.", name) for name in self.replaced):
                self._problems.append(f"{shown(wanted)}: named in modules_to_save, and not there")
        if self.config.token_ids and not any(module.rows for module in self.modules.values()):
            self._problems.append("trainable_token_indices names tokens, and their rows are not there")
        if not self.modules and not self.replaced:
            self._problems.append("it holds no tensors")
        self._shapes = {part.source: part.shape for tensor in table for part in tensor.parts}
        self._shapes[f"{HEAD}.weight"] = self._shapes[f"{EMBEDDING}.weight"]
        for name, value in self.replaced.items():
            self._replace(name, value)
        for name, module in self.modules.items():
            self._problems += [f"{shown(name)}: {why}" for why in self._put(name, module)]
        self.tied = tied and (self._problems or self._tie())
        if self._problems:
            what = f"the adapter does not fit the model: {counted(len(self._problems), 'problem')}"
            fix = "give the base model that it was trained on (base_model_name_or_path in its adapter_config.json)"
            raise ThoughtxError("E107", what, where=self.where, why=listed(self._problems), fix=fix)

    def _place(self, name: str) -> None:
        """Sort a stored tensor by what its name says."""
        key = name.removeprefix(PREFIX).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        match = _KEY.fullmatch(key)
        if key == name:
            self._problems.append(f"{shown(name)}: a name of peft begins with {PREFIX}")
        elif match is None:
            self.replaced[key.replace(".base_layer.", ".")] = name
        else:
            module = self.modules.setdefault(match["module"], Module())
            module.is_table |= match["table"] is not None
            setattr(module, _FIELDS[match["what"] or f"embedding_{match['table']}"], name)

    def _replace(self, name: str, stored: str) -> None:
        if name not in self._shapes:
            self._problems.append(f"{shown(stored)}: not a tensor of this model")
        elif self.shape(stored) != self._shapes[name]:
            self._problems.append(f"{shown(stored)}: has shape {list(self.shape(stored))}, wanted {list(self._shapes[name])}")
        else:
            self.changes.setdefault(name, []).append(self._replacing(stored))

    def _put(self, name: str, module: Module) -> list[str]:
        """Enter a module's products and rows; what does not fit."""
        parts = [name]
        for fused, own in FUSED.items():
            if name.endswith(f".{fused}"):
                parts = [name.removesuffix(fused) + part for part in own]
        weights = [self._shapes.get(f"{part}.weight", ()) for part in parts]
        if not all(weights):
            return ["not a module of this model"]
        if wrong := self._misfit(name, module, (sum(shape[0] for shape in weights), *weights[0][1:])):
            return wrong
        begin = 0
        for part, shape in zip(parts, weights, strict=True):
            changes = self.changes.setdefault(f"{part}.weight", [])
            if module.rows:
                changes.append(self._rows(module.rows))
                continue
            changes.append(self._adding(name, module, begin))
            self.products[part] = name, begin, begin + shape[0]
            if module.up_bias and f"{part}.bias" not in self._shapes:
                return [f"it has a bias (lora_bias), and {part} of the model has none that it could be added to"]
            if module.up_bias:
                self.changes.setdefault(f"{part}.bias", []).append(self._adding_bias(name, module.up_bias, begin))
            begin += shape[0]
        return []

    def _tie(self) -> bool:
        """Whether a tied model's head remains its embedding; its changes are entered."""
        of_table, of_head = (self.changes.get(f"{name}.weight", []) for name in (EMBEDDING, HEAD))
        if self._head_follows() or (EMBEDDING in self.modules and self.modules[EMBEDDING].rows):
            self.changes[f"{HEAD}.weight"] = of_table
            return True
        return not (of_table or of_head)

    def _head_follows(self) -> bool:
        """Whether there are changes of the head, and all are those of the embedding, as peft's ensure_weight_tying makes them."""

        def same(one: str | None, other: str | None, is_turned: bool) -> bool:
            if one is None or other is None:
                return one is other
            return np.array_equal(self.read(one).T if is_turned else self.read(one), self.read(other))

        table, head = self.modules.get(EMBEDDING, Module()), self.modules.get(HEAD, Module())
        pairs = [(self.replaced.get(f"{EMBEDDING}.weight"), self.replaced.get(f"{HEAD}.weight"), False)]
        pairs += [(table.down, head.up, True), (table.up, head.down, True)]
        return f"{HEAD}.weight" in self.changes and all(same(*pair) for pair in pairs)

    def peft_tensors(self, part: str) -> dict[str, np.ndarray]:
        """The tensors of a product under peft's names, of one part of a fused module."""
        name, begin, end = self.products[part]
        module, at = self.modules[name], slice(begin, end)
        assert module.down and module.up
        if module.is_table:
            return {"lora_embedding_A": self.read(module.down), "lora_embedding_B": self.read(module.up)}
        found = {"lora_A.weight": self.read(module.down), "lora_B.weight": self.read(module.up)[at]}
        found |= {"lora_B.bias": self.read(module.up_bias)[at]} if module.up_bias else {}
        return found | ({"lora_magnitude_vector": self.read(module.magnitude)[at]} if module.magnitude else {})

    def replaced_rows(self) -> tuple[tuple[int, ...], np.ndarray | None]:
        """(token ids, their rows of the embedding)."""
        stored = self.modules[EMBEDDING].rows if EMBEDDING in self.modules else None
        return (self.config.token_ids, self.read(stored)) if stored else ((), None)

    def read(self, name: str) -> np.ndarray:
        """A tensor in float64."""
        return self.stored.read(name).astype(np.float64)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored.stored[name].shape

    def _misfit(self, name: str, module: Module, shape: tuple[int, ...]) -> list[str]:
        """Why a module's tensors do not fit a weight of `shape`."""
        is_table, config = name == EMBEDDING, self.config
        if module.rows:
            wanted = (len(config.token_ids), *shape[1:])
            if not is_table or module.down or self.shape(module.rows) != wanted:
                return [f"replaces rows {list(self.shape(module.rows))}, wanted {list(wanted)} of {EMBEDDING} alone"]
            return ["trainable_token_indices has ids beyond the vocabulary"] if max(config.token_ids, default=0) >= shape[0] else []
        if module.down is None or module.up is None or len(shape) != 2 or module.is_table != is_table:
            return ["lora_A and lora_B of a matrix are wanted, lora_embedding_A and lora_embedding_B of the embedding"]
        rank, found = config.rank_of(name), []
        pairs: list[tuple[str, tuple[int, ...]]] = [
            (module.down, (rank, shape[0] if is_table else shape[1])),
            (module.up, (shape[1] if is_table else shape[0], rank)),
        ]
        pairs += [(stored, shape[:1]) for stored in (module.up_bias, module.magnitude) if stored]
        found += [f"{shown(s)}: has shape {list(self.shape(s))}, wanted {list(want)}" for s, want in pairs if self.shape(s) != want]
        if config.use_dora == (module.magnitude is None):
            found.append(f"use_dora is {str(config.use_dora).lower()}, and lora_magnitude_vector is {'not ' * config.use_dora}there")
        if is_table and config.use_dora:
            found.append("DoRA of the embedding is not implemented")
        if config.lora_bias == (module.up_bias is None):
            found.append(f"lora_bias is {str(config.lora_bias).lower()}, and lora_B.bias is {'not ' * config.lora_bias}there")
        return found

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray, float]:
        """(A [rank, inputs], B [outputs, rank], factor) of a module; the weight gets factor * B @ A."""
        module = self.modules[name]
        assert module.down and module.up
        down, up = self.read(module.down), self.read(module.up)
        return (up.T, down.T, self.config.scale_of(name)) if module.is_table else (down, up, self.config.scale_of(name))

    def _adding(self, name: str, module: Module, begin: int) -> Change:
        def change(rows: np.ndarray, first: int) -> np.ndarray:
            down, up, scale = self.factors(name)
            at = slice(begin + first, begin + first + len(rows))
            rows = rows + (up[at] @ down) * scale
            if module.magnitude:
                rows *= (self.read(module.magnitude)[at] / np.sqrt((rows * rows).sum(1)))[:, None]
            return rows

        return change

    def _adding_bias(self, name: str, stored: str, begin: int) -> Change:
        def change(rows: np.ndarray, first: int) -> np.ndarray:
            return rows + self.read(stored)[begin + first : begin + first + len(rows)] * self.config.scale_of(name)

        return change

    def _replacing(self, stored: str) -> Change:
        def change(rows: np.ndarray, first: int) -> np.ndarray:
            info = self.stored.stored[stored]
            out = np.empty(rows.shape, DTYPES[info.dtype])
            self.stored.pread(info, first, out)
            return out.astype(np.float64)

        return change

    def _rows(self, stored: str) -> Change:
        def change(rows: np.ndarray, first: int) -> np.ndarray:
            new = self.read(stored)
            rows = rows.copy()
            for index, token in enumerate(self.config.token_ids):
                if first <= token < first + len(rows):
                    rows[token - first] = new[index]
            return rows

        return change


def by_part(table: Sequence[Tensor], stored: Sequence[Tensor], changes: Mapping[str, list[Change]]) -> dict[Part, tuple[Change, ...]]:
    """`changes`, which go by the names in `table`, for the parts of the same tensors as they are `stored`."""
    found: dict[Part, tuple[Change, ...]] = {}
    for named, held in zip(table, stored, strict=True):
        for part, place in zip(named.parts, held.parts, strict=True):
            name = named.name if named.name == f"{HEAD}.weight" else part.source
            if changes.get(name):
                found[place] = tuple(changes[name])
    return found


def merged(rows: np.ndarray, first: int, changes: Sequence[Change]) -> np.ndarray:
    """`rows` of a stored tensor after `changes`, in their own type: rounded through float32, as PyTorch rounds float64."""
    with np.errstate(all="ignore"):  # what is not finite is found and named by its reader
        for change in changes:
            wide = change(rows.astype(np.float64), first)
            rows = (wide.astype(np.float32) if rows.dtype.itemsize < 4 else wide).astype(rows.dtype)
    return rows
