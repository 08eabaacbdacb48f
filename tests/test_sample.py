"""The checkpoint that ships with the package has learned its tasks, and an engine built from it answers them."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

import trtllm_thoughtx
from trtllm_thoughtx import Engine
from trtllm_thoughtx.build import build
from trtllm_thoughtx.runtime.sampling import GenerationParams

SAMPLE = Path(trtllm_thoughtx.__file__).parent / "samples" / "thoughtx-tiny"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sum_task(rng: random.Random, num_steps: int) -> tuple[str, str]:
    """Add digits modulo ten, one named operand a step."""
    digits = [rng.randrange(10) for _ in range(num_steps)]
    return " ".join(f"x{i} = {d}" for i, d in enumerate(digits, 1)) + " ?", str(sum(digits) % 10)


def lookup_task(rng: random.Random, num_hops: int) -> tuple[str, str]:
    """Follow `key > value` facts from a start for a number of hops, among distractors."""
    names = rng.sample(LETTERS, num_hops + 5)
    facts = list(pairwise(names[: num_hops + 1]))
    facts += [(name, rng.choice(names)) for name in names[num_hops + 1 :]]
    rng.shuffle(facts)
    return " ".join(f"{a} > {b} ;" for a, b in facts) + f" ? {names[0]} {num_hops}", names[num_hops]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "engine"
    options = {"backend": ("onnxruntime",), "max_batch_size": 16, "max_seq_len": 512, "use_chunked_attention": True, "chunk_size": 512}
    build(SAMPLE, out, options)
    return Engine.load(out)


@pytest.mark.parametrize("task, sizes", [(sum_task, range(1, 9)), (lookup_task, range(1, 5))])
def test_sample_reasons_to_the_right_answer(engine, task, sizes):
    rng = random.Random(7)
    items = [task(rng, size) for size in sizes for _ in range(4)]
    done = engine.generate([engine.text.chat(prompt) for prompt, _ in items], GenerationParams(max_new_tokens=160))
    right = 0
    for (_, answer), completion in zip(items, done, strict=True):
        assert completion.stop_reason == "eos"
        text = engine.text.decode(completion.output_ids)
        assert "</think>" in text
        right += text.split()[-1] == answer
    assert right >= len(items) - 1, f"{right} of {len(items)}"


def test_thinking_grows_with_the_question(engine):
    rng = random.Random(3)
    prompts = [engine.text.chat(sum_task(rng, size)[0]) for size in (1, 8) for _ in range(6)]
    lengths = [len(c.output_ids) for c in engine.generate(prompts, GenerationParams(max_new_tokens=200))]
    assert sum(lengths[6:]) > 2 * sum(lengths[:6])
