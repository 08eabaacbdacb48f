"""`WeightSource`: the tensors of a checkpoint under TensorRT-LLM's names, whichever of the two formats it is stored in.

A Hugging Face directory and the TensorRT-LLM directory converted from it give the same names, shapes and bytes. Names and
shapes are all checked when the source is opened; values (finite, in range of the wanted type) when they are read. Reading goes
through plain `pread` into the caller's array: no mapped pages pile up, so memory is what the caller allocates.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trtllm_thoughtx.checkpoint.adapter import Adapter, Change, by_part, merged
from trtllm_thoughtx.checkpoint.directory import count_nonfinite
from trtllm_thoughtx.checkpoint.exits import ExitWeights
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.tensor_check import EMBEDDING, HEAD, STORED_DTYPES, check_tensors, refuse_unexplained
from trtllm_thoughtx.checkpoint.tensor_file import DTYPES
from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, listed
from trtllm_thoughtx.families import Part, Tensor, in_trtllm_terms, tensors_of
from trtllm_thoughtx.families.fields import Fields
from trtllm_thoughtx.families.formats import FP8
from trtllm_thoughtx.families.hf_config import dtype_of, model_config_from_hf
from trtllm_thoughtx.families.quantization import with_quantization
from trtllm_thoughtx.families.trtllm_config import model_config_from_trtllm
from trtllm_thoughtx.progress import SILENT, Progress

NUMPY_DTYPES = {name: DTYPES[stored] for stored, name in STORED_DTYPES.items()}
# What is read, by the type's name in a safetensors file; float64 is always rounded.
READ_DTYPES = {stored: NUMPY_DTYPES[name] for stored, name in STORED_DTYPES.items()} | {"F64": np.dtype(np.float64)}
BLOCK_BYTES = 8 << 20  # holds the longest row that the bounds on sizes allow
_CAST_ELEMENTS = 1 << 16  # a piece whose temporaries stay in the processor's cache


@dataclass
class Findings:
    """What is wrong with the values read so far."""

    num_nonfinite: int = 0
    num_overflowed: int = 0  # finite, but beyond the range of the wanted type
    num_differing: int = 0  # rows of a tied model's stored head that are not the embedding's

    def __bool__(self) -> bool:
        return bool(self.num_nonfinite or self.num_overflowed or self.num_differing)

    def add(self, other: Findings) -> None:
        self.num_nonfinite += other.num_nonfinite
        self.num_overflowed += other.num_overflowed
        self.num_differing += other.num_differing


@functools.cache
def _every_value(source: str, target: str) -> np.ndarray:
    """The bits in `target` of each of the 65,536 values of a 16-bit type: faster than computing them for every element."""
    values = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(NUMPY_DTYPES[source]).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return _bits(values.astype(NUMPY_DTYPES[target]))


def cast_into(source: np.ndarray, target: np.ndarray) -> int:
    """Round `source` to the type of `target` (nearest, ties to even); both flat. Returns how many finite values became infinite."""
    num_overflowed = 0
    table = _every_value(source.dtype.name, target.dtype.name) if source.itemsize == 2 else None
    for begin in range(0, source.size, _CAST_ELEMENTS):
        piece, result = source[begin : begin + _CAST_ELEMENTS], target[begin : begin + _CAST_ELEMENTS]
        if table is not None:
            np.take(table, _bits(piece).astype(np.intp), out=_bits(result), mode="clip")
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                np.copyto(result, piece, casting="same_kind")
        if (result.itemsize == 2 or piece.itemsize > result.itemsize) and (num_bad := count_nonfinite(result)):
            num_overflowed += num_bad - count_nonfinite(piece)
    return num_overflowed


class _Scratch(threading.local):
    """Room for one block as stored, before it is cast; each reading thread has its own."""

    def __init__(self) -> None:
        self.block = np.empty(2 * BLOCK_BYTES, np.uint8)  # a block in float64 takes twice as much


class WeightSource:
    """An opened checkpoint. Use as a context manager, or call `close`. Several threads may read from it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        table: tuple[Tensor, ...],
        *,
        allow_nonfinite: bool,
        notes: tuple[str, ...] = (),
        adapter: Adapter | None = None,
        changes: Mapping[Part, Sequence[Change]] | None = None,
    ) -> None:
        """`changes`: what the `adapter` makes of the rows of a part."""
        self.checkpoint, self.config, self.adapter = checkpoint, config, adapter
        self.path, self.kind, self.members = checkpoint.path, checkpoint.kind, checkpoint.members
        self.notes = notes  # what a person should know about how this checkpoint was read
        self.allow_nonfinite = allow_nonfinite
        self._tensors = {t.name: t for t in table}
        self._stored = checkpoint.stored
        self._scratch = _Scratch()
        # A tied checkpoint may store the head as well; it is dropped, once it has been seen to be the embedding.
        self._changes = changes or {}
        self._stored_head = HEAD if config.tied and not config.has_head and HEAD in self._stored else None
        for one in [checkpoint, *([checkpoint.adapter] if checkpoint.adapter else [])]:
            for name in one.shards:  # before threads ask for them
                one.handle(name)

    def names(self) -> tuple[str, ...]:
        """TensorRT-LLM's names, layer-major; a tied model has no `lm_head.weight`, unless that is quantized."""
        return tuple(name for name in self._tensors if name != HEAD or self.config.has_head)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of a TensorRT-LLM checkpoint, layer-major, with the head of a tied model."""
        return tuple(self._tensors.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor as the checkpoint holds it."""
        stored = self._tensors[name].stored
        dtype = self._tensors[name].dtype or self.config.dtype
        return math.prod(self.shape(name)) * (DTYPES[stored] if stored else NUMPY_DTYPES[dtype]).itemsize

    def read(self, name: str, dtype: str | None = None) -> np.ndarray:
        """One tensor in `dtype` (None: the checkpoint's), C-contiguous, [out, in]. E108 on values that are not finite numbers.

        Tensors of a quantized layer come as they are stored, whatever `dtype`.
        """
        tensor = self._tensors[name]
        if tensor.stored:
            return self._read_fixed(tensor)
        dtype = dtype or tensor.dtype or self.config.dtype
        out = np.empty(tensor.shape, NUMPY_DTYPES[dtype])
        findings, row = Findings(), 0
        rows = out.reshape(-1, *tensor.parts[0].shape[1:])
        for part in tensor.parts:
            for begin, end in self.blocks(part):
                findings.add(self.read_rows(part, begin, end, rows[row + begin : row + end]))
            row += part.shape[0]
        self.refuse({name: findings} if findings else {}, dtype)
        return out

    def _read_fixed(self, tensor: Tensor) -> np.ndarray:
        """A tensor of a quantized layer. E108 when a scale is not a positive number, an 8-bit float no number, an order no permutation."""
        assert tensor.stored
        out = np.empty(tensor.shape, DTYPES[tensor.stored])
        self.checkpoint.pread(self._stored[tensor.name], 0, out)
        if tensor.stored in STORED_DTYPES or tensor.stored == FP8.stored:
            wide = out.astype(np.float32)
            good = np.isfinite(wide) & ((wide > 0) | tensor.name.endswith((".weight", ".zero")))
            if not good.all():
                raise ThoughtxError(
                    "E108",
                    f"{tensor.name}: {np.count_nonzero(~good)} values cannot be used",
                    where=str(self.path),
                    why="a scale must be a positive number, and a weight a finite one",
                    fix="copy the checkpoint again, or make it again from the original (thoughtx-calibrate or thoughtx-convert)",
                )
        if tensor.stored == "I32" and not np.array_equal(np.sort(out), np.arange(out.size)):
            raise ThoughtxError(
                "E108",
                f"{tensor.name} is not an order of the layer's inputs",
                where=str(self.path),
                why=f"it must name each of the channels 0 to {out.size - 1} once",
                fix="copy the checkpoint again, or make it again from the original: thoughtx-convert --force",
            )
        return out

    def blocks(self, part: Part) -> Iterator[tuple[int, int]]:
        """Row ranges that cover a part; none takes more than `BLOCK_BYTES`, in any dtype."""
        step = BLOCK_BYTES // (4 * math.prod(part.shape[1:]))
        for begin in range(0, part.shape[0], step):
            yield begin, min(begin + step, part.shape[0])

    def read_rows(self, part: Part, begin: int, end: int, into: np.ndarray) -> Findings:
        """One of the `blocks` of a part, cast to the dtype of `into` (C-contiguous). Counts what is wrong with the values."""
        info = self._stored[part.source]
        dtype = READ_DTYPES[info.dtype]
        raw = into if dtype == into.dtype else self._scratch.block[: into.size * dtype.itemsize].view(dtype).reshape(into.shape)
        self.checkpoint.pread(info, part.first_row + begin, raw)
        findings = Findings()
        if not self.allow_nonfinite:
            findings.num_nonfinite = count_nonfinite(raw)
        if self._stored_head and part.source in (EMBEDDING, "model.embed_tokens.weight"):
            head = self._stored[self._stored_head]
            other = np.empty(into.shape, READ_DTYPES[head.dtype])
            self.checkpoint.pread(head, begin, other)
            if head.dtype != info.dtype or not np.array_equal(_bits(other), _bits(raw)):
                findings.num_differing += end - begin
        if part in self._changes:
            raw[...] = merged(raw, begin, self._changes[part])
            findings.num_nonfinite = 0 if self.allow_nonfinite else count_nonfinite(raw)
        if raw is not into:
            findings.num_overflowed = cast_into(raw.reshape(-1), into.reshape(-1))
        return findings

    def refuse(self, found: dict[str, Findings], dtype: str) -> None:
        """E108 / E107 listing every tensor in `found`; nothing when it is empty."""
        differing = [name for name, f in found.items() if f.num_differing]
        if differing:
            raise ThoughtxError(
                "E107",
                "the model is tied, but its stored lm_head.weight is not the embedding",
                where=str(self.path),
                why="tie_word_embeddings is true, and which of the two is meant is not written down",
                fix="set tie_word_embeddings to false in config.json; only if the stored head is a leftover, remove it from its file "
                "(load_file and save_file of safetensors.torch)",
            )
        lines = []
        for name, f in found.items():
            if f.num_nonfinite:
                lines.append(f"{name}: {f.num_nonfinite} values are NaN or infinite")
            if f.num_overflowed:
                lines.append(f"{name}: {f.num_overflowed} values are beyond the range of {dtype}")
        if lines:
            overflows = any(f.num_overflowed for f in found.values())
            raise ThoughtxError(
                "E108",
                f"{len(found)} tensor(s) hold values that cannot be used",
                where=str(self.path),
                why=listed(lines),
                fix="give a --dtype with more range: bfloat16 or float32"
                if overflows
                else "download the checkpoint again, or ask its authors: such weights are damage. thoughtx-convert --allow_nonfinite "
                "keeps them as they are, for tensorrt-llm; no engine is built from them here",
            )

    @functools.cached_property
    def exits(self) -> ExitWeights:
        """The early exits that the checkpoint carries, checked; none (all None) where it has no such files."""
        return self.checkpoint.exits(self.config)

    def verify_unchanged(self) -> None:
        self.members.verify_unchanged()

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> WeightSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.itemsize}"))


def open_weights(path: Path | Checkpoint, *, allow_nonfinite: bool = False, progress: Progress = SILENT) -> WeightSource:
    """Open a Hugging Face or an unsharded TensorRT-LLM directory. All names and shapes are checked first (E107 lists them all).

    What a person should know about how it is read goes to `progress`, and is in `notes`.
    """
    checkpoint, notes = Checkpoint.open(path), list[str]()
    raw, where = checkpoint.raw, checkpoint.where
    if checkpoint.kind == "huggingface":
        config = model_config_from_hf(raw, where)  # an unsupported model says so before its files are looked at
        stored = checkpoint.stored
        notes = checkpoint.members.notes()
        refuse_unexplained(stored, checkpoint.path)
        if any(info.dtype == "F64" for info in stored.values()):
            notes.append("weights in float64 are rounded: no engine computes in it")
        used = {STORED_DTYPES.get(info.dtype, "float32") for info in stored.values() if info.dtype in READ_DTYPES}
        config = replace(config, dtype=dtype_of(Fields(raw, where), used.pop() if len(used) == 1 else None))
        table = named = tensors_of(config)
    else:
        tp, pp, cp = checkpoint.mapping
        if tp * pp * cp != 1:
            raise ThoughtxError(
                "E103",
                f"the checkpoint is split for {tp * pp * cp} ranks",
                where=where,
                why=f"tp_size {tp}, pp_size {pp}, cp_size {cp}; only TensorRT-LLM runs sharded checkpoints",
                fix="convert the original model in one piece: thoughtx-convert --tp_size 1 --pp_size 1, which are the defaults",
            )
        config = model_config_from_trtllm(raw, where)
        stored = checkpoint.stored
        if config.quantization is None:
            refuse_unexplained(stored, checkpoint.path)
        if "tie_word_embeddings" not in raw and HEAD not in stored:
            config = replace(config, tied=True)  # TensorRT-LLM takes a missing head for the embedding
        named = tensors_of(config)
        table = with_quantization(in_trtllm_terms(named, tied=config.tied), config)
    check_tensors(table, stored, config, checkpoint.path)
    adapter, changes = None, dict[Part, tuple[Change, ...]]()
    if checkpoint.adapter is not None:
        _check_plain(config, checkpoint)
        adapter = Adapter(checkpoint.adapter, named, config.tied)
        changes = by_part(named, table, adapter.changes)
        if config.tied and not adapter.tied:
            notes.append("the adapter changes the embedding and the tied head differently: the merged model has a head of its own")
            config = replace(config, tied=False)
        if checkpoint.members.exits:
            notes.append("the early exits of the checkpoint were fitted without the adapter: thoughtx-calibrate fits them again")
    if config.sliding_window is not None and config.sliding_window == config.longest:
        notes.append(f"layers attend to a sliding window of {config.sliding_window} positions: thoughtx-build --max_seq_len ends there")
    for note in notes:
        progress.note(f"note: {note}")
    return WeightSource(checkpoint, config, table, allow_nonfinite=allow_nonfinite, notes=tuple(notes), adapter=adapter, changes=changes)


def _check_plain(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """E103 for a base whose numbers are quantized."""
    if config.quantization is not None:
        why = "an adapter is added to numbers, and these would have to be rounded again"
        fix = "merge it into the original and quantize that: thoughtx-calibrate --model_dir ORIGINAL --lora_dir ADAPTER"
        what = "an adapter cannot be merged into a quantized checkpoint"
        raise ThoughtxError("E103", what, where=str(checkpoint.path), why=why, fix=fix)
