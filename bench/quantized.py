"""Decode and prefill speed of every quantized format on a CPU beside the float32 engine of the same checkpoint, in turn in one run.

    python bench/quantized.py MODEL_DIR [--formats int8_wo,int4_wo,...] [--rounds 3] [--prompt_len 64] [--new_tokens 32] [--json]

Formats are those of thoughtx-calibrate; lm_head is quantized too (--quant_lm_head). Where onnxruntime-genai is installed, its
own int8 and int4 models of the same checkpoint are measured too. Each measurement is a process of its own and the rounds interleave
the systems, as in bench/decode.py. MODEL_DIR is a Hugging Face directory; the scales come from a few random tokens, since only speed is
looked at. A format that is slower than float32 in either phase is named at the end, with what `thoughtx-build` says about it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from decode import GENAI, OURS, ROOT, measured

GENAI_FORMATS = {"int8": ("int8", []), "int4": ("int4", ["int4_block_size=128", "int4_accuracy_level=4"])}


def ratio(rows: list[dict[str, float]], others: list[dict[str, float]] | None, phase: str = "decode") -> float | None:
    """Of the rates of a phase, the median of the rounds."""
    return round(statistics.median(a[phase] / b[phase] for a, b in zip(rows, others, strict=True)), 2) if others else None


def genai_model(model_dir: Path, out: Path, precision: str, extra: list[str], num_threads: int) -> Path:
    words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model_dir), "-o", str(out), "-p", precision, "-e", "cpu"]
    words += ["-c", str(out.parent / "cache"), *(["--extra_options", *extra] if extra else [])]
    subprocess.run(words, check=True, capture_output=True)
    settings = json.loads((out / "genai_config.json").read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = num_threads  # its own default is fewer
    (out / "genai_config.json").write_text(json.dumps(settings))
    return out


def weights_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if ".data" in file.name or file.suffix == ".data")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--formats", default="int8_wo,int8_sq,fp8,int4_wo,int4_awq")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt_len", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--num_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="an existing directory on the disk to use (default: the system's temporary one)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from trtllm_thoughtx.build.build import build
    from trtllm_thoughtx.calibrate.quantize.job import calibrate

    options = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 256}
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        systems: dict[str, tuple[str, Path]] = {}
        notes: dict[str, list[str]] = {}
        build(args.model_dir, Path(work, "float32"), options)
        systems["thoughtx float32"] = (OURS, Path(work, "float32"))
        for name in args.formats.split(","):
            checkpoint, engine = Path(work, f"ckpt-{name}"), Path(work, name)
            calibrate(args.model_dir, checkpoint, qformat=name, calib_size=4, calib_seq_len=16, quant_lm_head=True)
            notes[f"thoughtx {name}"] = build(checkpoint, engine, options)["notes"]
            subprocess.run(["rm", "-r", str(checkpoint)], check=True)
            systems[f"thoughtx {name}"] = (OURS, engine)
        if importlib.util.find_spec("onnxruntime_genai"):
            for name, (precision, extra) in GENAI_FORMATS.items():
                made = genai_model(args.model_dir, Path(work, f"genai-{name}"), precision, extra, args.num_threads)
                systems[f"onnxruntime-genai {name}"] = (GENAI, made)
        rates: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
        for _ in range(args.rounds):
            for name, (script, path) in systems.items():
                rates[name].append(measured(script, path, args))
        sizes = {name: weights_bytes(path) for name, (_, path) in systems.items()}
    base = next(iter(systems))
    result: dict[str, Any] = {}
    for name, rows in rates.items():
        width = name.partition("int")[2][:1]
        result[name] = {
            "decode": round(statistics.median(r["decode"] for r in rows), 2),
            "decode_min": round(min(r["decode"] for r in rows), 2),
            "decode_max": round(max(r["decode"] for r in rows), 2),
            "prefill": round(statistics.median(r["prefill"] for r in rows), 1),
            "over_float32": ratio(rows, rates[base]),
            "prefill_over_float32": ratio(rows, rates[base], "prefill"),
            "over_genai": ratio(rows, rates.get(f"onnxruntime-genai int{width}")),
            "weights_mib": round(sizes[name] / (1 << 20)),
        }
    if args.json:
        print(json.dumps({"rounds": args.rounds, "prompt_len": args.prompt_len, "threads": args.num_threads, "systems": result}))
        return
    widths = {
        "decode": 14,
        "decode_min": 11,
        "decode_max": 11,
        "prefill": 9,
        "over_float32": 13,
        "prefill_over_float32": 21,
        "over_genai": 11,
        "weights_mib": 12,
    }
    print("tokens a second\n" + f"{'system':<26}" + "".join(f"{key:>{width}}" for key, width in widths.items()))
    for name, row in result.items():
        cells = ("-" if row[key] is None else row[key] for key in widths)
        print(f"{name:<26}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True)))
    for name, row in result.items():
        if name in notes and min(row["over_float32"], row["prefill_over_float32"]) < 1:
            print(f"slower than float32: {name}; the build says: {'; '.join(notes[name]) or 'NOTHING'}")


if __name__ == "__main__":
    main()
