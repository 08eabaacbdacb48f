"""Quantized checkpoints and their engines: what the stored numbers stand for, in the file, in onnxruntime and in a TensorRT-RTX plan."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from places import ROOT
from quantized_models import SIZES, damaged
from tiny import write_tiny

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from trtllm_thoughtx import Engine, report  # noqa: E402
from trtllm_thoughtx.build.build import build  # noqa: E402
from trtllm_thoughtx.calibrate.quantize import grid  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.job import calibrate  # noqa: E402
from trtllm_thoughtx.checkpoint.weights import open_weights  # noqa: E402
from trtllm_thoughtx.errors import ThoughtxError  # noqa: E402
from trtllm_thoughtx.families.formats import FORMATS, INT8, QUANT_ALGOS, Format  # noqa: E402

ROWS = [[5, 9, 2, 44, 7], [1] * 3, list(range(40)), [90, 3]]
OPTIONS = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64, "max_input_len": 16}
PACKAGE = ROOT / "trtllm_thoughtx"


def test_scales_are_the_same_numbers_in_every_type():
    values = torch.cat([torch.logspace(-12, 4, 999), torch.tensor([0.0, 65280.0])])
    for up in (True, False):
        tidy = grid.tidy(values, up=up)
        for kind in (torch.float16, torch.bfloat16):
            assert torch.equal(tidy.to(kind).float(), tidy), kind
    assert bool((grid.tidy(values) >= values).all())
    assert bool(((grid.tidy(values) - values) <= torch.maximum(values / 128, torch.tensor(2.0**-24))).all())


@pytest.mark.parametrize("qformat", QUANT_ALGOS)
def test_pack_and_unpack_are_inverse(qformat):
    algo, weight = QUANT_ALGOS[qformat], torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    scale = grid.weight_scale(weight, algo, 16 if qformat.startswith("nvfp4") else 32)
    found = grid.unpack(grid.pack(weight, scale, algo), scale.numpy(), algo=algo)
    assert np.array_equal(found, grid.on_grid(weight, scale, algo).numpy())
    step = {"fp8": 1 / 14, "int8_sq": 1 / 127, "int8_wo": 1 / 127, "int4_wo": 1 / 7, "int4_awq": 1 / 7, "nvfp4": 1 / 3, "nvfp4_wo": 1 / 3}[
        qformat
    ]
    assert np.abs(found - weight.numpy()).max() <= 0.51 * step * float(weight.abs().max()) * 1.01 + 1e-6


def plain_engine_of(checkpoint: Path, out: Path, hf: dict[str, np.ndarray], shape: dict) -> Engine:
    """An engine of an unquantized checkpoint whose matrices are what the quantized ones stand for. Weight-only formats must equal it."""
    tensors = dict(hf)
    with open_weights(checkpoint) as source:
        config = source.config
        quant = config.quantization
        for name, mine in (("transformer.vocab_embedding", "model.embed_tokens"), ("lm_head", "lm_head")):
            if quant.embedding and f"{name}.weight" in source.names():
                scale = source.read(f"{name}.{'weights_scaling_factor' if quant.embedding_group else 'per_channel_scale'}")
                tensors[f"{mine}.weight"] = grid.unpack(source.read(f"{name}.weight"), scale)
        for layer in range(config.num_layers):
            name, mine = f"transformer.layers.{layer}", f"model.layers.{layer}"
            for module, parts in (
                ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("attention.dense", ("self_attn.o_proj",)),
                ("mlp.fc", ("mlp.gate_proj",)),
                ("mlp.gate", ("mlp.up_proj",)),
                ("mlp.proj", ("mlp.down_proj",)),
            ):
                scale = source.read(f"{name}.{module}.{FORMATS[quant.algo].scale_name}")
                zero = source.read(f"{name}.{module}.zero") if quant.zero_point else None
                matrix = grid.unpack(source.read(f"{name}.{module}.weight"), scale, zero)
                if quant.prequant:
                    matrix = matrix * source.read(f"{name}.{module}.prequant_scaling_factor")
                first = 0
                for part in parts:
                    rows = hf[f"{mine}.{part}.weight"].shape[0]
                    tensors[f"{mine}.{part}.weight"] = matrix[first : first + rows].astype(np.float32)
                    first += rows
    write_tiny(out / "plain", tensors=tensors, **shape)
    build(out / "plain", out / "plain-engine", OPTIONS)
    return Engine.load(out / "plain-engine", num_threads=1)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("qformat", ["int8_wo", "int4_wo", "int4_awq"])
@pytest.mark.slow
def test_weight_only_engines_compute_with_what_the_file_stands_for(tmp_path, family, qformat):
    shape = {**SIZES, "family": family}
    hf = write_tiny(tmp_path / "m", **shape)
    calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, calib_size=8, calib_seq_len=32)
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    engine = Engine.load(tmp_path / "e", num_threads=1, exact=True)
    plain = plain_engine_of(tmp_path / "c", tmp_path, hf, shape)
    for mine, wanted in zip(engine.forward(ROWS), plain.forward(ROWS), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-4)
    original = build(tmp_path / "m", tmp_path / "o", OPTIONS) and Engine.load(tmp_path / "o", num_threads=1)
    assert np.abs(engine.forward(ROWS)[2] - original.forward(ROWS)[2]).max() > 1e-3


def test_a_row_of_the_table_is_a_format(tmp_path, monkeypatch):
    """Numbers and scales that no format has together: searched, stored, read, built, run and reported from the table's row alone."""
    row = Format(algo="W8A16_GROUPS", number=INT8, scales="group", scale_name="group_scale", qformat="int8_groups")
    monkeypatch.setitem(FORMATS, row.algo, row)
    monkeypatch.setitem(QUANT_ALGOS, row.qformat, row.algo)
    hf = write_tiny(tmp_path / "m", **SIZES)
    found = calibrate(
        tmp_path / "m",
        tmp_path / "c",
        qformat="int8_groups",
        group_size=16,
        calib_size=8,
        calib_seq_len=32,
        exclude=("transformer.vocab_embedding",),
    )
    assert found["size"]["mean_bits"] == 9  # 8, and a sixteenth of a 16-bit scale
    with open_weights(tmp_path / "c") as source:
        assert source.read("transformer.layers.0.mlp.fc.group_scale").shape == (128, 4)
        assert source.read("transformer.layers.0.mlp.fc.weight").dtype == np.int8
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    plain = plain_engine_of(tmp_path / "c", tmp_path, hf, SIZES).forward(ROWS)
    for exact in (True, False):
        for mine, wanted in zip(Engine.load(tmp_path / "e", num_threads=1, exact=exact).forward(ROWS), plain, strict=True):
            np.testing.assert_allclose(mine, wanted, atol=2e-4)


def test_formats_are_told_apart_in_one_table():
    """Beside it only the safetensors files, the reader of checkpoints that others quantized, and what trtllm-build takes spell them."""
    names = {row.algo for row in FORMATS.values()} | {row.number.stored for row in FORMATS.values()}
    where = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    }
    others = {"checkpoint/header.py", "checkpoint/tensor_file.py", "checkpoint/quantized.py", "build/trtllm.py"}
    assert where == {"families/formats.py", *others}


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
def test_engines_with_rounded_inputs_compute_what_the_calibration_did(tmp_path, qformat):
    """The walk's own arithmetic, layer by layer in torch, against the graph in onnxruntime."""
    write_tiny(tmp_path / "m", **SIZES)
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, calib_size=8, calib_seq_len=32)
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    engine = Engine.load(tmp_path / "e", num_threads=1)
    original = build(tmp_path / "m", tmp_path / "o", OPTIONS) and Engine.load(tmp_path / "o", num_threads=1)
    from trtllm_thoughtx.validate.divergence import Divergence

    seen = Divergence()
    for row in found["validation"]:
        seen.add(original.forward([row])[0], engine.forward([row])[0], [*row[1:], -1])
    assert seen.summary().kl == pytest.approx(found["end_to_end"]["kl"], rel=0.25)
    assert seen.summary().perplexity_ratio == pytest.approx(found["end_to_end"]["perplexity_ratio"], rel=0.01)
    assert found["end_to_end"]["kl"] > 1e-6


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qformat", ["int8_sq", "int8_wo", "int4_wo", "int4_awq"])
def test_fused_operators_compute_the_same_products(tmp_path, qformat, tied):
    """MatMulNBits rounds its inputs to 8 bits a block; QGemm is the graph's own integer arithmetic."""
    write_tiny(tmp_path / "m", tied=tied, **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, calib_size=8, calib_seq_len=32, quant_lm_head=True)
    build(tmp_path / "c", tmp_path / "e", {**OPTIONS, "early_exit_layers": (1,)})
    fused, exact = (Engine.load(tmp_path / "e", num_threads=1, exact=exact) for exact in (False, True))
    error, size = 0.0, 0.0
    for mine, wanted in zip(fused.forward(ROWS), exact.forward(ROWS), strict=True):
        error, size = error + float(((mine - wanted) ** 2).sum()), size + float((wanted**2).sum())
    assert (error / size) ** 0.5 < (1e-2 if qformat == "int8_sq" else 3e-2)


def fused_graph(engine: Path):
    """(graph as it runs on a CPU, what was rewritten)."""
    import onnx

    from trtllm_thoughtx.backends.ort_fused import fuse

    model = onnx.load(engine / "rank0.onnx", load_external_data=False)
    with (engine / "rank0.data").open("rb") as data:
        return model.graph, fuse(model, data)


def test_every_quantized_product_is_fused(tmp_path):
    for number, (qformat, num, group) in enumerate(
        (("int8_sq", 11, None), ("int8_wo", 22, 0), ("int8_wo", 11, None), ("int4_awq", 11, None))
    ):
        write_tiny(tmp_path / "m", **SIZES)
        calibrated, engine = tmp_path / f"c{number}", tmp_path / f"e{number}"
        calibrate(tmp_path / "m", calibrated, qformat=qformat, calib_size=4, calib_seq_len=16, quant_lm_head=True, group_size=group)
        build(calibrated, engine, OPTIONS)
        graph, found = fused_graph(engine)
        assert (found.num_products, found.num_rounding) == (11, 0 if qformat == "int8_sq" else 11)
        kinds = [node.op_type for node in graph.node]
        in_blocks = qformat == "int4_awq" or (qformat == "int8_wo" and group is None)
        assert kinds.count("MatMulNBits" if in_blocks else "QGemm") == num and "Gemm" not in kinds
        # INT8 weights: inputs are split once for all that read them, five times a layer less one for gate and up, and for the head
        assert kinds.count("ReduceL2" if group == 0 else "Round") == (9 if qformat == "int8_wo" else 0)
        assert found.num_lookups == 1


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("num", [64, 40_000])
def test_integer_products_are_exact_at_the_extremes(tmp_path, monkeypatch, signed, num):
    """The graph's signed integers, run unsigned around 128, against NumPy: largest and smallest numbers, any number of rows; 40,000 inputs
    pass what 32 bits hold of unsigned sums. Unsigned by signed only where the CPU's own largest products come out right."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    from trtllm_thoughtx.backends import ort_fused

    if signed and not ort_fused.takes_signed_weights():
        pytest.skip("this CPU saturates unsigned by signed products, so they are not used")
    monkeypatch.setattr(ort_fused, "takes_signed_weights", lambda: signed)
    weight = np.random.default_rng(0).integers(-128, 128, (8, num)).astype(np.int8)
    weight[0], weight[1], weight[2] = 127, -128, np.where(np.arange(num) % 2, 127, -128)
    (tmp_path / "data").write_bytes(weight.tobytes())
    stored = TensorProto(name="w", data_type=TensorProto.INT8, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "data"), ("offset", "0"), ("length", str(weight.nbytes))):
        stored.external_data.add(key=key, value=value)
    scalars = [onnx.numpy_helper.from_array(np.asarray(x), name) for x, name in ((np.float32(1), "one"), (np.int8(0), "zero"))]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "one"], ["matrix"]),
        helper.make_node("Gemm", ["d", "matrix"], ["y"], transB=1),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", None]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [stored, *scalars])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with (tmp_path / "data").open("rb") as data:
        arrays = ort_fused.fuse(model, data).arrays
    (product,) = [node for node in model.graph.node if node.op_type == "QGemm"]
    assert (product.input[3] == "w") == signed and [node.op_type for node in model.graph.node] == ["QuantizeLinear", "QGemm"]
    options = ort.SessionOptions()
    options.add_external_initializers(list(arrays), [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()])
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for rows in (1, 2, 5, 33):
        x = np.random.default_rng(rows).integers(-200, 200, (rows, num)).astype(np.float32)
        x[0], x[-1] = np.where(np.arange(num) % 2, 500, -500), (-500 if rows > 1 else 127)
        wanted = np.clip(x, -128, 127).astype(np.int64) @ weight.T.astype(np.int64)
        assert np.array_equal(session.run(None, {"x": x})[0], wanted.astype(np.float32)), rows


@pytest.mark.parametrize("room", [1 << 40, 0])
def test_fp8_matrices_are_widened_once_where_memory_has_room(tmp_path, monkeypatch, room):
    """What is widened when the engine is loaded is what the graph would widen in each step, bit for bit."""
    from trtllm_thoughtx.backends import ort_fused

    write_tiny(tmp_path / "m", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_size=4, calib_seq_len=16, quant_lm_head=True)
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    monkeypatch.setattr(ort_fused, "available_bytes", lambda: room)
    graph, found = fused_graph(tmp_path / "e")
    assert (found.num_wide, found.num_left, found.num_products) == ((11, 0, 0) if room else (0, 11, 0))
    assert [node.op_type for node in graph.node].count("DequantizeLinear") == (11 if room else 22)  # the inputs', and the matrices'
    mine, wanted = (Engine.load(tmp_path / "e", num_threads=1, exact=exact).forward(ROWS) for exact in (False, True))
    assert all(np.array_equal(a, b) for a, b in zip(mine, wanted, strict=True))


def test_odd_group_sizes_are_widened(tmp_path):
    """`MatMulNBits` knows no groups of 24; nothing may be widened in every step."""
    write_tiny(tmp_path / "m", **{**SIZES, "hidden_size": 96, "intermediate_size": 192})
    calibrate(
        tmp_path / "m",
        tmp_path / "c",
        qformat="int4_wo",
        calib_size=4,
        calib_seq_len=16,
        group_size=24,
        exclude=("transformer.vocab_embedding",),
    )
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    assert fused_graph(tmp_path / "e")[1].num_wide == 10
    mine, wanted = (Engine.load(tmp_path / "e", num_threads=1, exact=exact).forward(ROWS) for exact in (False, True))
    for a, b in zip(mine, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_builds_say_what_a_cpu_gains_nothing_from(tmp_path):
    """FP8, a 16-bit engine, groups that no operator knows: named by the build and by inspect; the rest has no note."""
    from trtllm_thoughtx.inspection import describe

    write_tiny(tmp_path / "m", **{**SIZES, "hidden_size": 96, "intermediate_size": 192})
    cases = (
        ("fp8", None, "float32", "FP8"),
        ("int4_wo", 24, "float32", "groups of 24"),
        ("int8_wo", None, "float16", "float16"),
        ("int8_wo", None, "float32", None),
        ("int8_sq", None, "float32", None),
        ("int4_wo", 32, "float32", None),
    )
    for number, (qformat, group_size, dtype, word) in enumerate(cases):
        checkpoint, engine = tmp_path / f"c{number}", tmp_path / f"e{number}"
        calibrate(tmp_path / "m", checkpoint, qformat=qformat, group_size=group_size, calib_size=4, calib_seq_len=8)
        made = build(checkpoint, engine, {**OPTIONS, "dtype": dtype})
        assert made["notes"] == describe(engine)["notes"]
        notes = [note for note in made["notes"] if "no tokenizer.json" not in note]
        assert len(notes) == (word is not None)
        if word is not None:
            assert word in notes[0] and "float32" in notes[0]


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
def test_a_product_of_two_rounded_sides_has_one_scale_on_each(tmp_path, qformat):
    """Engines put such scales into the product, whose result float16 then holds; scales per row come behind it."""
    import onnx

    write_tiny(tmp_path / "m", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, calib_size=4, calib_seq_len=16, quant_lm_head=True)
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    graph = onnx.load(tmp_path / "e" / "rank0.onnx", load_external_data=False).graph
    made = {node.output[0]: node for node in graph.node}
    dims = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    sides = [[made.get(name) for name in node.input[:2]] for node in graph.node if node.op_type == "Gemm"]
    assert len(sides) == 11
    assert all(side.op_type == "DequantizeLinear" and dims[side.input[1]] == [] for pair in sides for side in pair)


def test_the_checkpoint_has_tensorrt_llm_names_and_scales(tmp_path):
    write_tiny(tmp_path / "m", dtype="bfloat16", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_size=8, calib_seq_len=32)
    section = json.loads((tmp_path / "c" / "config.json").read_text())["quantization"]
    assert (section["quant_algo"], section["exclude_modules"], section["pre_quant_scale"]) == ("FP8", ["lm_head"], False)
    from trtllm_thoughtx.checkpoint.directory import read_tensors

    stored = read_tensors(tmp_path / "c", ["rank0.safetensors"])
    for module, shape in (("attention.qkv", (128, 64)), ("attention.dense", (64, 64)), ("mlp.fc", (128, 64)), ("mlp.proj", (64, 128))):
        name = f"transformer.layers.1.{module}"
        assert (stored[f"{name}.weight"].dtype, stored[f"{name}.weight"].shape) == ("F8_E4M3", shape)
        for suffix in ("weights_scaling_factor", "activation_scaling_factor"):
            assert (stored[f"{name}.{suffix}"].dtype, stored[f"{name}.{suffix}"].shape) == ("F32", (1,))
    assert stored["lm_head.weight"].dtype == stored["transformer.vocab_embedding.weight"].dtype == "BF16"
    with open_weights(tmp_path / "c") as source, open_weights(tmp_path / "m") as original:
        # trtllm-build fuses fc and gate with the larger of their scales: with equal ones it rounds nothing again
        scales = [source.read(f"transformer.layers.0.mlp.{m}.weights_scaling_factor") for m in ("fc", "gate")]
        assert scales[0] == scales[1]
        weight = original.read("transformer.layers.0.attention.qkv.weight", "float32")
        scale = source.read("transformer.layers.0.attention.qkv.weights_scaling_factor")
        assert np.abs(weight).max() / 448 <= scale[0] <= np.abs(weight).max() / 448 * 1.01
        found = grid.unpack(source.read("transformer.layers.0.attention.qkv.weight"), scale)
        assert np.abs(found - weight).max() <= np.abs(weight).max() / 28
    report.verify_files(tmp_path / "c")


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_quantized_when_asked(tmp_path, tied):
    write_tiny(tmp_path / "m", tied=tied, **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="int8_wo", calib_size=8, calib_seq_len=32, quant_lm_head=True)
    with open_weights(tmp_path / "c") as source:
        assert source.config.has_head != tied and source.read("transformer.vocab_embedding.weight").dtype == np.int8
        assert tied or source.read("lm_head.weight").dtype == np.int8
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    build(tmp_path / "m", tmp_path / "o", OPTIONS)
    mine, wanted = (Engine.load(tmp_path / name, num_threads=1, exact=True).forward(ROWS)[2] for name in ("e", "o"))
    assert 1e-4 < np.abs(mine - wanted).max() < 0.5


@pytest.mark.parametrize("qformat", ["fp8", "int4_awq"])
def test_a_tied_head_that_is_not_quantized_stays_the_embedding(tmp_path, qformat):
    write_tiny(tmp_path / "m", tied=True, **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, calib_size=8, calib_seq_len=32)
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    build(tmp_path / "m", tmp_path / "o", OPTIONS)
    mine, wanted = (Engine.load(tmp_path / name, num_threads=1).forward(ROWS)[2] for name in ("e", "o"))
    assert 1e-4 < np.sqrt(np.mean((mine - wanted) ** 2)) < 0.2 * wanted.std()
    with open_weights(tmp_path / "c") as source:
        assert not source.config.has_head and "lm_head.weight" not in source.names()


def test_stages_and_chunked_attention_take_quantized_layers(tmp_path):
    write_tiny(tmp_path / "m", num_layers=3, **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="int4_awq", calib_size=8, calib_seq_len=32)
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    whole = Engine.load(tmp_path / "e", num_threads=1).forward(ROWS)
    build(tmp_path / "c", tmp_path / "s", {**OPTIONS, "early_exit_layers": (1, 2), "use_chunked_attention": True, "chunk_size": 64})
    staged = Engine.load(tmp_path / "s", num_threads=1).forward(ROWS)
    for mine, wanted in zip(staged, whole, strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "int4_awq"])
def test_half_precision_engines_stay_close(tmp_path, dtype, qformat):
    write_tiny(tmp_path / "m", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, calib_size=8, calib_seq_len=32)
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    build(tmp_path / "c", tmp_path / "h", {**OPTIONS, "dtype": dtype})
    wide, half = (Engine.load(tmp_path / name, num_threads=1).forward(ROWS)[2] for name in ("e", "h"))
    assert np.sqrt(np.mean((wide - half) ** 2)) < 0.05 * wide.std()


@pytest.mark.rtx
@pytest.mark.parametrize("qformat", QUANT_ALGOS)
@pytest.mark.slow
def test_plans_compute_in_low_precision(tmp_path, qformat):
    """For SM89 and SM120 (NVFP4: SM120), without a GPU: every product is found among the plan's layers with weights of its type."""
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    write_tiny(tmp_path / "m", dtype="float16", hidden_size=256, intermediate_size=512, vocab_size=128)
    rows = 0 if qformat == "int8_wo" else None
    calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, calib_size=8, calib_seq_len=32, quant_lm_head=True, group_size=rows)
    targets = ("12.0",) if qformat.startswith("nvfp4") else ("8.9", "12.0")
    options = {"backend": ("tensorrt-rtx",), "max_seq_len": 64, "compute_capabilities": targets}
    made = build(tmp_path / "c", tmp_path / "e", options)
    check = next(check for check in made["checks"] if check["name"].startswith("low-precision"))
    assert check["status"] == "passed", check
    assert check["evidence"] == {
        "expected": 11,
        "found": 11,
        "types": [{"fp8": "FP8", "int8_sq": "Int8", "int8_wo": "Int8", "nvfp4": "FP4E2M1", "nvfp4_wo": "FP4E2M1"}.get(qformat, "Int4")],
    }


@pytest.mark.rtx
@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
@pytest.mark.slow
def test_plans_scale_inside_the_product(tmp_path, qformat):
    """Both sides' scales are one float32 of each product: behind it they would come too late for sums of raw numbers in float16."""
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    write_tiny(tmp_path / "m", dtype="float16", hidden_size=256, intermediate_size=512, vocab_size=128)
    calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, calib_size=8, calib_seq_len=32)
    build(tmp_path / "c", tmp_path / "e", {"backend": ("tensorrt-rtx",), "max_seq_len": 64, "compute_capabilities": ("8.9",)})
    plan = (tmp_path / "e" / "rank0.engine").read_bytes()
    with open_weights(tmp_path / "c") as source:
        for layer in range(2):
            for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
                name = f"transformer.layers.{layer}.{module}"
                of_rows = source.read(f"{name}.weights_scaling_factor")[0] if qformat == "fp8" else np.float32(2.0**-9)
                assert (source.read(f"{name}.activation_scaling_factor")[0] * of_rows).tobytes() in plan, name


@pytest.mark.rtx
def test_a_product_that_the_builder_does_not_fuse_is_named(tmp_path):
    """One 4-bit group per row is a form that TensorRT-RTX 1.7 widens before the product."""
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    write_tiny(tmp_path / "m", dtype="float16", hidden_size=128, intermediate_size=256, vocab_size=128)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="int4_wo", calib_size=4, calib_seq_len=16, group_size=128)
    made = build(tmp_path / "c", tmp_path / "e", {"backend": ("tensorrt-rtx",), "max_seq_len": 64, "compute_capabilities": ("8.9",)})
    check = next(check for check in made["checks"] if check["name"].startswith("low-precision"))
    assert check["status"] == "failed" and "layers.0.attention.qkv" in check["reason"]
    assert "layers.0.mlp.proj" not in check["reason"]


@pytest.mark.rtx
def test_a_plan_of_bytes_in_blocks_is_told_to_hold_16_bits(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    write_tiny(tmp_path / "m", dtype="float16", hidden_size=128, intermediate_size=256, vocab_size=128)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="int8_wo", calib_size=4, calib_seq_len=16)
    made = build(tmp_path / "c", tmp_path / "e", {"backend": ("tensorrt-rtx",), "max_seq_len": 64, "compute_capabilities": ("8.9",)})
    check = next(check for check in made["checks"] if check["name"].startswith("low-precision"))
    assert check["status"] == "failed" and check["evidence"]["found"] == 0
    assert any("--group_size 0" in note for note in made["notes"])


def test_a_layer_that_fell_back_is_named():
    from trtllm_thoughtx.backends.trt_builder import fallbacks

    int8, half = "{ Name: x, Datatype: Int8, }", "{ Name: x, Datatype: Half, }"
    layers = [
        ("0", int8, int8, "[ONNX Layer: layers.0.mlp.fc][ONNX Layer: layers.0.mlp.fc.matrix]"),
        ("0", half, half, "[ONNX Layer: layers.0.mlp.fc][ONNX Layer: layers.0.mlp.active]"),
        ("0", half, half, "[ONNX Layer: layers.0.mlp.gate]"),
        ("0", half, int8, "[ONNX Layer: layers.0.mlp.gate.matrix]"),
        ("0", half, int8, "[ONNX Layer: layers.0.mlp.proj]"),
    ]
    products = [["layers.0.mlp.fc", "Int8", True], ["layers.0.mlp.gate", "Int8", False], ["layers.0.mlp.proj", "Int8", True]]
    assert fallbacks(products, layers) == ["layers.0.mlp.gate", "layers.0.mlp.proj"]
    assert fallbacks([["layers.0.mlp.proj", "Int8", False]], layers) == []
    other_profile = [*layers, ("1", half, half, "[ONNX Layer: layers.0.mlp.fc]")]
    assert fallbacks(products[:1], layers) == [] and fallbacks(products[:1], other_profile) == ["layers.0.mlp.fc"]
    assert fallbacks([["layers.9.mlp.fc", "Int8", True]], layers) == ["layers.9.mlp.fc"]


def test_fp8_is_built_for_gpus_that_have_it(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_size=4, calib_seq_len=16)
    options = {"backend": ("onnxruntime",), "max_seq_len": 64}
    assert build(tmp_path / "c", tmp_path / "e", options, dry_run=True)["build"]["compute_capabilities"] == ["8.9", "12.0"]
    with pytest.raises(ThoughtxError, match=r"compute_capabilities 8\.6") as caught:
        build(tmp_path / "c", tmp_path / "e", {**options, "compute_capabilities": ("8.6", "8.9")})
    assert caught.value.code == "E001"


@pytest.mark.parametrize(
    ("code", "name", "change", "word"),
    [
        ("E108", "transformer.layers.0.mlp.fc.weights_scaling_factor", np.zeros_like, "mlp.fc.weights_scaling_factor"),
        ("E108", "transformer.layers.0.mlp.fc.activation_scaling_factor", lambda x: x * np.nan, "activation_scaling_factor"),
        ("E107", "transformer.layers.1.mlp.gate.weights_scaling_factor", lambda x: None, "mlp.gate.weights_scaling_factor: missing"),
        ("E107", "transformer.layers.1.mlp.proj.weight", lambda x: x.astype(np.float32), "has type F32, wanted F8_E4M3"),
    ],
)
def test_a_damaged_quantized_checkpoint_is_refused_by_name(tmp_path, code, name, change, word):
    write_tiny(tmp_path / "m", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_size=4, calib_seq_len=16)
    damaged(tmp_path / "c", name, change)
    with pytest.raises(ThoughtxError) as caught:
        build(tmp_path / "c", tmp_path / "e", OPTIONS)
    assert caught.value.code == code and word in caught.value.what + caught.value.why
    assert not (tmp_path / "e").exists()


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="fp8", calib_size=4, calib_seq_len=16)
    with pytest.raises(ThoughtxError, match="already quantized") as caught:
        calibrate(tmp_path / "c", tmp_path / "d", qformat="int8_wo")
    assert caught.value.code == "E103" and not (tmp_path / "d").exists()
