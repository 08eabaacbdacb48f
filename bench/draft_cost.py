"""What drafts cost on a real shape, whatever they are worth: time of a cycle by its number of drafts, and the runtime's own overhead.

    python bench/draft_cost.py [--shape 0.5b] [--drafts 1,3,6] [--rounds 3] [--new_tokens 24]

Weights are random, so no draft would be right; `trust` accepts all of them, which times a cycle of exactly so many drafts. From it and from
a plain step comes the break-even: how many drafts of a cycle must hold on average for drafting to be faster. The overhead of the runtime is
the share of decoding that is not spent inside the parts (float32, onnxruntime, a prompt of 64 tokens, one round in turn with the other).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from convert import make_checkpoint
from exit_cost import break_even
from inside import Inside

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.checkpoint.convert import convert
from trtllm_thoughtx.checkpoint.exits import ExitAdapter, ExitHead, ExitWeights, write_exits
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.runtime import generation
from trtllm_thoughtx.text.params import GenerationParams

RANK = 64


def prepare(folder: Path, shape: str) -> Path:
    """An engine in two stages whose adapter is sure of everything."""
    make_checkpoint(folder / "hf", shape)
    convert(folder / "hf", folder / "ckpt")
    with open_weights(folder / "ckpt") as source:
        config = source.config
    layer, hidden = max(1, config.num_layers // 3), config.hidden_size
    maps = np.zeros((RANK, hidden), np.float32), np.zeros((hidden, RANK), np.float32)
    sure = np.zeros((1, hidden), np.float32), np.full(1, 20.0, np.float32)
    adapter = ExitAdapter(layer, np.ones(hidden, np.float32), *maps, *sure, threshold=0.5)
    head = ExitHead(np.zeros((2, hidden), np.float32), np.zeros(2, np.float32), 0.9)
    write_exits(folder / "ckpt", ExitWeights(head, (adapter,)), config)
    options = {"backend": ("onnxruntime",), "dtype": "float32", "max_seq_len": 256, "max_input_len": 64, "max_batch_size": 1}
    build(folder / "ckpt", folder / "engine", {**options, "early_exit_layers": (layer,)})
    return folder / "engine"


def timed(engine: Engine, inside: Inside, new_tokens: int, num_drafts: int) -> tuple[float, float]:
    """Seconds of a cycle, and the share of the decoding that is the runtime's own."""
    generation.MAX_DRAFTS = num_drafts
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, engine.config.vocab_size, (1, 64)).tolist()
    settings: dict[str, Any] = {"exit_policy": "trust", "draft_threshold": 0.0} if num_drafts else {"exit_policy": "off"}
    params = GenerationParams(max_new_tokens=new_tokens, ignore_eos=True, **settings)
    engine.generate(prompts, GenerationParams(max_new_tokens=2, ignore_eos=True, **settings))
    before = inside.seconds
    engine.generate(prompts, params)
    stats = engine.stats
    num_cycles = stats.num_cycles or new_tokens - 1
    own = stats.prefill_seconds + stats.decode_seconds - (inside.seconds - before)  # of the prefill too: it has no decoding to hide in
    return stats.decode_seconds / num_cycles, own / stats.decode_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--drafts", default="1,3,6")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new_tokens", type=int, default=22)
    parser.add_argument("--num_threads", type=int, default=2)
    args = parser.parse_args()
    drafts = [int(x) for x in args.drafts.split(",")]
    with tempfile.TemporaryDirectory(prefix="draft-cost-") as folder:
        engine = Engine.load(prepare(Path(folder), args.shape), num_threads=args.num_threads)
        inside = Inside(engine)
        layer = engine.build.draft_layers[0]
        print(f"{args.shape}, {layer} of {engine.config.num_layers} layers draft, {args.num_threads} threads")
        print("| a plain step, ms | runtime's own | drafts | a cycle, ms | accepted to break even | by weight bytes |")
        print("|---|---|---|---|---|---|")
        seen: dict[int, list[tuple[float, float]]] = {num: [] for num in (0, *drafts)}
        for _ in range(args.rounds):
            for num in seen:
                seen[num].append(timed(engine, inside, args.new_tokens, num))
        step = statistics.median(seconds for seconds, _ in seen[0])
        own = statistics.median(share for _, share in seen[0])
        for num in drafts:
            cycle = statistics.median(seconds for seconds, _ in seen[num])
            in_bytes = break_even(engine.config, layer, RANK, num)
            plain = f"| {1000 * step:.1f} | {100 * own:.1f} % "
            print(f"{plain}| {num} | {1000 * cycle:.1f} | {cycle / step - 1:.2f} | {in_bytes:.2f} |", flush=True)
        engine.close()


if __name__ == "__main__":
    main()
