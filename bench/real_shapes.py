"""The whole way at real shapes: a directory that transformers saved (random weights, sharded, bfloat16) -> convert -> build -> validate.

    python bench/real_shapes.py [--shapes qwen2.5-0.5b,qwen3-0.6b,llama-3.2-1b,...] [--work DIR] [--json]

Each step is the installed command in a process of its own; the table gives seconds, peak memory of its largest process, and what
`thoughtx-validate` found against PyTorch. Random weights show that shapes, names and numerics are right; they show nothing about answers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from build import measured
from convert import ROOT

COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "dtype": "bfloat16"}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": (
        "Qwen2",
        {
            **{"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
            **{"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen3-0.6b": (
        "Qwen3",
        {
            **{"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 40960},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "llama-3.2-1b": (
        "Llama",
        {
            **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072},
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            },
        },
    ),
    "qwen3-30b-a3b-2-layers": (
        "Qwen3Moe",
        {
            **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 2, "head_dim": 128},
            **{"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 40960},
            **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": False,
        },
    ),
}
MAKE = """
import json, sys, torch, transformers
family, sizes, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
model = getattr(transformers, family + "ForCausalLM")(getattr(transformers, family + "Config")(**sizes))
for name, weight in model.named_parameters():
    if name.endswith("bias") or "norm" in name:
        weight.data.add_(0.1 * torch.randn_like(weight))
model.save_pretrained(out, max_shard_size="400MB")
"""
COMMAND = "import sys; from trtllm_thoughtx.cli.commands import main; main(sys.argv.pop(1))"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--work", type=Path, help="an existing directory on the disk to use (default: the system's temporary one)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    for shape in args.shapes.split(","):
        family, sizes = SHAPES[shape]
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            model, checkpoint, engine, xml = (Path(work, name) for name in ("model", "checkpoint", "engine", "report.xml"))
            subprocess.run(
                [sys.executable, "-c", MAKE, family, json.dumps({**COMMON, **sizes}), str(model)], check=True, capture_output=True
            )
            steps = {
                "convert": ["--model_dir", model, "--output_dir", checkpoint],
                "build": ["--checkpoint_dir", checkpoint, "--output_dir", engine, "--use_chunked_attention"],
                "validate": ["--engine_dir", engine, "--reference", model, "--junit", xml],
            }
            row: dict[str, Any] = {"shape": shape, "bytes": sum(path.stat().st_size for path in model.glob("*.safetensors"))}
            for step, options in steps.items():
                words = [sys.executable, "-c", COMMAND, step, *map(str, options), "-q"]
                seconds, peak = measured(words)
                row |= {f"{step}_s": round(seconds, 1), f"{step}_peak_mib": round(peak)}
            text = xml.read_text()
            row |= {"checks": text.count("<testcase"), "failed": text.count("<failure"), "skipped": text.count("<skipped")}
            row["plan_bytes"] = sum(path.stat().st_size for path in engine.glob("*.engine"))
            results.append(row)
            shutil.rmtree(engine)
            print(json.dumps(row) if args.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
