"""What chunked attention costs a model that was trained without it: a fact found at a distance, and KL and perplexity by position.

    python bench/real/chunks.py --model_dir DIR [--lengths 512,1024,2048,4096] [--num_facts 12] [--num_windows 6] [--output FILE]

Full attention, fixed chunks with and without sinks, and a chunk for each prompt from its entropy, whose `base_size` makes the mean of the
windows' chunks the same as that of the fixed ones: equal memory. A fact (a person's number) stands at a drawn depth of this repository's
documentation, and is asked for at the end, through the chat template, greedy; the interval is Wilson's, 95 %. KL is from full attention of
the same engine type, on windows of 2,048 tokens of documentation and tests. `slots` are KV slots a row: chunk_size * (1 + left_chunks) +
sink_tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import ROOT, build_flags, command
from quality import texts

from trtllm_thoughtx import Engine
from trtllm_thoughtx.evaluate.statistics import wilson
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.validate.divergence import Divergence

WINDOW, LARGEST, LEFT, SINKS = 2048, 1024, 1, 4
EDGES = (0, 256, 512, 1024, WINDOW)
NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Karim", "Lena")


@dataclass(frozen=True)
class Way:
    """One way to attend: which engine, and the chunk of its requests (tokens, "auto", or None for full attention)."""

    name: str
    engine: str
    chunk_size: int | str | None
    sinks: int = SINKS


def ways(chunk: int) -> list[Way]:
    return [
        Way("full", "full", None),
        Way(f"chunks of {chunk}", "sinks", chunk),
        Way(f"chunks of {chunk}, no sinks", "bare", chunk, 0),
        Way(f"chunks by entropy, mean {chunk}", "sinks", "auto"),
        Way(f"chunks of {2 * chunk}", "sinks", 2 * chunk),
    ]


def build(model_dir: Path, engine: Path, max_seq_len: int, *flags: object) -> Path:
    if not engine.is_dir():
        sizes = ("--dtype", "float32", "--max_seq_len", max_seq_len, "--max_input_len", 512, "--quiet")
        subprocess.run(command("build", *build_flags(model_dir, engine, *sizes, *flags)), check=True, stdout=subprocess.DEVNULL)
    return engine


def windows(engine: Engine, num: int) -> list[list[int]]:
    """Of documentation and tests, half each, spread over them."""
    assert engine.text is not None
    found = []
    for kind in ("English", "code"):
        ids = [i for part in texts()[kind] for i in engine.text.encode(part)]
        step = max(1, (len(ids) - WINDOW) // max(1, num // 2))
        found += [ids[at : at + WINDOW] for at in range(0, step * (num // 2), step)]
    return found


def facts(engine: Engine, length: int, num: int, seed: int) -> list[tuple[list[int], str]]:
    """(prompt of about `length` tokens, the number that answers it)."""
    assert engine.text is not None
    rng = random.Random(f"{seed} {length}")
    filler = engine.text.encode("\n".join(texts()["English"]))
    made: list[tuple[list[int], str]] = []
    for k in range(num):
        name, number = NAMES[k % len(NAMES)], str(rng.randrange(1000, 10000))
        begin, size = rng.randrange(len(filler) - length), max(16, length - 70)
        depth = round(size * (k + rng.random()) / num)
        before, after = (engine.text.decode(filler[begin : begin + depth]), engine.text.decode(filler[begin + depth : begin + size]))
        told = f"\nThe locker of {name} has the number {number}.\n"
        asked = f"\n\nWhat number does the locker of {name} have? Answer with the number."
        made.append((engine.text.chat(before + told + after + asked), number))
    return made


def found_facts(engine: Engine, way: Way, asked: list[tuple[list[int], str]]) -> tuple[int, list[int]]:
    """(how many were found, the chunks that were used)."""
    assert engine.text is not None
    num, sizes = 0, []
    for prompt, number in asked:
        (done,) = engine.generate([prompt], GenerationParams(max_new_tokens=16), chunk_size=way.chunk_size)
        num += number in engine.text.decode(done.output_ids)
        sizes += [done.chunk_size] if done.chunk_size else []
    return num, sizes


def chunk_of(engine: Engine, way: Way, row: list[int]) -> int | None:
    if way.chunk_size != "auto":
        return None if way.chunk_size is None else int(way.chunk_size)
    (done,) = engine.generate([row], GenerationParams(max_new_tokens=1), chunk_size="auto")
    return done.chunk_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[512, 1024, 2048, 4096])
    parser.add_argument("--num_facts", type=int, default=12, help="of each length")
    parser.add_argument("--num_windows", type=int, default=6)
    parser.add_argument("--chunk_size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", type=Path, help="engines that are there already are used (default: real-out/chunks-MODEL in the repository)"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    work = args.work or ROOT / "real-out" / f"chunks-{args.model_dir.name}"
    work.mkdir(parents=True, exist_ok=True)
    capacity = max(WINDOW, *args.lengths) + 128
    full = Engine.load(build(args.model_dir, work / "full", capacity))
    rows = windows(full, args.num_windows)
    entropies = full.prompt_entropy([row[:LARGEST] for row in rows])
    base = args.chunk_size / statistics.mean(entropies)
    chunked = ("--use_chunked_attention", "--max_chunk_size", LARGEST, "--left_chunks", LEFT, "--chunk_size", "auto")
    for name, sinks in (("sinks", SINKS), ("bare", 0)):
        build(args.model_dir, work / f"{name}-{base:.3f}", capacity, *chunked, "--base_size", f"{base:.3f}", "--sink_tokens", sinks)
    asked = {length: facts(full, length, args.num_facts, args.seed) for length in args.lengths}
    reference = [full.forward([row])[0] for row in rows]
    found: list[dict[str, Any]] = []
    for way in ways(args.chunk_size):
        engine = full if way.engine == "full" else Engine.load(work / f"{way.engine}-{base:.3f}")
        line: dict[str, Any] = {"name": way.name, "facts": {}, "by_position": {}}
        sizes: list[int] = []
        seen = {edge: Divergence() for edge in EDGES[:-1]}
        for row, wanted in zip(rows, reference, strict=True):
            size = chunk_of(engine, way, row)
            sizes += [size] if size else []
            logits = engine.forward([row], chunk_size=size)[0]
            for begin, end in itertools.pairwise(EDGES):
                seen[begin].add(wanted[begin:end], logits[begin:end], [*row[begin + 1 : end + 1], -1][: end - begin])
        line["mean_chunk"] = statistics.mean(sizes) if sizes else None
        line["slots"] = line["mean_chunk"] * (1 + LEFT) + way.sinks if sizes else WINDOW
        for begin, end in itertools.pairwise(EDGES):
            loss = seen[begin].summary()
            line["by_position"][f"{begin}-{end}"] = {"kl": loss.kl, "perplexity_ratio": loss.perplexity_ratio}
        for length, items in asked.items():
            num, of_facts = found_facts(engine, way, items)
            low, high = wilson(num, len(items))
            mean = statistics.mean(of_facts) if of_facts else None
            line["facts"][length] = {"right": num, "of": len(items), "low": low, "high": high, "mean_chunk": mean}
        found.append(line)
        print(json.dumps(line), file=sys.stderr, flush=True)
        if engine is not full:
            engine.close()
    document = {"model_dir": args.model_dir.name, "base_size": base, "entropies": entropies, "ways": found}
    text = json.dumps(document, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
