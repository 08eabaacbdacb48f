"""Chunked attention beside full attention on a CPU, in the same backend: seconds of a long prefill, decoding, memory.

    python bench/chunked.py [--shape qwen2.5-0.5b] [--length 8192] [--chunk_size 1024] [--left_chunks 0] [--rounds 2] [--json]
    python bench/chunked.py --long 131072          a small model reads a prompt of that many tokens within its window

Random weights, float32, onnxruntime. Every measurement is a process of its own and the rounds interleave the two engines. Memory is
what the kernel says of that process: the most it held, less what it held when the engine was loaded. KV bytes are those of the cache's
shape. `--shape qwen2.5-7b` only computes memory, in bfloat16; nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from convert import ROOT
from real_shapes import COMMON, SHAPES

MAKE = """
import json, sys, torch, transformers
family, sizes, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
model = getattr(transformers, family + "ForCausalLM")(getattr(transformers, family + "Config")(**sizes))
model.to(torch.bfloat16).save_pretrained(out)
"""
RUN = """
import json, sys, numpy as np
from trtllm_thoughtx import Engine
from trtllm_thoughtx.evaluate.memory import resident
from trtllm_thoughtx.text.params import GenerationParams
path, length, batch, new = sys.argv[1], *map(int, sys.argv[2:5])
engine = Engine.load(path, "onnxruntime")
engine.generate([[1, 2, 3]], GenerationParams(max_new_tokens=2, ignore_eos=True))
loaded = resident()
prompts = np.random.default_rng(0).integers(0, engine.config.vocab_size, (batch, length - new)).tolist()
engine.generate(prompts, GenerationParams(max_new_tokens=new, ignore_eos=True))
s = engine.stats
print(json.dumps({"prefill_s": s.prefill_seconds, "decode_tok_s": s.num_decoded / s.decode_seconds if new > 1 else None,
                  "more_bytes": resident("VmHWM") - loaded, "loaded_bytes": loaded}))
"""
SMALL = {
    **{"vocab_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 1 << 18, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
SEVEN = {
    **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
    **{"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}

SEVEN_BYTES = 2 * 7_615_616_512  # its weights, embedding and head of their own


def measured(engine: Path, length: int, batch: int, new: int) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, str(engine), str(length), str(batch), str(new)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def kv_bytes(sizes: dict[str, Any], options: dict[str, Any], item: int) -> int:
    """Of one sequence, from the cache's shape."""
    from trtllm_thoughtx.config import BuildConfig

    head_dim = sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    per_token = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * head_dim * item
    return per_token * BuildConfig(**{key: value for key, value in options.items() if key != "backend"}).kv_capacity


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=[*SHAPES, "small", "qwen2.5-7b"], default="qwen2.5-0.5b")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--chunk_size", type=int, default=1024)
    parser.add_argument("--left_chunks", type=int, default=0)
    parser.add_argument("--batches", default="1", help="batch sizes whose memory is measured, comma-separated")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--long", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from trtllm_thoughtx.build.build import build

    batches = [int(batch) for batch in args.batches.split(",")]
    length = args.long or args.length
    common = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": length, "max_batch_size": max(batches)}
    window = {"use_chunked_attention": True, "chunk_size": args.chunk_size, "sink_tokens": 4, "left_chunks": args.left_chunks}
    kinds = {"chunked": {**common, **window}} | ({} if args.long else {"full": common})
    shapes = {**SHAPES, "small": ("Qwen2", SMALL), "qwen2.5-7b": ("Qwen2", SEVEN)}
    family, sizes = shapes["small" if args.long else args.shape]
    result: dict[str, Any] = {
        "shape": "small" if args.long else args.shape,
        "length": length,
        "chunk_size": args.chunk_size,
        "left_chunks": args.left_chunks,
        "engines": {},
    }
    if args.shape == "qwen2.5-7b":
        for name, options in kinds.items():
            kv = kv_bytes(sizes, options, item=2)
            result["engines"][name] = {
                f"batch_{batch}": {
                    "kv_mib": round(batch * kv / (1 << 20), 1),
                    "total_gib": round((SEVEN_BYTES + batch * kv) / (1 << 30), 2),
                }
                for batch in (1, 8, 32)
            }
        print(
            json.dumps({**result, "computed": "bfloat16 KV bytes from the cache's shape; nothing was run"}, indent=None if args.json else 2)
        )
        return
    with tempfile.TemporaryDirectory() as work:
        model = Path(work, "model")
        subprocess.run([sys.executable, "-c", MAKE, family, json.dumps({**COMMON, **sizes}), str(model)], check=True, capture_output=True)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        for name, options in kinds.items():
            build(model, Path(work, name), options)
        for _ in range(args.rounds):
            for name in kinds:
                row = measured(Path(work, name), length, 1, 1)
                row |= {f"decode_tok_s_at_{n}": measured(Path(work, name), n, 1, 33)["decode_tok_s"] for n in {length, min(length, 1024)}}
                rows[name].append(row)
        for name, options in kinds.items():
            found = {key: round(statistics.median(row[key] for row in rows[name]), 2) for key in rows[name][0] if rows[name][0][key]}
            found["kv_mib"] = round(kv_bytes(sizes, options, item=4) / (1 << 20), 1)
            for batch in batches:
                held = measured(Path(work, name), length, batch, 2) if batch > 1 else rows[name][0]
                found[f"more_mib_batch_{batch}"] = round(held["more_bytes"] / (1 << 20), 1)
            result["engines"][name] = found
    if "full" in kinds:
        pairs = zip(rows["full"], rows["chunked"], strict=True)
        result["prefill_full_over_chunked"] = [round(a["prefill_s"] / b["prefill_s"], 2) for a, b in pairs]
        result["decode_at_length_over_at_1024"] = {
            name: [round(row[f"decode_tok_s_at_{length}"] / row["decode_tok_s_at_1024"], 2) for row in rows[name]] for name in kinds
        }
    print(json.dumps(result, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
