"""What `Engine.generate` returns, and what it cost: `Completion` of one prompt, `Stats` of one call."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from trtllm_thoughtx.config import ModelConfig
from trtllm_thoughtx.families.quantization import quantized_shapes


@dataclass(frozen=True)
class Completion:
    """One answer. `stop_reason` is eos | stop | length (max_new_tokens) | capacity (the engine's max_seq_len);
    `logits` float32 [new tokens, vocab], those that each token was picked from, and `logprobs` (natural, temperature 1), when asked for.
    `top_logprobs` are the likeliest tokens at each place, as `GenerationParams.logprobs` asks for them. `text_end`: only so many characters
    of the decoded ids are the text, because `stop_string`, or a stop token, follows; None: all of them. `index`: which of the prompt's
    `num_return_sequences` this is.
    `complexity` (nats) and `single_step` where the engine chose the chunk size: see `chunks`.

    `is_open`: the thinking was open where `output_ids` begin (see `answer`).
    `num_steps` and `num_thinking_tokens` count what was written between the thinking tags; `thinking_stop` says why it ended (see
    `thinking`), None where nothing was thought. `num_layer_tokens` is this row's part of `Work`, probes and rejected drafts included."""

    output_ids: list[int]
    stop_reason: str
    num_prompt_tokens: int
    chunk_size: int | None
    logits: np.ndarray | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    text_end: int | None = None
    stop_string: str | None = None
    index: int = 0
    complexity: float | None = None
    single_step: bool = False
    is_open: bool = False
    num_steps: int = 0
    num_thinking_tokens: int = 0
    thinking_stop: str | None = None
    num_layer_tokens: int = 0
    num_probes: int = 0
    num_probes_skipped: int = 0  # they could not have been taken back from a bounded cache


@dataclass
class Work:
    """Work that was done, whatever it was good for: tokens times layers, rows of logits, and bytes of weights read.

    A call reads the weights of the parts that it runs once, whatever its batch; embeddings are looked up and not counted. Padding and
    rows of a batch that wait are not counted as tokens.
    """

    num_layer_tokens: int = 0
    num_head_rows: int = 0
    num_calls: int = 0
    weight_bytes: int = 0

    def add(self, num_layers: int, num_tokens: int, num_head_rows: int, weight_bytes: int) -> None:
        self.num_layer_tokens += num_layers * num_tokens
        self.num_head_rows += num_head_rows
        self.num_calls += 1
        self.weight_bytes += weight_bytes


@dataclass
class Stats:
    """Wall-clock and counts of the last `generate`, summed over its batches, and all work since it began, forward passes included."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_prefilled: int = 0
    num_read_again: int = 0  # prompt tokens that were fed twice because the engine chose the chunk size
    num_decoded: int = 0  # tokens that came from decode steps: all but each row's first
    num_cycles: int = 0  # of drafts and their verification
    num_drafted: int = 0
    num_accepted: int = 0  # drafts
    work: Work = field(default_factory=Work)


def layer_parameters(config: ModelConfig) -> int:
    """Parameters of the matrices of one decoder layer that a token goes through: of experts those that it is sent to."""
    router = config.experts.num_experts + config.has_shared_expert if config.experts is not None else 0
    return config.hidden_size * (2 * config.q_size + 2 * config.kv_size + 3 * config.mlp_width + router)


def matrix_bytes(config: ModelConfig, first_layer: int, last_layer: int, item: int, *, head: bool) -> int:
    """Bytes of the matrices of layers first_layer .. last_layer - 1, and of the output matrix, as an engine whose numbers have `item`
    bytes holds them: quantized ones with their scales, of experts those that one token is sent to."""
    of_layer = {
        "attention.qkv": (config.q_size + 2 * config.kv_size, config.hidden_size),
        "attention.dense": (config.hidden_size, config.q_size),
        "mlp.fc": (config.mlp_width, config.hidden_size),
        "mlp.gate": (config.mlp_width, config.hidden_size),
        "mlp.proj": (config.hidden_size, config.mlp_width),
    }
    if config.experts is not None:
        of_layer["mlp.router"] = (config.experts.num_experts + config.has_shared_expert, config.hidden_size)
    modules = {f"transformer.layers.{i}.{name}": shape for i in range(first_layer, last_layer) for name, shape in of_layer.items()}
    if head:
        modules["lm_head"] = (config.vocab_size, config.hidden_size)
    quant, total = config.quantization, 0
    for module, shape in modules.items():
        if quant is None or not quant.covers(module):
            total += math.prod(shape) * item
            continue
        for suffix, (stored, size) in quantized_shapes(quant, *shape).items():
            total += math.prod(size) * (1 if suffix == "weight" else item if stored == "F32" else 4)
    return total


def head_in_layers(config: ModelConfig) -> float:
    """What the output matrix weighs, in layers: 2.3 for Qwen2.5-7B."""
    return config.vocab_size * config.hidden_size / layer_parameters(config)
