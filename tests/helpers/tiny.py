"""Small random checkpoints in Hugging Face form, for every test that needs a model. NumPy only.

`write_tiny(dir)` is a valid Qwen2: 2 layers, hidden 64, 4 heads, 2 KV heads, head 16, MLP 96, vocabulary 97. Overrides reach
every family, dtype and spelling that the project reads. The numbers depend on the seed and the tensor's name alone, so the
same tensor has the same values in one shard or three, with a tied head or without.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SAFETENSORS_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "int64": "I64",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
MISSING = object()  # as a value in `config`: leave the key out


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def safetensors_bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file, written independently of the package."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = []
    end = 0
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [end, end + len(raw)],
        }
        data.append(raw)
        end += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data)


def tiny_shapes(
    *,
    family: str,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
    tied: bool,
    attention_bias: bool,
) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names and shapes, in model order."""
    q, kv = num_heads * head_dim, num_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, hidden_size)}
    for i in range(num_layers):
        p = f"model.layers.{i}."
        shapes[p + "input_layernorm.weight"] = (hidden_size,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[p + f"self_attn.{name}_proj.weight"] = (rows, hidden_size)
            if family == "qwen2" or attention_bias:
                shapes[p + f"self_attn.{name}_proj.bias"] = (rows,)
        shapes[p + "self_attn.o_proj.weight"] = (hidden_size, q)
        if attention_bias:
            shapes[p + "self_attn.o_proj.bias"] = (hidden_size,)
        if family == "qwen3":
            shapes[p + "self_attn.q_norm.weight"] = (head_dim,)
            shapes[p + "self_attn.k_norm.weight"] = (head_dim,)
        shapes[p + "post_attention_layernorm.weight"] = (hidden_size,)
        shapes[p + "mlp.gate_proj.weight"] = (intermediate_size, hidden_size)
        shapes[p + "mlp.up_proj.weight"] = (intermediate_size, hidden_size)
        shapes[p + "mlp.down_proj.weight"] = (hidden_size, intermediate_size)
    shapes["model.norm.weight"] = (hidden_size,)
    if not tied:
        shapes["lm_head.weight"] = (vocab_size, hidden_size)
    return shapes


def tiny_values(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Norms near 1, biases near 0, matrices scaled so that activations keep their size through the layers."""
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        noise = 1 + np.float32(0.1) * noise
    elif name.endswith("bias"):
        noise = np.float32(0.2) * noise
    elif name != "model.embed_tokens.weight":
        noise = noise / np.float32(np.sqrt(shape[1]))
    return noise.astype(numpy_dtype(dtype))


def write_tiny(
    directory: Path,
    *,
    family: str = "qwen2",
    dtype: str = "float32",
    tied: bool = False,
    shards: int = 1,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate_size: int = 96,
    vocab_size: int = 97,
    max_position: int = 512,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    rope_parameters: dict[str, Any] | None = None,
    attention_bias: bool = False,
    spelling: int = 4,
    config: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    tokenizer: bool = False,
) -> dict[str, np.ndarray]:
    """Write a checkpoint into `directory` (created) and return its tensors.

    `family` is qwen2, qwen3 or llama. `spelling` 4 or 5 is the transformers version whose config.json is imitated;
    `rope_parameters` implies 5. `config` entries are added to config.json last (`MISSING` removes one), and `tensors` entries
    replace, add or (None) remove tensors. With `shards` > 1 the tensors are dealt out in order and an index is written.
    `tokenizer` adds tokenizer.json (one token per printable ASCII character, 95 `<eos>`, 96 `<pad>`), its config and
    generation_config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    size = head_dim or hidden_size // num_heads
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_position,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "use_cache": True,
        "tie_word_embeddings": tied,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 95,
    }
    if family in ("qwen2", "qwen3"):
        raw |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": num_layers}
    if family in ("qwen3", "llama"):
        raw |= {"attention_bias": attention_bias, "head_dim": size}
    elif head_dim is not None:
        raw["head_dim"] = size
    if family == "llama":
        raw |= {"mlp_bias": False, "pretraining_tp": 1}
    if rope_parameters is not None or spelling == 5:
        raw |= {"dtype": dtype, "transformers_version": "5.0.0"}
        raw["rope_parameters"] = rope_parameters or {"rope_theta": rope_theta, "rope_type": "default", **(rope_scaling or {})}
    else:
        raw |= {"torch_dtype": dtype, "transformers_version": "4.51.0", "rope_theta": rope_theta, "rope_scaling": rope_scaling}
    raw |= config or {}
    text = json.dumps({k: v for k, v in raw.items() if v is not MISSING}, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")

    shapes = tiny_shapes(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        tied=tied,
        attention_bias=attention_bias,
    )
    values: dict[str, np.ndarray | None] = {name: tiny_values(name, shape, dtype, seed) for name, shape in shapes.items()}
    values |= tensors or {}
    kept = {name: array for name, array in values.items() if array is not None}
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(kept, {"format": "pt"}))
    else:
        names = list(kept)
        weight_map = {}
        for k in range(shards):
            file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
            part = names[k * len(names) // shards : (k + 1) * len(names) // shards]
            (directory / file).write_bytes(safetensors_bytes({n: kept[n] for n in part}, {"format": "pt"}))
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(a.nbytes for a in kept.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    if tokenizer:
        write_tokenizer(directory)
    return kept


def write_tokenizer(directory: Path) -> None:
    """tokenizer.json, tokenizer_config.json (with a chat template) and generation_config.json for vocabulary 97."""
    vocab = {chr(32 + i): i for i in range(95)} | {"<eos>": 95, "<pad>": 96}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": [],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[t], "content": t, **flags} for t in ("<eos>", "<pad>")],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": model,
    }
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "model_max_length": 512,
        "chat_template": template,
    }
    generation = {"eos_token_id": [95], "pad_token_id": 96, "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
