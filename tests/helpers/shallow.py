"""A sample with its first layers only: the kernels, sizes, tokenizer and template of the whole one at a fraction of the work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from places import LONGCOT
from safetensors.numpy import load_file, save_file


def shallow(directory: Path, num_layers: int, sample: Path = LONGCOT) -> Path:
    """Its answers are noise; what is compared is the engine with itself."""
    shutil.copytree(sample, directory, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = load_file(sample / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if int((re.search(r"\.layers\.(\d+)\.", name) or [0, -1])[1]) < num_layers}
    assert len(kept) < len(tensors)
    save_file(kept, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": num_layers, "layer_types": config["layer_types"][:num_layers]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
