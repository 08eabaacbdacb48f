"""Inputs of a part of an engine for `polygraphy run --data-loader-script`: those of a JSON file beside this script, with the whole
KV cache. `thoughtx-validate --export_check` writes this file, which needs the standard library and NumPy.
"""

from __future__ import annotations

import base64
import io
import json
import pathlib
from collections.abc import Iterator

import numpy as np


def load(name: str, capacity: int) -> Iterator[dict[str, np.ndarray]]:
    """The one call that `name`.inputs.json has. A KV tensor there has the slots that were written; the rest, up to `capacity`, is zero."""
    text = (pathlib.Path(__file__).parent / f"{name}.inputs.json").read_text(encoding="ascii")
    for call in json.loads(text):
        feeds = {}
        for key, stored in call.items():
            value = np.load(io.BytesIO(base64.b64decode(stored["array"])), allow_pickle=False)
            if key.startswith("past_"):
                full = np.zeros((*value.shape[:2], capacity, value.shape[3]), value.dtype)
                full[:, :, : value.shape[2]] = value
                value = full
            feeds[key] = value
        yield feeds
