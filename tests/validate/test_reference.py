"""The measure itself: precision, masks, hidden states and refusals of `reference`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_models import FAMILIES, ROPES, save, torch, transformers

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.validate import reference
from trtllm_thoughtx.validate.golden import ChunkSpec
from trtllm_thoughtx.validate.reference import Reference, additive_mask, time_decode

IDS = [int(n) for n in np.random.default_rng(7).integers(0, 97, 23)]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2) / np.mean(b.astype(np.float64) ** 2)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save(root / family, family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_mask_is_the_default_run_bit_for_bit(models: dict[str, Path], family: str) -> None:
    kinds = {"attn_implementation": "eager", **({"experts_implementation": "eager"} if "moe" in family else {})}
    plain = transformers.AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32, **kinds)
    with torch.inference_mode():
        wanted = plain(torch.tensor([IDS]), use_cache=False, output_hidden_states=True)
    logits, hidden = Reference(models[family], "float32").run(IDS, layers=True)
    assert np.array_equal(logits, wanted.logits[0].numpy())
    assert len(hidden) == plain.config.num_hidden_layers + 1
    for ours, theirs in zip(hidden[:-1], wanted.hidden_states[:-1], strict=True):
        assert np.array_equal(ours, theirs[0].numpy())
    with torch.inference_mode():  # theirs has the final norm in its last entry, ours does not
        assert np.array_equal(plain.model.norm(torch.from_numpy(hidden[-1])).numpy(), wanted.hidden_states[-1][0].numpy())


@pytest.mark.parametrize("size", [1, 4, 7, 23, 64])
def test_chunk_mask_is_transformers_own_chunked_mask(models: dict[str, Path], size: int) -> None:
    from transformers.masking_utils import create_chunked_causal_mask

    config = transformers.AutoConfig.from_pretrained(models["llama"])
    config.attention_chunk_size, config._attn_implementation = size, "eager"
    length = len(IDS)
    theirs = create_chunked_causal_mask(
        config, torch.zeros(1, length, 8), attention_mask=None, past_key_values=None, position_ids=torch.arange(length)[None]
    )
    ours = additive_mask(length, ChunkSpec(size, 0, 0), torch.float32)
    assert torch.equal(ours, torch.zeros_like(ours) if theirs is None else theirs)

    run = Reference(models["llama"], "float32")
    chunked, _ = run.run(IDS, chunk=ChunkSpec(size, 0, 0))
    full, _ = run.run(IDS)
    assert np.array_equal(chunked, full) == (size >= length)
    assert np.array_equal(chunked[:size], full[:size])


def test_sinks_and_left_chunks_widen_the_view() -> None:
    def seen(chunk: ChunkSpec) -> list[list[int]]:
        return [np.flatnonzero(row == 0).tolist() for row in additive_mask(9, chunk, torch.float64)[0, 0].numpy()]

    assert seen(ChunkSpec(3, 0, 0))[8] == [6, 7, 8]
    assert seen(ChunkSpec(3, 1, 0))[8] == [0, 6, 7, 8]
    assert seen(ChunkSpec(3, 1, 1))[6] == [0, 3, 4, 5, 6]
    assert seen(ChunkSpec(3, 0, 2))[8] == list(range(9))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_float64_is_float64_throughout(models: dict[str, Path], family: str) -> None:
    """Nothing is left in float32: widening the float32 run by hand changes results by float32 rounding, and no less."""
    truth, hidden = Reference(models[family], "float64").run(IDS, layers=True)
    assert truth.dtype == np.float64 and hidden[0].dtype == np.float64
    single, _ = Reference(models[family], "float32").run(IDS)
    assert single.dtype == np.float32
    assert 1e-8 < relative(single, truth) < 3e-6


@pytest.mark.parametrize("rope", ROPES)
def test_float64_agrees_with_an_independent_float64_decoder(tmp_path: Path, rope: str) -> None:
    """A decoder written out in NumPy float64, here, from the definition; float32 anywhere inside would show as 1e-7."""
    made = save(tmp_path / "m", "qwen3", rope=rope, head_dim=12, rms_norm_eps=1e-3)
    loaded = Reference(made, "float64")
    truth, _ = loaded.run(IDS, chunk=ChunkSpec(5, 1, 1))
    model = loaded._model
    weights = {k: v.detach().numpy().astype(np.float64) for k, v in model.named_parameters()}
    frequencies, scale = model.model.rotary_emb.inv_freq.numpy(), model.model.rotary_emb.attention_scaling
    assert frequencies.dtype == np.float64
    mask = additive_mask(len(IDS), ChunkSpec(5, 1, 1), torch.float64)[0, 0].numpy()
    assert relative(truth, _decoder(weights, frequencies, scale, mask)) < 1e-13


def _decoder(w: dict[str, np.ndarray], frequencies: np.ndarray, scale: float, mask: np.ndarray) -> np.ndarray:
    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * w[name]

    angle = np.arange(len(IDS))[:, None] * frequencies
    cos, sin = (np.concatenate([f(angle)] * 2, -1) * scale for f in (np.cos, np.sin))

    def rotate(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, -1)
        return x * cos + np.concatenate([-second, first], -1) * sin

    x = w["model.embed_tokens.weight"][IDS]
    for layer in range(3):
        at = f"model.layers.{layer}."
        h = norm(x, f"{at}input_layernorm.weight")
        q, k, v = ((h @ w[f"{at}self_attn.{p}_proj.weight"].T).reshape(len(IDS), -1, 12).swapaxes(0, 1) for p in "qkv")
        q, k = rotate(norm(q, f"{at}self_attn.q_norm.weight")), rotate(norm(k, f"{at}self_attn.k_norm.weight"))
        scores = q @ np.repeat(k, 2, 0).swapaxes(1, 2) / np.sqrt(12) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        heads = scores / scores.sum(-1, keepdims=True) @ np.repeat(v, 2, 0)
        x = x + heads.swapaxes(0, 1).reshape(len(IDS), -1) @ w[f"{at}self_attn.o_proj.weight"].T
        h = norm(x, f"{at}post_attention_layernorm.weight")
        gate = h @ w[f"{at}mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"{at}mlp.up_proj.weight"].T)) @ w[f"{at}mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize(("dtype", "low", "high"), [("float16", 1e-5, 1e-2), ("bfloat16", 1e-3, 1e-1)])
def test_sixteen_bit_runs_are_rounded_and_finite(models: dict[str, Path], dtype: str, low: float, high: float) -> None:
    truth, _ = Reference(models["qwen2"], "float32").run(IDS, chunk=ChunkSpec(4, 1, 1))
    rough, _ = Reference(models["qwen2"], dtype).run(IDS, chunk=ChunkSpec(4, 1, 1))
    assert np.isfinite(rough).all() and low < relative(rough, truth) < high


def test_rows_pick_positions(models: dict[str, Path]) -> None:
    run = Reference(models["qwen3"], "float64")
    logits, hidden = run.run(IDS, layers=True)
    few, few_hidden = run.run(IDS, layers=True, rows=[0, 5, 22])
    assert few.shape == (3, 97) and relative(few, logits[[0, 5, 22]]) < 1e-14
    assert all(np.array_equal(a, b[[0, 5, 22]]) for a, b in zip(few_hidden, hidden, strict=True))


def test_only_safetensors_and_only_known_models(tmp_path: Path, models: dict[str, Path]) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((models["qwen2"] / "config.json").read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ThoughtxError) as caught:
        Reference(pickled, "float32")
    assert caught.value.code == "E109"
    with pytest.raises(ThoughtxError) as caught:
        Reference(tmp_path / "absent", "float32")
    assert caught.value.code == "E101"


def test_a_model_larger_than_memory_is_refused_before_loading(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "available_bytes", lambda: 1 << 20)
    with pytest.raises(ThoughtxError) as caught:
        Reference(models["qwen2"], "float64")
    assert caught.value.code == "E204" and "--golden" in caught.value.fix


@pytest.mark.parametrize("missing", ["torch", "transformers"])
@pytest.mark.slow
def test_without_torch_it_says_what_to_install(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from trtllm_thoughtx.errors import ThoughtxError\n"
        "try:\n import trtllm_thoughtx.validate.reference\nexcept ThoughtxError as e:\n print(e.code, e.fix)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("E201") and 'pip install "trtllm-thoughtx[reference]"' in done.stdout


def test_time_decode_counts_what_it_did(models: dict[str, Path]) -> None:
    threads = torch.get_num_threads()
    row = time_decode(models["qwen2"], prompt_len=5, new_tokens=4, batch=2, dtype="float32", num_threads=1)
    assert row.prefill_seconds > 0 and row.decode_tokens_per_second > 0 and row.num_threads == 1
    assert torch.get_num_threads() == threads
