"""How fast the kernels are on this GPU: `python -m trtllm_thoughtx.plugins.chunked_attention.bench.gpu_bench [--json]`.

Prefill of S tokens with chunks of C, in TFLOPS over visible pairs (4 D per pair and head), and decode of one token over L, in bytes of keys
and values that are live. Beside them: SDPA over everything (dense causal), SDPA on virtual batches (each chunk a batch entry of its own),
FlexAttention with a block mask. Ceilings are measured in the same run: a large matrix product and a large copy; shares of the data
sheet's (--peak_tflops, --peak_gbs) stand beside. Decode rotates its buffers, so that no cache holds them. Median, p10 and p90 of a loop.

Lines to pass on an H200: prefill >= 40 % of 989 TFLOPS at S >= 8k, decode >= 80 % of the measured copy at batch 64, 32k tokens with
C = 8k at least three times as fast as dense. With --interpret (and TRITON_INTERPRET=1) tiny sizes run on the CPU: that shows that the
script works and measures nothing. Not run by the authors on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from trtllm_thoughtx.plugins.chunked_attention import op
from trtllm_thoughtx.plugins.chunked_attention.bench.common import environment, inputs, need_device

HEADS = {"Qwen2.5-7B": (28, 4), "Qwen3-8B": (32, 8)}
HEAD_DIM = 128
ROTATED_BYTES = 256 << 20  # more than any L2 cache


def timed(run: Callable[[int], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Microseconds of one call; `run` is told the number of the call."""
    for i in range(1 if device.type == "cpu" else 10):
        run(i)
    seconds = []
    for i in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(i)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) * 1e-3)
        else:
            began = time.perf_counter()
            run(i)
            seconds.append(time.perf_counter() - began)
    seconds.sort()
    at = {name: seconds[min(len(seconds) - 1, int(share * len(seconds)))] for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
    return {f"{name}_us": 1e6 * value for name, value in at.items()}


def ceilings(device: torch.device, repeats: int) -> dict[str, float]:
    """TFLOPS of a bfloat16 product, GB/s of a copy (read and write counted)."""
    size, length = (8192, 1 << 30) if device.type == "cuda" else (64, 1 << 12)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.zeros(length, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product, copy = timed(lambda _: a @ a, device, repeats), timed(lambda _: target.copy_(source), device, repeats)
    return {"tflops": 2 * size**3 / product["median_us"] * 1e-6, "gbs": 2 * length / copy["median_us"] * 1e-3}


def prefill(device: torch.device, model: str, length: int, chunk: int, repeats: int, top: dict[str, float]) -> list[dict[str, Any]]:
    heads, kv_heads = HEADS[model]
    given = inputs(
        device, batch=1, heads=heads, kv_heads=kv_heads, width=length, length=length, head_dim=HEAD_DIM, chunk=chunk, dtype=torch.bfloat16
    )
    q, k, v = given[:3]
    pairs = sum(p % chunk + 1 for p in range(length))
    ways: dict[str, Callable[[int], Any]] = {
        "thoughtx": lambda _: op.chunked_attention(*given, HEAD_DIM**-0.5),
        "SDPA dense": lambda _: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    }
    if length % chunk == 0:
        cut = [x.view(x.shape[1], length // chunk, chunk, HEAD_DIM).transpose(0, 1).contiguous() for x in (q, k, v)]
        ways["SDPA virtual batches"] = lambda _: F.scaled_dot_product_attention(*cut, is_causal=True, enable_gqa=True)
    if device.type == "cuda":
        ways["FlexAttention"] = _flex(q, k, v, length, chunk)
    rows = []
    for name, run in ways.items():
        row = {"phase": "prefill", "system": name, "model": model, "length": length, "chunk": chunk, **timed(run, device, repeats)}
        done = heads * 4 * HEAD_DIM * (pairs if name != "SDPA dense" else length * (length + 1) // 2)
        row["tflops"] = done / row["median_us"] * 1e-6
        row["share_of_measured"] = row["tflops"] / top["tflops"]
        row["share_of_peak"] = row["tflops"] / top["peak_tflops"]
        rows.append(row)
    return rows


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, chunk: int) -> Callable[[int], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, p, j: (j <= p) & (j // chunk == p // chunk), None, None, length, length, device=q.device)
    compiled = torch.compile(flex_attention)
    return lambda _: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def decode(device: torch.device, model: str, batch: int, length: int, repeats: int, top: dict[str, float]) -> list[dict[str, Any]]:
    """One token of each row over a whole chunk of `length`."""
    heads, kv_heads = HEADS[model]
    live = 2 * batch * kv_heads * length * HEAD_DIM * 2
    shape: dict[str, Any] = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "width": 1, "length": length, "head_dim": HEAD_DIM}
    copies = max(1, -(-ROTATED_BYTES // live)) if device.type == "cuda" else 1
    sets = [inputs(device, chunk=length, dtype=torch.bfloat16, **shape) for _ in range(copies)]
    ways: dict[str, Callable[[int], Any]] = {
        "thoughtx": lambda i: op.chunked_attention(*sets[i % copies], HEAD_DIM**-0.5),
        "SDPA dense": lambda i: F.scaled_dot_product_attention(*sets[i % copies][:3], enable_gqa=True),
    }
    rows = []
    for name, run in ways.items():
        row = {"phase": "decode", "system": name, "model": model, "batch": batch, "length": length, **timed(run, device, repeats)}
        row["gbs"] = live / row["median_us"] * 1e-3
        row["share_of_measured"], row["share_of_peak"] = row["gbs"] / top["gbs"], row["gbs"] / top["peak_gbs"]
        rows.append(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool | None]:
    """The lines to pass; None where nothing was measured that tells."""
    mine = [row for row in rows if row["system"] == "thoughtx"]
    long = [row["share_of_peak"] >= 0.4 for row in mine if row["phase"] == "prefill" and row["length"] >= 8192]
    wide = [row["share_of_measured"] >= 0.8 for row in mine if row["phase"] == "decode" and row["batch"] == 64]
    pairs = [
        dense["median_us"] / row["median_us"] >= 3
        for row in mine
        for dense in rows
        if row["phase"] == dense["phase"] == "prefill" and dense["system"] == "SDPA dense" and dense["model"] == row["model"]
        if row["length"] == dense["length"] == 32768 and row["chunk"] == dense["chunk"] == 8192
    ]
    named = (("prefill >= 40 % of the peak", long), ("decode >= 80 % of the copy", wide), ("32k, C = 8k: 3x dense", pairs))
    return {name: all(found) if found else None for name, found in named}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--peak_tflops", type=float, default=989.4, help="the data sheet's, dense bfloat16")
    parser.add_argument("--peak_gbs", type=float, default=4800.0, help="the data sheet's memory bandwidth")
    args = parser.parse_args()
    device = need_device(args.interpret)
    repeats = 1 if args.interpret else args.repeats
    top = {**ceilings(device, repeats), "peak_tflops": args.peak_tflops, "peak_gbs": args.peak_gbs}
    rows: list[dict[str, Any]] = []
    for model in list(HEADS)[: 1 if args.interpret else None]:
        for length, chunk in ((32, 16),) if args.interpret else ((4096, 4096), (8192, 1024), (8192, 4096), (32768, 4096), (32768, 8192)):
            rows += prefill(device, model, length, chunk, repeats, top)
        for batch in (1,) if args.interpret else (1, 8, 64):
            for length in (32,) if args.interpret else (4096, 8192):
                rows += decode(device, model, batch, length, repeats, top)
    passed = dict.fromkeys(verdicts(rows)) if args.interpret else verdicts(rows)
    found = {"environment": environment(device), "ceilings": top, "rows": rows, "passed": passed}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    print(found["environment"], top, passed, sep="\n")


if __name__ == "__main__":
    main()
