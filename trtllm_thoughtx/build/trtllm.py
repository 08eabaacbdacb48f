"""`thoughtx-build --backend tensorrt-llm`: a checkpoint becomes an engine directory of TensorRT-LLM 1.2's own, by its `trtllm-build`.

The command line is made from the same limits as other builds and checked against a table of flags, so it is right on a host without the
package as well: there it is what the refusal says to type. What 1.2 cannot do is refused with the reason, before any work:

- chunked attention and sinks: its window slides where ours is cut into chunks, StreamingLLM asserts, and sink tokens are not honoured by
  its kernels
- stages, exit heads and drafts: its engine is one plan a rank with logits alone
- quantized formats but FP8: it wants their bytes in an order that its own tools make on a GPU
"""

from __future__ import annotations

import importlib.metadata
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_thoughtx import report
from trtllm_thoughtx.build.options import OPTIONS, Given, refuse
from trtllm_thoughtx.build.trtllm_flags import parse
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.checkpoint.outputs import Output
from trtllm_thoughtx.config import AUTO, ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.families.trtllm_config import model_config_from_trtllm
from trtllm_thoughtx.progress import SILENT, Progress

NAME, COMMAND, PACKAGE, RELEASE = "tensorrt-llm", "trtllm-build", "tensorrt_llm", "1.2."
MAX_NUM_TOKENS = 8192  # of one iteration
LAST_LINES = 12
LIMITS = ("max_batch_size", "max_input_len", "max_seq_len")
NO_CHUNKS = "TensorRT-LLM 1.2 has no chunk mask: its attention window slides, and sink tokens are not honoured by its kernels"
ONE_PLAN = "its engine is one plan a rank, not cut into stages"
# Flags of thoughtx-build that mean nothing here, and why
NOT_HERE = {
    "early_exit_layers": ONE_PLAN,
    "num_stages": ONE_PLAN,
    "plugin": "its attention is a plugin of its own",
    "plugin_library": "its attention is a plugin of its own",
    "compute_capabilities": "an engine is for the GPU that builds it",
    "kv_cache_dtype": "the checkpoint says which type its KV cache has",
    "max_lora_rank": f"{COMMAND} has flags of its own for adapters",
    "optimization_level": f"{COMMAND} has no such flag",
}


def is_wanted(given: Mapping[str, Any]) -> bool:
    """Whether this backend alone is asked for; with others, `build.options` refuses it."""
    names = given.get("backend")
    return names == NAME or (isinstance(names, (list, tuple)) and tuple(dict.fromkeys(names)) == (NAME,))


def build_trtllm(
    checkpoint_dir: Path | Checkpoint,
    output_dir: Path,
    given: Mapping[str, Any],
    *,
    command: str,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run `trtllm-build` on a TensorRT-LLM checkpoint. E101 and E103 for what 1.2 cannot build, E201 with the command to type where it is
    not installed, E205 with its last lines when it fails. `dry_run`: the command alone."""
    checkpoint = Checkpoint.open(checkpoint_dir)
    config, limits = _checked(checkpoint, given)
    num_ranks = len(checkpoint.shards)
    words = arguments(checkpoint.path, output_dir, config, limits, num_ranks)
    notes = _notes(checkpoint, config)
    for note in notes:
        progress.note(f"note: {note}")
    plan = {
        "backend": NAME,
        "checkpoint_dir": str(checkpoint.path),
        "output_dir": str(output_dir),
        "limits": limits,
        "num_ranks": num_ranks,
        "trtllm_build": [COMMAND, *words],
        "notes": notes,
    }
    if dry_run:
        return {**plan, "dry_run": True}
    recorded = {NAME: {"arguments": arguments(Path("."), Path("."), config, limits, num_ranks)}}
    output = Output(output_dir, checkpoint.members, recorded, command=command, force=force, progress=progress)
    output.packages |= {PACKAGE}
    if output.is_current():
        return {**plan, "up_to_date": True}
    program = _program(words)
    output.prepare(2 * sum(info.num_bytes for info in checkpoint.tensors()))
    with output.writing() as partial:
        words[words.index("--output_dir") + 1] = str(partial)
        with progress.stage(COMMAND):
            _run([program, *words], partial, num_ranks)
        output.carry(*(name for name in checkpoint.members.carried if not (partial / name).exists()))
    return {**plan, "up_to_date": False, "files": {path.name: path.stat().st_size for path in sorted(output_dir.iterdir())}}


def arguments(checkpoint_dir: Path, output_dir: Path, config: ModelConfig, limits: Mapping[str, int], num_ranks: int) -> list[str]:
    """What `trtllm-build` is called with. Every choice is written out, so that a default which changes changes nothing here."""
    is_fp8 = config.quantization is not None and config.quantization.algo is not None
    values: dict[str, Any] = {
        "checkpoint_dir": checkpoint_dir,
        "output_dir": output_dir,
        **{name: limits[name] for name in LIMITS},
        "max_beam_width": 1,
        "max_num_tokens": max(limits["max_input_len"], min(MAX_NUM_TOKENS, limits["max_batch_size"] * limits["max_input_len"])),
        "kv_cache_type": "paged",
        "remove_input_padding": "enable",
        "context_fmha": "enable",
        "use_paged_context_fmha": "enable",
        "gemm_plugin": "disable" if is_fp8 else "auto",
        "use_fused_mlp": "disable" if is_fp8 else "enable",  # of FP8 it would round gate and up again, with one scale for both
        "workers": num_ranks,
        "log_level": "info",
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    understood = parse(words)
    assert {name: str(understood[name]) for name in values} == {name: str(value) for name, value in values.items()}
    return words


def _checked(checkpoint: Checkpoint, given: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, int]]:
    """The model and the limits of its engine; E101, E103 or E001 for what 1.2 cannot build."""
    where = str(checkpoint.path)
    if checkpoint.kind != "tensorrt-llm":
        why, fix = "this is a Hugging Face directory", f"thoughtx-convert --model_dir {shown(where)} --output_dir CKPT, and build from CKPT"
        raise ThoughtxError("E101", f"{COMMAND} reads a TensorRT-LLM checkpoint", where=where, why=why, fix=fix)
    if checkpoint.adapter is not None:
        why, fix = f"{COMMAND} reads the checkpoint itself", "merge it first: thoughtx-convert --lora_dir, and build from what that writes"
        raise refuse("lora_dir", str(checkpoint.adapter.path), why, fix)
    config = model_config_from_trtllm(checkpoint.raw, checkpoint.where)
    asked = {name: value for name, value in given.items() if value is not None and name != "backend"}
    for name, why in NOT_HERE.items():
        if asked.get(name, AUTO) != AUTO:
            raise refuse(name, asked[name], why, f"leave it out, or build without --backend {NAME}")
    chunks = [name for name in asked if OPTIONS[name].is_of_chunks]
    if chunks and not asked.get("use_chunked_attention"):
        raise refuse(chunks[0], asked[chunks[0]], "it means something only with chunked attention", "leave it out")
    settled = Given(config, {name: asked[name] for name in LIMITS if name in asked})
    limits = {name: int(settled[name]) for name in LIMITS}
    if asked.get("use_chunked_attention") and not _is_full(asked, limits["max_seq_len"]):
        fix = (
            f"build it for tensorrt-rtx, tensorrt or onnxruntime, or leave chunked attention out (a --chunk_size of {limits['max_seq_len']}"
        )
        raise ThoughtxError(
            "E103", "chunked attention cannot be built", where=f"--backend {NAME}", why=NO_CHUNKS, fix=f"{fix} is full attention)"
        )
    if (dtype := asked.get("dtype", AUTO)) not in (AUTO, config.dtype):
        fix = f"leave it out, or convert to it: thoughtx-convert --dtype {dtype}"
        raise refuse("dtype", dtype, f"{COMMAND} builds in the checkpoint's type, which is {config.dtype}", fix)
    quant = config.quantization
    if quant is not None and (quant.algo not in (None, "FP8") or quant.kv_algo not in (None, "FP8")):
        why = f"{quant.algo or quant.kv_algo}: 1.2 wants these numbers in an order, or with factors, that its own tools make on a GPU"
        fix = f"leave --backend {NAME} out, or quantize to FP8: thoughtx-calibrate --qformat fp8"
        raise ThoughtxError("E103", "the checkpoint's format cannot be given to TensorRT-LLM 1.2", where=checkpoint.where, why=why, fix=fix)
    if config.family == "qwen3_moe" and config.experts is not None and not config.experts.is_normalized:
        why = "config.json says that a token's shares do not sum to 1, which TensorRT-LLM's own converter writes for every model"
        fix = "convert the Hugging Face model again: thoughtx-convert reads its norm_topk_prob"
        raise ThoughtxError("E103", "the shares of the experts are not normalized", where=checkpoint.where, why=why, fix=fix)
    return config, limits


def _is_full(asked: Mapping[str, Any], max_seq_len: int) -> bool:
    """A chunk that holds every position is full attention."""
    size = asked.get("chunk_size")
    return isinstance(size, int) and size >= max_seq_len


def _notes(checkpoint: Checkpoint, config: ModelConfig) -> list[str]:
    exits = checkpoint.exits(config)
    carried = [*(["its exit head"] if exits.head is not None else []), *(["its exit adapters"] if exits.adapters else [])]
    return [f"{' and '.join(carried)} are left out: an engine of TensorRT-LLM has logits alone"] if carried else []


def _program(words: list[str]) -> str:
    """Where `trtllm-build` of a 1.2 release is."""
    fix = f"on a host with a GPU and tensorrt-llm 1.2: {shlex.join([COMMAND, *words])}"
    program = shutil.which(COMMAND)
    if program is None:
        raise ThoughtxError("E201", f"--backend {NAME} needs TensorRT-LLM 1.2", where=COMMAND, why="there is no such command here", fix=fix)
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return program  # of another environment: it says itself what it lacks
    if not version.startswith(RELEASE):
        why = f"{PACKAGE} {shown(version)} is installed; 1.2 is the last release that builds engines"
        raise ThoughtxError("E201", f"--backend {NAME} needs TensorRT-LLM 1.2", where=COMMAND, why=why, fix=fix)
    return program


def _run(command: list[str], made: Path, num_ranks: int) -> None:
    """E205 with the last lines unless it ends well and leaves every rank's engine."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    lines = [shown(line) for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    wanted = ["config.json", *(f"rank{rank}.engine" for rank in range(num_ranks))]
    missing = [name for name in wanted if not (made / name).is_file()]
    if done.returncode or missing:
        said = f"exit status {done.returncode}" if done.returncode else f"it left no {', '.join(missing)}"
        why = listed([said, *lines[-LAST_LINES:]])
        raise ThoughtxError("E205", f"{COMMAND} failed", where=shlex.join(command), why=why, fix="see its last lines; nothing was kept")


def tables(summary: Mapping[str, Any]) -> list[Any]:
    """What was built, or with --dry_run what would be, for people."""
    facts = {
        name: value for name, value in summary.items() if name not in ("trtllm_build", "files", "dry_run", "up_to_date", "limits", "notes")
    }
    facts |= summary["limits"]
    title = "plan: nothing was written" if summary.get("dry_run") else "TensorRT-LLM engine"
    rows = [[name, value] for name, value in facts.items()]
    last = report.UP_TO_DATE if summary.get("up_to_date") else shlex.join(summary["trtllm_build"])
    return [report.table(title, ["fact", "value"], rows), last]
