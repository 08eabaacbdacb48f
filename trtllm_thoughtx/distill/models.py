"""Models that train: made new from a seed, taken from some layers of another, loaded and saved as Hugging Face directories."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trtllm_thoughtx.checkpoint.directory import HUGGING_FACE, kind_of
from trtllm_thoughtx.checkpoint.members import CALIBRATION, CARRIED, CARRIED_LIMIT
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.distill import vocabulary
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.files import atomic_dir, read_inside
from trtllm_thoughtx.text.text import Text
from trtllm_thoughtx.validate.reference import load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MADE_ANEW = ("generation_config.json", CALIBRATION)  # saved from the model; of other weights
INITIAL_STD = 0.05  # weights of narrow models start too small at the usual 0.02: four times the tokens to the same loss


def tokenizer() -> PreTrainedTokenizerFast:
    """The samples' tokenizer as transformers wraps it."""
    special = {"pad_token": vocabulary.PAD, "eos_token": vocabulary.EOS, "unk_token": vocabulary.PAD}
    made = PreTrainedTokenizerFast(tokenizer_object=vocabulary.build(), **special)
    made.chat_template = vocabulary.CHAT_TEMPLATE
    return made


def load_text(path: Path) -> Text:
    """The tokenizer and chat template of a Hugging Face directory; E112 without them."""
    kind_of(path, HUGGING_FACE)
    text = Text.load(path)
    if text is None:
        fix = "copy the model's tokenizer.json there; of an older model, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it"
        raise ThoughtxError("E112", "no tokenizer.json", where=str(path), why="traces are texts", fix=fix)
    if not text.has_template:
        fix = "add its chat_template.jinja, or chat_template in tokenizer_config.json"
        raise ThoughtxError("E112", "no chat template", where=str(path), why="prompts are written with it", fix=fix)
    return text


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The same for TRL, with a pad token (its EOS where it has none).

    Not AutoTokenizer: for a Qwen2 model transformers 5 puts Qwen2's own splitting in the place of the file's.
    """
    loaded: Any = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    loaded.padding_side = "left"
    made: PreTrainedTokenizerFast = loaded
    return made


def new_model(target: Path, *, num_layers: int, hidden_size: int, intermediate_size: int, max_positions: int, seed: int) -> None:
    """Write a stock Qwen2 for the generated tasks, random weights from `seed`, head_dim 32, two query heads to a KV head."""
    torch.manual_seed(seed)
    words = vocabulary.words()
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=max_positions,
        initializer_range=INITIAL_STD,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        bos_token_id=None,
        eos_token_id=words.index(vocabulary.EOS),
        pad_token_id=words.index(vocabulary.PAD),
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1 / math.sqrt(2 * num_layers))  # residual branches add up: GPT-2's scaling
    with atomic_dir(target, force=False) as root:
        model.save_pretrained(root)
        tokenizer().save_pretrained(root)


def load_student(
    path: Path | Checkpoint, dtype: str, layers: tuple[int, ...] | None = None, *, gradient_checkpointing: bool = False
) -> Any:
    """The model of `path`, or one of `layers` of it, in that order (DistilBERT, arXiv 1910.01108, section 3)."""
    model = load_model(path, DTYPES[dtype], attention="sdpa", rounds=False)
    if layers is not None:
        body, num = model.model, len(model.model.layers)
        if any(layer >= num for layer in layers):
            why = f"the model has layers 0 to {num - 1}, asked for: {', '.join(map(str, layers))}"
            fix = f"give --layers from 0 to {num - 1}. Nothing was written."
            raise ThoughtxError("E163", "layers that the model does not have", where=str(Path(path)), why=why, fix=fix)
        body.layers = torch.nn.ModuleList(body.layers[layer] for layer in layers)
        for index, layer in enumerate(body.layers):
            layer.self_attn.layer_idx = index
        config = model.config
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[layer] for layer in layers]
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def save_model(model: Any, weights: dict[str, torch.Tensor], texts_from: Path, target: Path, dtype: str) -> None:
    """Write a Hugging Face directory, with the tokenizer, templates and licence of `texts_from`, whole or not at all."""
    weights = {name: value.to("cpu", DTYPES[dtype]) for name, value in weights.items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    config.use_cache, config.dtype = True, DTYPES[dtype]
    config.architectures = [type(model).__name__]
    with atomic_dir(target, force=True) as root:
        config.save_pretrained(root)
        generation.save_pretrained(root)
        save_file({name: value.contiguous() for name, value in weights.items()}, root / "model.safetensors", {"format": "pt"})
        for name in CARRIED:
            if name not in MADE_ANEW and (texts_from / name).is_file():
                (root / name).write_bytes(read_inside(texts_from, name, CARRIED_LIMIT))
