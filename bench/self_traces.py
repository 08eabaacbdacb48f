"""What calibrating on the model's own thoughts is worth, beside the same prompts with their answers alone.

    python bench/self_traces.py [MODEL_DIR] [--formats fp8,int8_sq,int4_awq] [--seeds 0,1,2] [--num_items 32] [--json]

MODEL_DIR is a Hugging Face directory (default: the sample thoughtx-tiny). Data that have no thoughts, {"prompt", "answer"}, are what most
users have at hand; `--self_traces` lets the model think first. Both calibrations take the same questions. They are judged on other
questions, at every token that the unquantized model writes itself: the mean KL of the quantized graph there, in nats.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from convert import ROOT

BUILD: dict[str, Any] = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 512, "max_batch_size": 16}
LENGTHS = (0, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model_dir", type=Path, nargs="?", default=ROOT / "trtllm_thoughtx" / "samples" / "thoughtx-tiny")
    parser.add_argument("--formats", default="fp8,int8_sq,int4_awq")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--num_items", type=int, default=32, help="questions of each task")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from trtllm_thoughtx import Engine
    from trtllm_thoughtx.build.build import build
    from trtllm_thoughtx.calibrate.quantize.job import calibrate
    from trtllm_thoughtx.evaluate.questions import SIZES, generated
    from trtllm_thoughtx.text.params import GenerationParams
    from trtllm_thoughtx.validate.divergence import Divergence

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build(args.model_dir, work / "original", BUILD)
        original = Engine.load(work / "original")
        assert original.text is not None, "the model has no tokenizer"
        asked = generated(sorted(SIZES), "test", num_items=args.num_items // 2, seed=0, lengths=LENGTHS)
        prompts = [original.text.chat(one.prompt) for one in asked]
        written = original.generate(prompts, GenerationParams(max_new_tokens=300))
        rows = [[*prompt, *one.output_ids] for prompt, one in zip(prompts, written, strict=True)]
        wanted = [original.forward([row])[0] for row in rows]
        for seed in map(int, args.seeds.split(",")):
            drawn = generated(sorted(SIZES), "validation", num_items=args.num_items, seed=seed, lengths=LENGTHS)
            lines = [json.dumps({"prompt": one.prompt, "answer": one.expected}) + "\n" for one in drawn]
            (work / "data.jsonl").write_text("".join(lines))
            for name in args.formats.split(","):
                row: dict[str, Any] = {"seed": seed, "qformat": name}
                for key, own in (("answers_alone", False), ("self_traces", True)):
                    calibrate(args.model_dir, work / "c", qformat=name, calib_data=work / "data.jsonl", self_traces=own, force=True)
                    build(work / "c", work / "e", BUILD, force=True)
                    engine, seen = Engine.load(work / "e", exact=True), Divergence()
                    for ids, prompt, logits in zip(rows, prompts, wanted, strict=True):
                        at = len(prompt) - 1
                        seen.add(logits[at:], engine.forward([ids])[0][at:])
                    engine.close()
                    row[key] = round(seen.summary().kl, 6)
                print(json.dumps(row) if args.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
