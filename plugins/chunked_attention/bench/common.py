"""What check and bench share: a GPU or the interpreter, inputs with positions, the reference, and where numbers were measured."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
import triton

from trtllm_thoughtx.plugins.chunked_attention import kernels

EXIT_NO_GPU = 4
NOT_MEASURED = "interpreter: nothing here was measured on a GPU"


def need_device(interpret: bool) -> torch.device:
    """The GPU, or the CPU when --interpret is given; ends the program with status 4 where neither can run."""
    if interpret:
        if not kernels.INTERPRETED:
            _stop("the interpreter is off", "--interpret", "TRITON_INTERPRET is not 1", "set TRITON_INTERPRET=1 in the environment")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        _stop("no GPU", "torch.cuda", "torch sees none", "run this on a machine with one, or try it with --interpret")
    if kernels.INTERPRETED:
        _stop("the interpreter is on", "TRITON_INTERPRET", "it would time numpy", "unset TRITON_INTERPRET")
    return torch.device("cuda")


def _stop(what: str, where: str, why: str, fix: str) -> None:
    print(f"error[E202]: {what}\n  where: {where}\n  why:   {why}\n  fix:   {fix}", file=sys.stderr)
    sys.exit(EXIT_NO_GPU)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, and of a GPU its name, clock and temperature at this moment."""
    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "device": str(device)}
    if device.type == "cpu":
        return {**found, "note": NOT_MEASURED}
    query = "name,clocks.sm,temperature.gpu,driver_version"
    done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return {**found, "gpu": torch.cuda.get_device_name(), "nvidia_smi": done.stdout.strip() or done.stderr.strip()}


def inputs(
    device: torch.device, *, batch: int, heads: int, kv_heads: int, width: int, length: int, head_dim: int, chunk: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """q, k, v, positions of the last `width` of `length` tokens, positions of the slots, chunk sizes."""
    torch.manual_seed(0)
    q = torch.randn(batch, heads, width, head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, length, head_dim, device=device, dtype=dtype) for _ in "kv")
    slots = torch.arange(length, device=device).expand(batch, length).contiguous()
    return [q, k, v, slots[:, length - width :].contiguous(), slots, torch.full((batch,), chunk, device=device, dtype=torch.int64)]


def visible(at: torch.Tensor, slots: torch.Tensor, chunk: torch.Tensor, sink: int, left: int, anchors: int) -> torch.Tensor:
    """The operator's mask, bool [B, S, T]; see trtllm_thoughtx.graph.chunked_attention."""
    p, j, c = at[:, :, None], slots[:, None, :], chunk[:, None, None]
    kept = (j < sink) | (j // c >= p // c - left)
    if anchors:
        kept |= ((j + 1) % c == 0) & (j // c >= p // c - left - anchors)
    return kept & (j >= 0) & (j <= p)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """In float32, one sequence at a time."""
    groups, rows = q.shape[1] // k.shape[1], []
    for b in range(q.shape[0]):
        keys, values = (x[b].float().repeat_interleave(groups, 0) for x in (k, v))
        scores = (q[b].float() @ keys.transpose(-1, -2) * scale).masked_fill(~mask[b], float("-inf"))
        rows.append(torch.nan_to_num(scores.softmax(-1)) @ values)
    return torch.stack(rows)
