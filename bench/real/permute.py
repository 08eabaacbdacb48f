"""The same model with its channels in another order, so that no 4-bit grid which its weights once had lines up with the one under test.

    python bench/real/permute.py --model_dir DIR --output_dir DIR [--seed 0]

Channels of the residual stream and of the MLP, and those of each head's values, change places: exactly the same function, up to the
order of sums. Weights that were widened from blocks of 32 keep their numbers and lose their blocks, so formats are compared fairly. Takes
Qwen2 and Llama directories; files without weights are copied.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

COLUMNS = re.compile(r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight|model\.embed_tokens\.weight|lm_head\.weight")  # read the stream
ROWS = re.compile(r".*\.(o_proj|down_proj)\.(weight|bias)|.*layernorm\.weight|model\.norm\.weight")  # write it, or scale it


def permuted(tensors: dict[str, torch.Tensor], config: dict, seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face model in the new order."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    stream = torch.randperm(config["hidden_size"], generator=generator)
    values, reads, inner = {}, {}, {}
    for layer in range(config["num_hidden_layers"]):
        order = [torch.randperm(size, generator=generator) for _ in range(kv_heads)]
        values[layer] = torch.cat([kv * size + order[kv] for kv in range(kv_heads)])
        reads[layer] = torch.cat([head * size + order[head * kv_heads // heads] for head in range(heads)])
        inner[layer] = torch.randperm(config["intermediate_size"], generator=generator)
    found = {}
    for name, value in tensors.items():
        if COLUMNS.fullmatch(name):
            value = value[:, stream]
        elif ROWS.fullmatch(name):
            value = value[stream]
        if (place := re.match(r"model\.layers\.(\d+)\.", name)) is not None:
            layer = int(place[1])
            if ".v_proj." in name:
                value = value[values[layer]]
            elif name.endswith("o_proj.weight"):
                value = value[:, reads[layer]]
            elif ".gate_proj." in name or ".up_proj." in name:
                value = value[inner[layer]]
            elif name.endswith("down_proj.weight"):
                value = value[:, inner[layer]]
        found[name] = value.contiguous()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = json.loads((args.model_dir / "config.json").read_text())
    if config.get("model_type") not in ("qwen2", "llama"):
        parser.error(f"{args.model_dir} is no Qwen2 or Llama model")
    args.output_dir.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(args.model_dir.iterdir()):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.is_file() and not file.name.endswith(".index.json"):
            shutil.copy(file, args.output_dir)
    save_file(permuted(tensors, config, args.seed), args.output_dir / "model.safetensors", {"format": "pt"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
