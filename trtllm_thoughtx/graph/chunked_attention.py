"""`thoughtx::ChunkedAttention`: the operator, its ONNX function body, and its plain NumPy definition.

A query at position p sees a key at position j when

    0 <= j <= p  and  (j < sink  or  j // chunk_size >= p // chunk_size - left  or  j is an anchor)

An anchor is the last token of one of the `anchors` chunks before those.

Positions count from the first real token of a sequence. They are inputs, not implied by the slot index, so cache slots may
be empty (-1) or hold any position. `chunk_size` is a run-time input per sequence; `sink`, `left`, `anchors` (0 when absent) and
`scale` are attributes.
With left = sink = 0 this is Llama 4's chunked mask (transformers `create_chunked_causal_mask`); with chunk_size >= length it is
full causal attention.

The function carries standard operators, so that every backend runs it; a backend with a kernel may replace it by name. TensorRT's
parser looks a function up by name alone and ignores attribute defaults: hence the unmistakable name, and every attribute on
every node.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

DOMAIN = "thoughtx"
NAME = "ChunkedAttention"
OPSET = 24

_BODY = f"""
<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
{NAME} <scale, sink, left@attribute> (ca_q, ca_k, ca_v, ca_q_positions, ca_kv_positions, ca_chunk_size) => (ca_y)
{{
  ca_axes_query = Constant <value = int64[2] {{1, 3}}> ()
  ca_axes_key = Constant <value = int64[2] {{1, 2}}> ()
  ca_axes_chunk = Constant <value = int64[3] {{1, 2, 3}}> ()
  ca_zero = Constant <value = int64 {{0}}> ()
  ca_sink = Constant <value_int: int = @sink> ()
  ca_left = Constant <value_int: int = @left> ()
  ca_p = Unsqueeze (ca_q_positions, ca_axes_query)
  ca_j = Unsqueeze (ca_kv_positions, ca_axes_key)
  ca_c = Unsqueeze (ca_chunk_size, ca_axes_chunk)
  ca_chunk_of_p = Div (ca_p, ca_c)
  ca_chunk_of_j = Div (ca_j, ca_c)
  ca_first_chunk = Sub (ca_chunk_of_p, ca_left)
  ca_is_near = GreaterOrEqual (ca_chunk_of_j, ca_first_chunk)
  ca_is_sink = Less (ca_j, ca_sink)
  ca_in_window = Or (ca_is_near, ca_is_sink)
  ca_is_past = LessOrEqual (ca_j, ca_p)
  ca_is_live = GreaterOrEqual (ca_j, ca_zero)
  ca_is_causal = And (ca_is_past, ca_is_live)
@nodes  ca_visible = And (ca_in_@reach, ca_is_causal)
  ca_y = Attention <scale: float = @scale> (ca_q, ca_k, ca_v, ca_visible)
}}
"""


_ANCHORS = """\
  ca_anchors = Constant <value_int: int = @anchors> ()
  ca_one = Constant <value = int64 {1}> ()
  ca_next = Add (ca_j, ca_one)
  ca_rest = Mod (ca_next, ca_c)
  ca_is_last = Equal (ca_rest, ca_zero)
  ca_first_anchor = Sub (ca_first_chunk, ca_anchors)
  ca_is_kept = GreaterOrEqual (ca_chunk_of_j, ca_first_anchor)
  ca_is_anchor = And (ca_is_last, ca_is_kept)
  ca_in_reach = Or (ca_in_window, ca_is_anchor)
"""


def plugin_attributes(form: str, head_dim: int, groups: int, anchors: int) -> dict[str, int | str]:
    """What a node carries beside the operator's own attributes so that TensorRT's parser takes a plugin for it; none for "function".

    Since 10.15 the parser prefers the function unless the node itself has `plugin_namespace`, and it ignores attributes that a node
    does not state. A parser without such a plugin, and onnxruntime, still take the function.
    """
    if form == "function":
        return {}
    named: dict[str, int | str] = {"plugin_namespace": DOMAIN, "plugin_version": "1", **({"aot": 1} if form == "aot" else {})}
    return named | {"anchors": anchors, "head_dim": head_dim, "groups": groups}


def function_proto(*, anchors: bool = False, plugin: str = "function") -> onnx.FunctionProto:
    """The operator as an ONNX model-local function, with the attribute `anchors` or without it, and those that a plugin's nodes have.

    q [B, num_heads, S, head_dim], k and v [B, num_kv_heads, T, head_dim], q_positions int64 [B, S],
    kv_positions int64 [B, T], chunk_size int64 [B] -> y like q.
    """
    more = {"@attribute": ", anchors" if anchors else "", "@nodes": _ANCHORS if anchors else "", "@reach": "reach" if anchors else "window"}
    body = _BODY
    for mark, text in more.items():
        body = body.replace(mark, text)
    made = onnx.parser.parse_function(body)
    made.attribute.extend(name for name in plugin_attributes(plugin, 1, 1, 0) if name not in made.attribute)
    return made


def visible(
    q_positions: np.ndarray, kv_positions: np.ndarray, chunk_size: np.ndarray | None, sink: int = 0, left: int = 0, anchors: int = 0
) -> np.ndarray:
    """The mask itself: bool [..., S, T] from positions int [..., S] and [..., T], chunk_size int [...] (None: full attention)."""
    p, j = q_positions[..., :, None], kv_positions[..., None, :]
    causal = (j >= 0) & (j <= p)
    if chunk_size is None:
        return causal
    c = np.asarray(chunk_size)[..., None, None]
    is_anchor = ((j + 1) % c == 0) & (j // c >= p // c - left - anchors) if anchors else False
    return causal & ((j < sink) | (j // c >= p // c - left) | is_anchor)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
    """Masked grouped-query attention in float64: q [B, H, S, D], k and v [B, Hk, T, D], mask bool [B, S, T] -> [B, H, S, D]."""
    groups = q.shape[1] // k.shape[1]
    k64, v64 = (np.repeat(x.astype(np.float64), groups, axis=1) for x in (k, v))
    scores = np.where(mask[:, None], q.astype(np.float64) @ k64.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v64
