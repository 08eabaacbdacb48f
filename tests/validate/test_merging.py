"""An engine with a merged adapter is proven against transformers and peft, and quantization sees the merged weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from hf_models import model, save
from safetensors.numpy import load_file

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.quantize.job import calibrate
from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.validate.validate import validate

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
OPTIONS = {"backend": ("onnxruntime",), "max_seq_len": 32}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A tied model in bfloat16 and an adapter that parts its head from its embedding."""
    root = tmp_path_factory.mktemp("pair")
    save(root / "base", "llama", dtype="bfloat16", tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "down_proj"], task_type="CAUSAL_LM")
        made = peft.get_peft_model(model("llama", tie_word_embeddings=True), settings)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        made.save_pretrained(root / "lora")
    return root / "base", root / "lora"


def test_a_merged_engine_passes_beside_peft_and_fails_beside_the_base(pair, tmp_path):
    base, lora = pair
    for source, given in ((base, lora), (tmp_path / "ckpt", None)):
        if given is None:
            convert(base, source, lora_dir=lora)
        build(source, tmp_path / "engine", OPTIONS, lora_dir=given, force=True)
        found = validate(tmp_path / "engine", base, lora_dir=lora)
        assert found.ok and "peft" in found.expected_from, [check for check in found.checks if check.status == "failed"]
    with pytest.raises(ThoughtxError) as error:
        validate(tmp_path / "engine", base)  # its head is tied
    assert error.value.code == "E101" and "--lora_dir" in error.value.fix
    assert "--lora_dir lora" not in json.loads((tmp_path / "engine/manifest.json").read_text())["command"]
    with pytest.raises(ThoughtxError) as error:
        validate(tmp_path / "engine", golden=tmp_path / "golden", lora_dir=lora)
    assert error.value.code == "E001"


def test_an_engine_that_takes_adapters_is_proven_with_one_and_without(tmp_path):
    """Of a base in bfloat16 no weight is rounded again: the reference is merged in float64."""
    save(tmp_path / "base", "qwen2", dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model("qwen2"), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        made.save_pretrained(tmp_path / "lora")
    build(tmp_path / "base", tmp_path / "engine", OPTIONS | {"max_lora_rank": 8})
    for lora in (None, tmp_path / "lora"):
        found = validate(tmp_path / "engine", tmp_path / "base", lora_dir=lora)
        assert found.ok, [check for check in found.checks if check.status == "failed"]


def test_quantization_sees_the_merged_weights(pair, tmp_path):
    base, lora = pair
    convert(base, tmp_path / "merged", lora_dir=lora)
    given = {"qformat": "int8_wo", "group_size": 16, "calib_size": 8, "calib_seq_len": 16, "private_data": True}
    calibrate(tmp_path / "merged", tmp_path / "one", **given)
    calibrate(base, tmp_path / "other", lora_dir=lora, **given)
    one, other = (load_file(tmp_path / name / "rank0.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    assert "--lora_dir lora" in json.loads((tmp_path / "other/manifest.json").read_text())["command"]
    with pytest.raises(ThoughtxError) as error:
        build(tmp_path / "one", tmp_path / "engine", OPTIONS, lora_dir=lora)
    assert error.value.code == "E103" and "quantized" in error.value.what
