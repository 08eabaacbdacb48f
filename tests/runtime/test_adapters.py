"""Adapters as inputs of an engine: each row has its own, none is the base model to the bit, and a row is what the merged model is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hf_models import model, save

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.quantize.job import calibrate
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.row import Request
from trtllm_thoughtx.text.params import GenerationParams

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
OPTIONS: dict[str, Any] = {"backend": ("onnxruntime",), "max_seq_len": 64, "max_batch_size": 3, "max_input_len": 16}
RANK = 8
PROMPTS = [[5, 17, 3, 44, 91, 8, 2], [5, 17, 3, 44], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70]]
WEARS = {  # name -> settings of peft
    "all": {"r": 4, "target_modules": "all-linear"},
    "some": {"r": 2, "target_modules": ["k_proj", "v_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"layers.1.*v_proj": 8}},
    "dora": {"r": 4, "target_modules": ["q_proj"], "use_dora": True},
    "head": {"r": 4, "target_modules": ["lm_head"]},
    "large": {"r": 9, "target_modules": ["q_proj"]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    save(root / "base", "qwen2")
    for seed, (name, settings) in enumerate(WEARS.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = peft.get_peft_model(model("qwen2"), peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in made.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(0, 0.2, generator=generator)
            made.save_pretrained(root / name)
    build(root / "base", root / "bare", OPTIONS)
    build(root / "base", root / "engine", OPTIONS | {"max_lora_rank": RANK})
    for name in ("all", "some"):
        build(root / "base", root / f"merged-{name}", OPTIONS, lora_dir=root / name)
    return root


@pytest.fixture()
def engine(root):
    opened = Engine.load(root / "engine")
    opened.load_adapter(root / "all")
    assert opened.load_adapter(root / "some", "other") == "other"
    yield opened
    opened.close()


def of(path: Path, call: str, *arguments: Any) -> list[np.ndarray]:
    opened = Engine.load(path)
    try:
        return getattr(opened, call)(*arguments)
    finally:
        opened.close()


@pytest.mark.parametrize(("call", "more"), [("forward", []), ("decode_logits", [[3, 2, 9]])])
def test_rows_of_a_mixed_batch_are_the_merged_models_and_the_base_to_the_bit(call, more, root, engine):
    wanted = [of(root / name, call, PROMPTS, *more)[i] for i, name in enumerate(("merged-all", "bare", "merged-some"))]
    found = getattr(engine, call)(PROMPTS, *more, adapters=["all", None, "other"])
    assert np.array_equal(found[1], wanted[1])
    for i in (0, 2):
        np.testing.assert_allclose(found[i], wanted[i], rtol=0, atol=2e-5)
        assert np.abs(found[i] - of(root / "bare", call, PROMPTS, *more)[i]).max() > 0.1
    again = getattr(engine, call)(PROMPTS, *more)  # nothing of them is left
    assert all(np.array_equal(one, other) for one, other in zip(again, of(root / "bare", call, PROMPTS, *more), strict=True))


def test_requests_get_what_they_get_alone_whoever_comes_and_goes_beside_them(engine):
    """Slots change hands and places, and prompts that begin alike share KV only under the same adapter."""
    shared = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]
    wears, lengths = [None, "all", "other", "all", None, "other", "all"], [3, 9, 2, 12, 5, 7, 4]
    asked = [
        Request([*shared, i], GenerationParams(max_new_tokens=length, temperature=0.0, ignore_eos=True), i, 0, adapter=wear)
        for i, (wear, length) in enumerate(zip(wears, lengths, strict=True))
    ]
    together = {index: done.output_ids for index, done in engine.complete(asked)}
    assert engine.stats.num_reused > 0
    alone = {}
    for request in asked:
        ((index, done),) = engine.complete([request])
        alone[index] = done.output_ids
    assert together == alone
    assert len({tuple(engine.generate([PROMPTS[0]], adapter=wear)[0].output_ids) for wear in (None, "all", "other")}) == 3


def test_an_adapter_stands_beside_quantized_weights(root, tmp_path):
    """What it adds is computed in the engine's type; without it the numbers are those of the quantized engine, to the bit."""
    given = {"qformat": "int8_wo", "group_size": 16, "calib_size": 8, "calib_seq_len": 16, "private_data": True}
    calibrate(root / "base", tmp_path / "ckpt", **given)
    for name, options in (("bare", {}), ("engine", {"max_lora_rank": RANK})):
        build(tmp_path / "ckpt", tmp_path / name, OPTIONS | options)
    opened = Engine.load(tmp_path / "engine")
    opened.load_adapter(root / "all")
    found = opened.forward(PROMPTS[:2], adapters=[None, "all"])
    opened.close()
    assert np.array_equal(found[0], of(tmp_path / "bare", "forward", PROMPTS[:2])[0])
    merged, bare = (of(root / name, "forward", PROMPTS[:2])[1] for name in ("merged-all", "bare"))
    assert np.abs(found[1] - merged).max() < 0.1 * np.abs(bare - merged).max()


def test_what_cannot_be_worn_is_refused(root, engine):
    for name, code, said in (("dora", "E103", "DoRA"), ("head", "E103", "lm_head"), ("large", "E122", "for rank 8")):
        with pytest.raises(ThoughtxError) as error:
            engine.load_adapter(root / name)
        assert error.value.code == code and said in error.value.why
    with pytest.raises(ThoughtxError) as error:
        engine.load_adapter(root / "all")
    assert error.value.code == "E001"
    with pytest.raises(ThoughtxError) as error:
        engine.generate([PROMPTS[0]], adapter="nobody")
    assert error.value.code == "E122" and "all, other" in error.value.why
    opened = Engine.load(root / "bare")
    with pytest.raises(ThoughtxError) as error:
        opened.load_adapter(root / "all")
    opened.close()
    assert error.value.code == "E122" and "--max_lora_rank" in error.value.fix
    for options in ({"backend": ("tensorrt-rtx",)}, {"max_lora_rank": 2000}):
        with pytest.raises(ThoughtxError) as error:
            build(root / "base", root / "x", {**OPTIONS, "max_lora_rank": RANK, **options})
        assert error.value.code == "E001"


@pytest.mark.parametrize(
    "more", [{"dtype": "float16"}, {"dtype": "bfloat16"}, {"early_exit_layers": (1,)}, {"use_chunked_attention": True, "chunk_size": 8}]
)
def test_other_engines_take_adapters_too(more, root, tmp_path):
    for name, options in (("bare", {}), ("engine", {"max_lora_rank": RANK})):
        build(root / "base", tmp_path / name, OPTIONS | more | options)
    build(root / "base", tmp_path / "merged", OPTIONS | more, lora_dir=root / "all")
    opened = Engine.load(tmp_path / "engine")
    opened.load_adapter(root / "all")
    found = opened.forward(PROMPTS[:2], adapters=[None, "all"])
    opened.close()
    bare = of(tmp_path / "bare", "forward", PROMPTS[:2])[0]
    is_half = more.get("dtype") == "float16"  # which onnxruntime's CPU rounds where it likes
    assert np.array_equal(found[0], bare) or (is_half and np.abs(found[0] - bare).max() < 0.01)
    atol = {"float16": 0.02, "bfloat16": 0.3}.get(more.get("dtype"), 2e-5)
    np.testing.assert_allclose(found[1], of(tmp_path / "merged", "forward", PROMPTS[:2])[1], rtol=0, atol=atol)
    graph = onnx.load(next((tmp_path / "engine").glob("*.onnx")), load_external_data=False)
    assert any(value.name.startswith("lora_") for value in graph.graph.input)
