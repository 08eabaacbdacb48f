"""`thoughtx-validate` on quantized engines: the limits of the calibration hold for good engines and fail for damaged ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from quantized_models import damaged

hf_models = pytest.importorskip("hf_models")

from trtllm_thoughtx.build.build import build  # noqa: E402
from trtllm_thoughtx.calibrate.quantize.job import calibrate  # noqa: E402
from trtllm_thoughtx.errors import ThoughtxError  # noqa: E402
from trtllm_thoughtx.validate.divergence import Loss  # noqa: E402
from trtllm_thoughtx.validate.quality import Limits  # noqa: E402
from trtllm_thoughtx.validate.validate import validate  # noqa: E402

OPTIONS = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 96, "max_input_len": 32}


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return hf_models.save(tmp_path_factory.mktemp("hf") / "m", "qwen3", intermediate_size=64, head_dim=16)


def quantized(hf: Path, out: Path, qformat: str, **options) -> Path:
    calibrate(hf, out / "c", qformat=qformat, calib_size=32, calib_seq_len=64)
    build(out / "c", out / "e", {**OPTIONS, **options})
    return out / "e"


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "int8_wo", "int4_awq", "int4_wo", "nvfp4"])
@pytest.mark.slow
def test_a_good_engine_passes(hf, tmp_path, qformat):
    result = validate(quantized(hf, tmp_path, qformat), reference=hf)
    assert result.ok and not result.count["skipped"], result
    names = {check.name.removeprefix("onnxruntime: ") for check in result.checks}
    assert {
        "answers within the limits",
        "ragged decode equals prefill",
        "ragged prefill equals alone",
        "pieces of 7 equal the whole",
    } <= names


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_the_limits(hf, tmp_path, dtype):
    assert validate(quantized(hf, tmp_path, "int8_wo", dtype=dtype), reference=hf).ok


def test_chunked_engines_are_judged_under_their_mask(hf, tmp_path):
    made = quantized(hf, tmp_path, "int8_wo", use_chunked_attention=True, chunk_size=16, sink_tokens=2, left_chunks=1)
    assert validate(made, reference=hf).ok


def test_a_golden_file_stands_for_the_reference(hf, tmp_path):
    made = quantized(hf, tmp_path, "fp8")
    validate(made, reference=hf, record=tmp_path / "g.safetensors")
    assert validate(made, golden=tmp_path / "g.safetensors").ok


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("transformer.layers.1.mlp.proj.weights_scaling_factor", lambda x: x * 1.5),
        ("transformer.layers.0.attention.qkv.activation_scaling_factor", lambda x: x / 8),
        ("transformer.layers.2.attention.dense.weight", lambda x: np.roll(x.view(np.uint8), 1, 0).view(x.dtype)),
    ],
)
def test_a_damaged_scale_or_weight_fails(hf, tmp_path, name, change):
    calibrate(hf, tmp_path / "c", qformat="fp8", calib_size=32, calib_seq_len=64)
    damaged(tmp_path / "c", name, change)
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    result = validate(tmp_path / "e", reference=hf)
    assert not result.ok
    failed = next(check for check in result.checks if check.status == "failed")
    assert failed.name == "onnxruntime: answers within the limits" and "KL" in failed.reason


def test_limits_name_what_they_see():
    limits = Limits(max_kl=0.01, min_top1_agreement=0.95, max_perplexity_ratio=1.05)
    good = Loss(0.01, 0.1, 0.95, 10.0, 10.5, 1.05, 96)
    assert limits.broken(good) == ""
    for key, value, word in (
        ("kl", 0.011, "KL"),
        ("kl", float("nan"), "KL"),
        ("top1_agreement", 0.9, "top token"),
        ("perplexity_ratio", 1.1, "perplexity"),
    ):
        assert word in limits.broken(replace(good, **{key: value}))


@pytest.mark.parametrize(
    "change",
    [
        *({"backends": None, "limits": None}, {"backends": None, "limits": {"max_kl": "x"}}),  # a file that states one way alone
        *({"backends": {}}, {"backends": {"onnxruntime": {"max_kl": "x"}, "exact": {"max_kl": "x"}}}),
        *({"validation": [[999]]}, {"validation": [[]]}),
    ],
)
def test_a_changed_calibration_file_is_refused(hf, tmp_path, change):
    calibrate(hf, tmp_path / "c", qformat="int8_wo", calib_size=8, calib_seq_len=32)
    file = tmp_path / "c" / "calibration.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    with pytest.raises(ThoughtxError) as caught:
        validate(tmp_path / "e", reference=hf)
    assert caught.value.code == "E102"


@pytest.mark.parametrize("qformat", ["int8_wo", "int4_awq"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.slow
def test_what_is_promised_is_what_runs(hf, tmp_path, qformat, exact):
    """calibration.json states the loss of each way to run an engine, measured with its own operators; validation finds the same, and
    judges by that way's limits."""
    made = quantized(hf, tmp_path, qformat)
    stated = json.loads((made / "calibration.json").read_text())["backends"]["exact" if exact else "onnxruntime"]
    result = validate(made, reference=hf, exact=exact)
    (check,) = [check for check in result.checks if check.name == "onnxruntime: answers within the limits"]
    assert result.ok and check.evidence["limits"] == f"calibration.json, {'exact' if exact else 'onnxruntime'}"
    assert check.evidence["max_kl"] == stated["limits"]["max_kl"]
    assert stated["limits"]["max_kl"] == pytest.approx(1.5 * check.evidence["kl"] + 0.002, rel=2e-3)


def test_the_limits_of_the_other_way_do_not_count(hf, tmp_path):
    made = tmp_path / "e"
    calibrate(hf, tmp_path / "c", qformat="int4_wo", calib_size=16, calib_seq_len=32)
    file = tmp_path / "c" / "calibration.json"
    stated = json.loads(file.read_text())
    stated["backends"]["exact"]["limits"]["max_kl"] = stated["limits"]["max_kl"] = 0.0
    file.write_text(json.dumps(stated))
    build(tmp_path / "c", made, OPTIONS)
    assert validate(made, reference=hf).ok
    assert not validate(made, reference=hf, exact=True).ok


def test_files_that_state_one_loss_are_read(hf, tmp_path):
    calibrate(hf, tmp_path / "c", qformat="int4_wo", calib_size=16, calib_seq_len=32)
    file = tmp_path / "c" / "calibration.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "backends"}))
    build(tmp_path / "c", tmp_path / "e", OPTIONS)
    for exact in (False, True):
        (check,) = [c for c in validate(tmp_path / "e", reference=hf, exact=exact).checks if "within the limits" in c.name]
        assert check.status == "passed" and ("calibrate again" in check.evidence["limits"]) != exact
