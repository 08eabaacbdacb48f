"""adapter_config.json of a PEFT directory, read strictly: which modules have which rank, and how much of each product is added.

Whatever changes what an adapter computes, and is not implemented, is refused by name; so is a setting that this file does not know and
that is set. What only training needed is ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trtllm_thoughtx.errors import ThoughtxError, listed, shown
from trtllm_thoughtx.families.fields import Fields

MAX_RANK = 1 << 16
MAX_PATTERNS = 4096
# Settings that change nothing in a trained adapter, or whose effect is in its tensors.
_IGNORED = (
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
    ),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
)
_READ = (
    *("alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r"),
    *("rank_pattern", "trainable_token_indices", "use_dora", "use_rslora"),
)
_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # initial values that leave the base model as it is
# A pattern is a regular expression from a file: plain enough that no name can make it run long.
_PATTERN = re.compile(r"(?:[\w.^$|()\[\]-]|\\[.dw]|[.\]dw][*+](?![*+?{])){1,200}")
_MOST_REPEATS = 2
EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class AdapterConfig:
    """What the tensors of an adapter mean. Modules are named as Hugging Face names them."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]  # by pattern; the first that matches the end of a module's name counts
    alphas: Mapping[str, float]
    use_rslora: bool  # divide by the root of the rank
    use_dora: bool
    bias: str  # none | lora_only | all: which biases come with it
    lora_bias: bool  # the products have biases
    whole: tuple[str, ...]  # ends of names of modules whose tensors are replaced
    token_ids: tuple[int, ...]  # whose rows of the embedding are replaced

    def rank_of(self, module: str) -> int:
        return next((rank for pattern, rank in self.ranks.items() if _matches(pattern, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        return next((alpha for pattern, alpha in self.alphas.items() if _matches(pattern, module)), self.alpha)

    def scale_of(self, module: str) -> float:
        """The factor of a module's product."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def read_adapter_config(raw: object, where: str) -> AdapterConfig:
    """E102: malformed; E103: valid for PEFT, and not merged here."""
    fields = Fields(raw, where)
    kind = fields.text("peft_type", "")
    if kind != "LORA":
        fields.unsupported(f"peft_type {shown(kind)} is not supported", "LORA adapters are read", "merge it with peft, and give the result")
    _refuse(fields)
    bias = fields.text("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        fields.wrong("bias", f"is {shown(bias)}, wanted none, all or lora_only")
    return AdapterConfig(
        rank=fields.integer("r", 1, MAX_RANK, 8),
        alpha=fields.number("lora_alpha", -1e6, 1e6, 8),
        ranks={name: table.integer(name, 1, MAX_RANK) for name, table in _patterns(fields, "rank_pattern")},
        alphas={name: table.number(name, -1e6, 1e6) for name, table in _patterns(fields, "alpha_pattern")},
        use_rslora=fields.boolean("use_rslora", False),
        use_dora=fields.boolean("use_dora", False),
        bias=bias,
        lora_bias=fields.boolean("lora_bias", False),
        whole=_names(fields, "modules_to_save"),
        token_ids=_token_ids(fields),
    )


def _refuse(fields: Fields) -> None:
    start = fields.get("init_lora_weights", True)
    if not any(start is one or (isinstance(one, str) and start == one) for one in _STARTS):
        fields.unsupported(
            f"init_lora_weights {shown(start)} is not supported",
            "such an adapter belongs to a base model that was changed when its training began",
            "save it for the original base: peft's save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    others = [name for name, value in fields.raw.items() if name not in (*_IGNORED, *_READ) and value not in (None, False, "", [], {})]
    if others:
        raise ThoughtxError(
            "E103",
            f"the adapter has settings that are not implemented: {', '.join(shown(name, 60) for name in others[:8])}",
            where=fields.where,
            why=listed([f"{shown(name, 60)}: {shown(fields.raw[name], 100)}" for name in others]),
            fix="merge it with peft (model.merge_and_unload(), then save_pretrained), and give the result as the checkpoint",
        )


def _patterns(fields: Fields, key: str) -> list[tuple[str, Fields]]:
    table = fields.table(key)
    if table is None:
        return []
    if len(table.raw) > MAX_PATTERNS:
        fields.wrong(key, f"has {len(table.raw)} entries, wanted at most {MAX_PATTERNS}")
    for pattern in table.raw:
        is_plain = _PATTERN.fullmatch(pattern) and len(re.findall(r"[*+]", pattern)) <= _MOST_REPEATS
        try:
            re.compile(pattern)
        except re.error:
            is_plain = None
        if not is_plain:
            table.wrong(pattern, f"is no pattern that is read: names of modules, with at most {_MOST_REPEATS} of .* and \\d+")
    return [(pattern, table) for pattern in table.raw]


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    given = fields.get(key, [])
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given) or len(given) > MAX_PATTERNS:
        fields.wrong(key, "is not a list of names")
    return tuple(given)


def _token_ids(fields: Fields) -> tuple[int, ...]:
    """E103 for rows of anything but the embedding."""
    given = fields.get("trainable_token_indices", [])
    if isinstance(given, dict):
        if set(given) - {"embed_tokens", EMBEDDING}:
            what = f"trainable_token_indices of {shown(', '.join(given))} is not supported"
            fields.unsupported(what, "rows of embed_tokens are replaced", "merge it with peft, and give the result")
        given = next(iter(given.values()), [])
    if not isinstance(given, list) or not all(type(one) is int and 0 <= one < 1 << 31 for one in given) or len(set(given)) < len(given):
        fields.wrong("trainable_token_indices", "is not a list of different token ids")
    return tuple(given)
