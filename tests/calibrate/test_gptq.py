"""Compensated rounding of weight-only layers, the 8-bit embedding beside them, and what an engine directory of them weighs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from quantized_models import SIZES
from tiny import write_tiny

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from trtllm_thoughtx import Engine  # noqa: E402
from trtllm_thoughtx.backends.ort_product import FusedProduct  # noqa: E402
from trtllm_thoughtx.build.build import build  # noqa: E402
from trtllm_thoughtx.calibrate import prose  # noqa: E402
from trtllm_thoughtx.calibrate.quantize import gptq, grid, watch  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.job import calibrate  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.model import UNITS  # noqa: E402
from trtllm_thoughtx.checkpoint.weights import open_weights  # noqa: E402
from trtllm_thoughtx.config import QuantConfig  # noqa: E402
from trtllm_thoughtx.errors import ThoughtxError  # noqa: E402

ROWS = [[5, 9, 2, 44, 7], [1] * 3, list(range(40)), [90, 3]]
OPTIONS = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64, "max_input_len": 16}
FORMS = [
    QuantConfig(algo="W4A16", group_size=32, zero_point=True),
    QuantConfig(algo="W4A16_AWQ", group_size=32),
    QuantConfig(algo="W8A16"),
    QuantConfig(algo="W8A16_GPTQ", group_size=32),
]


def correlated(num: int = 2000, size: int = 128, seed: int = 0) -> torch.Tensor:
    """Inputs of which a few directions hold most."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 16, generator=generator) @ torch.randn(16, size, generator=generator) + 0.1 * torch.randn(
        num, size, generator=generator
    )


def error(weight: torch.Tensor, made: gptq.Rounded, x: torch.Tensor) -> float:
    return float((x @ (weight - made.matrix).T).square().sum() / (x @ weight.T).square().sum())


@pytest.mark.parametrize("quant", FORMS, ids=lambda quant: str(quant.algo))
def test_compensated_rounding_loses_less_of_the_outputs(quant):
    """On inputs that it has not seen, of the same kind."""
    x = correlated()
    weight, energy = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)), x[:1000].square().mean(0)
    made = gptq.compensated(weight, x[:1000].T @ x[:1000] / 1000, quant)
    assert made is not None
    assert error(weight, made, x[1000:]) < 0.5 * error(weight, gptq.nearest(weight, quant, energy), x[1000:])
    assert error(weight, gptq.nearest(weight, quant, energy), x[1000:]) <= 1.05 * error(weight, gptq.nearest(weight, quant), x[1000:])


def test_a_matrix_of_more_rows_than_are_worked_on_at_once(monkeypatch):
    x, weight = correlated(), torch.randn(50, 128, generator=torch.Generator().manual_seed(2))
    whole = gptq.compensated(weight, x.T @ x, FORMS[0])
    monkeypatch.setattr(gptq, "ROWS", 7)
    parts = gptq.compensated(weight, x.T @ x, FORMS[0])
    torch.testing.assert_close(parts.scale, whole.scale)
    assert float((parts.matrix - whole.matrix).square().mean()) < 0.02 * float((weight - whole.matrix).square().mean())


@pytest.mark.parametrize("quant", FORMS, ids=lambda quant: str(quant.algo))
def test_the_stored_bytes_are_what_the_operator_multiplies_with(quant):
    """Groups in odd numbers too: their zero points end inside a byte."""
    x = correlated(size=96)
    weight = torch.randn(41, 96, generator=torch.Generator().manual_seed(3)) + 0.5
    made = gptq.compensated(weight, x.T @ x, quant)
    stored = grid.pack(made.matrix, made.scale, quant.algo, made.zero)
    zero = None if made.zero is None else grid.pack_points(made.zero, quant.algo)
    if zero is not None:
        assert zero.shape == (62,) and len(made.zero.unique()) > 3
    assert np.array_equal(grid.unpack(stored, made.scale.numpy(), zero), made.matrix.numpy())
    got = FusedProduct(stored, made.scale.numpy(), zero)(x[:64].numpy())
    wanted = x[:64].numpy() @ made.matrix.numpy().T
    assert np.linalg.norm(got - wanted) < 0.01 * np.linalg.norm(wanted)


def test_inputs_that_say_nothing_are_rounded_to_nearest_and_named():
    """A Hessian with no inverse: numbers that overflowed; one of few tokens, or with a channel that is always zero, has one when damped."""
    x = correlated(num=20)
    x[:, 5] = 0
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(4))
    made = gptq.compensated(weight, x.T @ x, FORMS[0])
    assert made is not None and bool(torch.isfinite(made.matrix).all())
    assert error(weight, made, x) < error(weight, gptq.nearest(weight, FORMS[0]), x)
    for bad in (torch.full((128, 128), float("inf")), torch.zeros(128, 128), -torch.eye(128)):
        assert gptq.compensated(weight, bad, FORMS[0]) is None
    seen = watch.Watch([[0, 1]], "gptq")
    seen.add(x * 1e19, 0)
    quant = QuantConfig(algo="W4A16", group_size=32, zero_point=True)
    found, facts = watch.choose("transformer.layers.0", {"mlp.proj": weight}, seen.inputs(), quant)
    assert (
        facts["transformer.layers.0.mlp.proj"]["rounding"] == "nearest"
        and "no inverse" in facts["transformer.layers.0.mlp.proj"]["rounding_fallback"]
    )
    assert bool(torch.isfinite(found["mlp.proj"].matrix).all())
    from trtllm_thoughtx.calibrate.quantize.result import warnings_of

    assert any("no inverse: transformer.layers.0.mlp.proj" in one for one in warnings_of(facts))


def test_a_hessian_is_summed_in_panels_and_rows_are_seen_in_order(monkeypatch):
    monkeypatch.setattr(watch, "PANEL", 48)
    x = correlated(num=30)
    seen = watch.Watch([[0], [0]], "gptq")
    seen.add(x[:10], 0)
    seen.add(x[10:], 1)
    torch.testing.assert_close(seen.inputs().hessian, x.T @ x / 30, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num", [1, 5])
def test_bytes_in_blocks_multiply_inputs_of_16_bits(num):
    """Outliers, blocks of zeros, numbers of every size: a hundred times as exact as inputs of 8 bits, and in one pass over the matrix."""
    generator = np.random.default_rng(5)
    weight = generator.integers(-127, 128, (48, 192)).astype(np.int8)
    scale = generator.uniform(0.001, 0.01, (48, 3)).astype(np.float32)
    x = generator.standard_normal((num, 192)).astype(np.float32)
    x[:, 7] *= 1000
    x[-1, 64:128] = 0
    x[0, 128:] *= 1e-20
    wanted = x.astype(np.float64) @ grid.unpack(weight, scale).T.astype(np.float64)
    errors = []
    for rounds_inputs in (False, True):
        product = FusedProduct(weight, scale, rounds_inputs=rounds_inputs)
        errors.append(np.linalg.norm(product(x) - wanted) / np.linalg.norm(wanted))
        assert not product(np.zeros((2, 192), np.float32)).any()
    assert errors[0] < 1e-4 < 1e-3 < errors[1] < 3e-2


@pytest.mark.parametrize(("hidden", "group"), [(128, None), (128, 32), (128, 0), (24, None)])
def test_int8_has_blocks_where_they_fit_and_rows_on_demand(tmp_path, hidden, group):
    """Rows are stored as before there were blocks: without a key that older readers do not know."""
    shape = {**SIZES, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    write_tiny(tmp_path / "m", **shape)
    size = group if group is not None else 64 if hidden == 128 else 0
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat="int8_wo", group_size=group, calib_size=8, calib_seq_len=32)
    section = json.loads((tmp_path / "c" / "config.json").read_text())["quantization"]
    assert (section["quant_algo"], section.get("embedding_group_size")) == (("W8A16_GPTQ", size) if size else ("W8A16", None))
    assert {facts["rounding"] for facts in found["modules"].values() if facts["quantized"]} == {"gptq" if size else "nearest"}
    with open_weights(tmp_path / "c") as source:
        names = [name for name in source.names() if name.endswith("scaling_factor" if size else "per_channel_scale")]
        assert len(names) == 5 * source.config.num_layers + 2  # the embedding and the head too
        for name in names:
            rows, columns = source.read(f"{name.rpartition('.')[0]}.weight").shape
            assert source.read(name).shape == ((rows, columns // size) if size else (rows,))
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    build(tmp_path / "m", tmp_path / "o", OPTIONS)
    mine, exact, wanted = (
        Engine.load(tmp_path / name, num_threads=1, exact=is_exact).forward(ROWS)
        for name, is_exact in (("e", False), ("e", True), ("o", True))
    )
    for a, b, c in zip(mine, exact, wanted, strict=True):
        rounding = np.linalg.norm(b - c)
        assert 0 < rounding < 0.03 * np.linalg.norm(c)
        assert np.linalg.norm(a - b) < 0.2 * rounding  # what the operators add to what the stored numbers lose


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_int4_beats_rounding_to_nearest_end_to_end(tmp_path, family):
    write_tiny(tmp_path / "m", family=family, **SIZES)
    losses = {}
    for name, options in (("gptq", {}), ("nearest", {"rounding": "nearest"}), ("plain", {"plain_rounding": True})):
        found = calibrate(tmp_path / "m", tmp_path / name, qformat="int4_wo", calib_size=64, calib_seq_len=64, **options)
        losses[name] = found["end_to_end"]["kl"]
        kinds = {facts["rounding"] for facts in found["modules"].values()}
        assert kinds == ({"gptq"} if name == "gptq" else {"nearest"})
        assert found["quantization"]["zero_point"] == (name != "plain")
    assert losses["gptq"] < losses["nearest"] < losses["plain"]


def test_the_same_command_writes_the_same_bytes(tmp_path):
    write_tiny(tmp_path / "m", **SIZES)
    for out, batch in (("a", 8), ("b", 3)):
        calibrate(tmp_path / "m", tmp_path / out, qformat="int4_wo", calib_size=16, calib_seq_len=32, batch_size=batch)
        build(tmp_path / out, tmp_path / f"{out}-engine", OPTIONS)
    for name in ("a/rank0.safetensors", "a/calibration.json", "a-engine/rank0.data", "a-engine/rank0.onnx"):
        first, second = (hashlib.sha256((tmp_path / one).read_bytes()).hexdigest() for one in (name, name.replace("a", "b", 1)))
        assert first == second, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("qformat", "bits"), [("int4_wo", 4 + 20 / 32), ("int4_awq", 4 + 16 / 64), ("int8_wo", 8 + 16 / 64), ("int8_sq", 8)]
)
def test_an_engine_directory_holds_no_wide_matrix(tmp_path, tied, qformat, bits):
    """Layers at the format's bits, embedding and head at 8 or in the same blocks, a tied one once; what else there is are vectors."""
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 256}
    write_tiny(tmp_path / "m", tied=tied, vocab_size=2048, **sizes)
    calibrate(
        tmp_path / "m", tmp_path / "c", qformat=qformat, calib_size=8, calib_seq_len=32, group_size=64 if qformat == "int4_awq" else None
    )
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    with open_weights(tmp_path / "c") as source:
        config = source.config
        assert source.read("transformer.vocab_embedding.weight").dtype == np.int8
        assert ("lm_head.weight" in source.names()) == (not tied)
    linear = config.num_layers * (128 * (config.q_size + 2 * config.kv_size) + 128 * config.q_size + 3 * 128 * 256)
    tables = 2048 * 128 * (1 if tied else 2) * (1 if qformat != "int8_wo" else bits / 8)
    small = 4096 * len(config_names(tmp_path / "e"))  # each tensor begins on a page
    size = (tmp_path / "e" / "rank0.data").stat().st_size
    assert bits * linear / 8 + tables <= size <= bits * linear / 8 + tables + small
    engine = Engine.load(tmp_path / "e", num_threads=1)
    exact = Engine.load(tmp_path / "e", num_threads=1, exact=True)
    for mine, wanted in zip(engine.forward(ROWS), exact.forward(ROWS), strict=True):
        assert np.linalg.norm(mine - wanted) < 0.03 * np.linalg.norm(wanted)


def config_names(engine: Path) -> list[str]:
    import onnx

    return [tensor.name for tensor in onnx.load(engine / "rank0.onnx", load_external_data=False).graph.initializer if tensor.external_data]


@pytest.mark.parametrize("qformat", ["int4_wo", "int4_awq"])
def test_some_layers_of_a_4_bit_format_may_have_8(tmp_path, qformat):
    """One of two that read the same inputs, too. What runs is what the file stands for, and it loses less than 4 bits alone."""
    write_tiny(tmp_path / "m", **SIZES)
    size = {"calib_size": 16, "calib_seq_len": 32, "group_size": 32}
    names = ("*.mlp.proj", "transformer.layers.0.mlp.fc")
    plain = calibrate(tmp_path / "m", tmp_path / "p", qformat=qformat, **size)
    found = calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, int8_layers=names, **size)
    assert found["end_to_end"]["kl"] < plain["end_to_end"]["kl"]
    assert plain["size"]["mean_bits"] < found["size"]["mean_bits"] < 8
    with open_weights(tmp_path / "c") as source:
        assert source.config.quantization.wide == names
        kinds = {name: source.read(name).dtype for name in source.names() if ".mlp." in name and name.endswith("weight")}
        factors = {name for name in source.names() if name.endswith("prequant_scaling_factor") and ".mlp." in name}
    bytes_of = {name for name, kind in kinds.items() if kind == np.int8}
    assert bytes_of == {"transformer.layers.0.mlp.fc.weight", *(f"transformer.layers.{i}.mlp.proj.weight" for i in range(2))}
    assert not any(name.replace("prequant_scaling_factor", "weight") in bytes_of for name in factors)
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    engine, exact = (Engine.load(tmp_path / "e", num_threads=1, exact=is_exact) for is_exact in (False, True))
    for mine, wanted in zip(engine.forward(ROWS), exact.forward(ROWS), strict=True):
        assert np.linalg.norm(mine - wanted) < 0.03 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("qformat", "names", "word"), [("int8_wo", ("*.mlp.proj",), "widens nothing"), ("int4_wo", ("*.up",), "names no layer")]
)
def test_layers_that_cannot_be_widened_are_refused(tmp_path, qformat, names, word):
    write_tiny(tmp_path / "m", **SIZES)
    with pytest.raises(ThoughtxError, match="--int8_layers") as caught:
        calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, int8_layers=names)
    assert caught.value.code == "E001" and word in caught.value.what and not (tmp_path / "c").exists()


def test_a_table_that_is_excluded_stays_as_it_was(tmp_path):
    write_tiny(tmp_path / "m", tied=True, **SIZES)
    found = calibrate(
        tmp_path / "m", tmp_path / "c", qformat="int4_wo", calib_size=8, calib_seq_len=32, exclude=("transformer.vocab_embedding",)
    )
    assert found["size"]["embedding_bits"] == 32 and not found["quantization"]["embedding"]
    with open_weights(tmp_path / "c") as source:
        assert source.read("transformer.vocab_embedding.weight").dtype == np.float32


@pytest.mark.parametrize(("qformat", "options"), [("fp8", {}), ("int8_sq", {}), ("int4_wo", {"plain_rounding": True})])
def test_rounding_that_cannot_be_compensated_is_refused(tmp_path, qformat, options):
    write_tiny(tmp_path / "m", **SIZES)
    with pytest.raises(ThoughtxError, match="--rounding gptq") as caught:
        calibrate(tmp_path / "m", tmp_path / "c", qformat=qformat, rounding="gptq", **options)
    assert caught.value.code == "E001" and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"quant_algo": None, "kv_cache_quant_algo": "INT8"}, "has_quantized_embedding"),
        ({"scale_dtype": "float8"}, "scale_dtype"),
        ({"quant_algo": "W4A16_AWQ"}, "has_zero_point"),
        ({"embedding_group_size": 32, "has_quantized_embedding": False}, "embedding_group_size"),
        ({"quant_algo": "W8A16", "wide_modules": ["*"], "scale_dtype": "float32"}, "wide_modules"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(tmp_path, change, word):
    write_tiny(tmp_path / "m", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="int4_wo", calib_size=4, calib_seq_len=16)
    raw = json.loads((tmp_path / "c" / "config.json").read_text())
    raw["quantization"] |= change
    if word != "has_zero_point":
        raw["quantization"]["has_zero_point"] = False
    (tmp_path / "c" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ThoughtxError, match=word) as caught, open_weights(tmp_path / "c"):
        pass
    assert caught.value.code == "E103"


def test_damaged_scales_of_an_embedding_are_refused(tmp_path):
    from trtllm_thoughtx.checkpoint import tensor_file

    write_tiny(tmp_path / "m", **SIZES)
    calibrate(tmp_path / "m", tmp_path / "c", qformat="int4_wo", calib_size=4, calib_seq_len=16)
    tensors = tensor_file.read_all(tmp_path / "c", "rank0.safetensors")
    for name in ("transformer.vocab_embedding.per_channel_scale", "transformer.layers.0.mlp.proj.weights_scaling_factor"):
        bad = tensors[name].copy()
        bad.reshape(-1)[3] = np.nan
        tensor_file.write_all(tmp_path / "c" / "rank0.safetensors", tensors | {name: bad})
        with pytest.raises(ThoughtxError, match="cannot be used") as caught:
            build(tmp_path / "c", tmp_path / "e", OPTIONS)
        assert caught.value.code == "E108" and name in caught.value.what and not (tmp_path / "e").exists()


def test_layers_see_what_the_quantized_ones_before_them_give(tmp_path, monkeypatch):
    """With GPTQ the rows that calibrate go through the quantized layers; without it through those of the checkpoint."""
    from trtllm_thoughtx.calibrate.quantize import estimate

    monkeypatch.setattr(estimate, "seconds", lambda walk: 1.0)
    write_tiny(tmp_path / "m", **SIZES)
    seen: dict[str, list] = {"gptq": [], "nearest": []}
    real = watch.search
    for rounding, inputs in seen.items():
        monkeypatch.setattr(watch, "search", lambda w, x, q, inputs=inputs: (inputs.append(x), real(w, x, q))[1])
        calibrate(tmp_path / "m", tmp_path / rounding, qformat="int4_wo", rounding=rounding, calib_size=8, calib_seq_len=32)
    assert all(one.hessian is not None for one in seen["gptq"]) and all(one.hessian is None for one in seen["nearest"])
    assert not torch.equal(seen["gptq"][len(UNITS)].rows, seen["nearest"][len(UNITS)].rows)


class Words:
    """A tokenizer of whole words, or of single characters."""

    def __init__(self, size: int, *, keeps: bool = True) -> None:
        self.size, self.keeps = size, keeps

    def encode(self, text: str) -> list[int]:
        return [hash(text[i : i + self.size]) % 1000 for i in range(0, len(text), self.size)]

    def decode(self, ids: list[int]) -> str:
        return prose.SAMPLE if self.keeps else "?"


def test_prose_calibrates_models_that_read_it():
    assert prose.reads(Words(4)) and not prose.reads(Words(1)) and not prose.reads(Words(4, keeps=False))
    rows = prose.rows(Words(4), 9, 32, seed=1)
    assert len(rows) == 9 and all(len(row) == 32 for row in rows) and rows == prose.rows(Words(4), 9, 32, seed=1)
    assert rows != prose.rows(Words(4), 9, 32, seed=2)
