"""`thoughtx::ChunkedAttention` in Triton: one pass for prefill, a split one with a combination for decode.

The mask is the operator's own (`trtllm_thoughtx.graph.chunked_attention`): positions are inputs, so a slot may be empty (-1) or
hold any position, and a chunk size for each sequence is read at run time. Softmax is online (FlashAttention, arXiv 2205.14135), in
base 2, accumulated in float32. The query heads of a KV head share its keys: row r of a program is query r // GROUPS of head r % GROUPS
in the group. A block of keys is skipped after its positions alone when none of them can be visible.

    q, y [B, HK * GROUPS, S, D]   k, v [B, HK, T, D]   q_positions int64 [B, S]   kv_positions int64 [B, T]   chunk_size int64 [B]

Parameters are in the order of TensorRT's ahead-of-time launcher: inputs, int32 numbers, outputs. It passes no floats, so the scale is a
constant of the kernel. Keys and values may be float8 (e4m3) or int8; then KS and VS hold a float32 scale for each KV head.
"""

from __future__ import annotations

import triton
import triton.language as tl

MANY = tl.constexpr(1 << 30)  # more than any position
NEVER = tl.constexpr(-1.0e30)  # a score that no visible key has; -inf would give NaN where a row sees nothing


@triton.jit
def _attend(
    q,
    p,
    k_base,
    v_base,
    kv_positions,
    chunk,
    k_scale,
    start,
    end,
    SCALE_LOG2E: tl.constexpr,
    SINK: tl.constexpr,
    LEFT: tl.constexpr,
    ANCHORS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    SCALED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Rows q [BLOCK_M, BLOCK_D] at positions p (-1: no row) over the slots start .. end: largest score, sum, weighted values."""
    columns, dims, scan = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_SCAN)
    first = tl.where(p >= 0, p // chunk - LEFT, MANY)  # of the chunks that a row sees in full
    least_first, last_p = tl.min(first, 0), tl.max(p, 0)
    # Positions alone tell in which runs of slots there is something to see: one of the window, one of the sinks outside it.
    near_from, near_to, sink_from, sink_to = end, start, end, start
    for at in range(start, end, BLOCK_SCAN):
        slots = at + scan
        j = tl.load(kv_positions + slots, mask=slots < end, other=-1).to(tl.int32)
        past = (j >= 0) & (j <= last_p)
        near = j // chunk >= least_first
        if ANCHORS:
            near = near | (((j + 1) % chunk == 0) & (j // chunk >= least_first - ANCHORS))
        near = near & past
        near_from = tl.minimum(near_from, tl.min(tl.where(near, slots, end), 0))
        near_to = tl.maximum(near_to, tl.max(tl.where(near, slots + 1, start), 0))
        if SINK:
            sinks = past & (j < SINK) & (near == 0)
            sink_from = tl.minimum(sink_from, tl.min(tl.where(sinks, slots, end), 0))
            sink_to = tl.maximum(sink_to, tl.max(tl.where(sinks, slots + 1, start), 0))
    a_from, b_from = (sink_from - start) // BLOCK_N, (near_from - start) // BLOCK_N
    num_a = tl.maximum(0, (sink_to - start + BLOCK_N - 1) // BLOCK_N - a_from)
    num_b = tl.maximum(0, (near_to - start + BLOCK_N - 1) // BLOCK_N - b_from)
    if SINK:
        apart = (num_a == 0) | (num_b == 0) | (a_from + num_a <= b_from) | (b_from + num_b <= a_from)
        last = tl.maximum(a_from + num_a, b_from + num_b)
        b_from = tl.where(apart, b_from, tl.minimum(a_from, b_from))
        num_a, num_b = tl.where(apart, num_a, 0), tl.where(apart, num_b, last - b_from)
    best = tl.full([BLOCK_M], NEVER, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(0, num_a + num_b):
        block = tl.where(i < num_a, a_from + i, b_from + i - num_a)
        slots = start + block * BLOCK_N + columns
        exists = slots < end
        inside = exists[:, None] & (dims < D)[None, :]
        k = tl.load(k_base + slots.to(tl.int64)[:, None] * D + dims[None, :], mask=inside, other=0.0)
        j = tl.load(kv_positions + slots, mask=exists, other=-1).to(tl.int32)
        if SCALED:  # through float32: not every pair of types has a conversion of its own
            k = k.to(tl.float32).to(q.dtype)
        # The interpreter's dot is wrong in bfloat16.
        scores = tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32)) if EMULATE else tl.dot(q, tl.trans(k))
        c = j // chunk
        seen = c[None, :] >= first[:, None]
        if ANCHORS:
            is_anchor = (j + 1) % chunk == 0
            seen = seen | (is_anchor[None, :] & (c[None, :] >= first[:, None] - ANCHORS))
        if SINK:
            seen = seen | (j < SINK)[None, :]
        seen = seen & (j >= 0)[None, :] & (j[None, :] <= p[:, None])
        scores = tl.where(seen, scores * (SCALE_LOG2E * k_scale), NEVER)
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.where(seen, tl.math.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.math.exp2(best - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_base + slots.to(tl.int64)[:, None] * D + dims[None, :], mask=inside, other=0.0)
        if SCALED:
            v = v.to(tl.float32).to(q.dtype)
        if EMULATE:
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype).to(tl.float32), v.to(tl.float32))
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        best = higher
    return best, total, acc


@triton.jit
def attend(
    Q,
    K,
    V,
    Q_POSITIONS,
    KV_POSITIONS,
    CHUNK_SIZE,
    KS,
    VS,
    HK,
    S,
    T,
    Y,
    SCALE_LOG2E: tl.constexpr,
    SINK: tl.constexpr,
    LEFT: tl.constexpr,
    ANCHORS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    SCALED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Grid (cdiv(S * GROUPS, BLOCK_M), B * HK)."""
    head = tl.program_id(1)
    b = head // HK
    rows, dims = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    s, exists = rows // GROUPS, rows < S * GROUPS
    p = tl.load(Q_POSITIONS + b.to(tl.int64) * S + s, mask=exists, other=-1).to(tl.int32)
    places = ((head.to(tl.int64) * GROUPS + rows % GROUPS) * S + s)[:, None] * D + dims[None, :]
    inside = exists[:, None] & (dims < D)[None, :]
    q = tl.load(Q + places, mask=inside, other=0.0)
    chunk = tl.minimum(tl.load(CHUNK_SIZE + b), MANY).to(tl.int32)
    k_scale, v_scale = 1.0, 1.0
    if SCALED:
        k_scale, v_scale = tl.load(KS + head % HK), tl.load(VS + head % HK)
    base = head.to(tl.int64) * T * D
    _, total, acc = _attend(
        q, p, K + base, V + base, KV_POSITIONS + b.to(tl.int64) * T, chunk, k_scale, 0, T,
        SCALE_LOG2E, SINK, LEFT, ANCHORS, D, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_SCAN, SCALED, EMULATE,
    )  # fmt: skip
    y = acc * (v_scale / tl.where(total == 0, 1.0, total))[:, None]
    tl.store(Y + places, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def attend_split(
    Q,
    K,
    V,
    Q_POSITIONS,
    KV_POSITIONS,
    CHUNK_SIZE,
    KS,
    VS,
    HK,
    S,
    T,
    PER_SPLIT,
    PARTIAL,
    LSE,
    SCALE_LOG2E: tl.constexpr,
    SINK: tl.constexpr,
    LEFT: tl.constexpr,
    ANCHORS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    SCALED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Grid (cdiv(S * GROUPS, BLOCK_M), B * HK, splits): each looks at PER_SPLIT slots. PARTIAL float32 [B * HK, splits, S * GROUPS, D],
    LSE float32 [B * HK, splits, S * GROUPS], in base 2."""
    head, split = tl.program_id(1), tl.program_id(2)
    b = head // HK
    rows, dims = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    s, exists = rows // GROUPS, rows < S * GROUPS
    p = tl.load(Q_POSITIONS + b.to(tl.int64) * S + s, mask=exists, other=-1).to(tl.int32)
    places = ((head.to(tl.int64) * GROUPS + rows % GROUPS) * S + s)[:, None] * D + dims[None, :]
    inside = exists[:, None] & (dims < D)[None, :]
    q = tl.load(Q + places, mask=inside, other=0.0)
    chunk = tl.minimum(tl.load(CHUNK_SIZE + b), MANY).to(tl.int32)
    k_scale, v_scale = 1.0, 1.0
    if SCALED:
        k_scale, v_scale = tl.load(KS + head % HK), tl.load(VS + head % HK)
    base = head.to(tl.int64) * T * D
    start = split * PER_SPLIT
    best, total, acc = _attend(
        q, p, K + base, V + base, KV_POSITIONS + b.to(tl.int64) * T, chunk, k_scale, start, tl.minimum(start + PER_SPLIT, T),
        SCALE_LOG2E, SINK, LEFT, ANCHORS, D, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_SCAN, SCALED, EMULATE,
    )  # fmt: skip
    y = acc * (v_scale / tl.where(total == 0, 1.0, total))[:, None]
    row = (head.to(tl.int64) * tl.num_programs(2) + split) * S * GROUPS + rows
    tl.store(PARTIAL + row[:, None] * D + dims[None, :], y, mask=inside)
    tl.store(LSE + row, tl.where(total == 0, NEVER, best + tl.math.log2(tl.where(total == 0, 1.0, total))), mask=exists)


@triton.jit
def combine(
    PARTIAL,
    LSE,
    S,
    SPLITS,
    Y,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid (cdiv(S * GROUPS, BLOCK_M), B * HK): the splits of each row, weighted by the mass that they saw."""
    head = tl.program_id(1)
    rows, dims = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    s, exists = rows // GROUPS, rows < S * GROUPS
    inside = exists[:, None] & (dims < D)[None, :]
    first = head.to(tl.int64) * SPLITS * S * GROUPS + rows
    best = tl.full([BLOCK_M], NEVER, tl.float32)
    for split in range(0, SPLITS):
        best = tl.maximum(best, tl.load(LSE + first + split * S * GROUPS, mask=exists, other=NEVER))
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(0, SPLITS):
        at = first + split * S * GROUPS
        weight = tl.math.exp2(tl.load(LSE + at, mask=exists, other=NEVER) - best)
        total += weight
        acc += weight[:, None] * tl.load(PARTIAL + at[:, None] * D + dims[None, :], mask=inside, other=0.0)
    y = acc / tl.where(total == 0, 1.0, total)[:, None]
    places = ((head.to(tl.int64) * GROUPS + rows % GROUPS) * S + s)[:, None] * D + dims[None, :]
    tl.store(Y + places, y.to(Y.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(attend, triton.runtime.JITFunction)  # TRITON_INTERPRET=1: the kernels run on a CPU, as numpy
