"""How fast, and in how much memory, is a checkpoint converted? Compared with `cp -r` of the same files, in the same run.

    python bench/convert.py --shape 0.5b [--rounds 3] [--work DIR] [--dtype auto] [--json]

A synthetic bf16 checkpoint of the wanted shape is streamed to disk in shards, then copied and converted in turn. The disk
needs twice its size. A ratio of 1 means as fast as `cp -r`. Conversion also hashes all it reads and writes, looks at every
value, and returns when the data is on the disk; `cp` returns when it is in memory, so the time to sync is given beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# layers, hidden, intermediate, query heads, key-value heads, head size, vocabulary, tied
SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 16, 256, False),
    "0.15b": (3, 1024, 8192, 16, 2, 64, 32000, False),
    "0.5b": (24, 896, 4864, 14, 2, 64, 151936, True),
    "7b": (28, 3584, 18944, 28, 4, 128, 152064, False),
}
SHARD_BYTES = 4_000_000_000
# Linux's ru_maxrss would include what this process held when it started the child; VmHWM does not.
CONVERT = """
import re, sys
from pathlib import Path
from trtllm_thoughtx.checkpoint.convert import convert
convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def config_of(shape: str) -> dict[str, object]:
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, tied = SHAPES[shape]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
    }


def make_checkpoint(root: Path, shape: str, shard_bytes: int = SHARD_BYTES) -> int:
    """Stream a checkpoint of that shape to `root`; returns its bytes. Values repeat after 32 MiB, which no reader here notices."""
    from trtllm_thoughtx.families import expected_tensors
    from trtllm_thoughtx.families.hf_config import model_config_from_hf

    root.mkdir(parents=True)
    raw = config_of(shape)
    (root / "config.json").write_text(json.dumps(raw, indent=2))
    noise = np.random.default_rng(0).standard_normal(16 << 20, dtype=np.float32) * 0.02
    data = (noise.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).data
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, dims in expected_tensors(model_config_from_hf(raw, "config.json")).items():
        size = 2 * int(np.prod(dims))
        if held and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = dims
        held += size
    total, weight_map = 0, {}
    for number, tensors in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        table, offset = {}, 0
        for name, dims in tensors.items():
            end = offset + 2 * int(np.prod(dims))
            table[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
            offset, weight_map[name] = end, file
        head = json.dumps(table).encode()
        with (root / file).open("wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            left = offset
            while left:
                left -= out.write(data[: min(left, len(data))])
        total += offset
    if len(shards) > 1:
        (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def timed(*command: str) -> tuple[float, str]:
    """(seconds, standard output) of a command."""
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def convert_once(source: Path, output: Path, dtype: str = "auto") -> tuple[float, float]:
    """(seconds, peak MiB) of one conversion in a process of its own."""
    seconds, printed = timed(sys.executable, "-c", CONVERT, str(source), str(output), dtype)
    return seconds, int(printed) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, help="an existing directory on the disk to measure (default: the system's temporary one)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        source, copy, output = Path(work, "source"), Path(work, "copy"), Path(work, "output")
        num_bytes = make_checkpoint(source, args.shape)
        rows = []
        for _ in range(args.rounds):
            cp, _ = timed("cp", "-r", str(source), str(copy))
            sync, _ = timed("sync", "-f", str(copy))
            shutil.rmtree(copy)
            seconds, peak = convert_once(source, output, args.dtype)
            shutil.rmtree(output)
            row = {"cp_s": cp, "cp_sync_s": cp + sync, "convert_s": seconds, "ratio": cp / seconds, "ratio_sync": (cp + sync) / seconds}
            rows.append({key: round(value, 3) for key, value in row.items()} | {"peak_mib": round(peak, 1)})
    result = {
        "shape": args.shape,
        "dtype": args.dtype,
        "bytes": num_bytes,
        "rounds": rows,
        "median_ratio": statistics.median(row["ratio"] for row in rows),
        "median_ratio_sync": statistics.median(row["ratio_sync"] for row in rows),
        "median_convert_mb_per_s": round(num_bytes / 1e6 / statistics.median(row["convert_s"] for row in rows), 1),
        "peak_mib": max(row["peak_mib"] for row in rows),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.shape}: {num_bytes / 2**30:.2f} GiB, dtype {args.dtype}")
    print(f"{'round':>5} {'cp s':>9} {'cp+sync s':>10} {'convert s':>10} {'cp/convert':>11} {'cp+sync/convert':>16} {'peak MiB':>9}")
    for number, row in enumerate(rows, 1):
        print(
            f"{number:>5} {row['cp_s']:>9.2f} {row['cp_sync_s']:>10.2f} {row['convert_s']:>10.2f} {row['ratio']:>11.2f} "
            f"{row['ratio_sync']:>16.2f} {row['peak_mib']:>9.0f}"
        )
    print(
        f"median: {result['median_ratio']:.2f} of cp -r, {result['median_ratio_sync']:.2f} of cp -r and sync, "
        f"{result['median_convert_mb_per_s']:.0f} MB/s; peak {result['peak_mib']:.0f} MiB"
    )


if __name__ == "__main__":
    main()
