"""`torch.ops.thoughtx.chunked_attention`: the kernels as a PyTorch operator, for tests and figures without TensorRT.

Runs on CUDA tensors, and on CPU tensors in Triton's interpreter, when TRITON_INTERPRET=1 is set before this file is imported.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from trtllm_thoughtx.plugins.chunked_attention import kernels, tiles

LOG2E = 1.4426950408889634
KV_TYPES = (torch.int8, torch.float8_e4m3fn)


def _wrong(q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, kv_positions: Tensor, chunk_size: Tensor, scaled: bool) -> str:
    """What does not fit; empty when all does."""
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape:
        return f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; wanted [B, H, S, D] and twice [B, HK, T, D]"
    (b, h, s, d), (_, hk, t, _) = q.shape, k.shape
    if k.shape[0] != b or k.shape[3] != d or h % hk:
        return f"q {list(q.shape)} and k {list(k.shape)} have other batches or head sizes, or H is no multiple of HK"
    if not 16 <= d <= 256:
        return f"head_dim is {d}; the kernels take 16 to 256"
    wanted = {"q_positions": (q_positions, (b, s)), "kv_positions": (kv_positions, (b, t)), "chunk_size": (chunk_size, (b,))}
    for name, (value, shape) in wanted.items():
        if value.dtype != torch.int64 or tuple(value.shape) != shape:
            return f"{name} is {value.dtype} {list(value.shape)}, wanted int64 {list(shape)}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"q is {q.dtype}; wanted float16, bfloat16 or float32"
    if v.dtype != k.dtype or k.dtype not in ((q.dtype,) if not scaled else KV_TYPES):
        return f"k is {k.dtype} and v {v.dtype}; wanted q's type, or int8 or float8_e4m3fn with scales"
    return ""


@torch.library.custom_op("thoughtx::chunked_attention", mutates_args=())
def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    kv_positions: Tensor,
    chunk_size: Tensor,
    scale: float,
    sink: int = 0,
    left: int = 0,
    anchors: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
) -> Tensor:
    """Shapes as in `kernels`; k_scale and v_scale float32 [HK] for int8 and float8 keys and values. `num_splits` 0: as many as keep the
    GPU busy. ValueError, naming what is wrong, for anything that does not fit; RuntimeError where it cannot run."""
    problem = _wrong(q, k, v, q_positions, kv_positions, chunk_size, k_scale is not None)
    if (k_scale is None) != (v_scale is None):
        problem = "k_scale and v_scale belong together"
    for name, value, low in (("sink", sink, 0), ("left", left, 0), ("anchors", anchors, 0), ("num_splits", num_splits, 0)):
        problem = problem or (f"{name} is {value}; it must be at least {low}" if value < low else "")
    if not problem and not (math.isfinite(scale) and scale > 0):
        problem = f"scale is {scale}; it must be a number above 0"
    if problem:
        raise ValueError(f"thoughtx::chunked_attention: {problem}")
    if not q.is_cuda and not kernels.INTERPRETED:
        raise RuntimeError("thoughtx::chunked_attention runs on CUDA tensors, or on a CPU with TRITON_INTERPRET=1 set before Python starts")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    positions = [x.contiguous() for x in (q_positions, kv_positions, chunk_size)]
    (b, h, s, d), (_, hk, t, _) = q.shape, k.shape
    groups, y = h // hk, torch.empty_like(q)
    if not y.numel():
        return y
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    tile = tiles.tile_for(10 * capability[0] + capability[1], d, s * groups, item=q.element_size(), scaled=k_scale is not None)
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    splits = num_splits or tiles.num_splits(t, b * hk * triton.cdiv(s * groups, tile.block_m), num_sms, tile.block_n)
    scaled = k_scale is not None
    constants = {
        **{"SCALE_LOG2E": scale * LOG2E, "SINK": sink, "LEFT": left, "ANCHORS": anchors, "GROUPS": groups, "D": d},
        **{
            "BLOCK_D": triton.next_power_of_2(d),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_SCAN": tiles.BLOCK_SCAN,
            "SCALED": scaled,
        },
        "EMULATE": kernels.INTERPRETED,
    }
    launch = {} if kernels.INTERPRETED else {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    blocks = triton.cdiv(s * groups, tile.block_m)
    if splits == 1:
        kernels.attend[(blocks, b * hk)](q, k, v, *positions, k_scale, v_scale, hk, s, t, y, **constants, **launch)
        return y
    per_split = triton.cdiv(triton.cdiv(t, splits), tile.block_n) * tile.block_n
    splits = triton.cdiv(t, per_split)
    partial = torch.empty(b * hk, splits, s * groups, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(b * hk, splits, s * groups, dtype=torch.float32, device=q.device)
    kernels.attend_split[(blocks, b * hk, splits)](
        q, k, v, *positions, k_scale, v_scale, hk, s, t, per_split, partial, lse, **constants, **launch
    )  # fmt: skip
    few = {name: constants[name] for name in ("GROUPS", "D", "BLOCK_D")}
    kernels.combine[(triton.cdiv(s * groups, 16), b * hk)](partial, lse, s, splits, y, BLOCK_M=16, **few)
    return y


@chunked_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    kv_positions: Tensor,
    chunk_size: Tensor,
    scale: float,
    sink: int = 0,
    left: int = 0,
    anchors: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
) -> Tensor:
    return torch.empty_like(q)
