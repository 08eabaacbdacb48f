"""The shipped PTX on this GPU against PyTorch in float32: `python -m trtllm_thoughtx.plugins.chunked_attention.bench.gpu_check [--json]`.

Each kernel that `artifacts` compiles for the GPU's generation is launched through the driver, as TensorRT would, and the PyTorch operator
is run on the same inputs. Status 1 when one is off by more than the rounding of its type. With --interpret (and TRITON_INTERPRET=1) only
the operator runs, on the CPU. Not run by the authors on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
import triton

from trtllm_thoughtx.plugins.chunked_attention import artifacts, op
from trtllm_thoughtx.plugins.chunked_attention.bench.common import environment, inputs, need_device, reference, visible
from trtllm_thoughtx.plugins.chunked_attention.launch import Kernel

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
WINDOW = (4, 1, 0)


def judged(got: torch.Tensor, wanted: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Weights and result are rounded once each: at most two units of the largest value."""
    error, bound = float((got.float() - wanted).abs().max()), 2 * UNIT[dtype] * float(v.float().abs().max())
    return {"error": error, "bound": bound, "ok": bool(error <= bound)}


def check(device: torch.device, width: int, length: int, chunk: int) -> list[dict[str, Any]]:
    rows = []
    for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
        for head_dim in (64, 128):
            shape = {"batch": 2, "heads": 14, "kv_heads": 2, "width": width, "length": length, "head_dim": head_dim, "chunk": chunk}
            given = inputs(device, dtype=dtype, **shape)  # type: ignore[arg-type]
            scale = head_dim**-0.5
            wanted = reference(*given[:3], visible(*given[3:], *WINDOW), scale)
            label = {"dtype": name, "head_dim": head_dim, "width": width, "length": length, "chunk": chunk}
            for splits in (1, 4):
                got = op.chunked_attention(*given, scale, *WINDOW, num_splits=splits)
                rows.append({"what": f"operator, {splits} splits", **label, **judged(got, wanted, given[2], dtype)})
            if device.type == "cuda":
                rows.append({"what": "shipped PTX", **label, **judged(_launched(given, name, head_dim), wanted, given[2], dtype)})
    return rows


def _launched(given: list[torch.Tensor], dtype: str, head_dim: int) -> torch.Tensor:
    q, k = given[:2]
    major, minor = torch.cuda.get_device_capability()
    rows = q.shape[2] * q.shape[1] // k.shape[1]
    sink, left, anchors = WINDOW
    groups = q.shape[1] // k.shape[1]
    spec = artifacts.Spec(
        "attend", 10 * major + minor, dtype, head_dim=head_dim, groups=groups, sink=sink, left=left, anchors=anchors, rows=rows
    )
    y = torch.empty_like(q)
    with Kernel(artifacts.compile_kernel(spec)) as kernel:
        grid = (triton.cdiv(rows, kernel.artifact.tile.block_m), q.shape[0] * k.shape[1], 1)
        numbers = (k.shape[1], q.shape[2], k.shape[2])
        kernel.launch(grid, [x.data_ptr() for x in given], numbers, [y.data_ptr()], torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    return y


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = need_device(args.interpret)
    sizes = ((1, 48, 16), (20, 48, 16)) if args.interpret else ((1, 8191, 1024), (1024, 4096, 1024), (777, 2001, 256))
    rows = [row for width, length, chunk in sizes for row in check(device, width, length, chunk)]
    found = {"environment": environment(device), "rows": rows, "ok": all(row["ok"] for row in rows)}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(*(f"{'ok' if row['ok'] else 'WRONG'}  {row}" for row in rows), found["environment"], sep="\n")
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
