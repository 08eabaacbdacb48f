"""The judge is judged: right engines pass, every planted fault fails, and what did not run is never called passed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import ROPES, save, torch

from trtllm_thoughtx import report
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.config import BuildConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.report import Check
from trtllm_thoughtx.validate import parity
from trtllm_thoughtx.validate.golden import Band, ChunkSpec, Expected, Truth
from trtllm_thoughtx.validate.reference import Reference
from trtllm_thoughtx.validate.validate import Report, layers_checks, logits_checks, run_reference, validate

CHUNKED = BuildConfig(max_seq_len=48, max_input_len=32, use_chunked_attention=True, chunk_size=6, sink_tokens=2, left_chunks=1)
OPTIONS = {"backend": "onnxruntime", "max_seq_len": 48, "max_input_len": 32}
CHUNK_OPTIONS = {**OPTIONS, "use_chunked_attention": True, "chunk_size": 6, "sink_tokens": 2, "left_chunks": 1}


class Fake:
    """An engine made of transformers, in the engine's own type, with places to plant faults."""

    def __init__(self, model: Reference, build: BuildConfig) -> None:
        self.model, self.build = model, build
        self.mask: Callable[[ChunkSpec], ChunkSpec] = lambda chunk: chunk
        self.late = 0  # decode reads the row this many positions late
        self.leak = 0.0  # added to all rows but the first of a batch
        self.segment_noise = 0.0

    def _run(self, ids: Sequence[int], chunk_size: int | None, layers: bool = False) -> tuple[np.ndarray, list[np.ndarray]]:
        size = chunk_size or self.build.chunk_size
        chunk = self.mask(ChunkSpec(size, self.build.sink_tokens, self.build.left_chunks)) if self.build.use_chunked_attention else None
        logits, hidden = self.model.run(ids, chunk=chunk, layers=layers)
        return logits.astype(np.float32), hidden

    def forward(self, ids: Sequence[Sequence[int]], *, chunk_size: int | None = None, segment: int | None = None) -> list[np.ndarray]:
        rows = [self._run(row, chunk_size)[0] for row in ids]
        return [row + self.leak * (b > 0) + (self.segment_noise if segment == 7 else 0) for b, row in enumerate(rows)]

    def forward_layers(
        self, ids: Sequence[Sequence[int]], *, chunk_size: int | None = None
    ) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        runs = [self._run(row, chunk_size, layers=True) for row in ids]
        return [logits for logits, _ in runs], [[hidden[i] for _, hidden in runs] for i in range(self.model.num_layers + 1)]

    def decode_logits(self, ids: Sequence[Sequence[int]], num_prompt: Sequence[int], *, chunk_size: int | None = None) -> list[np.ndarray]:
        rows = [self._run(row, chunk_size)[0] for row in ids]
        return [np.roll(row, -self.late, axis=0)[n - 1 :] for row, n in zip(rows, num_prompt, strict=True)]

    def close(self) -> None: ...


def expected_of(hf: Path, build: BuildConfig) -> Expected:
    with open_weights(hf) as source:
        config = source.config
    identity = {"dtype": build.dtype, "num_layers": config.num_layers, "vocab_size": config.vocab_size, "hidden_size": config.hidden_size}
    return run_reference(hf, config, build, identity)


def failed(checks: Sequence[Check]) -> list[str]:
    return [check.name.split(": ")[1] for check in checks if check.status == "failed"]


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_transformers_in_the_engines_type_passes(hf: Path, dtype: str) -> None:
    build = dataclasses.replace(CHUNKED, dtype=dtype)
    expected, fake = expected_of(hf, build), Fake(Reference(hf, dtype), build)
    checks = [*logits_checks(fake, "fake", expected), *layers_checks(fake, "fake", expected, bisect=True)]
    assert failed(checks) == [] and all(check.status == "passed" for check in checks)


def perturb(at: str, index: int | slice, by: float) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        with torch.no_grad():
            dict(model.named_parameters())[at].view(-1)[index] *= 1 + by

    return apply


# what is wrong -> how the model differs from the reference; every one must be found in every type listed
MODEL_FAULTS: dict[str, tuple[tuple[str, ...], dict[str, Any], Callable[[Any], None] | None]] = {
    "rotary theta is 1 % too large": (("float32",), {"rope_parameters": {**ROPES["none"], "rope_theta": 10100.0}}, None),
    "rotary theta is twice too large": (("float16", "bfloat16"), {"rope_parameters": {**ROPES["none"], "rope_theta": 20000.0}}, None),
    "norm epsilon is 1e-5, not 1e-6": (("float32",), {"rms_norm_eps": 1e-5}, None),
    "norm epsilon is 1e-1, not 1e-6": (("float16", "bfloat16"), {"rms_norm_eps": 1e-1}, None),
    "one weight of the last layer is off by 1 %": (("float32",), {}, perturb("model.layers.2.mlp.down_proj.weight", 100, 0.01)),
    "one bias is missing": (("float32", "float16"), {}, perturb("model.layers.1.self_attn.v_proj.bias", 3, -1.0)),
    "the biases of one layer are missing": (("bfloat16",), {}, perturb("model.layers.1.self_attn.v_proj.bias", slice(None), -1.0)),
    "one norm weight is off by 1 %": (("float32",), {}, perturb("model.norm.weight", 5, 0.01)),
    "heads are scaled by another head size": (("float32", "float16", "bfloat16"), {}, None),
}


@pytest.mark.parametrize(("fault", "dtype"), [(fault, dtype) for fault, (dtypes, _, _) in MODEL_FAULTS.items() for dtype in dtypes])
@pytest.mark.slow
def test_a_fault_in_the_model_fails(hf: Path, tmp_path: Path, fault: str, dtype: str) -> None:
    _, config, change = MODEL_FAULTS[fault]
    build = dataclasses.replace(CHUNKED, dtype=dtype)
    fake = Fake(Reference(save(tmp_path / "m", "qwen2", **config), dtype), build)
    if change:
        change(fake.model._model)
    elif not config:
        for layer in fake.model._model.model.layers:
            layer.self_attn.scaling *= 0.9
    expected = expected_of(hf, build)
    assert failed(logits_checks(fake, "fake", expected))
    assert failed(layers_checks(fake, "fake", expected, bisect=False)) or "model.norm" in fault or "norm weight" in fault


MASK_FAULTS: dict[str, Callable[[ChunkSpec], ChunkSpec]] = {
    "one sink too many": lambda c: dataclasses.replace(c, sink=c.sink + 1),
    "one sink too few": lambda c: dataclasses.replace(c, sink=c.sink - 1),
    "one chunk too many": lambda c: dataclasses.replace(c, left=c.left + 1),
    "one chunk too few": lambda c: dataclasses.replace(c, left=c.left - 1),
    "chunks of one token more": lambda c: dataclasses.replace(c, chunk_size=c.chunk_size + 1),
    "no chunks at all": lambda c: ChunkSpec(1 << 20, 0, 0),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("fault", MASK_FAULTS)
@pytest.mark.slow
def test_a_wrong_mask_fails_in_every_type(hf: Path, fault: str, dtype: str) -> None:
    build = dataclasses.replace(CHUNKED, dtype=dtype)
    fake = Fake(Reference(hf, dtype), build)
    fake.mask = MASK_FAULTS[fault]
    found = failed(logits_checks(fake, "fake", expected_of(hf, build)))
    assert "prefill brim" in found and "decode brim" in found and "prefill one" not in found


def test_faults_outside_prefill_are_found_where_they_are(hf: Path) -> None:
    expected, model = expected_of(hf, CHUNKED), Reference(hf, "float32")
    for plant, wanted in (
        ({"late": 1}, {"decode", "ragged decode"}),
        ({"leak": 1e-4}, {"ragged prefill", "ragged equals alone"}),
        ({"segment_noise": 1e-4}, {"pieces of 7"}),
    ):
        fake = Fake(model, CHUNKED)
        vars(fake).update(plant)
        found = {name if not name.startswith("decode") else "decode" for name in failed(logits_checks(fake, "fake", expected))}
        assert found == wanted


def test_not_a_number_fails(hf: Path) -> None:
    expected, fake = expected_of(hf, CHUNKED), Fake(Reference(hf, "float32"), CHUNKED)
    run = fake._run

    def poisoned(*args: Any, **kwargs: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        logits, hidden = run(*args, **kwargs)
        logits[-1, 3] = np.nan
        return logits, hidden

    fake._run = poisoned  # type: ignore[method-assign]
    checks = logits_checks(fake, "fake", expected)
    assert all(check.status == "failed" for check in checks)
    assert checks[0].reason == "1 numbers are not finite"


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_bisect_names_the_first_wrong_layer(hf: Path, layer: int) -> None:
    fake = Fake(Reference(hf, "float32"), CHUNKED)
    perturb(f"model.layers.{layer}.mlp.down_proj.weight", 7, 0.02)(fake.model._model)
    check = layers_checks(fake, "fake", expected_of(hf, CHUNKED), bisect=True)[-1]
    assert check.name == "fake: bisect" and check.status == "failed"
    assert check.evidence["first_out_of_band"] == f"layer {layer}" and check.evidence["rms_error"] > check.evidence["rms_band"]


def test_bisect_names_the_embedding(hf: Path) -> None:
    fake = Fake(Reference(hf, "float32"), CHUNKED)
    perturb("model.embed_tokens.weight", 32 * 5, 0.02)(fake.model._model)
    ids = {token for prompt in expected_of(hf, CHUNKED).prompts if prompt.layers for token in prompt.ids}
    if 5 not in ids:
        perturb("model.embed_tokens.weight", 32 * min(ids), 0.02)(fake.model._model)
    check = layers_checks(fake, "fake", expected_of(hf, CHUNKED), bisect=True)[-1]
    assert check.evidence["first_out_of_band"] == "the embedding"


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_no_band_is_below_one_rounding() -> None:
    exact = np.full((2, 3), 8.0)
    truths = parity.pooled({"a": Truth(exact, parity.band_of(exact, exact))}, "float32")
    band = truths["a"].logits_band
    assert band.rms == band.peak == 8 * 2.0**-24
    assert parity.compare(exact.astype(np.float32), exact, band, "float32").ok
    assert parity.compare(np.nextafter(exact.astype(np.float32), np.float32(9)), exact, band, "float32").ok
    assert not parity.compare((exact * (1 + 1e-6)).astype(np.float32), exact, band, "float32").ok


def test_a_zero_tensor_needs_no_band() -> None:
    zero = np.zeros((1, 4))
    assert parity.compare(zero, zero, Band(0, 0, 0, 0), "float32").ok
    assert not parity.compare(zero + 1e-30, zero, Band(0, 0, 0, 0), "float32").ok


@pytest.mark.parametrize("chunk", [1, 2, 6, 16, 40, 300])
@pytest.mark.parametrize("sink", [0, 1, 4, 33])
@pytest.mark.parametrize("capacity", [2, 48, 2048])
def test_prompts_cover_both_sides_of_a_boundary(hf: Path, chunk: int, sink: int, capacity: int) -> None:
    build = dataclasses.replace(CHUNKED, max_seq_len=capacity, chunk_size=min(chunk, capacity), sink_tokens=sink)
    with open_weights(hf) as source:
        prompts = parity.plan_prompts(source.config, build, 0)
    assert prompts == parity.plan_prompts(source.config, build, 0) != parity.plan_prompts(source.config, build, 1)
    assert len({p.name for p in prompts}) == len(prompts) and all(1 <= len(p.ids) <= capacity for p in prompts)
    trial = min(build.chunk_size, parity.TRIAL_CHUNK)
    lengths = {len(p.ids) for p in prompts if p.chunk_size == trial}
    assert {n for n in (1, trial - 1, trial, trial + 1, 2 * trial + 1) if 1 <= n <= capacity} <= lengths
    far = max(len(p.ids) for p in prompts)
    if capacity == 2048:  # something is really out of sight, at the trial size and at the engine's own
        from trtllm_thoughtx.graph.chunked_attention import visible

        for size in {trial, build.chunk_size}:
            longest = max(len(p.ids) for p in prompts if p.chunk_size == size)
            at = np.arange(longest)
            assert (~visible(at, at, np.array(size), sink, 1) & (at <= at[:, None])).any(), (size, far)


def test_a_large_vocabulary_keeps_few_rows_and_both_sides_of_a_boundary() -> None:
    rows = parity._rows(100, 16, 152064)
    assert len(rows) <= 13 and {0, 99, 98, 79, 80, 95, 96} <= set(rows)
    assert parity._rows(100, 16, 97) == tuple(range(100))


# --- an engine directory ---------------------------------------------------------------------------------------------


def test_a_good_engine_passes(hf: Path, engine_dir: Path) -> None:
    result = validate(engine_dir, reference=hf, bisect=True)
    assert result.ok and result.count == {"passed": len(result.checks), "failed": 0, "skipped": 0}
    names = {check.name for check in result.checks}
    assert {"files match the manifest", "onnxruntime: prefill far", "onnxruntime: ragged decode", "onnxruntime: bisect"} <= names
    shown = json.loads(report.to_json(result))
    assert shown == report.plain(result) and shown["expected_from"].startswith("transformers")


def test_one_row_a_batch_skips_ragged(hf: Path, tmp_path: Path) -> None:
    build(hf, tmp_path / "e", {**OPTIONS, "max_batch_size": 1})
    result = validate(tmp_path / "e", reference=hf)
    assert result.ok and [check.name for check in result.checks if check.status == "skipped"] == ["onnxruntime: ragged prefill"]


def test_a_changed_weight_fails_against_the_reference(hf: Path, tmp_path: Path) -> None:
    """A real engine, from a checkpoint with one weight changed, judged by the original."""
    other = tmp_path / "other"
    model = Reference(hf, "float32")._model
    perturb("model.layers.1.mlp.up_proj.weight", 11, 0.05)(model)
    model.save_pretrained(other)
    build(other, tmp_path / "e", CHUNK_OPTIONS)
    result = validate(tmp_path / "e", reference=hf, bisect=True)
    assert not result.ok and result.checks[-1].evidence["first_out_of_band"] == "layer 1"


def test_another_model_is_refused(engine_dir: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "m", "qwen2", rms_norm_eps=1e-5)
    with pytest.raises(ThoughtxError) as caught:
        validate(engine_dir, reference=other)
    assert caught.value.code == "E101" and "norm_eps" in caught.value.why


def test_damaged_files_are_reported_and_not_loaded(engine_dir: Path, golden: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in engine_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / "rank0.data").read_bytes())
    data[4096] ^= 1
    (copy / "rank0.data").write_bytes(data)
    result = validate(copy, golden=golden)
    assert [check.status for check in result.checks] == ["failed", "skipped"] and "rank0.data" in result.checks[0].reason


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({}, "E001"),
        ({"reference": Path("a"), "golden": Path("b")}, "E001"),
        ({"golden": Path("b"), "record": Path("c")}, "E001"),
        ({"reference": Path("a"), "record": Path("/")}, "E130"),
        ({"reference": Path("a"), "record": Path("/no/such/directory/g")}, "E130"),
    ],
)
def test_bad_requests(engine_dir: Path, arguments: dict[str, Path], code: str) -> None:
    with pytest.raises(ThoughtxError) as caught:
        validate(engine_dir, **arguments)
    assert caught.value.code == code


# --- plans -----------------------------------------------------------------------------------------------------------


def with_plan(engine_dir: Path, copy: Path, **wrong: str) -> Path:
    """The engine with a pretended TensorRT-RTX plan, its hashes as thoughtx-build records them except for `wrong`."""
    copy.mkdir()
    for file in engine_dir.iterdir():
        if file.name != "manifest.json":
            (copy / file.name).write_bytes(file.read_bytes())
    (copy / "rank0.engine").write_bytes(b"a plan")
    config = json.loads((copy / "config.json").read_text())
    part = config["thoughtx"]["parts"][0]
    sums = {"graph_sha256": part["graph_sha256"], "weights_sha256": part["weights_sha256"], "sha256": hashlib.sha256(b"a plan").hexdigest()}
    config["thoughtx"]["build"]["backends"].append("tensorrt-rtx")
    part["plans"]["tensorrt-rtx"] = {"file": "rank0.engine", "compute_capabilities": ["8.9"], **sums, **wrong}
    (copy / "config.json").write_text(json.dumps(config))
    made = report.read_manifest(engine_dir)
    report.write_manifest(copy, command="x", inputs=made["inputs"], config={}, checks=[], environment={})
    return copy


def test_a_plan_without_a_gpu_is_checked_by_hash_and_not_called_run(engine_dir: Path, golden: Path, tmp_path: Path) -> None:
    result = validate(with_plan(engine_dir, tmp_path / "e"), golden=golden, backend="tensorrt-rtx")
    by_name = {check.name: check for check in result.checks}
    assert by_name["tensorrt-rtx: plan was built from this graph"].status == "passed"
    if "tensorrt-rtx: runs" in by_name:  # on a machine with a GPU the pretended plan would be refused instead
        assert by_name["tensorrt-rtx: runs"].status == "skipped" and by_name["tensorrt-rtx: runs"].reason
    assert not any(c.status == "passed" for n, c in by_name.items() if "prefill" in n)


@pytest.mark.parametrize("wrong", ["graph_sha256", "weights_sha256", "sha256"])
def test_a_plan_of_another_graph_fails(engine_dir: Path, golden: Path, tmp_path: Path, wrong: str) -> None:
    result = validate(with_plan(engine_dir, tmp_path / "e", **{wrong: "0" * 64}), golden=golden)
    check = next(c for c in result.checks if c.name == "tensorrt-rtx: plan was built from this graph")
    assert check.status == "failed" and wrong in check.reason and not result.ok
    assert any(c.name == "tensorrt-rtx: runs" and c.status == "skipped" for c in result.checks)


def test_report_counts() -> None:
    result = Report((Check("a", "passed"), Check("b", "skipped", "no GPU")), "x")
    assert result.ok and result.count == {"passed": 1, "failed": 0, "skipped": 1}
    assert not Report((Check("a", "failed", "why"),), "x").ok
