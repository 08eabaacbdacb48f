"""Checkpoint directories as data: what kind one is, which safetensors shards it has, and the tensors in them.

Nothing is read but names, shapes and places: index and shards must agree in every name before anyone looks at a value. Which
tensors a model ought to have is the business of `families` and `weights`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_thoughtx.checkpoint.header import CONVERT, MAX_TENSORS, ORIGINAL, TENSOR_NAME, read_header, unread
from trtllm_thoughtx.checkpoint.header import parse_header as parse_header
from trtllm_thoughtx.errors import ThoughtxError, counted, listed, shown
from trtllm_thoughtx.files import open_inside, read_json

if TYPE_CHECKING:
    import numpy as np

EXPONENT_MASKS = {
    **{"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF << 52},
    **{"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7C},  # e4m3fn has no infinity, and one NaN: all ones
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_TENSORS = ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
KINDS = {  # of what a user gives: directories, then files
    "huggingface": "Hugging Face directory",
    "tensorrt-llm": "TensorRT-LLM checkpoint",
    "engine": "engine directory",
    "onnx": ".onnx file",
    "plan": ".engine file",
}
HUGGING_FACE, CHECKPOINTS = ("huggingface",), ("huggingface", "tensorrt-llm")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_WEIGHTS = (*PICKLES, ".gguf", ".h5", ".msgpack", ".npz")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor and where its bytes lie: `num_bytes` bytes at `offset`, counted from the start of `file`."""

    name: str
    dtype: str  # F32, F16, BF16, I8, ...: a key of header.DTYPE_BYTES
    shape: tuple[int, ...]
    file: str
    offset: int
    num_bytes: int


def read_tensors(root: Path, files: Sequence[str]) -> dict[str, TensorInfo]:
    """The tensors of several safetensors files of one directory; a name in two of them is E106."""
    found: dict[str, TensorInfo] = {}
    for file in files:
        where = shown(str(Path(root) / file), 400)
        with open_inside(root, file) as handle:
            for name, (dtype, shape, begin, end) in read_header(handle, where).items():
                if name in found:
                    both = f"{shown(found[name].file)} and {shown(file)}"
                    fix = f"download {both} and {INDEX} again, all from one revision of the model"
                    raise _disagree([f"tensor {shown(name)!r} is in {both}"], Path(root), fix)
                found[name] = TensorInfo(name, dtype, shape, file, begin, end - begin)
    return found


# --- a directory -----------------------------------------------------------------------------------------------------


def model_files(root: Path) -> tuple[list[str], dict[str, TensorInfo]]:
    """The safetensors files of a Hugging Face directory that hold its model, in name order, and the tensors in them.

    With an index those that it names, which must agree with it in every name (E106); without one model.safetensors. Others, such
    as adapters, value heads or copies in another layout, do not belong to the model: `ignored_files`.
    """
    root = Path(root)
    present = _names(root)
    if INDEX not in present:
        if SINGLE in present:
            return [SINGLE], read_tensors(root, [SINGLE])
        raise _without_index(root, present)
    weight_map = _weight_map(root)
    wanted = set(weight_map.values())
    if SINGLE in present - wanted:
        what = f"{SINGLE} is there, and {INDEX} names other files: {', '.join(map(shown, sorted(wanted)[:5]))}"
        raise _disagree([what], root, f"keep one of the two: remove {SINGLE}, or {INDEX} and the files that it names")
    absent = sorted(wanted - present)
    if absent:
        problems = [f"{shown(name)} is named in the index but missing" for name in absent]
        raise _disagree(problems, root, f"download into this directory: {', '.join(map(shown, absent[:20]))}")
    problems = []
    tensors = read_tensors(root, sorted(wanted))
    for name, file in sorted(weight_map.items()):
        if name not in tensors:
            problems.append(f"tensor {shown(name)!r} is in the index but not in {shown(file)}")
        elif tensors[name].file != file:
            problems.append(f"tensor {shown(name)!r} is in {shown(tensors[name].file)}, not in {shown(file)} as the index says")
    surplus = sorted(tensors.keys() - weight_map)
    problems += [f"tensor {shown(name)!r} is in {shown(tensors[name].file)} but not in the index" for name in surplus]
    if problems:
        raise _disagree(problems, root, f"download {INDEX} and the files that it names again, all from one revision of the model")
    return sorted(wanted), tensors


def ignored_files(root: Path, shards: Sequence[str]) -> list[str]:
    """Safetensors files beside `shards` that hold no part of the model."""
    return sorted(name for name in _names(Path(root)) if name.endswith(".safetensors") and name not in shards)


def _without_index(root: Path, present: set[str]) -> ThoughtxError:
    """Why a directory with neither model.safetensors nor an index is refused."""
    shards = sorted(name for name in present if name.endswith(".safetensors") and SHARD_NAME.fullmatch(name))
    own = [name for name in shards if not name.startswith("adapter_")]
    if own:
        fix = f"download {INDEX} as well; it says which tensor is in which file"
        if len(own) == 1 and not re.search(r"-of-\d+", own[0]):
            fix = f"rename {shown(own[0])} to {SINGLE} if it holds the whole model"
        return _disagree([f"neither {SINGLE} nor {INDEX} is there, but: {', '.join(map(shown, own[:20]))}"], root, fix)
    others = sorted(name for name in present if name.endswith(OTHER_WEIGHTS))
    if others and not shards:
        return _other_format(f"the weights are not in safetensors files: {', '.join(map(shown, others[:5]))}", others[0], str(root))
    why, fix = _resemblance(root, present, HUGGING_FACE)
    return _unwanted(
        f"there are no weights: neither {SINGLE} nor {INDEX}", root, why, fix or f"download {SINGLE}, or {INDEX} and its files"
    )


def _weight_map(root: Path) -> dict[str, str]:
    index = read_json(root, INDEX, code="E106")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > MAX_TENSORS:
        raise _disagree([f"weight_map of {INDEX} is not a map of 1 to {MAX_TENSORS:,} tensors"], root, f"download {INDEX} again")
    for name, file in weight_map.items():
        where = f"{shown(str(root / INDEX), 400)}, weight_map entry {shown(name)!r}"
        if not isinstance(file, str) or not TENSOR_NAME.fullmatch(name):
            what = f"weight_map maps {shown(name)!r} to {shown(file)!r}; tensor name to file name is wanted"
            raise _disagree([what], root, f"download {INDEX} again")
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", file) and file.endswith(OTHER_WEIGHTS):
            raise _other_format(f"the index names a file that is not safetensors: {shown(file)}", file, where)
        if not SHARD_NAME.fullmatch(file):
            why = "a shard is a plain file NAME.safetensors beside its index, so that an index cannot reach other files"
            fix = "do not use this checkpoint, or correct its index"
            raise ThoughtxError("E104", f"the index names {shown(file)!r}", where=where, why=why, fix=fix)
    return weight_map


def kind_of(path: Path, wanted: Sequence[str] = tuple(KINDS)) -> str:
    """Which of `wanted`, keys of `KINDS`, is at `path`. Else E101, whose advice is for a command that takes `wanted`."""
    return kind_and_config(Path(path), wanted)[0]


def kind_and_config(path: Path, wanted: Sequence[str] = tuple(KINDS)) -> tuple[str, dict[str, Any]]:
    """(kind, config.json of a directory)."""
    kind, config = _recognized(path, wanted)
    if kind not in wanted:
        raise _unwanted(f"this is {_one(kind)}", path, f"{_any(wanted)} is needed", _instead(kind, path, wanted))
    return kind, config


def adapter_config(path: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT directory. E101 for another path, E109 where its tensors are a pickle."""
    give, is_dir = f"give a PEFT directory: {' and '.join(ADAPTER)}", os.path.isdir(path)
    present = _names(path) if is_dir else set()
    if ADAPTER_CONFIG not in present:
        why = f"it has no {ADAPTER_CONFIG}" if is_dir else "no directory is there, and nothing is downloaded"
        raise _unwanted("this is not a PEFT directory", path, why, give)
    if ADAPTER_TENSORS not in present:
        if pickles := sorted(name for name in present if name.endswith(PICKLES)):
            fix = "pickle files can run code and are never read; on a machine that may run it: "
            fix += "peft.PeftModel.from_pretrained(BASE, DIR).save_pretrained(NEW_DIR)"
            raise unread(f"the tensors of the adapter are a pickle: {shown(pickles[0])}", shown(str(path), 400), fix)
        raise _unwanted(f"there is no {ADAPTER_TENSORS}", path, "the adapter has no tensors", give)
    return read_json(path, ADAPTER_CONFIG)


def _recognized(path: Path, wanted: Sequence[str]) -> tuple[str, dict[str, Any]]:
    give = f"give {_any(wanted)}" + (": what thoughtx-build --output_dir wrote" if tuple(wanted) == ("engine",) else "")
    if os.path.isfile(path):
        kinds = {".onnx": "onnx", ".engine": "plan", ".plan": "plan"}
        if path.suffix in kinds:
            return kinds[path.suffix], {}
        if path.suffix in OTHER_WEIGHTS:
            raise _other_format(f"this is a {path.suffix} file", path.name, str(path))
        is_part = path.suffix == ".safetensors" or path.name == "config.json"
        fix = f"give the directory that holds it: {shown(str(path.parent), 400)}" if is_part else give
        raise _unwanted("this is a single file", path, f"{_any(wanted)} is needed", fix)
    if not os.path.isdir(path):
        if os.path.lexists(path):
            raise _unwanted("this is neither a directory nor a regular file", path, "a broken link, FIFO or device", give)
        is_hub = "huggingface" in wanted and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
        hub = "if it is a name on the Hugging Face Hub, download the model first and give its local directory"
        there = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
        fix = hub if is_hub else f"correct the path: of it {shown(str(there), 300)} exists"
        raise _unwanted("the path does not exist", path, "nothing is there, and nothing is downloaded", fix)
    present = _names(path)
    if "config.json" not in present:
        why, fix = _resemblance(path, present, wanted)
        raise _unwanted("there is no config.json", path, why, fix or give)
    config = read_json(path, "config.json")
    if isinstance(config, dict):
        if {"pretrained_config", "build_config"} & config.keys():
            return "engine", config
        if "architecture" in config:
            return "tensorrt-llm", config
        if {"model_type", "architectures"} & config.keys():
            return "huggingface", config
    why = "it has neither model_type (Hugging Face) nor architecture (TensorRT-LLM) nor pretrained_config (engine)"
    raise _unwanted("config.json is not that of a checkpoint or an engine", path, why, give)


def _one(kind: str) -> str:
    return f"{'an' if KINDS[kind][0] in '.e' else 'a'} {KINDS[kind]}"


def _any(kinds: Sequence[str]) -> str:
    *most, last = map(_one, kinds)
    return f"{', '.join(most)} or {last}" if most else last


def _instead(kind: str, path: Path, wanted: Sequence[str]) -> str:
    """What to give for something that is another kind than `wanted`."""
    if "engine" in wanted and kind in ("onnx", "plan"):
        is_inside = (path.parent / "config.json").is_file()
        return f"give the directory that holds it: {shown(str(path.parent), 400)}" if is_inside else "give the engine that it belongs to"
    if "engine" in wanted:
        other = ", or give the Hugging Face directory that it was converted from" if "huggingface" in wanted else ""
        return f"build an engine of it: thoughtx-build --checkpoint_dir {shown(str(path), 400)} --output_dir ENGINE{other}"
    made = "converted" if kind == "tensorrt-llm" else "built"
    return f"give the {' or '.join(KINDS[one] for one in wanted)} that it was {made} from"


def _names(root: Path) -> set[str]:
    try:
        with os.scandir(root) as entries:
            return {entry.name for entry in entries}
    except OSError as error:
        fix = "check the path and its permissions"
        raise _unwanted("the directory cannot be listed", root, os.strerror(error.errno or 0), fix) from None


def _resemblance(root: Path, present: set[str], wanted: Sequence[str]) -> tuple[str, str]:
    """Why a directory without a config or weights may have been given, and which of `wanted` to give ("" when it cannot be told)."""
    if not present:
        return "the directory is empty", ""
    inner = root / "snapshots" if "snapshots" in present else root
    models = sorted(name for name in _names(inner) if _holds(inner / name, wanted)) if inner.is_dir() else []
    give = f"give {shown(str(inner / models[-1]), 400)}" if models else ""
    if len(models) > 1:
        give = f"give one of the {len(models)} directories in {shown(str(inner), 400)}: {', '.join(shown(n, 60) for n in models[:8])}"
    if inner != root and "huggingface" in wanted:
        why = "it is an entry of the Hugging Face cache: the model is in a directory under its snapshots/"
        return why, give or "download the model into it again: none of its snapshots has a config.json"
    if "adapter_config.json" in present and "huggingface" in wanted:
        fix = (
            "give the base model that it was trained on; thoughtx-convert --model_dir BASE --lora_dir THIS --output_dir CKPT merges the two"
        )
        return "it is a LoRA adapter: a model's changes, and not the model", fix
    if models:
        return f"it holds {len(models)} such director{'y' if len(models) == 1 else 'ies'}", give
    return f"it holds {', '.join(shown(n, 60) for n in sorted(present)[:8])}{', ...' if len(present) > 8 else ''}", ""


def _holds(path: Path, wanted: Sequence[str]) -> bool:
    if not os.path.isfile(path / "config.json"):
        return False
    try:
        return kind_of(path, wanted) in wanted
    except ThoughtxError:
        return False


def count_nonfinite(array: np.ndarray) -> int:
    """How many NaN and infinities; a few MiB of temporaries whatever the size. 0 for integers."""
    import numpy as np

    mask = EXPONENT_MASKS.get(array.dtype.name)
    if mask is None:
        return 0
    bits = np.dtype(f"uint{8 * array.dtype.itemsize}").type
    flat = array.reshape(-1).view(bits)
    return sum(int(np.count_nonzero((flat[i : i + (1 << 20)] & bits(mask)) == bits(mask))) for i in range(0, flat.size, 1 << 20))


# --- refusals --------------------------------------------------------------------------------------------------------


def _unwanted(what: str, path: Path, why: str, fix: str) -> ThoughtxError:
    return ThoughtxError("E101", what, where=shown(str(path), 400), why=why, fix=fix)


def _other_format(what: str, name: str, where: str) -> ThoughtxError:
    return unread(what, shown(where, 400), CONVERT if name.endswith(PICKLES) else ORIGINAL)


def _disagree(problems: list[str], root: Path, fix: str) -> ThoughtxError:
    what = f"the weight files do not agree with each other: {counted(len(problems), 'problem')}"
    return ThoughtxError("E106", what, where=shown(str(root), 400), why=listed(problems), fix=fix)
