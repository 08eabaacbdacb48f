"""The graph against other definitions: the operator against NumPy, rotary tables against transformers, its bytes against themselves."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tiny import write_tiny

from trtllm_thoughtx.backends import ort_bfloat16 as emulation
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.config import BuildConfig, RopeConfig
from trtllm_thoughtx.graph import chunked_attention, external, rope
from trtllm_thoughtx.graph.decoder import decoder_graph, layer_output, parts_of

ROPES = {
    "none": {"rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 128, "rope_theta": 500000.0},
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0},
    "yarn, own factor": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0},
        **{"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    },
}


def attention_session(scale: float, sink: int, left: int) -> ort.InferenceSession:
    value = helper.make_tensor_value_info
    inputs = [
        value("q", TensorProto.FLOAT, ["B", "H", "S", "D"]),
        value("k", TensorProto.FLOAT, ["B", "G", "T", "D"]),
        value("v", TensorProto.FLOAT, ["B", "G", "T", "D"]),
        value("p", TensorProto.INT64, ["B", "S"]),
        value("j", TensorProto.INT64, ["B", "T"]),
        value("c", TensorProto.INT64, ["B"]),
    ]
    node = helper.make_node(
        chunked_attention.NAME, ["q", "k", "v", "p", "j", "c"], ["y"], domain=chunked_attention.DOMAIN, scale=scale, sink=sink, left=left
    )
    graph = helper.make_graph([node], "g", inputs, [value("y", TensorProto.FLOAT, ["B", "H", "S", "D"])])
    opsets = [helper.make_opsetid("", chunked_attention.OPSET), helper.make_opsetid(chunked_attention.DOMAIN, 1)]
    model = helper.make_model(graph, functions=[chunked_attention.function_proto()], opset_imports=opsets, ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@settings(max_examples=25, deadline=None)
@given(
    chunk=st.integers(1, 12),
    sink=st.integers(0, 5),
    left=st.integers(0, 3),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    width=st.integers(1, 8),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_operator_equals_its_definition(chunk, sink, left, lengths, width, groups, seed):
    """Prefill pieces and single tokens, ragged rows, empty slots, every GQA ratio, a chunk size per row."""
    rng = np.random.default_rng(seed)
    rows, slots = len(lengths), max(lengths) + 3
    q_positions = np.array([[max(0, n - width) + min(i, n - 1 - max(0, n - width)) for i in range(width)] for n in lengths])
    kv_positions = np.where(np.arange(slots)[None] < np.array(lengths)[:, None], np.arange(slots)[None], -1)
    for row in kv_positions:  # a slot may hold any position
        rng.shuffle(row)
    chunks = np.array([chunk + i for i in range(rows)])
    q = rng.standard_normal((rows, 4, width, 8)).astype(np.float32)
    k, v = (rng.standard_normal((rows, groups, slots, 8)).astype(np.float32) for _ in "kv")
    feeds = {"q": q, "k": k, "v": v, "p": q_positions, "j": kv_positions, "c": chunks}
    got = attention_session(0.25, sink, left).run(None, feeds)[0]
    mask = np.zeros((rows, width, slots), bool)
    for b in range(rows):
        for i, p in enumerate(q_positions[b]):
            for s, j in enumerate(kv_positions[b]):
                mask[b, i, s] = 0 <= j <= p and (j < sink or j // chunks[b] >= p // chunks[b] - left)
    assert np.array_equal(mask, chunked_attention.visible(q_positions, kv_positions, chunks, sink, left))
    np.testing.assert_allclose(got, chunked_attention.attention(q, k, v, mask, 0.25), atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 4, 7, 16, 64])
def test_mask_without_sinks_is_the_chunked_mask_of_transformers(chunk):
    torch = pytest.importorskip("torch")
    masking = pytest.importorskip("transformers.masking_utils")
    from transformers import Qwen2Config

    length = 33
    config = Qwen2Config(attention_chunk_size=chunk, attn_implementation="eager", hidden_size=8, num_attention_heads=1)
    hidden = torch.zeros(1, length, 8)
    theirs = masking.create_chunked_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=torch.arange(length)[None]
    )
    assert theirs is not None
    theirs = np.asarray(theirs[0, 0] == 0 if theirs.is_floating_point() else theirs[0, 0])
    positions = np.arange(length)
    assert np.array_equal(theirs, chunked_attention.visible(positions, positions, np.array(chunk)))


@pytest.mark.parametrize("name", ROPES)
def test_rotary_tables_equal_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from trtllm_thoughtx.families.hf_config import model_config_from_hf

    spelled = {"rope_type": "default", **ROPES[name]}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rope_parameters=spelled)
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1, 600, 64), torch.arange(600)[None])
    ours = model_config_from_hf({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, "config.json")
    cos, sin = rope.tables(ours.rope, ours.head_dim, ours.max_position, 600)
    for mine, reference in zip((cos, sin), theirs, strict=True):
        np.testing.assert_allclose(mine, reference[0, :, :8].numpy(), atol=3e-5)  # positions up to 600 in float32


def test_unscaled_rotary_angle_is_position_over_theta():
    cos, sin = rope.tables(RopeConfig(theta=100.0), 4, 64, 3)
    np.testing.assert_allclose(cos[2], np.cos([2.0, 2.0 / 10.0]), rtol=1e-6)
    np.testing.assert_allclose(sin[2], np.sin([2.0, 2.0 / 10.0]), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stages", [(), (1, 2)])
@pytest.mark.parametrize("chunked", [False, True])
def test_graphs_pass_the_checker_and_repeat_byte_for_byte(tmp_path, dtype, stages, chunked):
    write_tiny(tmp_path / "m", family="qwen3", num_layers=3, tied=True)
    with open_weights(tmp_path / "m") as source:
        extra = {"use_chunked_attention": True, "chunk_size": 8, "sink_tokens": 2, "left_chunks": 1} if chunked else {}
        build = BuildConfig(dtype=dtype, max_seq_len=64, stages=stages, **extra)
        parts = parts_of(source.config, stages)
        assert [p.name for p in parts] == (["rank0.stage0", "rank0.stage1", "rank0.stage2", "rank0.head"] if stages else ["rank0"])
        assert sum(p.last_layer - p.first_layer for p in parts) == 3
        for part in parts:
            first, second = (external.bind(decoder_graph(source.config, build, part), dtype, "w.data") for _ in range(2))
            assert first.model == second.model
            (tmp_path / "w.data").write_bytes(bytes(first.num_bytes))
            (tmp_path / "g.onnx").write_bytes(first.model)
            onnx.checker.check_model(str(tmp_path / "g.onnx"), full_check=True)
            ops = [node.op_type for node in first.graph.model.graph.node]
            num_layers = part.last_layer - part.first_layer
            assert ops.count("ChunkedAttention" if chunked else "Attention") == first.graph.num_attention == num_layers
            for node in first.graph.model.graph.node:
                if node.op_type == "ChunkedAttention":
                    assert {a.name for a in node.attribute} == {"scale", "sink", "left"}


def test_external_data_holds_the_weights_page_aligned(tmp_path):
    write_tiny(tmp_path / "m", family="qwen2", dtype="bfloat16")
    with open_weights(tmp_path / "m") as source:
        build = BuildConfig(dtype="float16", max_seq_len=64)
        bound = external.bind(decoder_graph(source.config, build, parts_of(source.config, ())[0]), "float16", "rank0.data")
        from trtllm_thoughtx.progress import SILENT

        digest = external.write_data(bound, source, tmp_path / "rank0.data", SILENT)
        assert all(offset % external.ALIGNMENT == 0 for offset in bound.offsets.values())
        (tmp_path / "rank0.onnx").write_bytes(bound.model)
        model = onnx.load(tmp_path / "rank0.onnx")
        stored = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
        for name in source.names():
            np.testing.assert_array_equal(stored[name], source.read(name).astype(np.float16))
        import hashlib

        assert digest == hashlib.sha256((tmp_path / "rank0.data").read_bytes()).hexdigest()


def test_the_emulation_computes_in_float32_and_rounds_every_result(tmp_path):
    write_tiny(tmp_path / "m", family="qwen2", dtype="bfloat16")
    with open_weights(tmp_path / "m") as source:
        build = BuildConfig(dtype="bfloat16", max_seq_len=64)
        graph = decoder_graph(source.config, build, parts_of(source.config, ())[0])
    model = onnx.ModelProto.FromString(external.bind(graph, "bfloat16", "w").model)
    assert emulation.is_bfloat16(model)
    made = emulation.emulated_bfloat16(model)
    assert model == onnx.ModelProto.FromString(external.bind(graph, "bfloat16", "w").model), "the plan's graph must stay as it is"
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*made.graph.input, *made.graph.output)}
    assert TensorProto.BFLOAT16 not in kinds.values() and kinds["past_key_0"] == TensorProto.FLOAT
    arithmetic = [n for n in model.graph.node if n.op_type in emulation.ROUNDED]
    assert len(made.graph.node) == len(model.graph.node) + 2 * len(arithmetic) + len(model.graph.initializer) - sum(
        x.data_type != TensorProto.BFLOAT16 for x in model.graph.initializer
    )
    producers = {n.output[0]: n for n in made.graph.node}
    assert producers[layer_output(0)].op_type == "Cast" and producers[producers[layer_output(0)].input[0]].op_type == "Cast"


def test_stage_edges_are_checked_by_name(tmp_path):
    from trtllm_thoughtx.build.options import resolve
    from trtllm_thoughtx.errors import ThoughtxError

    write_tiny(tmp_path / "m", num_layers=4)
    with open_weights(tmp_path / "m") as source:
        config = source.config
    assert resolve(config, {"early_exit_layers": (1, 3), "backend": ("onnxruntime",)}).stages == (1, 3)
    assert resolve(config, {"num_stages": 3, "backend": ("onnxruntime",)}).stages == (1, 2)
    bad = {
        "early_exit_layers": [(0,), (4,), (2, 1), (2, 2), ()],
        "num_stages": [0, 5, True],
        "max_seq_len": [1, 513, "9"],
        "max_batch_size": [0, -1],
        "max_input_len": [0, 4096],
        "chunk_size": [16],
        "sink_tokens": [1],
        "left_chunks": [1],
        "dtype": ["int8"],
        "backend": [("vulkan",)],
        "optimization_level": [6],
    }
    for flag, values in bad.items():
        for value in values:
            with pytest.raises(ThoughtxError) as caught:
                resolve(config, {"backend": ("onnxruntime",), flag: value})
            assert caught.value.code == "E001" and f"--{flag}" in caught.value.where, (flag, value)
    for flag, value in (("chunk_size", 0), ("chunk_size", 513), ("left_chunks", -1), ("sink_tokens", 512), ("sink_tokens", -1)):
        with pytest.raises(ThoughtxError):
            resolve(config, {"backend": ("onnxruntime",), "max_seq_len": 512, "use_chunked_attention": True, flag: value})


def test_large_models_are_cut_into_stages_for_tensorrt_only(tmp_path):
    from trtllm_thoughtx.build.options import STAGE_BYTES, resolve
    from trtllm_thoughtx.families.size import layer_parameters

    write_tiny(tmp_path / "m")
    with open_weights(tmp_path / "m") as source:
        config = dataclasses.replace(
            source.config,
            **{"hidden_size": 3584, "intermediate_size": 18944, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4},
            **{"head_dim": 128, "vocab_size": 152064, "tied": False},
        )
    settings_ = resolve(config, {"dtype": "float16", "backend": ("tensorrt-rtx",)})
    edges = [0, *settings_.stages, 28]
    per_layer = layer_parameters(config, whole=True) * 2
    head = 152064 * 3584 * 2
    sizes = [(b - a) * per_layer + (head if a == 0 else 0) for a, b in pairwise(edges)]
    assert len(settings_.stages) >= 3 and max(sizes) <= STAGE_BYTES
    assert resolve(config, {"dtype": "float16", "backend": ("onnxruntime",)}).stages == ()
