"""The decoder as ONNX graphs, authored straight from a `ModelConfig`: one graph, or one per stage and one for the head.

Standard operators of opset 24, plus `thoughtx::ChunkedAttention` when asked for. Nothing is traced and no weight is read
here: `decoder_graph` returns the graph with its large initializers marked external, and the list of what belongs in them
(`Initializer`), which `graph.external` streams to disk and `backends` hand to their builders from memory.

Shapes: B batch, S tokens of this call, T live cache slots, K rows of logits, H hidden, N = B * S, D head_dim. The residual
stream is kept flat, [N, H], so that each linear layer is one Gemm that takes the checkpoint's [out, in] weight as it lies
on disk, with its bias, and tied heads share the embedding's bytes.

The KV cache is static and written in place (TensorScatter); only its first T slots, those in use, are attended to, so that
the work per token follows the live cache and not max_seq_len. In TensorRT the cache must be a network input of static length.
With chunked attention it has `BuildConfig.kv_capacity` slots, and a slot may hold any position.
"""

from __future__ import annotations

from itertools import pairwise

from onnx import TensorProto, helper

from trtllm_thoughtx.checkpoint.exits import ExitWeights
from trtllm_thoughtx.config import BuildConfig, ModelConfig
from trtllm_thoughtx.families.quantization import TABLE
from trtllm_thoughtx.graph import blocks, chunked_attention, exits, experts, quantized, rope
from trtllm_thoughtx.graph.builder import Builder, Graph, Part
from trtllm_thoughtx.graph.lora import adapted
from trtllm_thoughtx.graph.quantized import linear

IR_VERSION = 11


def parts_of(config: ModelConfig, stages: tuple[int, ...]) -> list[Part]:
    """`stages` holds the first layer of each stage after the first; none: a single graph with everything in it."""
    if not stages:
        return [Part("rank0", 0, config.num_layers, embeds=True, head=True)]
    edges = [0, *stages, config.num_layers]
    body = [Part(f"rank0.stage{k}", a, b, embeds=k == 0, head=False) for k, (a, b) in enumerate(pairwise(edges))]
    return [*body, Part("rank0.head", config.num_layers, config.num_layers, embeds=False, head=True)]


def layer_output(layer: int) -> str:
    """Graph value that holds the residual stream after a layer, [N, H]; layer -1 is the embedding."""
    return "embedding.output" if layer < 0 else f"layers.{layer}.output"


def decoder_graph(config: ModelConfig, build: BuildConfig, part: Part, exits: ExitWeights | None = None) -> Graph:
    """The graph of one part; the same arguments give the same bytes. `exits` adds the outputs of `graph.exits`."""
    b = Builder(config, build, part, exits or ExitWeights())
    x = _enter(b)
    if part.last_layer > part.first_layer:
        _shared_inputs(b)
        for layer in range(part.first_layer, part.last_layer):
            x = _layer(b, layer, x)
    _leave(b, x)
    graph = helper.make_graph(b.nodes, part.name, b.inputs, b.outputs, b.inline)
    opsets = [helper.make_opsetid("", chunked_attention.OPSET)]
    functions = []
    if build.use_chunked_attention and b.num_attention:
        opsets.append(helper.make_opsetid(chunked_attention.DOMAIN, 1))
        functions.append(chunked_attention.function_proto(anchors=build.num_anchors > 0, plugin=build.plugin))
    if config.experts is not None and b.num_attention:
        opsets += [] if functions else [helper.make_opsetid(experts.DOMAIN, 1)]
        functions.append(experts.function_proto(config.experts, b.elem_type))
    if any(node.domain == blocks.DOMAIN for node in b.nodes):
        opsets.append(helper.make_opsetid(blocks.DOMAIN, 1))
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=IR_VERSION, producer_name="trtllm-thoughtx")
    return Graph(part, model, tuple(b.external), b.num_attention, tuple(b.products))


def _enter(b: Builder) -> str:
    hidden = b.config.hidden_size
    b.constant("shape.flat", [-1, hidden])
    if b.part.embeds:
        ids = b.input("input_ids", TensorProto.INT64, ["B", "S"])
        x = b.node("Gather", [quantized.table(b), ids], "embedding.lookup")
        return b.node("Reshape", [x, "shape.flat"], layer_output(-1))
    x = b.input("hidden_states", b.elem_type, ["B", "S", hidden])
    return b.node("Reshape", [x, "shape.flat"], "hidden_states.flat")


def _shared_inputs(b: Builder) -> None:
    """What all layers of the part share: positions, live slots, rotary tables, shapes."""
    config = b.config
    positions = b.input("positions", TensorProto.INT64, ["B", "S"])
    b.input("kv_positions", TensorProto.INT64, ["B", "T"])
    b.input("write_indices", TensorProto.INT64, ["B"])
    cos, sin = rope.tables(config.rope, config.head_dim, config.max_position, b.build.max_seq_len)
    b.table("rope.cos", cos)
    b.table("rope.sin", sin)
    b.node("Shape", [positions], "shape.tokens")
    for name, num_heads in (("q", config.num_heads), ("kv", config.num_kv_heads)):
        heads = b.constant(f"shape.{name}_heads", [num_heads, config.head_dim])
        b.node("Concat", ["shape.tokens", heads], f"shape.{name}", axis=0)
    b.constant("shape.attention", [-1, config.q_size])
    b.constant("qkv.sizes", [config.q_size, config.kv_size, config.kv_size])
    b.node("Shape", ["kv_positions"], "live.slots", start=1, end=2)
    b.constant("live.start", [0])
    b.constant("live.axis", [2])
    if b.build.use_chunked_attention:
        b.input("chunk_size", TensorProto.INT64, ["B"])
        return
    b.constant("mask.query_axes", [1, 3])
    b.constant("mask.key_axes", [1, 2])
    b.constant("mask.zero", 0)
    p = b.node("Unsqueeze", [positions, "mask.query_axes"], "mask.p")
    j = b.node("Unsqueeze", ["kv_positions", "mask.key_axes"], "mask.j")
    past = b.node("LessOrEqual", [j, p], "mask.is_past")
    live = b.node("GreaterOrEqual", [j, "mask.zero"], "mask.is_live")
    b.node("And", [past, live], "mask.visible")


def _layer(b: Builder, layer: int, x: str) -> str:
    config, name, hidden = b.config, f"layers.{layer}", b.config.hidden_size
    weights = f"transformer.layers.{layer}"
    h = b.norm(x, f"{weights}.input_layernorm.weight", f"{name}.attention.norm", hidden)
    a = _attention(b, layer, h)
    o = adapted(b, a, layer, "attention.dense", f"{name}.attention.dense", hidden, config.q_size, bias=config.o_bias)
    x = b.node("Add", [x, o], f"{name}.attention.residual")
    h = b.norm(x, f"{weights}.post_layernorm.weight", f"{name}.mlp.norm", hidden)
    if config.experts is not None:
        return b.node("Add", [x, experts.mlp(b, h, layer)], layer_output(layer))
    # TensorRT-LLM names: fc is the activated projection (gate_proj), gate is up_proj.
    fc = adapted(b, h, layer, "mlp.fc", f"{name}.mlp.fc", config.intermediate_size, hidden)
    gate = adapted(b, h, layer, "mlp.gate", f"{name}.mlp.gate", config.intermediate_size, hidden)
    active = b.node("Swish", [fc], f"{name}.mlp.active")
    product = b.node("Mul", [active, gate], f"{name}.mlp.product")
    down = adapted(b, product, layer, "mlp.proj", f"{name}.mlp.proj", hidden, config.intermediate_size)
    return b.node("Add", [x, down], layer_output(layer))


def _attention(b: Builder, layer: int, h: str) -> str:
    config, name, weights = b.config, f"layers.{layer}.attention", f"transformer.layers.{layer}.attention"
    qkv = adapted(b, h, layer, "attention.qkv", f"{name}.qkv", config.q_size + 2 * config.kv_size, config.hidden_size, bias=config.qkv_bias)
    split = [f"{name}.{x}.flat" for x in "qkv"]
    b.nodes.append(helper.make_node("Split", [qkv, "qkv.sizes"], split, name=f"{name}.split", axis=-1))
    heads = {}
    for x, flat in zip("qkv", split, strict=True):
        shaped = b.node("Reshape", [flat, "shape.q" if x == "q" else "shape.kv"], f"{name}.{x}.heads")
        if config.qk_norm and x != "v":
            shaped = b.norm(shaped, f"{weights}.{x}_layernorm.weight", f"{name}.{x}.norm", config.head_dim)
        heads[x] = b.node("Transpose", [shaped], f"{name}.{x}", perm=[0, 2, 1, 3])
    for x in "qk":
        heads[x] = b.node("RotaryEmbedding", [heads[x], "rope.cos", "rope.sin", "positions"], f"{name}.{x}.rotated")
    live = {}
    for x, kind in (("k", "key"), ("v", "value")):
        cache: list[str | int] = ["B", config.num_kv_heads, b.build.kv_capacity, config.head_dim]
        is_small = config.quantization is not None and config.quantization.kv_algo == "INT8"
        elem_type = TensorProto.INT8 if is_small else TensorProto.FLOAT16 if b.build.cache_dtype == "float16" else b.elem_type
        past = b.input(f"past_{kind}_{layer}", elem_type, cache)
        present = b.output(f"present_{kind}_{layer}", elem_type, cache)
        new = quantized.cache_in(b, heads[x], weights, f"{name}.{x}") if is_small else heads[x]
        if not is_small and elem_type != b.elem_type:
            new = b.node("Cast", [new], f"{name}.{x}.cached", to=elem_type)
        b.node("TensorScatter", [past, new, "write_indices"], present, axis=-2)
        slots = b.node("Slice", [present, "live.start", "live.slots", "live.axis"], f"{name}.{x}.live")
        live[x] = quantized.cache_out(b, slots, weights, f"{name}.{x}") if is_small else slots
        if not is_small and elem_type != b.elem_type:
            live[x] = b.node("Cast", [slots], f"{name}.{x}.wide", to=b.elem_type)
    scale = float(config.head_dim) ** -0.5
    b.num_attention += 1
    if b.build.use_chunked_attention:
        inputs = [heads["q"], live["k"], live["v"], "positions", "kv_positions", "chunk_size"]
        sizes = {"sink": b.build.sink_tokens, "left": b.build.left_chunks}
        sizes |= {"anchors": b.build.num_anchors} if b.build.num_anchors else {}
        groups = config.num_heads // config.num_kv_heads
        extra = sizes | chunked_attention.plugin_attributes(b.build.plugin, config.head_dim, groups, b.build.num_anchors)
        y = b.node(chunked_attention.NAME, inputs, f"{name}.heads", domain=chunked_attention.DOMAIN, scale=scale, **extra)
    else:
        y = b.node("Attention", [heads["q"], live["k"], live["v"], "mask.visible"], f"{name}.heads", scale=scale)
    y = b.node("Transpose", [y], f"{name}.tokens", perm=[0, 2, 1, 3])
    return b.node("Reshape", [y, "shape.attention"], f"{name}.flat")


def _leave(b: Builder, x: str) -> None:
    config, hidden = b.config, b.config.hidden_size
    b.constant("shape.hidden_tail", [hidden])
    # A head on its own has no `positions` to take B and S from.
    tokens = "shape.tokens"
    if not b.num_attention:
        tokens = b.node("Shape", ["hidden_states"], tokens, start=0, end=2)
    shape = b.node("Concat", [tokens, "shape.hidden_tail"], "shape.hidden", axis=0)
    if not b.part.head:
        out = b.output("hidden_states_out", b.elem_type, ["B", "S", hidden])
        b.node("Reshape", [x, shape], out)
        adapter = b.exits.adapter(b.part.last_layer)
        if adapter is not None:
            exits.add_draft(b, x, adapter)
        return
    shaped = b.node("Reshape", [x, shape], "head.hidden")
    rows = b.input("logit_indices", TensorProto.INT64, ["B", "K"])
    b.constant("head.index_axis", [2])
    index = b.node("Unsqueeze", [rows, "head.index_axis"], "head.index")
    picked = b.node("GatherND", [shaped, index], "head.rows", batch_dims=1)
    flat = b.node("Reshape", [picked, "shape.flat"], "head.rows.flat")
    normed = b.norm(flat, "transformer.ln_f.weight", "head.norm", hidden)
    if config.has_head or (config.quantization is not None and config.quantization.embedding):
        head = "lm_head" if config.has_head else TABLE
        logits = linear(b, normed, head, "head.logits", config.vocab_size, hidden)
    else:
        logits = b.node("Gemm", [normed, quantized.table(b)], "head.logits", transB=1)
    logits = b.node("Cast", [logits], "head.logits.float32", to=TensorProto.FLOAT)
    b.node("Shape", [rows], "shape.rows")
    b.constant("shape.vocab_tail", [config.vocab_size])
    b.node("Concat", ["shape.rows", "shape.vocab_tail"], "shape.logits", axis=0)
    out = b.output("logits", TensorProto.FLOAT, ["B", "K", config.vocab_size])
    b.node("Reshape", [logits, "shape.logits"], out)
    if b.exits.head is not None:
        exits.add_exit_head(b, normed, b.exits.head)
