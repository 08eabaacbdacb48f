"""Conversion: the same bytes out as in, whichever way they are stored or split; wrong values refused; nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from places import script
from tiny import tiny_values, write_tiny

from trtllm_thoughtx.checkpoint import convert as convert_module
from trtllm_thoughtx.checkpoint import weights as weights_module
from trtllm_thoughtx.checkpoint.convert import convert, rank_layers
from trtllm_thoughtx.checkpoint.weights import NUMPY_DTYPES, cast_into, open_weights
from trtllm_thoughtx.errors import ThoughtxError

FAMILIES = {
    "qwen2": {},
    "qwen2-tied": {"tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 32, "tied": True},
    "qwen3-bias": {"family": "qwen3", "attention_bias": True},
    "llama": {"family": "llama", "spelling": 5},
    "mistral": {"family": "mistral", "config": {"sliding_window": None}},
    "llama-bias": {"family": "llama", "attention_bias": True, "shards": 3},
}
NUMPY_OF = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def stored(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file, read independently of the package."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = np.frombuffer(data[8 + length + begin : 8 + length + end], NUMPY_OF[entry["dtype"]]).reshape(entry["shape"])
    return found


def all_of(path: Path) -> dict[str, np.ndarray]:
    with open_weights(path) as source:
        return {name: source.read(name) for name in source.names()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    assert list(one) == list(other)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(one.values(), other.values(), strict=True)
    )


def refused(code: str, call: Any, *args: Any, **kwargs: Any) -> ThoughtxError:
    with pytest.raises(ThoughtxError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code, caught.value.render()
    return caught.value


def only(path: Path, *names: str) -> bool:
    """Nothing but `names` is left in `path`, hidden files included."""
    return sorted(p.name for p in path.iterdir()) == sorted(names)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that tiny tensors take several and ranks meet in the middle of one."""
    for module in (weights_module, convert_module):
        monkeypatch.setattr(module, "BLOCK_BYTES", 2048)


# --- one rank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(tmp_path: Path, name: str, dtype: str, small_blocks: None) -> None:
    tensors = write_tiny(tmp_path / "hf", dtype=dtype, **FAMILIES[name])
    summary = convert(tmp_path / "hf", tmp_path / "out")
    assert summary["dtype"] == dtype and summary["num_bytes"] < (tmp_path / "out" / "rank0.safetensors").stat().st_size
    one, other = all_of(tmp_path / "hf"), all_of(tmp_path / "out")
    assert same(one, other)
    with open_weights(tmp_path / "hf") as hf, open_weights(tmp_path / "out") as trt:
        assert hf.config == trt.config
        assert (hf.kind, trt.kind) == ("huggingface", "tensorrt-llm")
        assert all(hf.shape(n) == trt.shape(n) == a.shape and hf.num_bytes(n) == a.nbytes for n, a in one.items())
        assert ("lm_head.weight" in one) != hf.config.tied
    p = "model.layers.1."
    fused = np.concatenate([tensors[f"{p}self_attn.{x}_proj.weight"] for x in "qkv"])
    assert other["transformer.layers.1.attention.qkv.weight"].tobytes() == fused.tobytes()
    for ours, theirs in (("fc", "gate_proj"), ("gate", "up_proj"), ("proj", "down_proj")):
        assert other[f"transformer.layers.1.mlp.{ours}.weight"].tobytes() == tensors[f"{p}mlp.{theirs}.weight"].tobytes()
    head = stored(tmp_path / "out" / "rank0.safetensors")["lm_head.weight"]
    assert head.tobytes() == tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).tobytes()


def test_the_safetensors_library_reads_the_output(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    write_tiny(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    loaded = safetensors.load_file(tmp_path / "out" / "rank0.safetensors")
    assert same(dict(sorted(loaded.items())), dict(sorted(stored(tmp_path / "out" / "rank0.safetensors").items())))


def test_same_input_same_bytes(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf", tokenizer=True, shards=2)
    first = convert(tmp_path / "hf", tmp_path / "a", tp_size=2)
    second = convert(tmp_path / "hf", tmp_path / "b", tp_size=2)
    assert first["files"] == second["files"]
    for name in first["files"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_files_beside_the_weights(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf", tokenizer=True, shards=2)
    for name in ("LICENSE", "modeling.py", "pytorch_model.bin", "chat_template.jinja"):
        (tmp_path / "hf" / name).write_text("{{ messages }}")
    convert(tmp_path / "hf", tmp_path / "out")
    carried = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "rank0.safetensors", "manifest.json", *carried}
    umask = os.umask(0)
    os.umask(umask)
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o666 & ~umask for p in (tmp_path / "out").iterdir())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    inputs = {row["name"] for row in manifest["inputs"]}
    assert (
        inputs
        == {"config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} | carried
    )
    from trtllm_thoughtx.report import verify_files

    verify_files(tmp_path / "out")


def test_convert_again_from_a_converted_checkpoint(tmp_path: Path, small_blocks: None) -> None:
    write_tiny(tmp_path / "hf", tied=True)
    convert(tmp_path / "hf", tmp_path / "one")
    convert(tmp_path / "hf", tmp_path / "direct", tp_size=2, pp_size=2)
    convert(tmp_path / "one", tmp_path / "again", tp_size=2, pp_size=2)
    for rank in range(4):
        name = f"rank{rank}.safetensors"
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


# --- several ranks ---------------------------------------------------------------------------------------------------


def test_layers_of_pipeline_ranks_are_those_of_tensor_split() -> None:
    for layers, size in ((2, 2), (7, 3), (28, 8), (5, 5), (4, 1)):
        ranks = rank_layers(layers, size)
        assert [list(r) for r in ranks] == [list(a) for a in np.array_split(np.arange(layers), size)]


def rebuilt(out: Path, tensors: dict[str, np.ndarray], *, tp: int, pp: int, layers: int, heads: int, kv: int, dim: int) -> None:
    """Put the ranks together again, by the rules of the format, and compare with the Hugging Face tensors."""
    ranks = [[stored(out / f"rank{stage * tp + r}.safetensors") for r in range(tp)] for stage in range(pp)]
    q_rows, kv_rows = heads * dim // tp, max(kv // tp, 1) * dim
    seen = 0
    for stage, numbers in enumerate(np.array_split(np.arange(layers), pp)):
        for local, layer in enumerate(numbers):
            prefix, hf = f"transformer.layers.{local}.", f"model.layers.{layer}."

            def each(name: str, stage: int = stage, prefix: str = prefix) -> list[np.ndarray]:
                return [rank[prefix + name] for rank in ranks[stage]]

            for kind in ("weight", "bias"):
                if f"{hf}self_attn.q_proj.{kind}" not in tensors:
                    continue
                fused = each(f"attention.qkv.{kind}")
                q, k, v = (tensors[f"{hf}self_attn.{x}_proj.{kind}"] for x in "qkv")
                assert np.array_equal(np.concatenate([f[:q_rows] for f in fused]), q)
                for offset, whole in ((q_rows, k), (q_rows + kv_rows, v)):
                    copies = max(tp // kv, 1)  # each head, `copies` times, in order
                    wanted = np.repeat(whole.reshape(kv, dim, -1), copies, axis=0).reshape(kv * copies * dim, *whole.shape[1:])
                    assert np.array_equal(np.concatenate([f[offset : offset + kv_rows] for f in fused]), wanted)
                assert all(len(f) == q_rows + 2 * kv_rows for f in fused)
            for ours, theirs, axis in (
                ("attention.dense.weight", "self_attn.o_proj.weight", 1),
                ("mlp.fc.weight", "mlp.gate_proj.weight", 0),
                ("mlp.gate.weight", "mlp.up_proj.weight", 0),
                ("mlp.proj.weight", "mlp.down_proj.weight", 1),
            ):
                assert np.array_equal(np.concatenate(each(ours), axis=axis), tensors[hf + theirs])
            for ours, theirs in (
                ("input_layernorm.weight", "input_layernorm.weight"),
                ("post_layernorm.weight", "post_attention_layernorm.weight"),
                ("attention.dense.bias", "self_attn.o_proj.bias"),
                ("attention.q_layernorm.weight", "self_attn.q_norm.weight"),
                ("attention.k_layernorm.weight", "self_attn.k_norm.weight"),
            ):
                assert (hf + theirs in tensors) == (prefix + ours in ranks[stage][0])
                if hf + theirs in tensors:
                    assert all(np.array_equal(copy, tensors[hf + theirs]) for copy in each(ours))
            seen += 1
    assert seen == layers
    for r in range(tp):
        assert np.array_equal(ranks[0][r]["transformer.vocab_embedding.weight"], tensors["model.embed_tokens.weight"])
        assert np.array_equal(ranks[-1][r]["transformer.ln_f.weight"], tensors["model.norm.weight"])
    head = np.concatenate([rank["lm_head.weight"] for rank in ranks[-1]])
    whole = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    assert len(head) == -(-len(whole) // tp) * tp and all(len(rank["lm_head.weight"]) == len(head) // tp for rank in ranks[-1])
    assert np.array_equal(head[: len(whole)], whole) and not head[len(whole) :].any()
    if pp > 1:
        assert not any("lm_head.weight" in r or "transformer.ln_f.weight" in r for stage in ranks[:-1] for r in stage)
        assert not any("transformer.vocab_embedding.weight" in r for stage in ranks[1:] for r in stage)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-bias", "llama"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (4, 3)])
def test_ranks_hold_the_original(tmp_path: Path, name: str, tp: int, pp: int, small_blocks: None) -> None:
    """Vocabulary 97 needs padding for tp 2 and 4, and with tp 4 each of the two KV heads lives on two ranks."""
    spec = FAMILIES[name]
    tensors = write_tiny(tmp_path / "hf", **spec | {"num_layers": 4})
    convert(tmp_path / "hf", tmp_path / "out", tp_size=tp, pp_size=pp)
    rebuilt(tmp_path / "out", tensors, tp=tp, pp=pp, layers=4, heads=4, kv=2, dim=16)
    mapping = json.loads((tmp_path / "out" / "config.json").read_text())["mapping"]
    assert (mapping["tp_size"], mapping["pp_size"], mapping["world_size"]) == (tp, pp, tp * pp)
    error = refused("E103", open_weights, tmp_path / "out")
    assert "TensorRT-LLM" in error.why


def test_splits_that_do_not_fit(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf", num_heads=6, num_kv_heads=2, hidden_size=96)
    for sizes, word in (({"tp_size": 4}, "heads"), ({"pp_size": 3}, "layers"), ({"tp_size": 0}, "at least 1"), ({"tp_size": 5}, "MLP")):
        assert word in refused("E001", convert, tmp_path / "hf", tmp_path / "out", **sizes).why
    refused("E001", convert, tmp_path / "hf", tmp_path / "out", dtype="int8")
    assert only(tmp_path, "hf")


# --- types and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", NUMPY_DTYPES)
@pytest.mark.parametrize("target", NUMPY_DTYPES)
def test_cast_is_that_of_ml_dtypes(source: str, target: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32)
    values = (
        bits.astype(np.uint16).view(NUMPY_DTYPES[source])
        if source != "float32"
        else (bits * 65537 + 0x7FFF).astype(np.uint32).view(np.float32)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.astype(np.float32).astype(NUMPY_DTYPES[target])
    got = np.empty(values.shape, NUMPY_DTYPES[target])
    num_overflowed = cast_into(values, got)
    is_number = ~np.isnan(values.astype(np.float32))
    assert np.array_equal(np.isnan(got.astype(np.float32)), ~is_number)
    assert got[is_number].tobytes() == wanted[is_number].tobytes()
    finite = np.isfinite(values.astype(np.float32))
    assert num_overflowed == np.count_nonzero(finite & ~np.isfinite(got.astype(np.float32)))


@pytest.mark.parametrize("target", NUMPY_DTYPES)
def test_dtype_of_the_output(tmp_path: Path, target: str) -> None:
    tensors = write_tiny(tmp_path / "hf", dtype="bfloat16", tied=True)
    convert(tmp_path / "hf", tmp_path / "out", dtype=target)
    got = all_of(tmp_path / "out")
    wanted = tensors["model.layers.0.mlp.up_proj.weight"].astype(np.float32).astype(NUMPY_DTYPES[target])
    assert got["transformer.layers.0.mlp.gate.weight"].tobytes() == wanted.tobytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == target
    with open_weights(tmp_path / "hf") as source:
        assert source.read("transformer.layers.0.mlp.gate.weight", target).tobytes() == wanted.tobytes()


def test_mixed_types_follow_the_configuration(tmp_path: Path) -> None:
    norm = tiny_values("model.norm.weight", (64,), "float32", 5)
    write_tiny(tmp_path / "hf", dtype="bfloat16", tensors={"model.norm.weight": norm})
    convert(tmp_path / "hf", tmp_path / "out")
    assert same(all_of(tmp_path / "hf"), all_of(tmp_path / "out"))
    assert all_of(tmp_path / "out")["transformer.ln_f.weight"].tobytes() == norm.astype(ml_dtypes.bfloat16).tobytes()


def test_the_weights_decide_when_the_configuration_names_no_type(tmp_path: Path) -> None:
    from tiny import MISSING

    write_tiny(tmp_path / "one", dtype="float16", config={"torch_dtype": MISSING})
    with open_weights(tmp_path / "one") as source:
        assert source.config.dtype == "float16"
    norm = {"model.norm.weight": np.ones(64, np.float32)}
    write_tiny(tmp_path / "two", dtype="float16", config={"torch_dtype": MISSING}, tensors=norm)
    assert "dtype" in refused("E102", open_weights, tmp_path / "two").what


def test_values_that_are_not_numbers_are_all_listed(tmp_path: Path, small_blocks: None) -> None:
    broken = {}
    for name, shape, bad in (
        ("model.layers.0.mlp.up_proj.weight", (96, 64), [np.nan]),
        ("model.layers.1.self_attn.k_proj.weight", (32, 64), [np.inf, -np.inf]),
    ):
        broken[name] = tiny_values(name, shape, "bfloat16", 0)
        broken[name].reshape(-1)[-len(bad) :] = bad
    write_tiny(tmp_path / "hf", dtype="bfloat16", tensors=broken)
    error = refused("E108", convert, tmp_path / "hf", tmp_path / "out")
    assert "layers.0.mlp.gate.weight: 1 values" in error.why and "layers.1.attention.qkv.weight: 2 values" in error.why
    assert only(tmp_path, "hf")
    with open_weights(tmp_path / "hf") as source:
        refused("E108", source.read, "transformer.layers.0.mlp.gate.weight")
        source.read("transformer.layers.0.mlp.fc.weight")
    convert(tmp_path / "hf", tmp_path / "out", allow_nonfinite=True)
    kept = stored(tmp_path / "out" / "rank0.safetensors")["transformer.layers.0.mlp.gate.weight"]
    assert kept.tobytes() == broken["model.layers.0.mlp.up_proj.weight"].tobytes()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]["allow_nonfinite"] is True


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    big = tiny_values("x", (96, 64), "bfloat16", 0)
    big[3, :5] = 70000.0
    write_tiny(tmp_path / "hf", dtype="bfloat16", tensors={"model.layers.0.mlp.up_proj.weight": big})
    error = refused("E108", convert, tmp_path / "hf", tmp_path / "out", dtype="float16")
    assert "layers.0.mlp.gate.weight: 5 values are beyond the range of float16" in error.why and "bfloat16" in error.fix
    assert only(tmp_path, "hf")
    convert(tmp_path / "hf", tmp_path / "out")


def test_a_tied_model_may_store_its_head_too(tmp_path: Path) -> None:
    embedding = tiny_values("model.embed_tokens.weight", (97, 64), "float32", 0)
    write_tiny(tmp_path / "same", tied=True, tensors={"lm_head.weight": embedding})
    write_tiny(tmp_path / "plain", tied=True)
    assert same(all_of(tmp_path / "same"), all_of(tmp_path / "plain"))
    convert(tmp_path / "same", tmp_path / "out")
    other = embedding.copy()
    other[96, 63] += 1
    write_tiny(tmp_path / "other", tied=True, tensors={"lm_head.weight": other})
    with open_weights(tmp_path / "other") as source:
        assert "tied" in refused("E107", source.read, "transformer.vocab_embedding.weight").what
    refused("E107", convert, tmp_path / "other", tmp_path / "out2")
    write_tiny(tmp_path / "shape", tied=True, tensors={"lm_head.weight": other[:90]})
    refused("E107", open_weights, tmp_path / "shape")
    shutil.rmtree(tmp_path / "other")
    assert only(tmp_path, "same", "plain", "out", "shape")


# --- structure -------------------------------------------------------------------------------------------------------


def test_all_structural_findings_at_once(tmp_path: Path) -> None:
    changes = {
        "model.layers.0.mlp.up_proj.weight": None,
        "model.norm.weight": np.ones(65, np.float32),
        "model.layers.0.self_attn.extra": np.ones(3, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    write_tiny(tmp_path / "hf", tensors=changes)
    error = refused("E107", open_weights, tmp_path / "hf")
    assert error.what.endswith(": 3 problems")
    for text in ("up_proj.weight: missing, wanted [96, 64]", "norm.weight: has shape [65], wanted [64]", "extra: not a tensor"):
        assert text in error.why
    assert "inv_freq" not in error.why


def test_rotary_buffers_of_old_checkpoints_are_skipped(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf", tensors={"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    convert(tmp_path / "hf", tmp_path / "out")


def test_a_base_model_is_named_as_one(tmp_path: Path) -> None:
    tensors = write_tiny(tmp_path / "hf", tied=True)
    renamed = {name: None for name in tensors} | {name.removeprefix("model."): array for name, array in tensors.items()}
    write_tiny(tmp_path / "base", tied=True, tensors=renamed)
    error = refused("E107", open_weights, tmp_path / "base")
    assert "base model" in error.what and "model." in error.why


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf", tensors={"model.layers.0.mlp.up_proj.weight": np.ones((96, 64), ml_dtypes.float8_e4m3fn)})
    error = refused("E103", open_weights, tmp_path / "hf")
    assert error.what.endswith("does not say how (1 tensor)") and "quantization_config" in error.fix


def test_sharded_and_wrong_inputs(tmp_path: Path) -> None:
    refused("E101", open_weights, tmp_path / "nothing")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "config.json").write_text('{"pretrained_config": {}, "build_config": {}}')
    refused("E101", open_weights, tmp_path / "engine")


# --- outputs and failures --------------------------------------------------------------------------------------------


def test_output_rules(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf")
    assert not convert(tmp_path / "hf", tmp_path / "out")["up_to_date"]
    assert convert(tmp_path / "hf", tmp_path / "out")["up_to_date"]
    refused("E130", convert, tmp_path / "hf", tmp_path / "out", dtype="float16")
    refused("E130", convert, tmp_path / "hf", tmp_path / "hf", force=True)
    refused("E130", convert, tmp_path / "hf", tmp_path / "hf" / "inside")
    before = (tmp_path / "out" / "rank0.safetensors").stat().st_ino
    convert(tmp_path / "hf", tmp_path / "out", force=True)
    assert (tmp_path / "out" / "rank0.safetensors").stat().st_ino != before
    (tmp_path / "out" / "config.json").write_text("{}")
    refused("E130", convert, tmp_path / "hf", tmp_path / "out")
    assert only(tmp_path, "hf", "out")


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused("E203", convert, tmp_path / "hf", tmp_path / "out")
    assert only(tmp_path, "hf")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    write_tiny(tmp_path / "hf")
    real = weights_module.WeightSource.read_rows

    def fails(self: Any, part: Any, begin: int, end: int, into: np.ndarray) -> Any:
        if "layers.1.mlp" in part.source:
            raise failure
        return real(self, part, begin, end, into)

    monkeypatch.setattr(weights_module.WeightSource, "read_rows", fails)
    with pytest.raises((ThoughtxError, KeyboardInterrupt, MemoryError)):
        convert(tmp_path / "hf", tmp_path / "out")
    assert only(tmp_path, "hf")


def test_a_write_error_in_a_thread_is_reported(tmp_path: Path) -> None:
    """The writer runs beside the reader; what it meets must not be lost. A file size limit makes its write fail."""
    write_tiny(tmp_path / "hf", hidden_size=128, vocab_size=4000)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from trtllm_thoughtx.checkpoint.convert import convert; from trtllm_thoughtx.errors import ThoughtxError\n"
        "try: convert(sys.argv[1], sys.argv[2])\n"
        "except ThoughtxError as error: print(error.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hf"), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "E206", done.stderr
    assert only(tmp_path, "hf")


def test_an_input_that_changes_is_noticed(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf")
    with open_weights(tmp_path / "hf") as source:
        source.verify_unchanged()
        os.utime(tmp_path / "hf" / "model.safetensors", ns=(1, 1))
        refused("E111", source.verify_unchanged)
    with open_weights(tmp_path / "hf") as source:
        os.truncate(tmp_path / "hf" / "model.safetensors", 5000)
        refused("E111", source.read, "lm_head.weight")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path, dtype: str) -> None:
    bench = script("bench/convert.py")
    num_bytes = bench.make_checkpoint(tmp_path / "hf", "0.15b", shard_bytes=100_000_000)
    assert num_bytes > 280_000_000
    _, peak_mib = bench.convert_once(tmp_path / "hf", tmp_path / "out", dtype)
    assert peak_mib < 140, f"{peak_mib:.0f} MiB for {num_bytes / 2**20:.0f} MiB"


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_threads_may_read_from_one_source(tmp_path: Path, dtype: str) -> None:
    write_tiny(tmp_path / "hf", dtype="bfloat16", num_layers=4)
    with open_weights(tmp_path / "hf") as source, ThreadPoolExecutor(4) as pool:
        alone = {name: source.read(name, dtype).tobytes() for name in source.names()}
        for _ in range(20):
            together = pool.map(lambda name: source.read(name, dtype).tobytes(), alone)
            assert all(a == b for a, b in zip(alone.values(), together, strict=True))
