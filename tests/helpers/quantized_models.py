"""Quantized Hugging Face checkpoints as AWQ, GPTQ, compressed-tensors and ModelOpt write them, and one damaged tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tiny
from tiny import write_tiny

SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position": 256}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GROUP = 32
tiny.SAFETENSORS_DTYPES["int32"] = "I32"


def names(*, head: bool = False) -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS] + ["lm_head"] * head


def packed(numbers: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """[rows, n] of 0..15 -> int32 [rows, n / 8]; place i of a word takes number `order[i]`; four places have 8 bits each. Written from the
    formats' descriptions."""
    num = len(order)
    words = np.zeros((numbers.shape[0], numbers.shape[1] // num), np.uint32)
    for place, number in enumerate(order):
        words |= numbers[:, number::num].astype(np.uint32) << np.uint32(32 // num * place)
    return words.view(np.int32)


def groups_of(name: str, num_in: int, act_order: bool) -> np.ndarray:
    """The group of each input channel, I32: GPTQ hands groups out by the size of the inputs, which q, k and v (gate, up) share."""
    found = np.arange(num_in) // GROUP
    reads = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
    return (np.random.default_rng(list(reads.encode())).permutation(found) if act_order else found).astype(np.int32)


def four_bits(
    path: Path,
    method: str,
    *,
    symmetric: bool = False,
    v2: bool = False,
    act_order: bool = False,
    head: bool = False,
    bits: int = 4,
    whole_rows: bool = False,
    **sizes: Any,
) -> dict[str, np.ndarray]:
    """An AWQ or GPTQ checkpoint in `path`; returns what its matrices stand for, by Hugging Face name. `whole_rows`: group_size -1."""
    rng = np.random.default_rng(5)
    plain = write_tiny(path, **{**SIZES, **sizes})
    changed: dict[str, np.ndarray | None] = {}
    meant = {}
    for name in names(head=head):
        weight = plain[f"{name}.weight"]
        num_out, num_in = weight.shape
        groups = np.zeros(num_in, np.int32) if whole_rows else groups_of(name, num_in, act_order)
        numbers, num_groups = rng.integers(0, 1 << bits, (num_out, num_in)), 1 if whole_rows else num_in // GROUP
        zeros = np.full((num_out, num_groups), 1 << (bits - 1)) if symmetric else rng.integers(1, 1 << bits, (num_out, num_groups))
        scales = (rng.uniform(0.5, 1.5, (num_out, num_groups)) * 0.64 / (1 << bits)).astype(np.float16)
        meant[f"{name}.weight"] = ((numbers - zeros[:, groups]) * scales.astype(np.float32)[:, groups]).astype(np.float32)
        changed[f"{name}.weight"] = None
        changed[f"{name}.scales"] = np.ascontiguousarray(scales.T)
        if method == "awq":
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            changed[f"{name}.qweight"] = packed(numbers.T, order)
            changed[f"{name}.qzeros"] = packed(zeros.T, order)
        else:
            straight = tuple(range(32 // bits))
            changed[f"{name}.qweight"] = np.ascontiguousarray(packed(numbers, straight).T)
            changed[f"{name}.qzeros"] = packed(zeros.T - (0 if v2 else 1), straight)
            changed[f"{name}.g_idx"] = groups
    config = {"quant_method": method, "bits": bits, "group_size": -1 if whole_rows else GROUP, "zero_point": not symmetric}
    config |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    config |= {"desc_act": True, "static_groups": False} if act_order else {}
    write_tiny(path, **{**SIZES, **sizes}, tensors=changed, config={"quantization_config": config})
    return meant


def fp8(
    path: Path,
    *,
    kind: str = "compressed-tensors",
    per_row: bool = False,
    same: bool = False,
    per_token: bool = False,
    weight_only: bool = False,
    more: dict[str, np.ndarray] | None = None,
    **sizes: Any,
) -> dict[str, np.ndarray]:
    plain = write_tiny(path, **{**SIZES, **sizes})
    changed: dict[str, np.ndarray] = {}
    meant = {}
    for number, name in enumerate(names()):
        weight = plain[f"{name}.weight"].astype(np.float32)
        rows = np.abs(weight).max(1, keepdims=True) if per_row else np.abs(weight).max().reshape(1)
        scale = (np.full_like(rows, 0.02) if same else rows / 448 * (1 + 0.01 * number)).astype(np.float32)
        stored = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        changed |= {f"{name}.weight": stored, f"{name}.weight_scale": scale}
        changed |= {} if per_token or weight_only else {f"{name}.input_scale": np.array([0.05], np.float32)}
        meant[f"{name}.weight"] = stored.astype(np.float32) * scale
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    group = {"weights": {**inputs, "strategy": "channel" if per_row else "tensor"}, "input_activations": inputs, "targets": ["Linear"]}
    group |= {"input_activations": {**inputs, "strategy": "token", "dynamic": True}} if per_token else {}
    group |= {"input_activations": None} if weight_only else {}
    config: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    write_tiny(
        path, **{**SIZES, **sizes}, tensors=changed | (more or {}), config={} if kind == "modelopt" else {"quantization_config": config}
    )
    if kind == "modelopt":
        quantization = {
            "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN" if per_token else "FP8",
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head"],
        }
        (path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return meant


def damaged(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """Rewrite one tensor of a checkpoint."""
    from trtllm_thoughtx.checkpoint import tensor_file
    from trtllm_thoughtx.checkpoint.directory import read_tensors

    infos = read_tensors(path, ["rank0.safetensors"])
    tensors = tensor_file.read_all(path, "rank0.safetensors")
    tensors[name] = change(tensors[name])
    tensor_file.write_all(path / "rank0.safetensors", {key: tensors[key] for key in infos if tensors[key] is not None})
