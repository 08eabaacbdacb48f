"""The catalogue of hostile checkpoints: a name, how to build it, and the answer it must get.

Each builder writes a Hugging Face directory that is valid but for one thing. `test_badfiles.py` runs every row. When a bad
input is found in the wild, it becomes a row here first. Builders may use the parent of the directory for what lies outside.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
REFUSED = 3  # the exit status of every row: an input is refused, whatever is wrong with it


@dataclass(frozen=True)
class BadFile:
    name: str
    build: Callable[[Path], object]
    code: str
    exit: int = REFUSED


# --- tools for builders ----------------------------------------------------------------------------------------------


def entry(dtype: Any = "F32", shape: Any = (64,), offsets: Any = (0, 256), **extra: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **extra}


def packed(header: Any, data: bytes = bytes(256), *, claim: int | None = None) -> bytes:
    """A safetensors file of a header (JSON-able, or bytes as they are) and data; `claim` is what the length field says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if claim is None else claim) + raw + data


def weights(content: bytes) -> Callable[[Path], object]:
    """A good config.json with these bytes as model.safetensors."""

    def build(d: Path) -> None:
        tiny.write_tiny(d)
        (d / SINGLE).write_bytes(content)

    return build


def header(h: Any, data: bytes = bytes(256), *, claim: int | None = None) -> Callable[[Path], object]:
    return lambda d: weights(packed(h, data, claim=claim))(d)


def config(**fields: Any) -> Callable[[Path], object]:
    """A checkpoint whose config.json differs in these fields; the weights stay what they were."""
    return lambda d: tiny.write_tiny(d, config=fields)


def config_text(old: str, new: str) -> Callable[[Path], object]:
    """config.json with a piece of its text replaced, for what json.dumps cannot write."""

    def build(d: Path) -> None:
        tiny.write_tiny(d)
        text = (d / "config.json").read_text()
        assert text.count(old) == 1, old
        (d / "config.json").write_text(text.replace(old, new))

    return build


def config_bytes(content: bytes) -> Callable[[Path], object]:
    def build(d: Path) -> None:
        tiny.write_tiny(d)
        (d / "config.json").write_bytes(content)

    return build


def tensors(**kwargs: Any) -> Callable[[Path], object]:
    return lambda d: tiny.write_tiny(d, **kwargs)


def index_entry(value: Any) -> Callable[[Path], object]:
    """A two-shard checkpoint whose index maps the final norm to `value`."""

    def build(d: Path) -> None:
        tiny.write_tiny(d, shards=2)
        (d.parent / "outside.safetensors").write_bytes((d / SECOND).read_bytes())
        index = json.loads((d / INDEX).read_text())
        index["weight_map"][NORM] = value
        (d / INDEX).write_text(json.dumps(index))

    return build


def index_bytes(content: bytes) -> Callable[[Path], object]:
    def build(d: Path) -> None:
        tiny.write_tiny(d, shards=2)
        (d / INDEX).write_bytes(content)

    return build


def sharded(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A two-shard checkpoint, then `change`."""

    def build(d: Path) -> None:
        tiny.write_tiny(d, shards=2)
        change(d)

    return build


def instead_of(file: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else made under the name of a file."""

    def build(d: Path) -> None:
        tiny.write_tiny(d)
        (d / file).unlink()
        make(d / file)

    return build


def outside(p: Path) -> None:
    target = p.parent.parent / f"outside-{p.name}"
    tiny.write_tiny(p.parent.parent / "other")
    (p.parent.parent / "other" / p.name).rename(target)
    p.symlink_to(target)


def loop(p: Path) -> None:
    p.symlink_to(p.name)


def moved(d: Path, drop: str, add: str | None = None) -> None:
    """The index without `drop`, and with `add` mapped to the second shard."""
    index = json.loads((d / INDEX).read_text())
    del index["weight_map"][drop]
    if add:
        index["weight_map"][add] = SECOND
    (d / INDEX).write_text(json.dumps(index))


def twice_across_shards(d: Path) -> None:
    t = tiny.write_tiny(d, shards=2)
    names = json.loads((d / INDEX).read_text())["weight_map"]
    second = {n: t[n] for n, file in names.items() if file == SECOND}
    (d / SECOND).write_bytes(tiny.safetensors_bytes({**second, EMBEDDING: t[EMBEDDING]}))


def poisoned(value: float, dtype: str = "float32") -> Callable[[Path], object]:
    def build(d: Path) -> None:
        matrix = tiny.tiny_values("model.layers.1.mlp.up_proj.weight", (96, 64), dtype, 0)
        matrix[95, 63] = value
        tiny.write_tiny(d, dtype=dtype, tensors={"model.layers.1.mlp.up_proj.weight": matrix})

    return build


def only_bin(d: Path) -> None:
    tiny.write_tiny(d)
    (d / SINGLE).unlink()
    (d / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def bin_index(d: Path) -> None:
    only_bin(d)
    (d / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {NORM: "pytorch_model.bin"}}))


def zipped(d: Path) -> None:
    tiny.write_tiny(d)
    with zipfile.ZipFile(d / SINGLE, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def short(num_bytes: int) -> Callable[[Path], object]:
    """model.safetensors cut at its end (or with zeros after it)."""

    def build(d: Path) -> None:
        tiny.write_tiny(d)
        size = (d / SINGLE).stat().st_size
        os.truncate(d / SINGLE, size - num_bytes)

    return build


@functools.cache
def million_tensors() -> bytes:
    entries = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    return packed(b"{" + entries.encode() + b"}", b"")


def swap(d: Path, file: str, other: str) -> None:
    (d / file).rename(d / other)


def only_adapter(d: Path) -> None:
    d.mkdir()
    (d / "adapter_config.json").write_text("{}")
    (d / "adapter_model.safetensors").write_bytes(packed({"a": entry()}))


DEEP = b"[" * 200_000 + b"]" * 200_000
PAIR = {"a": entry(), "b": entry(offsets=(256, 512))}
ONE = json.dumps({"a": entry()}).encode()
TWIN = b'"dtype":"F32","shape":[64],"data_offsets":[0,256]}'
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Entry not found</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 3554214752\n"
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}

PATHS = [
    BadFile("index: parent directory", index_entry("../outside.safetensors"), "E104"),
    BadFile("index: parent directory, twice", index_entry("../../outside.safetensors"), "E104"),
    BadFile("index: absolute path", index_entry("/etc/passwd"), "E104"),
    BadFile("index: absolute path to safetensors", index_entry("/tmp/outside.safetensors"), "E104"),
    BadFile("index: down and up", index_entry("a/../outside.safetensors"), "E104"),
    BadFile("index: subdirectory", index_entry("sub/model.safetensors"), "E104"),
    BadFile("index: dot slash", index_entry("./" + SECOND), "E104"),
    BadFile("index: drive letter", index_entry("C:\\x.safetensors"), "E104"),
    BadFile("index: backslash parent", index_entry("..\\outside.safetensors"), "E104"),
    BadFile("index: network share", index_entry("\\\\host\\share\\x.safetensors"), "E104"),
    BadFile("index: home", index_entry("~/x.safetensors"), "E104"),
    BadFile("index: url", index_entry("https://example.com/x.safetensors"), "E104"),
    BadFile("index: dots", index_entry("..safetensors"), "E104"),
    BadFile("index: empty name", index_entry(""), "E104"),
    BadFile("index: NUL in name", index_entry("x\0.safetensors"), "E104"),
    BadFile("index: newline in name", index_entry("x.safetensors\n"), "E104"),
    BadFile("index: ANSI in name", index_entry("\x1b[2Jx.safetensors"), "E104"),
    BadFile("index: very long name", index_entry("x" * 5000 + ".safetensors"), "E104"),
    BadFile("index: not a safetensors name", index_entry("config.json"), "E104"),
    BadFile("index: number for a name", index_entry(7), "E106"),
    BadFile("index: null for a name", index_entry(None), "E106"),
    BadFile("index: list for a name", index_entry([SECOND]), "E106"),
    BadFile("index: .bin name", index_entry("pytorch_model.bin"), "E109"),
    BadFile("shard: link out of the tree", instead_of(SINGLE, outside), "E104"),
    BadFile("shard: link loop", instead_of(SINGLE, loop), "E104"),
    BadFile("shard: link to /dev/zero", instead_of(SINGLE, lambda p: p.symlink_to("/dev/zero")), "E104"),
    BadFile("shard: link to /dev/stdin", instead_of(SINGLE, lambda p: p.symlink_to("/dev/stdin")), "E104"),
    BadFile("shard: link to a directory", instead_of(SINGLE, lambda p: p.symlink_to(".")), "E104"),
    BadFile("shard: broken link", instead_of(SINGLE, lambda p: p.symlink_to("nowhere.safetensors")), "E101"),
    BadFile("shard: FIFO", instead_of(SINGLE, os.mkfifo), "E104"),
    BadFile("shard: directory", instead_of(SINGLE, os.mkdir), "E104"),
    BadFile("shard of an index: FIFO", sharded(lambda d: ((d / FIRST).unlink(), os.mkfifo(d / FIRST))), "E104"),
    BadFile("config: link out of the tree", instead_of("config.json", outside), "E104"),
    BadFile("config: FIFO", instead_of("config.json", os.mkfifo), "E104"),
    BadFile("config: directory", instead_of("config.json", os.mkdir), "E104"),
    BadFile("config: link to /dev/zero", instead_of("config.json", lambda p: p.symlink_to("/dev/zero")), "E104"),
]

HEADERS = [
    BadFile("duplicate name", header(b'{"a":{%s,"a":{%s}' % (TWIN, TWIN)), "E105"),
    BadFile("duplicate name, escaped", header(b'{"a":{%s,"\\u0061":{%s}' % (TWIN, TWIN)), "E105"),
    BadFile(
        "duplicate name, two spans",
        header(b'{"a":{%s,"a":{"dtype":"F32","shape":[64],"data_offsets":[256,512]}}' % TWIN, bytes(512)),
        "E105",
    ),
    BadFile("duplicate field", header(b'{"a":{"dtype":"I32",%s}' % TWIN), "E105"),
    BadFile("duplicate metadata", header(b'{"__metadata__":{"k":"1"},"__metadata__":{"k":"2"},"a":{%s}' % TWIN), "E105"),
    BadFile("duplicate metadata key", header(b'{"__metadata__":{"k":"1","k":"2"},"a":{%s}' % TWIN), "E105"),
    BadFile("metadata with a number", header({"__metadata__": {"k": 1}, "a": entry()}), "E105"),
    BadFile("metadata nested", header({"__metadata__": {"k": {"x": "y"}}, "a": entry()}), "E105"),
    BadFile("metadata is a list", header({"__metadata__": ["k"], "a": entry()}), "E105"),
    BadFile("overlap, same span", header({"a": entry(), "b": entry()}), "E105"),
    BadFile("overlap, partly", header({"a": entry(), "b": entry(offsets=(128, 384))}, bytes(384)), "E105"),
    BadFile("hole between tensors", header({"a": entry(), "b": entry(offsets=(512, 768))}, bytes(768)), "E105"),
    BadFile("hole at the start", header({"a": entry(offsets=(256, 512))}, bytes(512)), "E105"),
    BadFile("data short by one", short(1), "E105"),
    BadFile("data cut in the middle", short(40_000), "E105"),
    BadFile("trailing byte", short(-1), "E105"),
    BadFile("trailing zip", header({"a": entry()}, bytes(256) + b"PK\x03\x04"), "E105"),
    BadFile("no data at all", header(PAIR, b""), "E105"),
    BadFile("offsets reversed", header({"a": entry(offsets=(256, 0))}), "E105"),
    BadFile("offsets negative", header({"a": entry(offsets=(-256, 0))}), "E105"),
    BadFile("offsets float", header({"a": entry(offsets=(0.0, 256.0))}), "E105"),
    BadFile("offsets text", header({"a": entry(offsets=("0", "256"))}), "E105"),
    BadFile("offsets boolean", header({"a": entry("U8", (1,), (False, True))}, bytes(1)), "E105"),
    BadFile("offsets three", header({"a": entry(offsets=(0, 256, 512))}), "E105"),
    BadFile("offsets 2**64", header({"a": entry(offsets=(0, 2**64))}), "E105"),
    BadFile("offsets 2**63 - 1", header({"a": entry("U8", (2**63 - 1,), (0, 2**63 - 1))}), "E105"),
    BadFile("header length 0", header(b"", claim=0), "E105"),
    BadFile("header length 2**63", header(PAIR, claim=2**63), "E105"),
    BadFile("header length 2**64 - 8", header(PAIR, claim=2**64 - 8), "E105"),
    BadFile("header length past the limit", header(PAIR, claim=100_000_001), "E105"),
    BadFile("header length one short", header(ONE, claim=len(ONE) - 1), "E105"),
    BadFile("header length one long", header(ONE, claim=len(ONE) + 1), "E105"),
    BadFile("header length past the file", header(ONE, b"", claim=len(ONE) + 1), "E105"),
    BadFile("leading blank", header(b" " + ONE), "E105"),
    BadFile("leading newline", header(b"\n" + ONE), "E105"),
    BadFile("byte order mark", header(b"\xef\xbb\xbf" + ONE), "E105"),
    BadFile("NUL padding", header(ONE + b"\0\0"), "E105"),
    BadFile("newline padding", header(ONE + b"\n\n"), "E105"),
    BadFile("second JSON", header(ONE + b"{}"), "E105"),
    BadFile("not UTF-8", header(b'{"\xff\xfe":1}'), "E105"),
    BadFile("UTF-16", header(ONE.decode().encode("utf-16")), "E105"),
    BadFile("not JSON", header(b"{hello world"), "E105"),
    BadFile("JSON list", header(b"[]", b""), "E105"),
    BadFile("NaN in the header", header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'), "E105"),
    BadFile("lone surrogate", header(b'{"\\ud800":{%s}' % TWIN), "E105"),
    BadFile("deep nesting", header(b'{"a":' + DEEP + b"}", b""), "E105"),
    BadFile("unknown dtype", header({"a": entry("F31")}), "E105"),
    BadFile("lower-case dtype", header({"a": entry("f32")}), "E105"),
    BadFile("dtype is a list", header({"a": entry(["F32"])}), "E105"),
    BadFile("known dtype that is not read", header({"a": entry("F4", (512,), (0, 256))}), "E103"),
    BadFile("entry without dtype", header({"a": {"shape": [64], "data_offsets": [0, 256]}}), "E105"),
    BadFile("entry with a surplus field", header({"a": entry(evil="x")}), "E105"),
    BadFile("entry is a number", header({"a": 1}), "E105"),
    BadFile("shape times size is wrong", header({"a": entry(shape=(65,))}), "E105"),
    BadFile("shape product overflows", header({"a": entry(shape=(2**32, 2**32, 4))}), "E105"),
    BadFile("shape product overflows before a zero", header({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}, b""), "E105"),
    BadFile("shape negative", header({"a": entry(shape=(-8, -8))}), "E105"),
    BadFile("shape float", header({"a": entry(shape=(64.0,))}), "E105"),
    BadFile("shape boolean", header({"a": entry(shape=(True, 64))}), "E105"),
    BadFile("shape is a number", header({"a": {"dtype": "F32", "shape": 64, "data_offsets": [0, 256]}}), "E105"),
    BadFile("rank 1000", header({"a": entry(shape=(1,) * 1000, offsets=(0, 4))}, bytes(4)), "E105"),
    BadFile("name empty", header({"": entry()}), "E105"),
    BadFile("name with parent directory", header({"../../etc/passwd": entry()}), "E105"),
    BadFile("name with dots", header({"a..b": entry()}), "E105"),
    BadFile("name with slash", header({"a/b": entry()}), "E105"),
    BadFile("name with backslash", header({"a\\b": entry()}), "E105"),
    BadFile("name with NUL", header({"a\0b": entry()}), "E105"),
    BadFile("name with newline", header({"a\nINFO all is well": entry()}), "E105"),
    BadFile("name with ANSI escape", header({"a\x1b[2J\x1b[31mb": entry()}), "E105"),
    BadFile("name with C1 control", header({"a\x9b2Jb": entry()}), "E105"),
    BadFile("name right to left", header({"a\u202eb": entry()}), "E105"),
    BadFile("name not ASCII", header({"mod\u00e8le": entry()}), "E105"),
    BadFile("name of a megabyte", header({"a" * 1_000_000: entry()}), "E105"),
    BadFile("a million empty tensors", lambda d: weights(million_tensors())(d), "E105"),
    BadFile("a million numbers", lambda d: weights(packed(b'{"a":[' + b"1," * 4_000_000 + b"1]}"))(d), "E105"),
]

FILES = [
    BadFile("empty file", weights(b""), "E105"),
    BadFile("seven bytes", weights(b"\0" * 7), "E105"),
    BadFile("zeros", weights(bytes(4096)), "E105"),
    BadFile("LFS pointer", weights(LFS), "E109"),
    BadFile("HTML page", weights(HTML), "E109"),
    BadFile("HTML page after blanks", weights(b"\n\n  " + HTML), "E109"),
    BadFile("zip archive", zipped, "E109"),
    BadFile("pickle", weights(pickle.dumps({"a": list(range(100))}, protocol=2)), "E109"),
    BadFile("pickle, protocol 4", weights(pickle.dumps({"a": list(range(100))}, protocol=4)), "E109"),
    BadFile("GGUF", weights(b"GGUF" + struct.pack("<IQQ", 3, 123, 1) + bytes(64)), "E109"),
    BadFile("only pytorch_model.bin", only_bin, "E109"),
    BadFile("only .bin with its index", bin_index, "E109"),
    BadFile("no weights", lambda d: (tiny.write_tiny(d), (d / SINGLE).unlink()), "E101"),
    BadFile("empty directory", lambda d: d.mkdir(), "E101"),
    BadFile("missing directory", lambda d: None, "E101"),
    BadFile("a file for a directory", lambda d: d.write_bytes(ONE), "E101"),
    BadFile("only a LoRA adapter", only_adapter, "E101"),
    BadFile("missing shard", sharded(lambda d: (d / FIRST).unlink()), "E106"),
    BadFile("single file beside an index", sharded(lambda d: (d / SINGLE).write_bytes((d / FIRST).read_bytes())), "E106"),
    BadFile("shards without index", sharded(lambda d: (d / INDEX).unlink()), "E106"),
    BadFile("tensor in index, not in shard", sharded(lambda d: moved(d, NORM, "model.extra.weight")), "E106"),
    BadFile("tensor in shard, not in index", sharded(lambda d: moved(d, NORM)), "E106"),
    BadFile("tensor in the other shard", index_entry(FIRST), "E106"),
    BadFile("tensor in two shards", twice_across_shards, "E106"),
    BadFile("shards swapped", sharded(lambda d: (swap(d, FIRST, "x"), swap(d, SECOND, FIRST), swap(d, "x", SECOND))), "E106"),
    BadFile("truncated shard", sharded(lambda d: os.truncate(d / SECOND, (d / SECOND).stat().st_size - 1024)), "E105"),
    BadFile("index not JSON", index_bytes(b"weights here"), "E106"),
    BadFile("index empty", index_bytes(b""), "E106"),
    BadFile("index is a list", index_bytes(b"[]"), "E106"),
    BadFile("index without weight_map", index_bytes(b'{"metadata":{}}'), "E106"),
    BadFile("index with empty weight_map", index_bytes(b'{"weight_map":{}}'), "E106"),
    BadFile("index with duplicate keys", index_bytes(b'{"weight_map":{"a":"%s","a":"%s"}}' % (FIRST.encode(), SECOND.encode())), "E106"),
    BadFile("index with ANSI in a tensor name", index_bytes(json.dumps({"weight_map": {"a\x1b[2J": FIRST}}).encode()), "E106"),
    BadFile("index deeply nested", index_bytes(b'{"weight_map":' + DEEP + b"}"), "E106"),
    BadFile("index nested past our limit", index_bytes(b'{"weight_map":' + b"[" * 70 + b"]" * 70 + b"}"), "E106"),
    BadFile("index too large", index_bytes(b'{"weight_map":{}}' + b" " * (17 << 20)), "E106"),
]

CONFIGS = [
    BadFile("config missing", lambda d: (tiny.write_tiny(d), (d / "config.json").unlink()), "E101"),
    BadFile("config empty", config_bytes(b""), "E102"),
    BadFile("config not JSON", config_bytes(b"model_type: qwen2\n"), "E102"),
    BadFile("config is HTML", config_bytes(HTML), "E102"),
    BadFile("config is a list", config_bytes(b"[1]"), "E101"),
    BadFile("config of something else", config_bytes(b"{}"), "E101"),
    BadFile("config too large", config_bytes(b'{"model_type":"qwen2"}' + b" " * (17 << 20)), "E102"),
    BadFile("config with millions of brackets", config_bytes(b"[" + b"{}," * 5_000_000 + b"{}]"), "E102"),
    BadFile("config with a byte order mark", config_bytes(b'\xef\xbb\xbf{"model_type":"qwen2"}'), "E102"),
    BadFile("config UTF-16", config_bytes('{"model_type":"qwen2"}'.encode("utf-16")), "E102"),
    BadFile("config deeply nested", config_bytes(b'{"model_type":' + DEEP + b"}"), "E102"),
    BadFile("config lone surrogate", config_bytes(b'{"model_type":"\\udfff"}'), "E102"),
    BadFile("config duplicate key", config_text('"vocab_size": 97', '"vocab_size": 97, "vocab_size": 98'), "E102"),
    BadFile("config NaN", config_text('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN'), "E102"),
    BadFile("config Infinity", config_text('"rms_norm_eps": 1e-06', '"rms_norm_eps": Infinity'), "E102"),
    BadFile("config 1e999", config_text('"rope_theta": 10000.0', '"rope_theta": 1e999'), "E102"),
    BadFile("config 5000-digit integer", config_text('"vocab_size": 97', f'"vocab_size": {"9" * 5000}'), "E102"),
    BadFile("config 5000-digit integer, ignored field", config_text('"use_cache": true', f'"use_cache": {"9" * 5000}'), "E102"),
    BadFile("config true for an integer", config(num_hidden_layers=True), "E102"),
    BadFile("config text for an integer", config(num_hidden_layers="2"), "E102"),
    BadFile("config float for an integer", config(num_hidden_layers=2.0), "E102"),
    BadFile("config null for an integer", config(num_hidden_layers=None), "E102"),
    BadFile("config list for an integer", config(hidden_size=[64]), "E102"),
    BadFile("config text for a float", config(rms_norm_eps="1e-6"), "E102"),
    BadFile("config text for a boolean", config(tie_word_embeddings="false"), "E102"),
    BadFile("config number for a name", config(model_type=2), "E102"),
    BadFile("config missing field", config(num_hidden_layers=tiny.MISSING), "E102"),
    BadFile("config negative size", config(intermediate_size=-96), "E102"),
    BadFile("config zero layers", config(num_hidden_layers=0), "E102"),
    BadFile("config zero heads", config(num_attention_heads=0), "E102"),
    BadFile("config zero KV heads", config(num_key_value_heads=0), "E102"),
    BadFile("config a billion layers", config(num_hidden_layers=10**9), "E102"),
    BadFile("config vocabulary 2**40", config(vocab_size=2**40), "E102"),
    BadFile("config hidden 2**62", config(hidden_size=2**62), "E102"),
    BadFile("config context 2**31", config(max_position_embeddings=2**31), "E102"),
    BadFile("config heads not divisible", config(num_key_value_heads=3), "E102"),
    BadFile("config more KV heads than heads", config(num_key_value_heads=8), "E102"),
    BadFile("config hidden not divisible by heads", config(num_attention_heads=6), "E102"),
    BadFile("config head_dim 0", config(head_dim=0), "E102"),
    BadFile("config head_dim odd", config(head_dim=15), "E102"),
    BadFile("config rope theta negative", config(rope_theta=-1.0), "E102"),
    BadFile("config rope theta zero", config(rope_theta=0), "E102"),
    BadFile("config norm eps negative", config(rms_norm_eps=-1e-6), "E102"),
    BadFile("config rope_scaling is a list", config(rope_scaling=[1]), "E102"),
    BadFile("config rope factor as text", config(rope_scaling={"type": "linear", "factor": "2"}), "E102"),
    BadFile("config hidden_act", config(hidden_act="gelu"), "E103"),
    BadFile("config auto_map", config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}), "E110"),
    BadFile("config unknown model_type", config(model_type="mamba", architectures=["MambaForCausalLM"]), "E103"),
    BadFile("config hostile model_type", config(model_type="\x1b[2J../../qwen2"), "E103"),
    BadFile("config hostile architecture", config(architectures=["os.system\n"]), "E103"),
    BadFile("config sliding window 0", config(use_sliding_window=True, sliding_window=0, max_window_layers=0), "E102"),
    BadFile("config sliding layers without a window", config(layer_types=["full_attention", "sliding_attention"]), "E102"),
    BadFile("config unknown layer types", config(layer_types=["full_attention", "chunked_attention"]), "E103"),
    BadFile("config unknown rope type", config(rope_scaling={"rope_type": "magic", "factor": 2.0}), "E103"),
    BadFile("config unknown rope type, new spelling", config(rope_parameters={**ROPE, "rope_type": "magic"}), "E103"),
    BadFile("config quantization_config", config(quantization_config={"quant_method": "awq", "bits": 4}), "E103"),
    BadFile("config dtype unknown", config(torch_dtype="int8"), "E103"),
    BadFile("config mlp_bias", tensors(family="llama", config={"mlp_bias": True}), "E103"),
]

TENSORS = [
    BadFile("fewer layers than the config says", config(num_hidden_layers=3), "E107"),
    BadFile("more layers than the config says", config(num_hidden_layers=1), "E107"),
    BadFile("tied, with another lm_head", config(tie_word_embeddings=True), "E107"),
    BadFile("not tied, without lm_head", tensors(tied=True, config={"tie_word_embeddings": False}), "E107"),
    BadFile("vocabulary of the config is wrong", config(vocab_size=98), "E107"),
    BadFile("intermediate of the config is wrong", config(intermediate_size=128), "E107"),
    BadFile("head_dim of the config is wrong", config(head_dim=32), "E107"),
    BadFile("matrix transposed", tensors(tensors={"model.layers.0.mlp.up_proj.weight": np.zeros((64, 96), np.float32)}), "E107"),
    BadFile("norm with two dimensions", tensors(tensors={NORM: np.ones((1, 64), np.float32)}), "E107"),
    BadFile("norm is a scalar", tensors(tensors={NORM: np.ones((), np.float32)}), "E107"),
    BadFile("empty tensor", tensors(tensors={NORM: np.ones((0,), np.float32)}), "E107"),
    BadFile("missing tensor", tensors(tensors={"model.layers.1.mlp.up_proj.weight": None}), "E107"),
    BadFile("missing bias", tensors(tensors={"model.layers.1.self_attn.q_proj.bias": None}), "E107"),
    BadFile("extra tensor", tensors(tensors={"model.layers.1.mlp.extra.weight": np.zeros(4, np.float32)}), "E107"),
    BadFile("no tensors", header({}, b""), "E107"),
    BadFile("integer weights", tensors(tensors={NORM: np.ones(64, np.int8)}), "E103"),
    BadFile("NaN weight", poisoned(np.nan), "E108"),
    BadFile("infinite weight", poisoned(np.inf), "E108"),
    BadFile("negative infinite weight, bfloat16", poisoned(-np.inf, "bfloat16"), "E108"),
    BadFile("NaN weight, float16", poisoned(np.nan, "float16"), "E108"),
]

CATALOGUE = PATHS + HEADERS + FILES + CONFIGS + TENSORS
