"""Decode speed on a CPU: this package, transformers eager and, where installed, onnxruntime-genai, in turn in the same run.

    python bench/decode.py MODEL_DIR [--rounds 3] [--prompt_len 128] [--new_tokens 48] [--max_seq_len 256,4096] [--json]

MODEL_DIR is a Hugging Face directory, float32 is computed throughout, greedy, batch 1, no stop token. Each measurement is a process of its
own, so that one runtime's threads do not spin beside another's; the rounds interleave the systems. The reported ratio is ours over
theirs, round by round. With several values of --max_seq_len the same question is put to engines of different capacity: what a token
costs should follow the live cache and not the capacity.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

OURS = """
import sys, json, numpy as np
from trtllm_thoughtx import Engine
from trtllm_thoughtx.text.params import GenerationParams
engine = Engine.load(sys.argv[1], "onnxruntime", int(sys.argv[4]))
prompt = np.random.default_rng(0).integers(0, engine.config.vocab_size, int(sys.argv[2])).tolist()
params = GenerationParams(max_new_tokens=int(sys.argv[3]), ignore_eos=True)
engine.generate([prompt], GenerationParams(max_new_tokens=4, ignore_eos=True))
engine.generate([prompt], params)
stats = engine.stats
print(json.dumps({"prefill": stats.num_prefilled / stats.prefill_seconds, "decode": stats.num_decoded / stats.decode_seconds}))
"""
TRANSFORMERS = """
import sys, json
from pathlib import Path
from trtllm_thoughtx.validate.reference import time_decode
n, new = int(sys.argv[2]), int(sys.argv[3])
seen = time_decode(Path(sys.argv[1]), prompt_len=n, new_tokens=new, batch=1, dtype="float32", num_threads=int(sys.argv[4]))
print(json.dumps({"prefill": n / seen.prefill_seconds, "decode": seen.decode_tokens_per_second}))
"""
GENAI = """
import sys, json, time, numpy as np
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
vocab = json.load(open(sys.argv[1] + "/genai_config.json"))["model"]["vocab_size"]
n, new = int(sys.argv[2]), int(sys.argv[3])
prompt = np.random.default_rng(0).integers(0, vocab, n).astype(np.int32)
for count in (4, new):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=n + count, min_length=n + count, do_sample=False)
    generator = og.Generator(model, params)
    began = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(count - 1):
        generator.generate_next_token()
    end = time.perf_counter()
print(json.dumps({"prefill": n / (first - began), "decode": (count - 1) / (end - first)}))
"""


def measured(script: str, path: Path, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-c", script, str(path), str(args.prompt_len), str(args.new_tokens), str(args.num_threads)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.num_threads)}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt_len", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--max_seq_len", default="256", help="capacities to build engines for, comma-separated")
    parser.add_argument("--num_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from trtllm_thoughtx.build.build import build

    with tempfile.TemporaryDirectory() as work:
        systems: dict[str, tuple[str, Path]] = {}
        for capacity in map(int, args.max_seq_len.split(",")):
            engine = Path(work, f"engine-{capacity}")
            build(args.model_dir, engine, {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": capacity})
            systems[f"thoughtx, max_seq_len {capacity}"] = (OURS, engine)
        systems["transformers eager"] = (TRANSFORMERS, args.model_dir)
        if importlib.util.find_spec("onnxruntime_genai"):
            out = Path(work, "genai")
            builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(args.model_dir), "-o", str(out)]
            subprocess.run([*builder, "-p", "fp32", "-e", "cpu", "-c", str(Path(work, "cache"))], check=True, capture_output=True)
            settings = json.loads((out / "genai_config.json").read_text())
            settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = args.num_threads  # its own default is fewer
            (out / "genai_config.json").write_text(json.dumps(settings))
            systems["onnxruntime-genai"] = (GENAI, out)
        rates: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
        for _ in range(args.rounds):
            for name, (script, path) in systems.items():
                rates[name].append(measured(script, path, args))
    ours = next(iter(systems))
    result = {}
    for name, rows in rates.items():
        ratios = [a["decode"] / b["decode"] for a, b in zip(rates[ours], rows, strict=True)]
        result[name] = {
            "decode": round(statistics.median(r["decode"] for r in rows), 2),
            "decode_min": round(min(r["decode"] for r in rows), 2),
            "decode_max": round(max(r["decode"] for r in rows), 2),
            "prefill": round(statistics.median(r["prefill"] for r in rows), 1),
            "ours_over_it": round(statistics.median(ratios), 2),
        }
    if args.json:
        print(json.dumps({"rounds": args.rounds, "prompt_len": args.prompt_len, "threads": args.num_threads, "systems": result}))
        return
    print(f"{'system':<32}{'decode tok/s':>14}{'min':>8}{'max':>8}{'prefill tok/s':>15}{'ours / it':>11}")
    for name, row in result.items():
        cells = f"{row['decode']:>14}{row['decode_min']:>8}{row['decode_max']:>8}{row['prefill']:>15}{row['ours_over_it']:>11}"
        print(f"{name:<32}{cells}")


if __name__ == "__main__":
    main()
