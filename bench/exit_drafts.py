"""Level 2 of `early_exit.py`: drafts by the first layers against plain decoding, and all of it re-costed for a 7B shape."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import exit_cost as cost

from trtllm_thoughtx import Engine
from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.evaluate.questions import Question
from trtllm_thoughtx.families.hf_config import model_config_from_hf
from trtllm_thoughtx.families.size import head_in_layers
from trtllm_thoughtx.text.params import GenerationParams

QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "hidden_act": "silu", "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    sample: str
    questions: Sequence[Question]
    config: ModelConfig
    layer: int  # layers that draft
    rounds: int
    num_threads: int


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def drafts(engine_dir: Path, asked: Asked, say: Callable[..., None]) -> list[dict[str, Any]]:
    """Plain decoding, `verify` and `auto` in turns, at batch 1: acceptance, weight bytes, speed, and whether the tokens are the same."""
    engine = Engine.load(engine_dir, num_threads=asked.num_threads)
    assert engine.text
    prompts = [engine.text.chat(one.prompt) for one in asked.questions[:: max(1, len(asked.questions) // 24)]][:24]
    base: dict[str, Any] = {"max_new_tokens": 200, "stop_ids": engine.text.eos_ids}
    say()
    say(
        f"## Level 2: drafts of the first {asked.layer} of {asked.config.num_layers} layers, checked "
        f"({asked.sample}, {len(prompts)} questions one by one, {asked.num_threads} threads)"
    )
    say()
    say("| batch | same tokens | drafted, accepted a cycle | weight bytes a token | tokens/s off | verify | ratio, by round | auto |")
    say("|---|---|---|---|---|---|---|---|")
    rows = []
    for batch in (1,):  # rows beside each other do not draft
        groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
        per = {}
        speeds: dict[str, list[float]] = {"off": [], "verify": [], "auto": []}
        outputs: dict[str, Any] = {}
        for _ in range(asked.rounds):
            for policy in speeds:
                seconds, num, counts = 0.0, 0, [0, 0, 0, 0]
                outputs[policy] = []
                for group in groups:
                    done = engine.generate(group, GenerationParams(**base, exit_policy=policy))
                    stats = engine.stats
                    seconds, num = seconds + stats.decode_seconds, num + stats.num_decoded
                    counts = [
                        a + b
                        for a, b in zip(
                            counts, (stats.num_cycles, stats.num_drafted, stats.num_accepted, stats.work.weight_bytes), strict=True
                        )
                    ]
                    outputs[policy] += [one.output_ids for one in done]
                speeds[policy].append(num / seconds)
                per[policy] = {
                    "num_cycles": counts[0],
                    "num_drafted": counts[1],
                    "num_accepted": counts[2],
                    "weight_bytes_per_token": counts[3] / num,
                }
        ratios = [b / a for a, b in zip(speeds["off"], speeds["verify"], strict=True)]
        verify = per["verify"]
        row = {
            "batch": batch,
            "is_same": outputs["off"] == outputs["verify"] == outputs["auto"],
            "acceptance": verify["num_accepted"] / max(1, verify["num_drafted"]),
            "drafted_per_cycle": verify["num_drafted"] / verify["num_cycles"] / min(batch, len(prompts)),
            "accepted_per_cycle": verify["num_accepted"] / verify["num_cycles"] / min(batch, len(prompts)),
            "weight_bytes": {policy: per[policy]["weight_bytes_per_token"] for policy in per},
            "tokens_per_second": {policy: statistics.median(values) for policy, values in speeds.items()},
            "ratios": ratios,
        }
        rows.append(row)
        saved = 1 - row["weight_bytes"]["verify"] / row["weight_bytes"]["off"]
        speed = row["tokens_per_second"]
        say(
            f"| {batch} | {'yes' if row['is_same'] else 'NO'} | {row['drafted_per_cycle']:.2f}, {row['accepted_per_cycle']:.2f} "
            f"({percent(row['acceptance'], 0)}) | {percent(saved)} saved | {speed['off']:.0f} | {speed['verify']:.0f} "
            f"| {', '.join(f'{r:.2f}' for r in ratios)} | {speed['auto']:.0f} |"
        )
    engine.close()
    return rows


def recost(found: Mapping[str, Any], asked: Asked, rank: int, say: Callable[..., None]) -> dict[str, Any]:
    """Computed, not measured: what was counted, on Qwen2.5-7B's shape."""
    big: ModelConfig = model_config_from_hf(QWEN_7B, "Qwen2.5-7B")
    rows = {one["name"]: one for one in found["level_1"]["rows"]}
    whole, head = rows["whole traces"]["tokens"], rows["exit head"]["tokens"]
    thinking = 1 - cost.generation_in_layers(big, head, has_head=True) / cost.generation_in_layers(big, whole)
    one = found["level_2"][0]
    layer = round(asked.layer * big.num_layers / asked.config.num_layers)
    drafts = cost.drafts_saved(big, layer, rank, one["drafted_per_cycle"], one["accepted_per_cycle"])
    needed = cost.break_even(big, layer, rank, one["drafted_per_cycle"])
    computed = {
        "head_in_layers": head_in_layers(big), "thinking_saved": thinking, "draft_layer": layer, "drafts_saved_weight_bytes": drafts,
        "break_even_accepted_per_cycle": needed,
    }  # fmt: skip
    say()
    say("## Computed, not measured: Qwen2.5-7B's shape with the counts above")
    say()
    say(f"- its lm_head weighs {head_in_layers(big):.2f} layers;")
    say(f"- exit head: {100 * thinking:.1f} % of generation saved, if its traces were as redundant and its head as good;")
    say(
        f"- drafts of {layer} of {big.num_layers} layers, rank {rank}, {one['drafted_per_cycle']:.2f} drafted and "
        f"{one['accepted_per_cycle']:.2f} accepted a cycle: "
        f"{percent(drafts)} of weight bytes saved at batch 1; they pay from {needed:.2f} accepted a cycle on."
    )
    return computed
