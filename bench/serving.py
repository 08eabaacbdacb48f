"""A closed list of ragged requests over slots, against fixed groups: total tokens a second, in turns in one process.

    python bench/serving.py ENGINE_DIR [--requests 24] [--slots 8] [--prompts 32,512] [--answers 16,256] [--rounds 3] [--json]

Prompts are random tokens, which share nothing; lengths of prompts and answers are drawn evenly between the two numbers. A fixed group of
as many requests as there are slots is prefilled together, padded to the longest, and decoded until its last row ends, as most small
runtimes do it. Both sides decode greedily and run the same engine; the tokens are compared. The runtime's own share is what is not spent
inside the engine's calls. `--reuse` times the second turn of a conversation of so many tokens against a cold one, `--lookup N` prompt
lookup on a text that repeats its prompt and on one that does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from inside import Inside

from trtllm_thoughtx import Engine
from trtllm_thoughtx.runtime.generation import Generation
from trtllm_thoughtx.runtime.row import Request
from trtllm_thoughtx.text.params import GenerationParams


def fixed_groups(engine: Engine, prompts: Sequence[list[int]], num_new: Sequence[int], num_slots: int) -> list[list[int]]:
    session, written = engine.session, list[list[int]]()
    for start in range(0, len(prompts), num_slots):
        rows, most = prompts[start : start + num_slots], num_new[start : start + num_slots]
        batch, width = session.start(rows, None), max(map(len, rows))
        padded = [[*prompt, *[prompt[-1]] * (width - len(prompt))] for prompt in rows]
        logits = session.step(batch, padded, [[len(prompt) - 1] for prompt in rows])[:, 0]
        for row, prompt in enumerate(rows):
            batch.forget(row, len(prompt))
        new = [list[int]() for _ in rows]
        for _ in range(max(most)):
            for row, tokens in enumerate(new):
                tokens.append(int(logits[row].argmax()))
            logits = session.step(batch, [tokens[-1:] for tokens in new], [[0]] * len(rows))[:, 0]
        written += [tokens[:num] for tokens, num in zip(new, most, strict=True)]
    return written


def over_slots(engine: Engine, prompts: Sequence[list[int]], num_new: Sequence[int], num_slots: int) -> list[list[int]]:
    requests = [
        Request(prompt, GenerationParams(max_new_tokens=num, ignore_eos=True, exit_policy="off"), index, 0)
        for index, (prompt, num) in enumerate(zip(prompts, num_new, strict=True))
    ]
    done: dict[int, Any] = dict(engine.complete(requests, num_slots=num_slots))
    return [done[index].output_ids for index in range(len(prompts))]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def closed_list(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    rng, vocab = np.random.default_rng(0), engine.config.vocab_size
    (low, high), (shortest, longest) = args.prompts, args.answers
    prompts = [rng.integers(0, vocab, rng.integers(low, high, endpoint=True)).tolist() for _ in range(args.requests)]
    num_new = rng.integers(shortest, longest, args.requests, endpoint=True).tolist()
    inside, seconds, own = Inside(engine), {"fixed groups": [], "slots": []}, list[float]()  # type: ignore[var-annotated]
    over_slots(engine, [prompts[0]], [4], args.slots)
    alike = 0
    for _ in range(args.rounds):
        took, fixed = timed(lambda: fixed_groups(engine, prompts, num_new, args.slots))
        seconds["fixed groups"].append(took)
        before = inside.seconds
        took, slots = timed(lambda: over_slots(engine, prompts, num_new, args.slots))
        seconds["slots"].append(took)
        own.append(1 - (inside.seconds - before) / took)
        alike = sum(one == other for one, other in zip(fixed, slots, strict=True))
    total = sum(map(len, prompts)) + sum(num_new)
    ratios = [fixed / slots for fixed, slots in zip(*seconds.values(), strict=True)]
    return {
        "num_prompt_tokens": sum(map(len, prompts)),
        "num_new_tokens": sum(num_new),
        "new_tokens_per_second": {name: round(sum(num_new) / statistics.median(found), 1) for name, found in seconds.items()},
        "all_tokens_per_second": {name: round(total / statistics.median(found), 1) for name, found in seconds.items()},
        "slots_over_fixed_groups": [round(ratio, 2) for ratio in ratios],
        "runtimes_own_share": round(statistics.median(own), 4),
        "answers_alike": f"{alike} of {args.requests}",
    }


def second_turn(engine: Engine, length: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token of a prompt of which all but 24 tokens were read before, and of the same one cold."""
    rng, ratios, cold_seconds = np.random.default_rng(1), list[float](), list[float]()
    params = GenerationParams(max_new_tokens=1, ignore_eos=True)
    for _ in range(rounds):
        first = rng.integers(0, engine.config.vocab_size, length).tolist()
        second = [*first, *rng.integers(0, engine.config.vocab_size, 24).tolist()]

        def run(generation: Generation, prompt: list[int], index: int) -> float:
            def work() -> None:
                generation.add(Request(prompt, params, index, 0))
                while not generation.is_idle:
                    generation.tick()

            return timed(work)[0]

        cold = run(Generation(engine.session, engine.text, (), 2), second, 0)
        generation = Generation(engine.session, engine.text, (), 2)
        run(generation, first, 0)
        warm = run(generation, second, 1)
        ratios.append(warm / cold)
        cold_seconds.append(cold)
    return {
        "shared_tokens": length,
        "cold_seconds": round(statistics.median(cold_seconds), 3),
        "warm_over_cold": [round(r, 3) for r in ratios],
    }


def lookup(engine: Engine, most: int, rounds: int) -> dict[str, Any]:
    """Decoding with and without prompt lookup: of a prompt that the model is told to repeat, and of one that it is not."""
    assert engine.text is not None, "prompt lookup is timed on text"
    passage = (
        "def moving_average(values, width):\n    result = []\n    for start in range(len(values) - width + 1):\n"
        "        window = values[start : start + width]\n        result.append(sum(window) / width)\n    return result\n"
    )
    asked = {
        "repeats its prompt": f"Repeat this code exactly, without changing anything:\n\n{passage}",
        "does not": "Tell me a long story about a lighthouse keeper and a storm.",
    }
    found = {}
    for name, text in asked.items():
        prompt, ratios, drafted = engine.text.chat(text), list[float](), (0, 0)
        for _ in range(rounds):
            rates = []
            for num in (0, most):
                done = engine.generate(
                    [prompt], GenerationParams(max_new_tokens=160, stop_ids=engine.text.eos_ids, prompt_lookup=num, exit_policy="off")
                )
                rates.append(len(done[0].output_ids) / engine.stats.decode_seconds)
            ratios.append(rates[1] / rates[0])
            drafted = engine.stats.num_drafted, engine.stats.num_accepted
        found[name] = {"with_over_without": [round(r, 2) for r in ratios], "drafted": drafted[0], "accepted": drafted[1]}
    return found


def main() -> None:
    def pair(text: str) -> tuple[int, int]:
        low, high = map(int, text.split(","))
        return low, high

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--prompts", type=pair, default=(32, 512))
    parser.add_argument("--answers", type=pair, default=(16, 256))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reuse", type=int, default=0)
    parser.add_argument("--lookup", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    engine = Engine.load(args.engine_dir, num_threads=args.num_threads)
    result: dict[str, Any] = {
        "engine": args.engine_dir.name,
        "dtype": engine.build.dtype,
        "load_before": load,
        "num_threads": args.num_threads,
    }
    if args.reuse:
        result["second_turn"] = second_turn(engine, args.reuse, args.rounds)
    if args.lookup:
        result["prompt_lookup"] = lookup(engine, args.lookup, args.rounds)
    if args.requests:
        result["closed_list"] = closed_list(engine, args)
    engine.close()
    print(json.dumps(result, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
