"""What each weight-only format loses on real text, beside its size: bits per weight of the whole engine directory, KL, top-1, perplexity.

    python bench/real/quality.py --model_dir DIR [--formats int4_wo,int4_awq,int8_wo] [--flags "--rounding nearest"] [--work DIR] [--json]

Every format is calibrated and built as a user does it, with the default data, and run on onnxruntime's operators; the reference is the
float32 engine of the same directory. The text is this repository's documentation (English), its tests (code) and `questions.jsonl`: none
of it calibrates. The units are two roundings to nearest that are computed here: `Q4_0` (blocks of 32 with a 16-bit scale from the largest
number, which becomes -8; embedding as Q8_0) and `Q8_0` (blocks of 32). Use a directory that `permute.py` made where the weights were
quantized before: a grid that lines up with the old one is flattered.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from commands import ROOT, build_flags, command
from safetensors import safe_open
from safetensors.numpy import save_file

FORMATS = ("int4_wo", "int4_awq", "int8_wo")
LENGTH = 256


def texts() -> dict[str, list[str]]:
    """By kind."""
    questions = [json.loads(line) for line in Path(__file__).with_name("questions.jsonl").read_text().splitlines()]
    return {
        "English": [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))],
        "code": [path.read_text() for path in sorted((ROOT / "tests").glob("*/*.py"))[::7]],
        "questions": ["\n".join(f"Question: {one['prompt']}\nAnswer: {one['answer']}" for one in questions)],
    }


def rows_of(model_dir: Path, num: int) -> list[list[int]]:
    """`num` windows of each kind of text, spread over it."""
    from trtllm_thoughtx.files import read_json
    from trtllm_thoughtx.text.text import Text

    text = Text.load(model_dir, read_json(model_dir, "config.json"))
    assert text is not None
    rows = []
    for parts in texts().values():
        ids = [i for part in parts for i in text.encode(part)]
        places = np.linspace(0, max(0, len(ids) - LENGTH), min(num, max(1, len(ids) // LENGTH))).astype(int)
        rows += [ids[at : at + LENGTH] for at in places]
    return rows


def blocks(weight: np.ndarray, bits: int) -> np.ndarray:
    """Rounded as Q4_0 or Q8_0 does it, in float32."""
    groups = weight.astype(np.float32).reshape(weight.shape[0], -1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(2, keepdims=True), 2)
    scale = (largest / -8 if bits == 4 else np.abs(largest) / 127).astype(np.float16).astype(np.float32)
    over = np.where(scale == 0, 1, scale)
    steps = np.clip(np.round(groups / over), *((-8, 7) if bits == 4 else (-127, 127)))
    return (steps * scale).reshape(weight.shape)


def rounded_copy(model_dir: Path, out: Path, bits: int) -> None:
    """The directory with its matrices rounded in blocks, in float32; the embedding and the head in 8 bits."""
    import torch

    out.mkdir()
    tensors = {}
    for file in sorted(model_dir.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
            continue
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                value = stored.get_tensor(name).to(torch.float32).numpy()
                is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
                tensors[name] = blocks(value, 8 if is_table else bits) if value.ndim == 2 else value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))


def num_parameters(model_dir: Path) -> tuple[int, int]:
    """(of the layers' matrices, of the embedding and an untied head)."""
    tied = json.loads((model_dir / "config.json").read_text()).get("tie_word_embeddings", False)
    layers = tables = 0
    for file in model_dir.glob("*.safetensors"):
        with safe_open(file, "np") as stored:
            for name in stored.keys():  # noqa: SIM118
                size = math.prod(stored.get_slice(name).get_shape())
                if name == "model.embed_tokens.weight" or (name == "lm_head.weight" and not tied):
                    tables += size
                elif name != "lm_head.weight":
                    layers += size
    return layers, tables


def run(name: str, *flags: object) -> float:
    """CPU seconds of `thoughtx-NAME`."""
    before, line = resource.getrusage(resource.RUSAGE_CHILDREN), command(name, *flags, "--quiet")
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(line)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def build(checkpoint: Path, engine: Path) -> Path:
    if not engine.is_dir():
        sizes = ("--dtype", "float32", "--max_seq_len", 2 * LENGTH, "--max_input_len", LENGTH)
        run("build", *build_flags(checkpoint, engine, *sizes))
    return engine


def logits_of(engine: Path, rows: list[list[int]]) -> Iterator[np.ndarray]:
    from trtllm_thoughtx import Engine

    loaded = Engine.load(engine)
    for row in rows:
        yield loaded.forward([row])[0]
    loaded.close()


def judged(engine: Path, rows: list[list[int]], reference: Path) -> dict[str, float]:
    from trtllm_thoughtx.validate.divergence import Divergence

    seen = Divergence()
    for number, (row, logits) in enumerate(zip(rows, logits_of(engine, rows), strict=True)):
        seen.add(np.load(reference / f"{number}.npy"), logits, [*row[1:], -1])
    return asdict(seen.summary())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--formats", default=",".join(FORMATS), help="of thoughtx-calibrate, with flags of their own behind a colon")
    parser.add_argument("--units", default="4,8", help="bits of the roundings in blocks that are beside them")
    parser.add_argument("--num_rows", type=int, default=6, help="windows of 256 tokens of each kind of text")
    parser.add_argument("--flags", default="", help="more flags for thoughtx-calibrate")
    parser.add_argument("--work", type=Path, help="what is there already is used (default: real-out/quality-MODEL in the repository)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    work = args.work or ROOT / "real-out" / f"quality-{args.model_dir.name}"
    work.mkdir(parents=True, exist_ok=True)
    rows, (of_layers, of_tables) = rows_of(args.model_dir, args.num_rows), num_parameters(args.model_dir)
    reference = work / f"reference-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}"
    if not reference.is_dir():
        reference.mkdir()
        for number, logits in enumerate(logits_of(build(args.model_dir, work / "float32-engine"), rows)):
            np.save(reference / f"{number}.npy", logits)
    (reference / "rows.json").write_text(json.dumps(rows))  # peers.py reads them
    table: list[dict[str, Any]] = []
    for bits in [int(one) for one in args.units.split(",") if one]:
        copy = work / f"Q{bits}_0"
        if not copy.is_dir():
            rounded_copy(args.model_dir, copy, bits)
        found = judged(build(copy, work / f"Q{bits}_0-engine"), rows, reference)
        mean = ((bits + 0.5) * of_layers + 8.5 * of_tables) / (of_layers + of_tables)
        table.append({"name": f"Q{bits}_0, rounded here", "bits": mean, "weights_bits": mean, "seconds": 0.0, **found})
    for name in [one for one in args.formats.split(",") if one]:
        qformat, _, own = name.partition(":")
        checkpoint, engine = work / f"{name}-ckpt".replace(" ", ""), work / f"{name}-engine".replace(" ", "")
        began, seconds = time.perf_counter(), 0.0
        if not checkpoint.is_dir():
            flags = [*shlex.split(args.flags), *shlex.split(own)]
            seconds = run("calibrate", "--model_dir", str(args.model_dir), "--output_dir", str(checkpoint), "--qformat", qformat, *flags)
            print(f"{name}: calibrated in {time.perf_counter() - began:.0f} s, {seconds:.0f} s of CPU", file=sys.stderr, flush=True)
        found = judged(build(checkpoint, engine), rows, reference)
        whole = sum(file.stat().st_size for file in engine.iterdir())
        weights, total = (engine / "rank0.data").stat().st_size, of_layers + of_tables
        table.append({"name": name, "bits": 8 * whole / total, "weights_bits": 8 * weights / total, "seconds": seconds, **found})
    if args.json:
        print(json.dumps({"model_dir": str(args.model_dir), "num_tokens": sum(map(len, rows)), "formats": table}))
        return 0
    print(f"{args.model_dir.name}: {sum(map(len, rows))} tokens, {(of_layers + of_tables) / 1e6:.1f} M parameters")
    print("format                      bits (weights)     KL   top-1  perplexity (reference)  CPU s of calibration")
    for one in table:
        size = f"{one['bits']:6.2f} ({one['weights_bits']:5.2f})"
        loss = f"{one['kl']:8.4f}  {one['top1_agreement']:.3f}  {one['perplexity']:8.3f} ({one['perplexity_reference']:.3f})"
        print(f"{one['name']:26} {size} {loss}  {one['seconds']:6.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
