"""Builds whose graphs must not move a byte, and their sha256. Rewrite the record of them, tests/graph/graphs.json, with

    python tests/helpers/graph_cases.py

A graph's bytes depend on the configuration and the options alone: weights and rotary tables lie beside it, and what runs on one CPU
and not on another has no part in them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from exit_models import checkpoint, some_exits
from places import TESTS
from quantized_models import four_bits, fp8
from tiny import tiny_values, write_tiny

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.build.options import resolve
from trtllm_thoughtx.checkpoint.quantized import import_quantized
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.graph import external
from trtllm_thoughtx.graph.decoder import decoder_graph, parts_of

RECORD = TESTS / "graph" / "graphs.json"
COMMAND = "python tests/helpers/graph_cases.py"
SIZES: dict[str, Any] = {"max_seq_len": 64, "max_input_len": 32}
CHUNKS: dict[str, Any] = {"use_chunked_attention": True, "chunk_size": 16, "max_chunk_size": 32}
SHARED: dict[str, Any] = {"sink_tokens": 4, "left_chunks": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "chunks": CHUNKS,
    "sinks": {**CHUNKS, **SHARED},
    "anchors": {**CHUNKS, **SHARED, "num_anchors": 2},
    "stages": {"early_exit_layers": (1, 2)},
    "staged chunks": {**CHUNKS, "early_exit_layers": (2,)},
    "plugin aot": {**CHUNKS, **SHARED, "backend": ("tensorrt",), "dtype": "float16", "plugin": "aot"},
    "plugin cpp": {**CHUNKS, **SHARED, "backend": ("tensorrt",), "dtype": "bfloat16", "plugin": "cpp"},
}
FAMILIES = ("qwen2", "qwen3", "llama", "qwen2_moe", "qwen3_moe")
IMPORTED = ("awq", "gptq", "fp8")
CALIBRATED = ("fp8", "int8_sq", "int8_wo", "int4_awq", "int4_wo", "int8_wo, int8 cache", "nvfp4", "nvfp4_wo")
CASES = (
    *(f"qwen3, {name}" for name in OPTIONS),
    *(f"{family}, {name}" for family in FAMILIES if family != "qwen3" for name in ("full", "chunks")),
    *("tied", "exits"),
    *(f"imported {name}" for name in IMPORTED),
    *(f"calibrated {name}" for name in CALIBRATED),
)


def mixture(path: Path, family: str) -> None:
    """A tiny mixture of experts, by NumPy alone."""
    hidden, inner, shared, experts = 64, 32, 48, 6
    shapes = {"gate": (experts, hidden)}
    shapes |= {f"experts.{e}.{name}_proj": (inner, hidden) for e in range(experts) for name in ("gate", "up")}
    shapes |= {f"experts.{e}.down_proj": (hidden, inner) for e in range(experts)}
    config = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": inner, "decoder_sparse_step": 1}
    config |= {"mlp_only_layers": [], "norm_topk_prob": family == "qwen3_moe", "model_type": family}
    if family == "qwen2_moe":
        shapes |= {f"shared_expert.{name}_proj": (shared, hidden) for name in ("gate", "up")}
        shapes |= {"shared_expert.down_proj": (hidden, shared), "shared_expert_gate": (1, hidden)}
        config |= {"shared_expert_intermediate_size": shared}
    names = {f"model.layers.{layer}.mlp.{name}.weight": shape for layer in range(3) for name, shape in shapes.items()}
    tensors: dict[str, np.ndarray | None] = {name: tiny_values(name, shape, "float32", 0) for name, shape in names.items()}
    dense = [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(3) for name in ("gate", "up", "down")]
    config["architectures"] = ["Qwen2MoeForCausalLM" if family == "qwen2_moe" else "Qwen3MoeForCausalLM"]
    write_tiny(path, family=family.removesuffix("_moe"), num_layers=3, config=config, tensors=tensors | dict.fromkeys(dense))


def source_of(case: str, root: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a case, written below `root`, and the build's options."""
    path, (kind, _, rest) = root / "model", case.partition(" ")
    if case == "exits":
        return checkpoint(root, some_exits(64, (1,)), num_layers=3), {"early_exit_layers": (1,)}
    if case == "tied":
        write_tiny(path, tied=True)
    elif kind == "imported":
        fp8(path) if rest == "fp8" else four_bits(path, rest, act_order=rest == "gptq")
        import_quantized(path, root / "imported")
        return root / "imported", {}
    elif kind == "calibrated":
        from trtllm_thoughtx.calibrate.quantize.job import calibrate

        write_tiny(path, intermediate_size=128)
        qformat, _, cache = rest.partition(", ")
        calibrate(path, root / "c", qformat=qformat, calib_size=4, calib_seq_len=16, **({"kv_cache_dtype": "int8"} if cache else {}))
        return root / "c", {}
    else:
        family, _, name = case.partition(", ")
        mixture(path, family) if family.endswith("_moe") else write_tiny(path, family=family, num_layers=3)
        return path, OPTIONS[name]
    return path, {}


def hashes_of(case: str, root: Path) -> dict[str, str]:
    """sha256 of the graph of each part."""
    path, options = source_of(case, root)
    given = {"backend": ("onnxruntime",), "dtype": "float32", **SIZES, **options}
    if "plugin" not in given:
        return {part["name"]: part["graph_sha256"] for part in build(path, root / "engine", given)["parts"]}
    with open_weights(path) as source:
        settings = resolve(source.config, given)
        graphs = [decoder_graph(source.config, settings, part, source.exits) for part in parts_of(source.config, settings.stages)]
    return {graph.part.name: external.bind(graph, settings.dtype, f"{graph.part.name}.data").sha256 for graph in graphs}


def record() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        graphs = {case: hashes_of(case, Path(name) / str(number)) for number, case in enumerate(CASES)}
    return {"onnx": onnx.__version__, "graphs": graphs}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
    print(f"{len(CASES)} builds in {RECORD}: say in the commit why their graphs moved")
