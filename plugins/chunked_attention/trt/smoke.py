"""All forms of the operator inside TensorRT on this host's GPU: `python -m trtllm_thoughtx.plugins.chunked_attention.trt.smoke WORK`.

    --library FILE   the shared library that `make plugin` wrote; without it the form cpp is reported as skipped
    --shapes N       how many times the shapes change afterwards, while free memory is watched (TensorRT issue 4849)

A small random model is made in WORK, an engine of each form is built with thoughtx-build, and the logits of all are compared with those
of onnxruntime. Every line says ran, WRONG or skipped with the reason; status 0 only when something ran and nothing was wrong, 1 when
something was wrong, 4 where TensorRT or a GPU is missing. NOT RUN by the authors so far: they had no host with TensorRT and a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_thoughtx.backends.trt_module import load_module
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime.engine import Engine

FORMS = ("function", "aot", "cpp")
LIMIT = 0.02  # of float16 logits whose size is about one
OPTIONS: dict[str, Any] = {
    **{"dtype": "float16", "max_seq_len": 512, "max_input_len": 128, "max_batch_size": 2, "use_chunked_attention": True},
    **{"chunk_size": 48, "max_chunk_size": 64, "sink_tokens": 4, "left_chunks": 1, "num_anchors": 1},
}


def make_model(path: Path) -> None:
    """A random Qwen2 of two layers with heads of 64."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(path)


def rows_of(rng: np.random.Generator) -> list[list[int]]:
    return [rng.integers(0, 512, int(rng.integers(2, 400))).tolist() for _ in range(2)]


def free_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


def smoke(work: Path, library: Path | None, num_shapes: int) -> list[dict[str, Any]]:
    model, rng = work / "model", np.random.default_rng(0)
    if not model.exists():
        make_model(model)
    build(model, work / "reference", {**OPTIONS, "backend": ("onnxruntime",)}, force=True)
    rows = rows_of(rng)
    reference = Engine.load(work / "reference")
    wanted = reference.forward(rows)
    reference.close()
    found: list[dict[str, Any]] = []
    for form in FORMS:
        if form == "cpp" and library is None:
            found.append({"form": form, "status": "skipped", "reason": "no --library was given"})
            continue
        more = {"plugin_library": library} if form == "cpp" else {}
        made = build(model, work / form, {**OPTIONS, "backend": ("tensorrt",), "plugin": form, **more}, force=True)
        engine = Engine.load(work / form, "tensorrt")
        error = max(float(np.abs(a - b).max()) for a, b in zip(engine.forward(rows), wanted, strict=True))
        before = free_bytes()
        for _ in range(num_shapes):
            engine.forward(rows_of(rng))
        lost = before - free_bytes()
        engine.close()
        status = "ran" if error <= LIMIT else "WRONG"
        found.append({"form": form, "status": status, "error": error, "bytes_lost": lost, "checks": made["checks"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("work", type=Path, help="an empty folder")
    parser.add_argument("--library", type=Path)
    parser.add_argument("--shapes", type=int, default=1000)
    args = parser.parse_args()
    try:
        load_module("tensorrt")
        found = smoke(args.work, args.library, args.shapes)
    except ThoughtxError as error:
        print(error.render(), file=sys.stderr)
        sys.exit(int(error.exit))
    print(json.dumps(found, indent=1))
    sys.exit(1 if any(row["status"] == "WRONG" for row in found) else 0)


if __name__ == "__main__":
    main()
