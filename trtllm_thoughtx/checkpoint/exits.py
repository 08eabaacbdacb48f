"""What a checkpoint carries for early exits: an exit head, and exit adapters, in `exits.safetensors` and `exits.json`.

    exit_head.weight [2, hidden], exit_head.bias [2]     ready to answer, end of a step: logits over the final norm's output
    exit_adapter.L.norm.weight [hidden]                  of the layers before L, a draft of the last layer's output:
    exit_adapter.L.down.weight [rank, hidden]                draft = x + up(down(norm(x)))
    exit_adapter.L.up.weight [hidden, rank]
    exit_adapter.L.confidence.weight [1, hidden], .bias [1]  logit that the draft's next token is the full model's, over norm(x)

All tensors are float32. Thresholds are probabilities in (0, 1]: what `thoughtx-calibrate` chose for a stated loss. Both files are read
strictly, since a checkpoint is hostile data: E102 for the JSON, E105 to E108 for the tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx.checkpoint import tensor_file
from trtllm_thoughtx.checkpoint.header import read_header
from trtllm_thoughtx.checkpoint.members import EXIT_JSON, EXIT_TENSORS, EXITS
from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.files import open_inside, read_json

SCHEMA = "thoughtx.exits/1"
READY, BOUNDARY = 0, 1  # the exit head's rows


@dataclass(frozen=True)
class ExitHead:
    """`weight` float32 [2, hidden], `bias` float32 [2]; `threshold`: from which `ready` on the thinking ends."""

    weight: np.ndarray
    bias: np.ndarray
    threshold: float


@dataclass(frozen=True)
class ExitAdapter:
    """The draft that the first `layer` layers give. `threshold`: from which confidence on it is worth verifying."""

    layer: int
    norm: np.ndarray
    down: np.ndarray
    up: np.ndarray
    confidence: np.ndarray
    bias: np.ndarray
    threshold: float


@dataclass(frozen=True)
class ExitWeights:
    """All of it; `report` is what was measured when it was fitted, kept as it is."""

    head: ExitHead | None = None
    adapters: tuple[ExitAdapter, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.head is not None or bool(self.adapters)

    def __str__(self) -> str:
        """What there is, in words."""
        layers = ", ".join(str(one.layer) for one in self.adapters)
        parts = ["an exit head"] * (self.head is not None) + [f"exit adapters before layers {layers}"] * bool(layers)
        return " and ".join(parts) or "no exits"

    def adapter(self, layer: int) -> ExitAdapter | None:
        return next((one for one in self.adapters if one.layer == layer), None)

    def tensors(self) -> dict[str, np.ndarray]:
        """By the names at the top of this file, in a fixed order."""
        found: dict[str, np.ndarray] = {}
        if self.head is not None:
            found |= {"exit_head.weight": self.head.weight, "exit_head.bias": self.head.bias}
        for one in self.adapters:
            name = f"exit_adapter.{one.layer}"
            found |= {f"{name}.norm.weight": one.norm, f"{name}.down.weight": one.down, f"{name}.up.weight": one.up}
            found |= {f"{name}.confidence.weight": one.confidence, f"{name}.confidence.bias": one.bias}
        return found


def write_exits(root: Path, exits: ExitWeights, config: ModelConfig) -> None:
    """Both files, into a directory that has neither."""
    body = {
        "schema": SCHEMA,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "head": None if exits.head is None else {"threshold": exits.head.threshold},
        "adapters": [{"layer": one.layer, "rank": int(one.down.shape[0]), "threshold": one.threshold} for one in exits.adapters],
        "report": exits.report,
    }
    tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in exits.tensors().items()}
    tensor_file.write_all(root / EXIT_TENSORS, tensors, metadata=None)
    with (root / EXIT_JSON).open("xb") as file:
        file.write((json.dumps(body, indent=2, sort_keys=True) + "\n").encode())


def read_exits(root: Path, config: ModelConfig) -> ExitWeights:
    """What the checkpoint in `root` carries; nothing (all None) where it has neither file."""
    found = [name for name in EXITS if os.path.lexists(Path(root) / name)]
    if not found:
        return ExitWeights()
    where = shown(str(Path(root) / EXIT_JSON), 400)
    if len(found) == 1:
        raise _refuse("E106", "one of the two files of its exits is missing", where, f"there is only {found[0]}")
    body = read_json(root, EXIT_JSON)
    problems = _json_problems(body, config)
    if problems:
        raise _refuse("E102", "the description of its exits cannot be used", where, listed(problems))
    wanted = _shapes(body, config)
    place = shown(str(Path(root) / EXIT_TENSORS), 400)
    with open_inside(root, EXIT_TENSORS) as handle:
        header = read_header(handle, place)
        wrong = [f"{shown(name)}: not a tensor of these exits" for name in header if name not in wanted]
        wrong += [f"{name}: missing" for name in wanted if name not in header]
        wrong += [
            f"{name}: {dtype} {list(shape)}, wanted F32 {list(wanted[name])}"
            for name, (dtype, shape, _, _) in header.items()
            if name in wanted and (dtype, shape) != ("F32", wanted[name])
        ]
        if wrong:
            raise _refuse("E107", "the tensors of its exits do not fit", place, listed(wrong))
        arrays = {}
        for name, (_, shape, begin, end) in header.items():
            handle.seek(begin)
            arrays[name] = np.frombuffer(tensor_file.exactly(handle, end - begin), np.float32).reshape(shape)
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if bad:
        raise _refuse("E108", "values of its exits are not finite numbers", place, listed(bad))
    head = None
    if body["head"] is not None:
        head = ExitHead(arrays["exit_head.weight"], arrays["exit_head.bias"], float(body["head"]["threshold"]))
    adapters = tuple(_adapter(row, arrays) for row in body["adapters"])
    return ExitWeights(head, adapters, body["report"])


def is_threshold(value: object) -> bool:
    """A probability above 0; NaN is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 < value <= 1


def _adapter(row: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> ExitAdapter:
    name = f"exit_adapter.{row['layer']}"
    return ExitAdapter(
        layer=row["layer"],
        norm=arrays[f"{name}.norm.weight"],
        down=arrays[f"{name}.down.weight"],
        up=arrays[f"{name}.up.weight"],
        confidence=arrays[f"{name}.confidence.weight"],
        bias=arrays[f"{name}.confidence.bias"],
        threshold=float(row["threshold"]),
    )


def _json_problems(body: Any, config: ModelConfig) -> list[str]:
    if not isinstance(body, dict) or set(body) != {"schema", "hidden_size", "num_layers", "head", "adapters", "report"}:
        return ["it must be an object with schema, hidden_size, num_layers, head, adapters and report"]
    problems = []
    if body["schema"] != SCHEMA:
        problems.append(f"schema must be {SCHEMA}, not {shown(body['schema'], 40)}")
    for name in ("hidden_size", "num_layers"):
        if body[name] != getattr(config, name):
            problems.append(f"{name} is {shown(body[name], 40)}, that of the model is {getattr(config, name)}")
    head, rows = body["head"], body["adapters"]
    if head is not None and not (isinstance(head, dict) and set(head) == {"threshold"} and is_threshold(head["threshold"])):
        problems.append("head must be null or an object with a threshold above 0 and at most 1")
    if not isinstance(rows, list) or not all(_is_adapter(row, config) for row in rows):
        problems.append(f"adapters must be a list of objects with layer (1 to {config.num_layers - 1}), rank and threshold")
    elif [row["layer"] for row in rows] != sorted({row["layer"] for row in rows}):
        problems.append("the layers of the adapters must rise")
    if not isinstance(body["report"], dict):
        problems.append("report must be an object")
    return problems


def _is_adapter(row: Any, config: ModelConfig) -> bool:
    return (
        isinstance(row, dict)
        and set(row) == {"layer", "rank", "threshold"}
        and type(row["layer"]) is int
        and type(row["rank"]) is int
        and 0 < row["layer"] < config.num_layers
        and 0 < row["rank"] <= config.hidden_size
        and is_threshold(row["threshold"])
    )


def _shapes(body: Mapping[str, Any], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if body["head"] is not None:
        shapes |= {"exit_head.weight": (2, hidden), "exit_head.bias": (2,)}
    for row in body["adapters"]:
        name = f"exit_adapter.{row['layer']}"
        shapes |= {f"{name}.norm.weight": (hidden,), f"{name}.down.weight": (row["rank"], hidden)}
        shapes |= {f"{name}.up.weight": (hidden, row["rank"]), f"{name}.confidence.weight": (1, hidden)}
        shapes[f"{name}.confidence.bias"] = (1,)
    return shapes


def _refuse(code: str, what: str, where: str, why: str) -> ThoughtxError:
    return ThoughtxError(
        code,
        what,
        where=where,
        why=why,
        fix="fit them again (thoughtx-calibrate --fit_exit_head, --exit_layers), or remove exits.json and exits.safetensors",
    )
