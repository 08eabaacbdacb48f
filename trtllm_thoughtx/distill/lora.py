"""Training by an adapter (`--lora_rank`): the student stays as it is, every linear layer gets a product of low rank, and the thinking tags
get rows of the embedding of their own.

Each stage trains a product of its own beside the model that the stages before it made of the student, so that this model is the reference
of stages 2 and 3. What is saved is one adapter of the student: the products of all stages, one under the other, which add up exactly.
`adapter/` is a PEFT directory that peft and every `--lora_dir` of this package read; `model/` is the merged model.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from trtllm_thoughtx.checkpoint import tensor_file
from trtllm_thoughtx.checkpoint.adapter import PREFIX
from trtllm_thoughtx.checkpoint.adapter_config import EMBEDDING
from trtllm_thoughtx.checkpoint.directory import ADAPTER_CONFIG, ADAPTER_TENSORS
from trtllm_thoughtx.distill.settings import Settings
from trtllm_thoughtx.files import atomic_dir, read_json
from trtllm_thoughtx.text.text import Text

ADAPTER = "adapter"
ROWS = f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"


def token_ids(text: Text) -> list[int]:
    """The thinking tags, where each is one token: an instruction-tuned base has hardly trained its reserved ones."""
    return sorted(tag[0] for tag in text.think_ids if len(tag) == 1) if text.think_ids else []


def with_adapter(model: Any, settings: Settings, text: Text, stage: str) -> Any:
    """`model`, frozen, with a product beside each linear layer that trains, and adds nothing yet. The rows of the thinking tags train in
    stage 1: TRL's fused loss of the others reads a head that is not wrapped."""
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_rank,
            lora_alpha=settings.lora_factor * settings.lora_rank,
            target_modules="all-linear",
            trainable_token_indices=(token_ids(text) or None) if stage == "supervised" else None,
        )
        return peft.get_peft_model(model, config)


def save_adapter(trained: Any, before: Path | None, target: Path, settings: Settings, text: Text) -> None:
    """Write what this stage trained, behind the products of the adapter in `before`, as one adapter of the student."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peft.get_peft_model_state_dict(trained)
    own = {name: np.ascontiguousarray(value.detach().to("cpu", torch.float32).numpy()) for name, value in state.items()}
    rank = settings.lora_rank
    if before is not None:
        rank += read_json(before, ADAPTER_CONFIG)["r"]
        held = tensor_file.read_all(before, ADAPTER_TENSORS)
        own = {name: _joined(name, held[name], own.get(name)) for name in held}
    ids = token_ids(text) if ROWS in own else []
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.student_dir.resolve().name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": settings.lora_factor * rank,
        "target_modules": "all-linear",
        "bias": "none",
        **({"trainable_token_indices": ids} if ids else {}),
    }
    with atomic_dir(target, force=True) as root:
        (root / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        tensor_file.write_all(root / ADAPTER_TENSORS, dict(sorted(own.items())))


def _joined(name: str, held: np.ndarray, own: np.ndarray | None) -> np.ndarray:
    """Ranks one behind the other; rows of tokens, which are whole values, as they are."""
    return held if own is None else np.concatenate([held, own], axis=0 if ".lora_A." in name else 1)
