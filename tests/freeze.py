"""One JSON of what the commands write and print, to show that a refactoring moves no byte.

    python tests/freeze.py freeze-before.json       (on the old tree)
    python tests/freeze.py freeze-after.json --against freeze-before.json

Holds the sha256 of every artefact, every `--json` document without times and paths, every help text, and the answers to the hostile
inputs of badfiles.py. Graphs and weights repeat byte for byte by design, which is what makes equality a proof. Commands run as
`python -m trtllm_thoughtx`, so a file may move. With `--against`, exit status 1 and one line for each difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "trtllm_thoughtx" / "samples" / "thoughtx-tiny"
COMMANDS = ("convert", "calibrate", "build", "validate", "run", "eval", "bench", "inspect", "distill")
TIMES = re.compile(r"seconds|per_second|created|time|_ms|ms_|speed|rss|memory|load|elapsed|version|eta|threads")
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "qwen2_moe", "qwen3_moe")
QFORMATS = ("fp8", "int8_sq", "int8_wo", "int4_awq", "int4_wo", "int8_wo,kv", "nvfp4", "nvfp4_wo")
SHORT = ("--max_seq_len", "128", "--max_input_len", "32", "--backend", "onnxruntime")
CHUNKS = ("--use_chunked_attention", "--chunk_size", "16", "--max_chunk_size", "32")
BUILDS: dict[str, tuple[str, ...]] = {
    "full": (),
    "float16": ("--dtype", "float16"),
    "bfloat16": ("--dtype", "bfloat16"),
    "chunks": CHUNKS,
    "sinks": (*CHUNKS, "--sink_tokens", "4", "--left_chunks", "2"),
    "anchors": (*CHUNKS, "--num_anchors", "2"),
    "auto": ("--use_chunked_attention", "--chunk_size", "auto", "--max_chunk_size", "32", "--base_size", "16", "--threshold_low", "0.1"),
    "stages": ("--early_exit_layers", "1,2"),
    "staged-chunks": ("--early_exit_layers", "2", *CHUNKS),
    "batch": ("--max_batch_size", "4"),
}


def scrubbed(value: Any, work: Path) -> Any:
    """`value` without what may differ between two runs: times, memory, versions, and the paths of the work directory."""
    if isinstance(value, dict):
        return {key: scrubbed(item, work) for key, item in value.items() if not TIMES.search(key)}
    if isinstance(value, list):
        return [scrubbed(item, work) for item in value]
    if isinstance(value, str):
        return value.replace(str(work), "WORK").replace(str(ROOT), "ROOT")
    return value


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Freeze:
    """Collects entries by name; every command runs in a process of its own, below `work`."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.entries: dict[str, Any] = {}

    def command(self, name: str, *argv: str, files: Path | None = None) -> None:
        env = {"PATH": os.environ["PATH"], "HOME": str(self.work), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        line = [sys.executable, "-m", "trtllm_thoughtx", *argv]
        done = subprocess.run(line, cwd=self.work, env=env, capture_output=True, text=True)
        try:
            out = scrubbed(json.loads(done.stdout), self.work)
        except ValueError:
            out = scrubbed(done.stdout, self.work)
        self.entries[name] = {"status": done.returncode, "out": out}
        if files is not None and files.is_dir():
            for file in sorted(files.rglob("*")):
                if file.is_file():
                    self.entries[f"{name}: {file.relative_to(files)}"] = self._content(file)

    def _content(self, file: Path) -> Any:
        if file.name in ("manifest.json", "calibration.json", "report.html", "chunks.json") or file.suffix in (".html", ".png"):
            try:
                raw = scrubbed(json.loads(file.read_text()), self.work)
            except ValueError:
                return "not compared"
            raw.pop("files", None) if isinstance(raw, dict) else None
            return raw
        return sha256(file)


def inputs(work: Path) -> None:
    """Checkpoints that the entries start from: all families, dtypes and shards; a chat model's tokenizer; quantized ones."""
    import hf_models
    from quantized_models import four_bits, fp8

    for family in FAMILIES:
        hf_models.save(work / family, family)
    for dtype in ("float16", "bfloat16"):
        hf_models.save(work / f"qwen2-{dtype}", "qwen2", dtype=dtype)
    hf_models.save(work / "qwen3-sharded", "qwen3", max_shard_size="20KB")
    for rope in ("linear", "yarn", "llama3"):
        hf_models.save(work / f"llama-{rope}", "llama", rope=rope)
    hf_models.save(work / "qwen2-tied", "qwen2", tie_word_embeddings=True)
    for method in ("awq", "gptq"):
        four_bits(work / method, method)
    fp8(work / "fp8")
    (work / "data.jsonl").write_text("".join(json.dumps({"input_ids": [(7 * i + k) % 97 for k in range(24)]}) + "\n" for i in range(12)))
    (work / "prompts.jsonl").write_text('{"prompt": "x1 = 38 x2 = 75 ?"}\n{"id": "b", "prompt": "x1 = 3 x2 = 5 ?"}\n')


def of_format(qformat: str) -> tuple[str, ...]:
    name, _, kv = qformat.partition(",")
    return ("--qformat", name, *(("--kv_cache_dtype", "int8") if kv else ()))


def jobs(freeze: Freeze) -> Iterator[list[tuple[str, tuple[str, ...], Path | None]]]:
    """Rounds of commands; those of one round need nothing of one another."""
    work, sample = freeze.work, str(SAMPLE)
    checkpoints = sorted(path.name for path in work.iterdir() if (path / "config.json").exists())
    yield [(f"help {name}", (name, "--help"), None) for name in COMMANDS] + [("help", ("--help",), None)]
    convert = [
        (f"convert {c}", ("convert", "--model_dir", c, "--output_dir", f"{c}-ckpt", "--json"), work / f"{c}-ckpt") for c in checkpoints
    ]
    split = ("convert", "--model_dir", "qwen3", "--output_dir", "qwen3-tp2", "--tp_size", "2", "--json")
    half = ("convert", "--model_dir", "llama", "--output_dir", "llama-half", "--dtype", "float16", "--json")
    yield [*convert, ("convert tp 2", split, work / "qwen3-tp2"), ("convert float16", half, work / "llama-half")]
    yield [
        (
            f"calibrate {q}",
            ("calibrate", "--model_dir", sample, "--output_dir", f"sample-{q}", "--calib_size", "8", "--json", *of_format(q)),
            work / f"sample-{q}",
        )
        for q in QFORMATS
    ]
    builds = []
    for name, flags in BUILDS.items():
        out = f"engine-{name}"
        builds.append(
            (f"build {name}", ("build", "--checkpoint_dir", "qwen3-ckpt", "--output_dir", out, *SHORT, *flags, "--json"), work / out)
        )
    for source in (*FAMILIES, "awq", "gptq", "fp8"):
        out = f"engine-of-{source}"
        flags = ("build", "--checkpoint_dir", f"{source}-ckpt", "--output_dir", out, *SHORT, "--json")
        builds.append((f"build of {source}", flags, work / out))
    for source in (*(f"sample-{q}" for q in QFORMATS), sample):
        out = f"engine-of-{Path(source).name}"
        flags = ("build", "--checkpoint_dir", source, "--output_dir", out, "--backend", "onnxruntime", "--json")
        builds.append((f"build of {Path(source).name}", flags, work / out))
    yield builds
    engine, ids = "engine-of-thoughtx-tiny", ("--input_ids", "5,6,7,8,9", "--max_new_tokens", "12", "--json")
    after: list[tuple[str, tuple[str, ...], Path | None]] = [
        (f"run {name}", ("run", "--engine_dir", f"engine-{name}", *ids), None) for name in BUILDS
    ]
    after += [(f"run sample {q}", ("run", "--engine_dir", f"engine-of-sample-{q}", *ids), None) for q in QFORMATS]
    after += [
        ("run prompts", ("run", "--engine_dir", engine, "--prompts", "prompts.jsonl", "--json"), None),
        ("run budget", ("run", "--engine_dir", engine, "--prompt", "x1 = 3 x2 = 5 ?", "--max_reasoning_depth", "0", "--json"), None),
        ("validate", ("validate", "--engine_dir", engine, "--reference", sample, "--json"), None),
        ("validate int8", ("validate", "--engine_dir", "engine-of-sample-int8_sq", "--reference", sample, "--json"), None),
        ("validate other", ("validate", "--engine_dir", "engine-chunks", "--reference", "qwen3", "--json"), None),
        ("validate wrong", ("validate", "--engine_dir", "engine-full", "--reference", "qwen2", "--json"), None),
        ("eval", ("eval", "--engine_dir", engine, "--task", "chain,loan", "--num_items", "4", "--json"), None),
        *((f"inspect {path}", ("inspect", path, "--json"), None) for path in ("qwen3", "qwen3-ckpt", engine, f"{engine}/rank0.onnx")),
        ("nothing there", ("build", "--checkpoint_dir", "nowhere", "--output_dir", "x", "--json"), None),
        ("wrong flag", ("build", "--no_such_flag", "--json"), None),
    ]
    yield after


def hostile(freeze: Freeze) -> None:
    """The code and exit of every hostile input, through convert."""
    import badfiles

    for index, case in enumerate(badfiles.CATALOGUE):
        source = freeze.work / f"bad{index}"
        source.mkdir()
        case.build(source)
        freeze.command(f"hostile {case.name}", "convert", "--model_dir", str(source), "--output_dir", f"bad{index}-out", "--json")


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {json.dumps(before.get(name))[:300]} -> {json.dumps(after.get(name))[:300]}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--hostile", action="store_true", help="also the hostile inputs, one process each (minutes)")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        freeze = Freeze(Path(name))
        inputs(freeze.work)
        for group in jobs(freeze):
            list(pool.map(lambda job: freeze.command(job[0], *job[1], files=job[2]), group))
        if args.hostile:
            hostile(freeze)
    args.output.write_text(json.dumps(freeze.entries, indent=1, sort_keys=True))
    print(f"{len(freeze.entries)} entries in {args.output}")
    found = differences(json.loads(args.against.read_text()), freeze.entries) if args.against else []
    print("\n".join(found) if found else "no differences" if args.against else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
