"""Strict JSON: what two parsers could read in two ways is refused.

Python's reader lets the last of two equal keys win, reads `1e999` as infinity and NaN as a number, follows nesting until its
stack ends, and turns a few megabytes of brackets into gigabytes of objects. A checkpoint is untrusted, so none of that is
let in. Pure functions on bytes; nothing but `ThoughtxError` escapes.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from trtllm_thoughtx.errors import ThoughtxError, shown

JSON_DEPTH = 64
JSON_MARKS = 4_000_000  # commas and brackets: bounds the objects, hence the memory, that a small file may turn into


def parse_json(data: bytes, where: str, code: str = "E102", *, max_marks: int = JSON_MARKS) -> Any:
    """Strict JSON: UTF-8 without BOM, unique keys, finite numbers, integers below 2**63, at most 64 levels. Raises only `code`."""

    def refuse(what: str, why: str) -> ThoughtxError:
        return ThoughtxError(code, what, where=where, why=why, fix="correct the file, or download it again")

    if data.startswith(b"\xef\xbb\xbf"):
        raise refuse("the JSON starts with a byte order mark", "JSON is UTF-8 without one; readers differ on what to do")
    if sum(map(data.count, (b",", b"[", b"{"))) > max_marks:
        raise refuse("the JSON has too many values", f"more than {max_marks:,} commas and brackets")
    try:
        value = _DECODER.decode(data.decode("utf-8"))
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise refuse("a JSON string holds half of a surrogate pair", "it is no Unicode text") from None
    except UnicodeDecodeError as error:
        raise refuse(f"the JSON is not UTF-8 at byte {error.start}", "JSON files must be UTF-8") from None
    except json.JSONDecodeError as error:
        why = "the file may be truncated, or is something else"
        raise refuse(f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}", why) from None
    except RecursionError:
        value = None
        depth = JSON_DEPTH + 1
    except _Strict as error:
        raise refuse(str(error), "readers differ on what it means") from None
    else:
        depth = _depth(value)
    if depth > JSON_DEPTH:
        raise refuse("the JSON is nested too deeply", f"more than {JSON_DEPTH} levels")
    return value


class _Strict(ValueError):
    """JSON that Python reads and we do not."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Strict(f"the key {shown(key)!r} appears twice in one JSON object")
            seen.add(key)
    return found


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Strict(f"the number {shown(text, 40)} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) >= 1 << 63:
        raise _Strict(f"the integer {shown(text, 40)} is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise _Strict(f"{text} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_float, parse_int=_int, parse_constant=_constant)


def _depth(value: Any) -> int:
    """Levels of nesting, counted to one past `JSON_DEPTH` and no further."""
    level, depth = [value], 0
    while depth <= JSON_DEPTH:
        level = [v for v in level if isinstance(v, (dict, list))]
        if not level:
            break
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
        depth += 1
    return depth
