"""What a request asks for (`GenerationParams`), and what of it a checkpoint's generation_config.json says.

The file is data of a stranger: a value that is odd, and a setting that is not supported, is passed over and named (`unused_settings`), so
that it never stands in the way of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from trtllm_thoughtx.config import AUTO, EXIT_POLICIES
from trtllm_thoughtx.errors import ThoughtxError, shown

MAX_IDS = 1024  # stop ids
MAX_STOPS = 256  # stop strings, of so many characters at most
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
THINKING = ("max_reasoning_depth", "max_thinking_tokens", "exit_threshold", "exit_probe", "probe_agree", "probe_tokens")
DRAFTS = ("exit_policy", "draft_threshold", "prompt_lookup")
# What transformers assumes where a generation_config.json is silent.
DEFAULTS: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
# Settings of a generation_config.json that would change the tokens and are not applied here, with their neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (),
    "diversity_penalty": (0.0,),
    "num_return_sequences": (1,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
    "max_time": (),
}


@dataclass(frozen=True, kw_only=True)
class GenerationParams:
    """What one request asks for. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch those filters off, as 1 does the
    repetition penalty (on all tokens of prompt and answer) and 0 the other two (on tokens of the answer): see `sampling`.

    `stop_ids` end a row once generated; `ignore_eos` switches them off, and not `stop_token_ids` and the strings of `stop`, which are no
    part of the text. `num_return_sequences` answers are drawn from different random streams. `logprobs`: of so many of the likeliest tokens
    at each place, and of the one that was written (None: not asked for). `max_reasoning_depth` steps and `max_thinking_tokens` at most
    stand between the thinking tags (None: as many as the model likes). The thinking also ends behind a step where the engine's exit head
    says `exit_threshold` ("auto": as calibrated), or where the last `probe_agree` probe answers of up to `probe_tokens` tokens agree
    with a confidence of `exit_probe`. `exit_policy` says what becomes of drafted tokens, `draft_threshold` how confident a draft must
    be (None: the engine's): see `drafts`. `prompt_lookup`: at most so many tokens are drafted from what stands in the request already
    (0: none). Wrong values raise E001 naming the flag.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    stop_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    num_return_sequences: int = 1
    logprobs: int | None = None
    max_reasoning_depth: int | None = None
    max_thinking_tokens: int | None = None
    exit_threshold: float | str | None = None
    exit_probe: float | None = None
    probe_agree: int = 2
    probe_tokens: int = 16
    exit_policy: str = "auto"
    draft_threshold: float | None = None
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        for name, kind, is_good, wanted in _RULES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not _is_right(value, kind, is_good):
                raise ThoughtxError(
                    "E001",
                    f"--{name} must be {wanted}, not {shown(value, 60)}",
                    where=f"--{name}",
                    why="the value has another type or is out of range",
                    fix=f"give {wanted}",
                )
        for name in ("temperature", "top_p", "min_p", *PENALTIES):
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.num_return_sequences > 1 and self.is_greedy:
            what = f"--num_return_sequences {self.num_return_sequences} needs sampling"
            why = "decoding is greedy, so that all of them would be the same"
            raise ThoughtxError("E001", what, where="--num_return_sequences", why=why, fix="give a --temperature above 0 as well")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return tuple(getattr(self, name) for name in PENALTIES) != (1, 0, 0)

    @property
    def thinking_flags(self) -> dict[str, Any]:
        """The settings that may end the thinking, those that are set."""
        names = ("max_reasoning_depth", "max_thinking_tokens", "exit_threshold", "exit_probe")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def engine_flags(self) -> dict[str, Any]:
        """The settings that only an engine can follow, those that are set."""
        drafts: dict[str, Any] = {"exit_policy": self.exit_policy} if self.exit_policy != AUTO else {}
        drafts |= {"prompt_lookup": self.prompt_lookup} if self.prompt_lookup else {}
        return {**self.thinking_flags, **drafts, **({} if self.draft_threshold is None else {"draft_threshold": self.draft_threshold})}

    @property
    def thinks_nothing(self) -> bool:
        """A budget of nothing: the answer comes at once."""
        return 0 in (self.max_reasoning_depth, self.max_thinking_tokens)

    @property
    def stops(self) -> frozenset[int]:
        """The ids that end a row, `ignore_eos` considered."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(self.stop_ids))

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, Any], **overrides: Any) -> GenerationParams:
        """The checkpoint's own settings, with `overrides` (fields of this class) on top; an override of None changes nothing.

        Without `do_sample` the answer is greedy, as in transformers; overriding `temperature` then switches sampling on, with
        the config's filters or transformers' defaults. What is odd in the config is passed over; a bad override is E001.
        """
        known = {f.name for f in fields(cls)}
        assert known >= overrides.keys(), overrides.keys() - known
        value = _applied(raw)[0]
        if not value.pop("do_sample"):
            value["temperature"] = 0.0
        return cls(**{**value, **{name: given for name, given in overrides.items() if given is not None}})


def _applied(raw: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields that a generation_config.json sets, `do_sample` among them, and the names of those whose values are odd."""
    value, odd = dict(DEFAULTS), []
    for name in (*DEFAULTS, "max_new_tokens"):
        given = raw.get(name)
        if given is None:
            continue
        if isinstance(given, bool) if name == "do_sample" else _is_right(given, *_RULE[name]):
            value[name] = given
        else:
            odd.append(name)
    value["stop_ids"] = token_ids(raw, "eos_token_id")
    odd += [f"{name}_token_id" for name in ("bos", "eos", "pad") if len(token_ids(raw, f"{name}_token_id")) != len(_several(raw, name))]
    if (given := raw.get("stop_strings")) is not None:
        strings = tuple(given) if isinstance(given, list) else (given,)
        if _are_stops(strings):
            value["stop"] = strings
        else:
            odd.append("stop_strings")
    return value, tuple(odd)


def _several(raw: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    value = raw.get(f"{name}_token_id")
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def token_ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A field of a config file that holds one token id, several, or none; what is no token id is passed over."""
    value = raw.get(key)
    given: list[Any] = value if isinstance(value, list) else [value]
    return tuple(i for i in given[:MAX_IDS] if _are_ids([i]))


def unused_settings(raw: Mapping[str, Any], given: Collection[str] = ()) -> tuple[str, ...]:
    """Settings in a generation_config.json that would change the answer in transformers and are not applied here, because they are not
    supported or their values are odd; `given` are the fields that flags set in their place."""
    flags = {"stop": "stop_strings"}
    replaced = {flags.get(name, name) for name in given}
    unsupported = (name for name, neutral in NEUTRAL.items() if raw.get(name) is not None and raw[name] not in neutral)
    return tuple(name for name in (*_applied(raw)[1], *unsupported) if name not in replaced)


def _is_right(value: object, kind: Any, is_good: Callable[[Any], bool]) -> bool:
    return isinstance(value, bool) == (kind is bool) and isinstance(value, kind) and is_good(value)


def _are_ids(value: Sequence[object]) -> bool:
    return len(value) <= MAX_IDS and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in value)


def _are_stops(value: Sequence[object]) -> bool:
    return len(value) <= MAX_STOPS and all(isinstance(text, str) and 1 <= len(text) <= MAX_STOPS for text in value)


# field, type, test, what is wanted; a test may assume the type
_RULES: tuple[tuple[str, Any, Any, str], ...] = (
    ("max_new_tokens", int, lambda v: 1 <= v < 2**31, "a whole number from 1"),
    ("temperature", (int, float), lambda v: math.isfinite(v) and 0 <= v <= 100, "a number from 0 (greedy) to 100"),
    ("top_k", int, lambda v: 0 <= v < 2**31, "a whole number from 0 (off)"),
    ("top_p", (int, float), lambda v: 0 < v <= 1, "a number above 0 and at most 1 (off)"),
    ("seed", int, lambda v: 0 <= v < 2**64, "a whole number from 0 to 2**64 - 1"),
    ("ignore_eos", bool, lambda v: True, "true or false"),
    ("stop_ids", tuple, _are_ids, f"a tuple of at most {MAX_IDS} token ids"),
    ("min_p", (int, float), lambda v: 0 <= v <= 1, "a number from 0 (off) to 1"),
    ("repetition_penalty", (int, float), lambda v: 0.01 <= v <= 100, "a number from 0.01 to 100 (1 is off)"),
    ("presence_penalty", (int, float), lambda v: -2 <= v <= 2, "a number from -2 to 2 (0 is off)"),
    ("frequency_penalty", (int, float), lambda v: -2 <= v <= 2, "a number from -2 to 2 (0 is off)"),
    ("stop", tuple, _are_stops, f"a tuple of at most {MAX_STOPS} texts of 1 to {MAX_STOPS} characters"),
    ("stop_token_ids", tuple, _are_ids, f"a tuple of at most {MAX_IDS} token ids"),
    ("num_return_sequences", int, lambda v: 1 <= v <= 1024, "a whole number from 1 to 1024"),
    ("logprobs", int, lambda v: 0 <= v <= 1000, "a whole number from 0 to 1000"),
    ("max_reasoning_depth", int, lambda v: 0 <= v < 2**31, "a whole number from 0 (answer at once)"),
    ("max_thinking_tokens", int, lambda v: 0 <= v < 2**31, "a whole number from 0 (answer at once)"),
    ("exit_threshold", (int, float, str), lambda v: v == AUTO or (not isinstance(v, str) and 0 <= v <= 1), "a number from 0 to 1, or auto"),
    ("exit_probe", (int, float), lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    ("probe_agree", int, lambda v: 1 <= v <= 1000, "a whole number from 1 to 1000"),
    ("probe_tokens", int, lambda v: 1 <= v <= 4096, "a whole number from 1 to 4096"),
    ("exit_policy", str, lambda v: v in EXIT_POLICIES, f"one of {', '.join(EXIT_POLICIES)}"),
    ("draft_threshold", (int, float), lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    ("prompt_lookup", int, lambda v: 0 <= v <= 64, "a whole number from 0 (off) to 64"),
)
_RULE = {name: (kind, is_good) for name, kind, is_good, _ in _RULES}
_OPTIONAL = ("logprobs", "max_reasoning_depth", "max_thinking_tokens", "exit_threshold", "exit_probe", "draft_threshold")
