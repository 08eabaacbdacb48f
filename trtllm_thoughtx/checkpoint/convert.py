"""Hugging Face checkpoint in, TensorRT-LLM 1.2 checkpoint out: `config.json` and one `rank{r}.safetensors` per rank.

One pass over the source. Each block of rows is read once, checked, cast if need be, and dealt to the ranks that hold it, so
memory does not grow with the model and every output file is written, and hashed, front to back. All findings about values are
collected and reported together; nothing is left behind when there are any.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trtllm_thoughtx.checkpoint import tensor_file
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.outputs import Output
from trtllm_thoughtx.checkpoint.recorded import command_line
from trtllm_thoughtx.checkpoint.tensor_check import STORED_DTYPES
from trtllm_thoughtx.checkpoint.tensor_file import Entry
from trtllm_thoughtx.checkpoint.weights import BLOCK_BYTES, NUMPY_DTYPES, Findings, WeightSource, open_weights
from trtllm_thoughtx.config import DTYPES, ModelConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.families.family import ALL, COLS, KV_ROWS, VOCAB_ROWS, Part, Tensor, stacked
from trtllm_thoughtx.families.trtllm_config import trtllm_config
from trtllm_thoughtx.progress import SILENT, Progress

_STORED = {name: stored for stored, name in STORED_DTYPES.items()}
NUM_BUFFERS = 6


def rank_layers(num_layers: int, pp_size: int) -> list[range]:
    """Layers of each pipeline rank: as equal as possible, the first ranks take one more (as torch.tensor_split does)."""
    base, extra = divmod(num_layers, pp_size)
    starts = [rank * base + min(rank, extra) for rank in range(pp_size + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def _shard(part: Part, rank: int, tp_size: int, config: ModelConfig) -> tuple[int, int, int]:
    """(first row, end row, rows of zeros after them) that a tensor-parallel rank holds of a part."""
    num_rows = part.shape[0]
    if part.split in (ALL, COLS):
        return 0, num_rows, 0
    if part.split == KV_ROWS and config.num_kv_heads < tp_size:  # several ranks hold the same head
        head = rank // (tp_size // config.num_kv_heads)
        return head * config.head_dim, (head + 1) * config.head_dim, 0
    per_rank = -(-num_rows // tp_size)  # only the vocabulary may leave a rest
    begin, end = min(rank * per_rank, num_rows), min((rank + 1) * per_rank, num_rows)
    return begin, end, per_rank - (end - begin) if part.split == VOCAB_ROWS else 0


def rank_shape(tensor: Tensor, rank: int, tp_size: int, config: ModelConfig) -> tuple[int, ...]:
    """Shape of a tensor on one tensor-parallel rank."""
    shapes = []
    for part in tensor.parts:
        begin, end, pad = _shard(part, rank, tp_size, config)
        num_columns = [size // tp_size if part.split == COLS else size for size in part.shape[1:]]
        shapes.append((end - begin + pad, *num_columns))
    return stacked(shapes, tensor.shape[0] if len(tensor.shape) > 2 else None)


@dataclass
class _RankFile:
    """One safetensors file under construction, written and hashed front to back."""

    handle: BinaryIO
    digest: Any = field(default_factory=hashlib.sha256)


class _Lanes:
    """Two threads beside the one that reads: one writes, one hashes. Blocks live in a ring of buffers, so memory is fixed."""

    def __init__(self) -> None:
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._ring: list[tuple[np.ndarray, list[Future[Any]]]] = [(np.empty(BLOCK_BYTES, np.uint8), []) for _ in range(NUM_BUFFERS)]
        self._next = 0

    def buffer(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in the next buffer, once everything sent from there has been written."""
        memory, pending = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        _finish(pending)
        return memory[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def send(self, output: _RankFile, data: bytes | memoryview) -> None:
        """Append `data`, which must stay as it is until the buffer taken last is taken again."""
        pending = self._ring[self._next - 1][1]
        pending += [self._writer.submit(output.handle.write, data), self._hasher.submit(output.digest.update, data)]

    def drain(self) -> None:
        for _, pending in self._ring:
            _finish(pending)

    def __enter__(self) -> _Lanes:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)


def _finish(pending: list[Future[Any]]) -> None:
    for future in pending:
        future.result()
    pending.clear()


def _check_parallel(config: ModelConfig, tp_size: int, pp_size: int) -> None:
    """E001 when the model cannot be split that way."""
    kv, experts = config.num_kv_heads, config.experts
    widths = [config.intermediate_size] if experts is None else [experts.intermediate_size, experts.shared_size]
    rules = [
        (tp_size >= 1 and pp_size >= 1, "tp_size and pp_size must be at least 1"),
        (pp_size <= config.num_layers, f"pp_size {pp_size} is more than the {config.num_layers} layers"),
        (tp_size < 1 or config.num_heads % tp_size == 0, f"tp_size {tp_size} does not divide the {config.num_heads} attention heads"),
        (tp_size < 1 or kv % tp_size == 0 or tp_size % kv == 0, f"tp_size {tp_size} and the {kv} key-value heads do not divide each other"),
        *((tp_size < 1 or width % tp_size == 0, f"tp_size {tp_size} does not divide the MLP width {width}") for width in widths),
        (tp_size * pp_size <= 4096, f"{tp_size * pp_size} ranks are too many"),
    ]
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise ThoughtxError(
            "E001",
            "the model cannot be split that way",
            where=f"--tp_size {tp_size} --pp_size {pp_size}",
            why="; ".join(broken),
            fix="choose a tp_size that divides the heads and the MLP width, and a pp_size of at most the number of layers",
        )


def convert(
    model_dir: Path | Checkpoint,
    output_dir: Path,
    *,
    lora_dir: Path | None = None,
    dtype: str = "auto",
    tp_size: int = 1,
    pp_size: int = 1,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write `model_dir`, with the adapter in `lora_dir` merged, as a TensorRT-LLM checkpoint to `output_dir`; returns a summary.

    `dtype` auto keeps the checkpoint's. E108 lists every tensor with values that are not finite or do not fit `dtype`.
    """
    command = command_line("thoughtx-convert", locals())
    output_dir = Path(output_dir)
    if dtype not in ("auto", *DTYPES):
        raise ThoughtxError(
            "E001", f"unknown dtype {dtype}", where="--dtype", why=f"known are auto, {', '.join(DTYPES)}", fix="choose one of them"
        )
    with open_weights(Checkpoint.open(model_dir, lora_dir=lora_dir), allow_nonfinite=allow_nonfinite, progress=progress) as source:
        config = source.config
        _check_plain(source)
        target = config.dtype if dtype == "auto" else dtype
        _check_parallel(config, tp_size, pp_size)
        settings = {"dtype": target, "tp_size": tp_size, "pp_size": pp_size, "allow_nonfinite": allow_nonfinite}
        summary = {"output_dir": str(output_dir), "model_type": config.family, **settings}
        output = Output(output_dir, source.members, settings, command=command, force=force, progress=progress)
        if output.is_current():
            return {**summary, "up_to_date": True}
        stages = [_stage_tensors(source, layers, stage, pp_size) for stage, layers in enumerate(rank_layers(config.num_layers, pp_size))]
        shapes = [[_entries(stage, rank, tp_size, config, target) for rank in range(tp_size)] for stage in stages]
        num_bytes = sum(tensor_file.num_bytes(rank) for stage in shapes for rank in stage)
        output.prepare(num_bytes)
        with output.writing() as partial:
            _write_ranks(source, target, stages, shapes, partial, output, progress)
            output.write("config.json", json.dumps(trtllm_config(config, dtype=target, tp_size=tp_size, pp_size=pp_size), indent=2) + "\n")
            output.carry(*source.members.carried, *source.members.exits)
    return {
        **summary,
        "up_to_date": False,
        "notes": list(source.notes),
        "exits": str(source.exits) if source.exits else None,
        "num_tensors": sum(len(stage) for stage in stages),
        "num_bytes": num_bytes,
        "files": dict(sorted(output.hashes.items())),
    }


def _write_ranks(
    source: WeightSource,
    dtype: str,
    stages: Sequence[Sequence[tuple[str, Tensor]]],
    shapes: Sequence[Sequence[Sequence[Entry]]],
    folder: Path,
    output: Output,
    progress: Progress,
) -> None:
    """Every rank's file, stage by stage. E108 with all findings about values, once every tensor was looked at."""
    found: dict[str, Findings] = {}
    num_bytes = sum(math.prod(tensor.shape) * NUMPY_DTYPES[tensor.dtype or dtype].itemsize for stage in stages for _, tensor in stage)
    with progress.stage("convert", num_bytes, "bytes") as step:
        for stage, (tensors, entries_of_ranks) in enumerate(zip(stages, shapes, strict=True)):
            names = [f"rank{stage * len(entries_of_ranks) + rank}.safetensors" for rank in range(len(entries_of_ranks))]
            with ExitStack() as stack:
                ranks = [_RankFile(stack.enter_context((folder / name).open("xb"))) for name in names]
                lanes = stack.enter_context(_Lanes())
                for rank, entries in zip(ranks, entries_of_ranks, strict=True):
                    lanes.send(rank, tensor_file.header(entries))
                for _, tensor in tensors:
                    findings = _deal(source, tensor, ranks, tensor.dtype or dtype, lanes, step, keep=not found)
                    if findings:
                        found[tensor.name] = findings
                lanes.drain()
            output.hashes |= {name: rank.digest.hexdigest() for name, rank in zip(names, ranks, strict=True)}
    source.refuse(found, dtype)


def _check_plain(source: WeightSource) -> None:
    """E103 for a TensorRT-LLM checkpoint with quantized layers; E102 and its kin for exits that cannot be used."""
    if source.config.quantization is not None:
        why = "it is a TensorRT-LLM checkpoint with quantized layers, whose numbers are kept as they are"
        fix = "use it as it is: thoughtx-build and trtllm-build read it"
        raise ThoughtxError("E103", "the checkpoint is already quantized", where=str(source.path), why=why, fix=fix)
    _ = source.exits


def _stage_tensors(source: WeightSource, layers: range, stage: int, pp_size: int) -> list[tuple[str, Tensor]]:
    """(name in the rank's file, tensor) of one pipeline stage; layer numbers in files count from the stage's first layer."""
    held = []
    for tensor in source.tensors():
        if tensor.layer is None:
            if stage == (0 if tensor.name == source.tensors()[0].name else pp_size - 1):
                held.append((tensor.name, tensor))
        elif tensor.layer in layers:
            held.append((f"transformer.layers.{tensor.layer - layers.start}.{tensor.suffix}", tensor))
    return held


def _entries(tensors: Sequence[tuple[str, Tensor]], rank: int, tp_size: int, config: ModelConfig, dtype: str) -> list[Entry]:
    """What a rank's file holds."""
    return [(name, _STORED[tensor.dtype or dtype], rank_shape(tensor, rank, tp_size, config)) for name, tensor in tensors]


def _deal(source: WeightSource, tensor: Tensor, outputs: list[_RankFile], dtype: str, lanes: _Lanes, step: Any, *, keep: bool) -> Findings:
    """Stream one tensor to all ranks of its stage; without `keep`, or once values are found wrong, only look at the values."""
    tp_size, found, kind = len(outputs), Findings(), NUMPY_DTYPES[dtype]
    for part in tensor.parts:
        shards = [_shard(part, rank, tp_size, source.config) for rank in range(tp_size)]
        for begin, end in source.blocks(part):
            block = lanes.buffer((end - begin, *part.shape[1:]), kind)
            found.add(source.read_rows(part, begin, end, block))
            step.advance(block.nbytes)
            for rank, (first, last, _) in enumerate(shards):
                rows = block[max(first - begin, 0) : max(min(last, end) - begin, 0)]
                if part.split == COLS and tp_size > 1:
                    width = part.shape[1] // tp_size
                    rows = np.ascontiguousarray(rows[:, rank * width : (rank + 1) * width])
                if rows.size and keep and not found:
                    lanes.send(outputs[rank], rows.reshape(-1).view(np.uint8).data)
        for rank, (_, _, num_zero_rows) in enumerate(shards):
            if num_zero_rows:
                lanes.send(outputs[rank], bytes(num_zero_rows * math.prod(part.shape[1:]) * kind.itemsize))
    return found
