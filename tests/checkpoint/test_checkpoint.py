"""Headers, shards and kinds: what is read is what the safetensors library reads, and less of it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny
from badfiles import FILES, HEADERS, SINGLE, entry, packed
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_thoughtx.checkpoint import directory as checkpoint
from trtllm_thoughtx.checkpoint.header import DTYPE_BYTES, MAX_TENSORS, parse_header
from trtllm_thoughtx.errors import ThoughtxError


def parse(blob: bytes) -> dict:
    return parse_header(blob, len(blob), "here")


def library_accepts(blob: bytes) -> bool:
    try:
        safetensors.deserialize(blob)
    except safetensors.SafetensorError:
        return False
    return True


# --- headers ---------------------------------------------------------------------------------------------------------

GOOD = {
    "a scalar": packed({"a": entry(shape=(), offsets=(0, 4))}, bytes(4)),
    "an empty tensor": packed({"a": entry(shape=(0, 5), offsets=(0, 0))}, b""),
    "eight dimensions": packed({"a": entry(shape=(1,) * 7 + (64,))}),
    "no tensors": packed({}, b""),
    "metadata": packed({"__metadata__": {"format": "pt", "note": "{[,]}"}, "a": entry()}),
    "padding": packed(json.dumps({"a": entry()}).encode() + b" " * 9),
    "any order": packed({"b": entry(offsets=(256, 512)), "a": entry()}, bytes(512)),
    "a long name": packed({"a" * 512: entry()}),
    "odd alignment": packed({"a": entry("U8", (1,), (0, 1)), "b": entry(offsets=(1, 257))}, bytes(257)),
    "a header as long as a pickle's magic": packed(json.dumps({"a": entry()}).encode().ljust(0x280), bytes(256)),
}


@pytest.mark.parametrize("blob", GOOD.values(), ids=GOOD.keys())
def test_good_headers(blob: bytes) -> None:
    assert library_accepts(blob)
    parse(blob)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_dtype(dtype: str) -> None:
    size = DTYPE_BYTES[dtype]
    blob = packed({"x": entry(dtype, (3, 5), (0, 15 * size))}, bytes(15 * size))
    assert library_accepts(blob)
    name, shape, begin, end = parse(blob)["x"]
    assert (name, shape, end - begin, end) == (dtype, (3, 5), 15 * size, len(blob))


def test_positions_are_the_librarys(tmp_path: Path) -> None:
    """A file that the library wrote, read at our positions, gives its values."""
    rng = np.random.default_rng(0)
    arrays = {
        "f32": rng.standard_normal((3, 4), dtype=np.float32),
        "f16": rng.standard_normal(7).astype(np.float16),
        "i8": rng.integers(-9, 9, (2, 2, 2), dtype=np.int8),
        "bf16": rng.standard_normal((5, 1), dtype=np.float32).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5),
    }
    safetensors.numpy.save_file(arrays, tmp_path / SINGLE, metadata={"format": "pt"})
    blob = (tmp_path / SINGLE).read_bytes()
    found = checkpoint.read_tensors(tmp_path, [SINGLE])
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        info = found[name]
        assert (info.shape, info.num_bytes, info.file, info.name) == (array.shape, array.nbytes, SINGLE, name)
        assert blob[info.offset : info.offset + info.num_bytes] == array.tobytes()


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/\\."), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(tiny.SAFETENSORS_DTYPES)), SHAPES), max_size=6))
def test_write_and_read(wanted: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    arrays = {name: np.zeros(shape, tiny.numpy_dtype(dtype)) for name, (dtype, shape) in wanted.items()}
    blob = tiny.safetensors_bytes(arrays)
    assert {n: (d, s) for n, (d, s, _, _) in parse(blob).items()} == {
        name: (tiny.SAFETENSORS_DTYPES[dtype], shape) for name, (dtype, shape) in wanted.items()
    }
    assert library_accepts(blob)


BASE = tiny.safetensors_bytes(
    {"a.weight": np.ones((2, 3), np.float32), "b.bias": np.ones(5, np.float16), "c": np.zeros((0, 2), np.int8)},
    {"format": "pt"},
)
HEADER_END = 8 + struct.unpack("<Q", BASE[:8])[0]


def check_damaged(blob: bytes) -> None:
    """Only our error may escape, and what we accept the library accepts."""
    try:
        parse(blob)
    except ThoughtxError as error:
        assert error.code in ("E103", "E105", "E109")
        assert error.render().isascii()
    else:
        assert library_accepts(blob), blob


def test_every_byte_changed() -> None:
    """Each byte of a small header set to each of a set of telling values."""
    values = b'\x00\x01\x7f\x80\xff {}[]",:.-+0123456789eE\\/uabFBN\n'
    for i in range(HEADER_END):
        for value in values:
            blob = bytearray(BASE)
            blob[i] = value
            check_damaged(bytes(blob))


def test_every_truncation() -> None:
    for size in range(len(BASE)):
        with pytest.raises(ThoughtxError):
            parse(BASE[:size])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_some_bytes_changed(changes: list[tuple[int, int]]) -> None:
    blob = bytearray(BASE)
    for i, value in changes:
        blob[i] = value
    check_damaged(bytes(blob))


@settings(max_examples=400, deadline=None)
@given(st.integers(8, HEADER_END), st.integers(0, 12), st.text('{}[]":,\\u0061.-+eE 19abFU8I_metadata', max_size=12).map(str.encode))
def test_a_piece_replaced(at: int, removed: int, new: bytes) -> None:
    """Text put in place of other text, with a length field that agrees."""
    header = BASE[8:at] + new + BASE[min(at + removed, HEADER_END) : HEADER_END]
    check_damaged(struct.pack("<Q", len(header)) + header + BASE[HEADER_END:])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(blob: bytes) -> None:
    check_damaged(blob)
    check_damaged(struct.pack("<Q", len(blob)) + blob)


# What the library lets in and we do not, by row of the catalogue: names last-wins, and values that no tensor needs.
LIBRARY_ACCEPTS = {
    "duplicate name",
    "duplicate name, escaped",
    "duplicate metadata key",
    "leading blank",
    "leading newline",
    "newline padding",
    "entry with a surplus field",
    "known dtype that is not read",
    "rank 1000",
    "name empty",
    "name with parent directory",
    "name with dots",
    "name with slash",
    "name with backslash",
    "name with NUL",
    "name with newline",
    "name with ANSI escape",
    "name with C1 control",
    "name right to left",
    "name not ASCII",
    "name of a megabyte",
}


def test_stricter_than_the_library(tmp_path: Path) -> None:
    accepted = set()
    for k, row in enumerate(HEADERS):
        if row.name == "a million empty tensors":
            continue  # the library takes seconds over it
        row.build(tmp_path / str(k))
        blob = (tmp_path / str(k) / SINGLE).read_bytes()
        with pytest.raises(ThoughtxError) as caught:
            parse(blob)
        assert caught.value.code == row.code
        if library_accepts(blob):
            accepted.add(row.name)
    assert accepted == LIBRARY_ACCEPTS


def test_messages_name_what_is_wrong() -> None:
    def message(blob: bytes) -> str:
        with pytest.raises(ThoughtxError) as caught:
            parse(blob)
        return caught.value.render()

    overlap = message(packed({"left": entry(), "right": entry(offsets=(128, 384))}, bytes(384)))
    assert "'left'" in overlap and "'right'" in overlap
    assert "1 bytes short; re-download" in message(packed({"a": entry()}, bytes(255)))
    assert "git lfs pull" in message(b"version https://git-lfs.github.com/spec/v1\n")
    assert "save_pretrained" in message(b"PK\x03\x04" + bytes(100))
    assert "\\x1b[2J" in message(packed({"\x1b[2J": entry()}))
    unknown, unread = message(packed({"a": entry("F31")})), message(packed({"a": entry("F4", (512,))}))
    assert "unknown dtype" in unknown and "not supported" in unread
    assert "9,223,372,036,854,775,808" in message(packed({"a": entry()}, claim=2**63))


@pytest.mark.slow
def test_many_tensors_are_fine() -> None:
    entries = ",".join(
        f'"model.layers.{i}.mlp.up_proj.weight":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * i},{4 * i + 4}]}}'
        for i in range(MAX_TENSORS)
    )
    assert len(parse(packed(b"{" + entries.encode() + b"}", bytes(4 * MAX_TENSORS)))) == MAX_TENSORS


# --- directories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards(tmp_path: Path, family: str, shards: int) -> None:
    written = tiny.write_tiny(tmp_path, family=family, shards=shards, dtype="bfloat16", tokenizer=True)
    files, _ = checkpoint.model_files(tmp_path)
    assert len(files) == shards and files == sorted(files)
    found = checkpoint.read_tensors(tmp_path, files)
    assert found.keys() == written.keys()
    for name, info in found.items():
        data = (tmp_path / info.file).read_bytes()[info.offset : info.offset + info.num_bytes]
        assert data == written[name].tobytes() and info.dtype == "BF16"


def test_a_hub_cache_snapshot(tmp_path: Path) -> None:
    """What huggingface_hub downloads: a snapshot directory of relative links into blobs."""
    blobs = tmp_path / "hub" / "models--Qwen--Tiny" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    written = tiny.write_tiny(tmp_path / "plain", shards=2)
    for k, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        path.rename(blobs / f"{k:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{k:040x}")
    assert checkpoint.kind_of(snapshot) == "huggingface"
    assert checkpoint.model_files(snapshot)[1].keys() == written.keys()
    with pytest.raises(ThoughtxError) as caught:
        checkpoint.kind_of(blobs.parent)
    assert "snapshots" in caught.value.why


def test_hard_links(tmp_path: Path) -> None:
    written = tiny.write_tiny(tmp_path / "a", shards=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=os.link)
    assert checkpoint.model_files(tmp_path / "b")[1].keys() == written.keys()


def test_all_disagreements_at_once(tmp_path: Path) -> None:
    tiny.write_tiny(tmp_path, shards=4)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    (tmp_path / "model-00003-of-00004.safetensors").rename(tmp_path / "another.safetensors")
    with pytest.raises(ThoughtxError) as caught:
        checkpoint.model_files(tmp_path)
    assert caught.value.code == "E106"
    for name in ("model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"):
        assert name in caught.value.why and name in caught.value.fix

    shutil.rmtree(tmp_path)
    tiny.write_tiny(tmp_path, shards=2)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    for k in range(100):
        index["weight_map"][f"ghost.{k}"] = "model-00001-of-00002.safetensors"
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(ThoughtxError) as caught:
        checkpoint.model_files(tmp_path)
    assert "101 problems" in caught.value.what and "ghost.0" in caught.value.why and "more" in caught.value.why


def test_files_beside_the_weights_do_not_matter(tmp_path: Path) -> None:
    written = tiny.write_tiny(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit")
    (tmp_path / "original").mkdir()
    os.mkfifo(tmp_path / "README.md")
    assert checkpoint.model_files(tmp_path)[0] == [SINGLE]
    assert checkpoint.read_tensors(tmp_path, [SINGLE]).keys() == written.keys()


CONFIGS = [
    ({"model_type": "qwen2"}, "huggingface"),
    ({"architectures": ["Qwen2ForCausalLM"]}, "huggingface"),
    ({"architecture": "Qwen2ForCausalLM", "mapping": {}}, "tensorrt-llm"),
    ({"version": "0.1.0", "pretrained_config": {"architecture": "x"}, "build_config": {}}, "engine"),
]


@pytest.mark.parametrize(("config", "kind"), CONFIGS)
def test_kind_of_a_directory(tmp_path: Path, config: dict, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint.kind_of(tmp_path) == kind


def test_kind_of_a_file(tmp_path: Path) -> None:
    for name, kind in (("m.onnx", "onnx"), ("rank0.engine", "plan"), ("m.plan", "plan")):
        (tmp_path / name).touch()
        assert checkpoint.kind_of(tmp_path / name) == kind


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.safetensors", "give the directory"),
        ("config.json", "give the directory"),
        ("notes.txt", "checkpoint"),
        ("fifo", "FIFO"),
        ("loop", "broken link"),
        ("missing", "correct the path"),
        ("x" * 5000, "correct the path"),
        ("a\0b", "correct the path"),
        ("empty", "empty"),
        ("adapter", "LoRA"),
        ("other", "it holds \\x1b"),
        ("new\nline", "correct the path"),
    ],
)
def test_kind_of_something_else(tmp_path: Path, name: str, hint: str) -> None:
    for file in ("model.safetensors", "config.json", "notes.txt"):
        (tmp_path / file).touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for folder in ("empty", "adapter", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    for k in range(7):
        (tmp_path / "other" / f"\x1b[2J{k}").touch()
    with pytest.raises(ThoughtxError) as caught:
        checkpoint.kind_of(tmp_path / name)
    text = caught.value.render()
    assert caught.value.code == "E101" and hint in text
    assert all(line.isprintable() and line.isascii() for line in text.split("\n"))


def test_a_hub_name_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ThoughtxError) as caught:
        checkpoint.kind_of(Path("Qwen/Qwen2.5-7B-Instruct"))
    assert "download the model first" in caught.value.fix


# --- values ----------------------------------------------------------------------------------------------------------

FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_count_nonfinite_agrees_with_numpy(dtype: str) -> None:
    kind = tiny.numpy_dtype(dtype)
    bits = np.dtype(f"uint{8 * kind.itemsize}")
    every = np.arange(2 ** min(16, 8 * kind.itemsize), dtype=np.uint64) << np.uint64(max(0, 8 * kind.itemsize - 16))
    array = every.astype(bits).view(kind)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = array.astype(np.float64)
    expected = int(np.count_nonzero(~np.isfinite(wide)))
    assert checkpoint.count_nonfinite(array) == expected > 0


def test_count_nonfinite_shapes() -> None:
    array = np.zeros((7, 300_007), np.float32)
    array[0, 0], array[6, 300_006], array[3, 5] = np.nan, np.inf, -np.inf
    assert checkpoint.count_nonfinite(array) == 3
    assert checkpoint.count_nonfinite(array[:, 1:]) == 2
    assert checkpoint.count_nonfinite(np.float32(np.nan).reshape(())) == 1
    assert checkpoint.count_nonfinite(np.zeros((0, 3), np.float16)) == 0
    assert checkpoint.count_nonfinite(np.full(9, -1, np.int8)) == 0


def test_count_nonfinite_is_small() -> None:
    array = np.ones(1 << 24, np.float32)
    tracemalloc.start()
    checkpoint.count_nonfinite(array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_the_catalogue_covers_every_disguise() -> None:
    assert {row.code for row in FILES} >= {"E101", "E105", "E106", "E109"}
