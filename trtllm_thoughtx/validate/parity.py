"""When are two sets of numbers the same model: the prompts to try, the rounding band, and the verdict.

The truth is the reference in a wider type than the engine's: float64 for float32 engines, float32 for 16-bit ones. The band is
how far the reference in the engine's own type is from that truth, so it measures rounding on this very model and prompt,
whatever its depth and scale. An engine rounds in other places than the reference does, so its error is not the same number; it
passes within a factor of it. Both the rms and the largest error must pass: the rms is steady and catches small errors
everywhere, the largest catches one wrong row, which an rms over many rows would hide.

A prompt's band is the larger of its own and, scaled to its size, the one pooled over all prompts: one token has
too few numbers for a steady rms. No band is taken to be below one rounding of the tensor itself.

Measured on onnxruntime (CPU), 1,300 checks a type over 32 checkpoints: random ones, two of them 24 layers deep, three as transformers
initializes them, a trained one. The worst right engine, and the mildest of the faults that tests/validate/test_validate.py plants:

| type     | right: rms / band | right: largest / band | wrong mask | rotary theta x 2 | norm epsilon x 10 | a weight off by 1 % |
|----------|-------------------|-----------------------|------------|------------------|-------------------|---------------------|
| float32  | 2.2               | 2.0                   | 7e5        | 5e5              | 23                | 340                 |
| float16  | 1.4               | 2.3                   | 165        | 104              | not seen          | not seen            |
| bfloat16 | 1.4               | 1.9                   | 21         | 13               | not seen          | not seen            |

So the limits leave a factor of about two to a right engine. The last columns are why a 16-bit engine should have a float32 sibling
that passes too: faults smaller than 16-bit rounding are invisible behind it, whatever the limit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trtllm_thoughtx.config import BuildConfig, ModelConfig
from trtllm_thoughtx.validate.golden import Band, ChunkSpec, Prompt, Truth

RMS_FACTOR = {"float32": 4.0, "float16": 2.5, "bfloat16": 2.5}
MAX_FACTOR = {"float32": 6.0, "float16": 4.5, "bfloat16": 4.5}
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
WIDER = {"float32": "float64", "float16": "float32", "bfloat16": "float32"}

TRIAL_CHUNK = 16  # boundaries are tried at this chunk size when the engine's own is larger; the size is a run-time input
MAX_LENGTH = 2560  # of the one prompt that uses the engine's own chunk size
FILL_LENGTH = 512  # an engine of at most this max_seq_len is filled to the brim
MAX_VALUES = 2 << 20  # logits kept per prompt; a large vocabulary leaves fewer rows
MIN_ROWS = 12
NUM_DECODED = 40  # tokens of a prompt that are decoded one at a time


# --- prompts ---------------------------------------------------------------------------------------------------------


def plan_prompts(config: ModelConfig, build: BuildConfig, seed: int) -> tuple[Prompt, ...]:
    """The prompts of one validation: token ids are uniform over the vocabulary, from `seed` alone, and the same for every run."""
    rows: list[tuple[str, int, int | None, ChunkSpec | None]] = []  # name, length, engine's chunk size, reference's mask
    if build.use_chunked_attention:
        trial = min(build.chunk_size, TRIAL_CHUNK)

        def row(name: str, length: int, size: int) -> None:
            rows.append((name, length, size, ChunkSpec(size, build.sink_tokens, build.left_chunks, build.num_anchors)))

        lengths = {"one": 1, "below": trial - 1, "at": trial, "past": trial + 1, "second": 2 * trial + 1}
        for name, length in {**lengths, "far": _first_cut(trial, build) + trial + 1}.items():
            row(name, length, trial)
        if build.chunk_size > trial:
            row("own", min(_first_cut(build.chunk_size, build) + 2, MAX_LENGTH), build.chunk_size)
        uncut = min(2 * trial + 1, build.max_chunk_size) if build.is_bounded else 2 * trial + 1
        rows.append(("uncut", uncut, uncut, None))  # a chunk that holds everything is full attention
        if build.max_seq_len <= FILL_LENGTH:
            row("brim", build.max_seq_len, trial)
    else:
        lengths = {"one": 1, "few": 7, "some": 33, "piece": min(build.max_input_len + 1, FILL_LENGTH)}
        lengths |= {"brim": build.max_seq_len} if build.max_seq_len <= FILL_LENGTH else {}
        rows = [(name, length, None, None) for name, length in lengths.items()]
    prompts, seen = [], set()
    for index, (name, length, size, mask) in enumerate(rows):
        length = min(length, build.max_seq_len)
        if length < 1 or (length, size, mask) in seen:
            continue
        seen.add((length, size, mask))
        ids = np.random.default_rng([seed, index]).integers(0, config.vocab_size, length)
        kept = _rows(length, size or TRIAL_CHUNK, config.vocab_size)
        prompts.append(Prompt(name, tuple(ids.tolist()), kept, size, mask, layers=name in ("one", "past", "far", "few", "some")))
    return tuple(prompts)


def _first_cut(size: int, build: BuildConfig) -> int:
    """The first position whose query no longer sees every earlier key."""
    return (-(-(build.sink_tokens + 1) // size) + build.left_chunks) * size


def _rows(length: int, size: int, vocab: int) -> tuple[int, ...]:
    """Positions to compare: all, or when that is too much the ends, both sides of chunk boundaries, and an even spread."""
    count = max(MIN_ROWS, MAX_VALUES // vocab)
    if length <= count:
        return tuple(range(length))
    edges = [p for boundary in range(size, length, size) for p in (boundary - 1, boundary)]
    spread = np.linspace(0, length - 1, count).round().astype(int).tolist()
    wanted = dict.fromkeys([0, length - 1, *edges[-count // 2 :], length - 2, *spread])
    return tuple(sorted(list(wanted)[:count]))


# --- bands -----------------------------------------------------------------------------------------------------------


def rms(array: np.ndarray) -> float:
    return math.sqrt(float(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0


def peak(array: np.ndarray) -> float:
    return float(np.max(np.abs(array))) if array.size else 0.0


def band_of(truth: np.ndarray, rough: np.ndarray) -> Band:
    """How far `rough`, the reference in the engine's type, is from `truth`."""
    error = rough.astype(np.float64) - truth
    return Band(rms(error), peak(error), rms(truth), peak(truth))


def pooled(truths: Mapping[str, Truth], dtype: str) -> dict[str, Truth]:
    """The same truths with bands widened to what was seen over all prompts, and to one rounding of the tensor."""
    columns: dict[int, list[Band]] = {}
    for truth in truths.values():
        for depth, band in enumerate((truth.logits_band, *truth.hidden_bands)):
            columns.setdefault(depth, []).append(band)
    shares = {depth: _shares(bands, dtype) for depth, bands in columns.items()}

    def widen(depth: int, band: Band) -> Band:
        of_rms, of_peak = shares[depth]
        return Band(max(band.rms, of_rms * band.scale), max(band.peak, of_peak * band.top), band.scale, band.top)

    return {
        name: dataclasses.replace(
            truth,
            logits_band=widen(0, truth.logits_band),
            hidden_bands=tuple(widen(depth, band) for depth, band in enumerate(truth.hidden_bands, 1)),
        )
        for name, truth in truths.items()
    }


def _shares(bands: Sequence[Band], dtype: str) -> tuple[float, float]:
    """Band over size of the tensor, of all prompts together, at least one rounding."""
    scale = math.sqrt(sum(b.scale**2 for b in bands))
    top = max(b.top for b in bands)
    of_rms = math.sqrt(sum(b.rms**2 for b in bands)) / scale if scale else 0.0
    of_peak = max(b.peak for b in bands) / top if top else 0.0
    return max(of_rms, ROUNDOFF[dtype]), max(of_peak, ROUNDOFF[dtype])


# --- verdict ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One comparison. Ratios are error over band; `num_bad` counts numbers that are not finite."""

    rms_error: float
    rms_band: float
    rms_ratio: float
    max_error: float
    max_band: float
    max_ratio: float
    num_bad: int
    ok: bool

    @property
    def reason(self) -> str:
        if self.num_bad:
            return f"{self.num_bad} numbers are not finite"
        return f"error is {self.rms_ratio:.3g} x the rounding band (rms) and {self.max_ratio:.3g} x (largest)"


def compare(got: np.ndarray, truth: np.ndarray, band: Band, dtype: str) -> Verdict:
    """Is `got` within the stated factors of `band` around `truth`? Shapes must agree."""
    assert got.shape == truth.shape, (got.shape, truth.shape)
    num_bad = int(np.count_nonzero(~np.isfinite(got)))
    error = np.nan_to_num(got.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) - truth
    size, largest = rms(error), peak(error)
    ratio, max_ratio = _ratio(size, band.rms), _ratio(largest, band.peak)
    ok = not num_bad and ratio <= RMS_FACTOR[dtype] and max_ratio <= MAX_FACTOR[dtype]
    return Verdict(size, band.rms, ratio, largest, band.peak, max_ratio, num_bad, ok)


def _ratio(error: float, band: float) -> float:
    return error / band if band else (0.0 if error == 0 else math.inf)
