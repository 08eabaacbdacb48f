"""An engine directory that holds plans, without a builder: a CPU engine to which files are added as plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tiny import write_tiny

from trtllm_thoughtx import report
from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.build.build import build


def cpu_engine(work: Path) -> Path:
    """`work`/e, of `work`/m, for onnxruntime."""
    write_tiny(work / "m", num_layers=1, max_position=256, tokenizer=True)
    build(work / "m", work / "e", {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 64})
    return work / "e"


def add_plans(
    root: Path,
    plans: Mapping[str, bytes],
    versions: Mapping[str, str],
    *,
    compute_capabilities: tuple[str, ...] = ("8.6", "8.9"),
    library: bytes | None = None,
) -> None:
    """Plans by backend; `versions` by module go into the manifest, which is made again."""
    raw = json.loads((root / "config.json").read_text())
    mine = raw["thoughtx"]
    for backend, plan in plans.items():
        mine["build"]["backends"].append(backend)
        for part in mine["parts"]:
            file = f"{part['name']}{BACKENDS[backend].plan_suffix}"
            (root / file).write_bytes(plan)
            part["plans"][backend] = {
                "file": file,
                "sha256": None,
                "graph_sha256": None,
                "weights_sha256": None,
                "compute_capabilities": list(compute_capabilities),
            }
    if library is not None:
        mine["build"]["plugin"] = "cpp"
        (root / "libthoughtx_chunked_attention.so").write_bytes(library)
    (root / "config.json").write_text(json.dumps(raw))
    again(root, versions)


def again(root: Path, versions: Mapping[str, str] | None = None) -> None:
    """Make the manifest again, over what the directory now holds."""
    old = report.read_manifest(root)
    environment = {**old["environment"], **(versions or {})}
    report.write_manifest(root, command="x", inputs=old["inputs"], config=old["config"], checks=[], environment=environment)
