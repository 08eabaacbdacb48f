"""Which token comes next: greedy, or temperature, then top-k, then top-p, in the order and with the meaning of transformers.

A row's draw depends on the seed, the row's stream number and the step, and on nothing else: each draw is one block of a
counter-based generator (Philox) keyed by (seed, stream). So a prompt gives the same answer alone and in any batch, at any
batch size, whatever the other rows do. The price is one generator object per draw (about 15 microseconds).

Filtering looks at float32 values; the weights of what is kept, their sum and the draw are float64. Nothing sorts the whole
vocabulary: top-k partitions, and top-p first drops every token that is too unlikely to matter, which is exact (see `_likely`).
Shapes: V vocabulary, B rows of this call, K tokens kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from trtllm_thoughtx.config import AUTO, EXIT_POLICIES
from trtllm_thoughtx.errors import ThoughtxError, shown

MAX_IDS = 1024  # stop ids
THINKING = ("max_reasoning_depth", "max_thinking_tokens", "exit_threshold", "exit_probe", "probe_agree", "probe_tokens")
DRAFTS = ("exit_policy", "draft_threshold")
# What transformers assumes where a generation_config.json is silent.
DEFAULTS: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
# Settings of a generation_config.json that would change the tokens and are not applied here, with their neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
}


@dataclass(frozen=True, kw_only=True)
class GenerationParams:
    """What one request asks for. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off.

    `stop_ids` end a row once generated; `ignore_eos` switches them off. `max_reasoning_depth` steps and `max_thinking_tokens` at most
    stand between the thinking tags (None: as many as the model likes). The thinking also ends behind a step where the engine's exit head
    says `exit_threshold` ("auto": as calibrated), or where the last `probe_agree` trial answers of up to `probe_tokens` tokens agree
    with a confidence of `exit_probe`. `exit_policy` says what becomes of drafted tokens, `draft_threshold` how confident a draft must
    be (None: the engine's): see `drafts`. Wrong values raise E001 naming the flag.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    stop_ids: tuple[int, ...] = ()
    max_reasoning_depth: int | None = None
    max_thinking_tokens: int | None = None
    exit_threshold: float | str | None = None
    exit_probe: float | None = None
    probe_agree: int = 2
    probe_tokens: int = 16
    exit_policy: str = "auto"
    draft_threshold: float | None = None

    def __post_init__(self) -> None:
        for name, kind, is_good, wanted in _RULES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind) or not is_good(value):
                raise ThoughtxError(
                    "E001",
                    f"--{name} must be {wanted}, not {shown(value, 60)}",
                    where=f"--{name}",
                    why="the value has another type or is out of range",
                    fix=f"give {wanted}",
                )
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "top_p", float(self.top_p))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def thinking_flags(self) -> dict[str, Any]:
        """The settings that may end the thinking, those that are set."""
        names = ("max_reasoning_depth", "max_thinking_tokens", "exit_threshold", "exit_probe")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def engine_flags(self) -> dict[str, Any]:
        """The settings that only an engine can follow, those that are set."""
        drafts = {"exit_policy": self.exit_policy} if self.exit_policy != AUTO else {}
        return {**self.thinking_flags, **drafts, **({} if self.draft_threshold is None else {"draft_threshold": self.draft_threshold})}

    @property
    def thinks_nothing(self) -> bool:
        """A budget of nothing: the answer comes at once."""
        return 0 in (self.max_reasoning_depth, self.max_thinking_tokens)

    @property
    def stops(self) -> frozenset[int]:
        """The ids that end a row, `ignore_eos` considered."""
        return frozenset() if self.ignore_eos else frozenset(self.stop_ids)

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, Any], *, where: str = "generation_config.json", **overrides: Any) -> GenerationParams:
        """The checkpoint's own settings, with `overrides` (fields of this class) on top; an override of None changes nothing.

        Without `do_sample` the answer is greedy, as in transformers; overriding `temperature` then switches sampling on, with
        the config's top_k and top_p or transformers' defaults (50, 1.0). A malformed config is E102, a bad override E001.
        """
        known = {f.name for f in fields(cls)}
        assert known >= overrides.keys(), overrides.keys() - known
        given = {name: value for name, value in overrides.items() if value is not None}
        value = {name: default if raw.get(name) is None else raw[name] for name, default in DEFAULTS.items()}
        if not isinstance(value["do_sample"], bool):
            raise _malformed(where, "do_sample", value["do_sample"], "true or false")
        if raw.get("max_new_tokens") is not None:
            value["max_new_tokens"] = raw["max_new_tokens"]
        value["stop_ids"] = token_ids(raw, "eos_token_id", where)
        do_sample = value.pop("do_sample")
        for name, kind, is_good, wanted in _RULES:
            if name in value and (isinstance(value[name], bool) or not isinstance(value[name], kind) or not is_good(value[name])):
                raise _malformed(where, name, value[name], wanted)
        if not do_sample:
            value["temperature"] = 0.0
        return cls(**{**value, **given})


def token_ids(raw: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """A field of generation_config.json that holds one token id, several, or none; E102 when it holds anything else."""
    value = raw.get(key)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not _are_ids(ids):
        raise _malformed(where, key, value, f"a token id or a list of at most {MAX_IDS}")
    return ids


def unused_settings(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings in a generation_config.json that change the tokens in transformers and are not applied here."""
    return tuple(name for name, neutral in NEUTRAL.items() if raw.get(name) is not None and raw[name] not in neutral)


class Sampler:
    """Picks the next token of each row and counts the steps of each.

    `params`: for all rows, or one for each. `streams` names each row's random stream (default 0 .. num_rows - 1). When a request is
    cut into several batches, give each row its number in the request: then the cutting does not change the answer.
    """

    def __init__(self, params: GenerationParams | Sequence[GenerationParams], num_rows: int, streams: Sequence[int] | None = None) -> None:
        self.params = [params] * num_rows if isinstance(params, GenerationParams) else list(params)
        self.streams = tuple(range(num_rows) if streams is None else streams)
        assert len(self.streams) == num_rows, (len(self.streams), num_rows)
        self._steps = [0] * num_rows

    def pick(self, logits: np.ndarray, rows: Sequence[int] | None = None) -> np.ndarray:
        """int64[B] from float[B, V]; of equal logits the greedy choice is the lowest id.

        `rows` says which rows of this sampler the B rows are (default: all, in order). E123 names a row that is not finite.
        """
        rows = range(len(self.streams)) if rows is None else rows
        assert logits.ndim == 2 and logits.shape[0] == len(rows) and logits.shape[1] > 0, (logits.shape, len(rows))
        logits = np.asarray(logits, dtype=np.float32)
        for row, values in zip(rows, logits, strict=True):
            if not np.isfinite(values).all():
                raise _nonfinite(row, self._steps[row], values)
        chosen = np.array([self._choose(row, values) for row, values in zip(rows, logits, strict=True)], np.int64)
        for row in rows:
            self._steps[row] += 1
        return chosen

    def guess(self, row: int, num_ahead: int, logits: np.ndarray) -> int:
        """What `pick` would give for float[V] after `num_ahead` more steps of the row. Nothing advances; any values are taken."""
        if not np.isfinite(logits).all():
            return int(logits.argmax())
        return self._choose(row, np.asarray(logits, np.float32), num_ahead)

    def _choose(self, row: int, logits: np.ndarray, num_ahead: int = 0) -> int:
        params = self.params[row]
        if params.is_greedy:
            return int(logits.argmax())
        ids, probs = distribution(logits, params)
        sums = probs.cumsum()
        number = uniform(params.seed, self.streams[row], self._steps[row] + num_ahead)
        place = sums.searchsorted(number * sums[-1], side="right")
        return int(ids[min(int(place), len(ids) - 1)])


def distribution(logits: np.ndarray, params: GenerationParams) -> tuple[np.ndarray, np.ndarray]:
    """What a draw from finite float32[V] may give: ids int64[K] in rising order, and their probabilities float64[K].

    Tokens that tie with the k-th are kept, as in transformers. At the edge of top-p, where transformers leaves ties to its
    sort, the lowest ids stay.
    """
    if params.is_greedy:
        return np.array([logits.argmax()], np.int64), np.ones(1)
    temperature = max(params.temperature, 1e-30)  # below, float32 would divide by zero; the result is the same
    top, size = float(logits.max()), logits.size
    tail = 0.0
    if 0 < params.top_k < size:
        ids = np.flatnonzero(logits >= np.partition(logits, size - params.top_k)[size - params.top_k])
    elif params.top_p < 1:
        ids, tail = _likely(logits, temperature, 1 - params.top_p)
    else:
        weights = _weights(logits, top, temperature)
        weights /= weights.sum()
        return np.arange(size), weights
    if params.top_p < 1:
        values = logits[ids]
        rising = np.sort(values)
        sums = tail + np.cumsum(_weights(rising, top, temperature))
        first = min(int(sums.searchsorted((1 - params.top_p) * sums[-1], side="right")), len(ids) - 1)
        above, equal = ids[values > rising[first]], ids[values == rising[first]]
        ids = np.sort(np.concatenate([above, equal[: len(ids) - first - len(above)]]))
    weights = _weights(logits[ids], top, temperature)
    return ids, weights / weights.sum()


def log_probability(logits: np.ndarray, token: int) -> float:
    """Natural logarithm of the softmax of float[V] at `token`."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return float(shifted[token] - np.log(np.exp(shifted).sum()))


def uniform(seed: int, stream: int, step: int) -> float:
    """A number in [0, 1), a pure function of its arguments (each below 2**64)."""
    key, counter = np.array([seed, stream], np.uint64), np.array([0, step, 0, 0], np.uint64)
    return (int(np.random.Philox(key=key, counter=counter).random_raw()) >> 11) * 2.0**-53


def _weights(logits: np.ndarray, top: float, temperature: float) -> np.ndarray:
    """Unnormalised softmax, float64; the largest is 1."""
    weights = logits.astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        weights -= top
        weights /= temperature
        return np.exp(weights, out=weights)


def _likely(logits: np.ndarray, temperature: float, cut: float) -> tuple[np.ndarray, float]:
    """The ids that top-p may keep, and the summed weight of the others.

    Top-p removes the least likely tokens while their sum is at most `cut` of the total. All tokens whose weight is below
    cut * total / V together weigh less than that, so each of them is removed, and only the rest need sorting. float32 is
    enough to say so with the 0.999 as margin.
    """
    with np.errstate(over="ignore", under="ignore"):
        rough = logits - logits.max()
        rough /= np.float32(temperature)
        np.exp(rough, out=rough)
    total = float(rough.sum(dtype=np.float64))
    ids = np.flatnonzero(rough > np.float32(0.999 * cut * total / logits.size))
    return ids, max(0.0, total - float(rough[ids].sum(dtype=np.float64)))


def _nonfinite(row: int, step: int, values: np.ndarray) -> ThoughtxError:
    bad = np.flatnonzero(~np.isfinite(values))
    return ThoughtxError(
        "E123",
        f"row {row}: {len(bad)} of {values.size} logits are not finite (first: id {bad[0]} is {values[bad[0]]})",
        where=f"row {row}, new token {step}",
        why="the numbers left the range of the engine's type (float16 ends at 65504), or the weights are damaged",
        fix="build the engine with more range (thoughtx-build --dtype float32) and compare it with its checkpoint (thoughtx-validate)",
    )


def _malformed(where: str, key: str, value: object, wanted: str) -> ThoughtxError:
    return ThoughtxError(
        "E102",
        f"{key} must be {wanted}, not {shown(value, 60)}",
        where=where,
        why="the sampling settings come from this file unless flags replace them",
        fix="correct it or remove it in generation_config.json, or give the flag",
    )


def _are_ids(value: Sequence[object]) -> bool:
    return len(value) <= MAX_IDS and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in value)


# field, type, test, what is wanted; a test may assume the type
_RULES: tuple[tuple[str, Any, Any, str], ...] = (
    ("max_new_tokens", int, lambda v: 1 <= v < 2**31, "a whole number from 1"),
    ("temperature", (int, float), lambda v: math.isfinite(v) and 0 <= v <= 100, "a number from 0 (greedy) to 100"),
    ("top_k", int, lambda v: 0 <= v < 2**31, "a whole number from 0 (off)"),
    ("top_p", (int, float), lambda v: 0 < v <= 1, "a number above 0 and at most 1 (off)"),
    ("seed", int, lambda v: 0 <= v < 2**64, "a whole number from 0 to 2**64 - 1"),
    ("ignore_eos", bool, lambda v: True, "true or false"),
    ("stop_ids", tuple, _are_ids, f"a tuple of at most {MAX_IDS} token ids"),
    ("max_reasoning_depth", int, lambda v: 0 <= v < 2**31, "a whole number from 0 (answer at once)"),
    ("max_thinking_tokens", int, lambda v: 0 <= v < 2**31, "a whole number from 0 (answer at once)"),
    ("exit_threshold", (int, float, str), lambda v: v == AUTO or (not isinstance(v, str) and 0 <= v <= 1), "a number from 0 to 1, or auto"),
    ("exit_probe", (int, float), lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    ("probe_agree", int, lambda v: 1 <= v <= 1000, "a whole number from 1 to 1000"),
    ("probe_tokens", int, lambda v: 1 <= v <= 4096, "a whole number from 1 to 4096"),
    ("exit_policy", str, lambda v: v in EXIT_POLICIES, f"one of {', '.join(EXIT_POLICIES)}"),
    ("draft_threshold", (int, float), lambda v: 0 <= v <= 1, "a number from 0 to 1"),
)
_OPTIONAL = ("max_reasoning_depth", "max_thinking_tokens", "exit_threshold", "exit_probe", "draft_threshold")
