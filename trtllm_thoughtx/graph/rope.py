"""Cosine and sine tables of the rotary embedding: none, linear, YaRN, llama3.

The tables are computed in float32 exactly as transformers does (inverse frequencies, then position * frequency), so that an
engine's rotary values equal the reference's, and are stored in the graph's own type.

Sources: RoFormer (arXiv 2104.09864); linear interpolation (arXiv 2306.15595); YaRN (arXiv 2309.00071), sections 3.2 and 3.4;
llama3 frequency bands as published with Llama 3.1.
"""

from __future__ import annotations

import math

import numpy as np

from trtllm_thoughtx.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_position: int) -> tuple[np.ndarray, float]:
    """float32 [head_dim / 2], and the factor that scales both tables (1 except for YaRN)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    plain = (np.float32(1.0) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)).astype(np.float32)
    if rope.kind == "none":
        return plain, 1.0
    if rope.kind == "linear":
        return (plain / np.float32(rope.factor)).astype(np.float32), 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(plain, rope, head_dim, max_position)
    raise AssertionError(rope.kind)


def _llama3(plain: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = (2 * math.pi / plain).astype(np.float32)
    longest, shortest = rope.original_max_position / rope.low_freq_factor, rope.original_max_position / rope.high_freq_factor
    stretched = np.where(wavelength > longest, plain / np.float32(rope.factor), plain).astype(np.float32)
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * stretched / rope.factor + blend * stretched
    between = (wavelength >= shortest) & (wavelength <= longest)
    return np.where(between, blended, stretched).astype(np.float32)


def _yarn(plain: np.ndarray, rope: RopeConfig, head_dim: int, max_position: int) -> tuple[np.ndarray, float]:
    original = rope.original_max_position or max_position

    def correction(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # transformers' guard against a division by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    keep = (1 - ramp).astype(np.float32)
    frequencies = (plain / np.float32(rope.factor)) * (1 - keep) + plain * keep
    return frequencies.astype(np.float32), _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor)


def tables(rope: RopeConfig, head_dim: int, max_position: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), float32 [length, head_dim / 2]; `max_position` is the checkpoint's, `length` the engine's."""
    frequencies, scale = inverse_frequencies(rope, head_dim, max_position)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale)
