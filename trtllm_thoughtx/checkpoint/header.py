"""The header of one safetensors file, read by rules stricter than the library's.

Whatever is accepted here the safetensors library accepts too, but not the other way round: duplicate names, leading blanks,
odd names and unknown fields are refused. It looks at bytes and builds nothing larger than the header, so a header that lies
costs nothing; a file that is something else in disguise (pickle, LFS pointer, HTML page) is recognised and named.
"""

from __future__ import annotations

import os
import re
from typing import Any, BinaryIO

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.strictjson import parse_json

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_TENSORS = 100_000
MAX_MARKS = 16 * MAX_TENSORS  # commas and brackets that so many entries of rank <= 8 need, with some for the metadata
MAX_RANK = 8
TENSOR_NAME = re.compile(r"(?!.*\.\.)[!-.0-\[\]-~]{1,512}")  # printable ASCII without blank, slash and backslash
DTYPE_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}
UNREAD_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
# first bytes -> what the file is, and what to do about it
DISGUISES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "fetch the weights with `git lfs pull`, or download the file again"),
    (b"PK\x03\x04", "a zip archive (PyTorch pickle weights are zip files)", "{convert}"),
    (b"\x80\x02", "a pickle", "{convert}"),
    (b"\x80\x03", "a pickle", "{convert}"),
    (b"\x80\x04", "a pickle", "{convert}"),
    (b"\x80\x05", "a pickle", "{convert}"),
    (b"GGUF", "a GGUF file", "{original}"),
    (b"\x89HDF", "an HDF5 file", "{original}"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
)
HTML = (b"<!doctype", b"<html", b"<head", b"<?xml")
CONVERT = (
    "pickle files can run code and are never read; on a machine that may run it: "
    "transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR), and copy the tokenizer's files"
)
ORIGINAL = "use the safetensors checkpoint that it was made from"

Header = dict[str, tuple[str, tuple[int, ...], int, int]]


def header_length(head: bytes, file_size: int, where: str) -> int:
    """Length of the JSON header from the first bytes of a file (16 are enough); E105, or E109 for a file in disguise."""
    length = int.from_bytes(head[:8], "little")
    is_plausible = len(head) >= 9 and head[8:9] == b"{" and 2 <= length <= min(file_size - 8, MAX_HEADER)
    if not is_plausible:
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        for start, what, fix in DISGUISES:
            if head.startswith(start):
                raise unread(
                    f"the file is {what}", where, fix.format(convert=f"rename it to pytorch_model.bin; {CONVERT}", original=ORIGINAL)
                )
        if text.startswith(HTML):
            raise unread("the file is an HTML page, probably an error page that was saved", where, "download it again")
    if file_size < 10:
        raise _malformed(f"the file is too small: {file_size} bytes", where, "a safetensors file has an 8 byte length and a header")
    if not 2 <= length <= file_size - 8:
        why = f"the file has {file_size:,} bytes; it is truncated, or no safetensors file"
        raise _malformed(f"the header claims {length:,} bytes", where, why)
    if length > MAX_HEADER:
        raise _malformed(f"the header claims {length:,} bytes", where, f"the format allows {MAX_HEADER:,}")
    if head[8:9] != b"{":
        raise _malformed(f"the header starts with byte 0x{head[8]:02x}", where, "it must start with '{'")
    return length


def parse_header(head: bytes, file_size: int, where: str) -> Header:
    """Tensors of a safetensors file: name -> (dtype, shape, begin, end), positions counted from the start of the file.

    `head` is the start of the file, at least the 8 length bytes and the header. E105 for anything that is not exactly the
    format, E103 for a dtype that it has and we do not read, E109 for a file in disguise.
    """
    length = header_length(head, file_size, where)
    raw = head[8 : 8 + length]
    if len(raw) < length:
        raise _malformed(f"the header is {length - len(raw)} bytes short", where, "the file is truncated")
    if raw.count(b"{") > 2 * MAX_TENSORS:
        raise _malformed("the header has too many tensors", where, f"at most {MAX_TENSORS:,} are read")
    text = raw.rstrip(b" ")
    if not text.endswith(b"}"):
        raise _malformed("the header does not end with '}'", where, "only blanks may follow; the file may be truncated")
    entries = parse_json(text, f"{where}, header", "E105", max_marks=MAX_MARKS)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed("__metadata__ is not a map from text to text", where, "the format allows nothing else there")
    if len(entries) > MAX_TENSORS:
        raise _malformed(f"the header has {len(entries):,} tensors", where, f"at most {MAX_TENSORS:,} are read")
    found = {name: _entry(name, entry, where) for name, entry in entries.items()}
    data_size = file_size - 8 - length
    end, last = 0, ""
    for name, (_, _, begin, stop) in sorted(found.items(), key=lambda item: item[1][2:]):
        if begin < end:
            why = f"one ends at byte {end}, the other begins at {begin}"
            raise _malformed(f"tensors {shown(last)!r} and {shown(name)!r} overlap", where, why)
        if begin > end:
            raise _malformed(f"there is a hole before tensor {shown(name)!r}", where, f"bytes {end} to {begin} belong to no tensor")
        end, last = stop, name
    if end > data_size:
        why = f"its header describes {end:,} bytes of data and {data_size:,} are there: the download stopped early"
        raise _malformed(f"the file is {end - data_size:,} bytes short; re-download it", where, why)
    if end < data_size:
        raise _malformed(f"the file has {data_size - end:,} bytes after the last tensor", where, "they belong to no tensor")
    return {name: (dtype, shape, 8 + length + begin, 8 + length + stop) for name, (dtype, shape, begin, stop) in found.items()}


def _entry(name: str, entry: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    if not TENSOR_NAME.fullmatch(name):
        raise _malformed(
            f"the tensor name {shown(name)!r} is refused", where, "1 to 512 printable ASCII characters, no blank, slash or '..'"
        )
    where = f"{where}, tensor {shown(name)!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        got = ", ".join(shown(k, 40) for k in list(entry)[:5]) if isinstance(entry, dict) else type(entry).__name__
        raise _malformed("a tensor entry is not exactly dtype, shape and data_offsets", where, f"found: {got}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype in UNREAD_DTYPES:
        what = f"tensors of type {dtype} are not supported"
        why = f"the type is valid, but only these are read: {', '.join(DTYPE_BYTES)}"
        raise ThoughtxError("E103", what, where=where, why=why, fix="use an unquantized checkpoint")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _malformed(f"unknown dtype {shown(dtype, 40)!r}", where, f"the format has {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _malformed(f"the shape {shown(shape, 80)} is not a list of sizes", where, "sizes are integers, 0 or more")
    if len(shape) > MAX_RANK:
        raise _malformed(f"the tensor has {len(shape)} dimensions", where, f"at most {MAX_RANK} are read")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise _malformed(f"data_offsets {shown(offsets, 80)} is not [begin, end]", where, "both are integers, 0 or more")
    num_bytes = DTYPE_BYTES[dtype]
    for size in shape:
        num_bytes *= size
        if num_bytes >= 1 << 60:
            raise _malformed(f"the shape {shown(shape, 80)} is too large", where, "its product overflows")
    begin, end = offsets
    if end - begin != num_bytes:
        raise _malformed(f"data_offsets span {end - begin:,} bytes", where, f"{dtype} of shape {shape} takes {num_bytes:,}")
    return dtype, tuple(shape), begin, end


def read_header(handle: BinaryIO, where: str) -> Header:
    """`parse_header` of an open file."""
    size = os.fstat(handle.fileno()).st_size
    head = handle.read(64)
    rest = 8 + header_length(head, size, where) - len(head)
    while rest > 0 and (block := handle.read(rest)):
        head += block
        rest -= len(block)
    return parse_header(head, size, where)


def _malformed(what: str, where: str, why: str) -> ThoughtxError:
    return ThoughtxError("E105", what, where=where, why=why, fix="download the file again; if that does not help, do not use it")


def unread(what: str, where: str, fix: str) -> ThoughtxError:
    """E109: weights in a format that is not read."""
    return ThoughtxError("E109", what, where=where, why="only safetensors files are read: plain numbers that cannot run code", fix=fix)
