"""Rotary position tables (RoFormer, arXiv 2104.09864) with every scaling rule of `RopeScaling`."""

from __future__ import annotations

import math

import numpy as np

from ruvllm_core.model.spec import ModelSpec, RopeScaling
from ruvllm_core.protocols import FloatArray


def inverse_frequencies(spec: ModelSpec, variant: int) -> tuple[FloatArray, float]:
    """Radians per position of each rotated pair, float32 ``[rope_dim / 2]``, and the factor on cos and sin."""
    scaling, half = spec.rope_scaling, spec.rope_dim // 2
    # float32 throughout, as in the training code of these models: the rounding is part of what they learned.
    exponents = np.arange(half, dtype=np.float32) * np.float32(2.0) / np.float32(spec.rope_dim)
    base = (1.0 / np.power(np.float32(spec.rope_theta), exponents)).astype(np.float32)
    factor = scaling.attention_factor
    if scaling.kind == "yarn":
        return _yarn(base, spec), 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor
    if scaling.kind == "longrope":
        divisors = np.asarray(scaling.long_factors if variant else scaling.short_factors, dtype=np.float32)
        if factor is None:
            stretch = math.log(scaling.factor) / math.log(scaling.original_context) if scaling.factor > 1 else 0.0
            factor = math.sqrt(1.0 + stretch)
        return base / divisors, factor
    if scaling.freq_factors:
        base = base / np.asarray(scaling.freq_factors, dtype=np.float32)
    elif scaling.kind == "llama3":
        base = _llama3(base, scaling)
    elif scaling.kind == "linear":
        base = base / np.float32(scaling.factor)
    return base, 1.0 if factor is None else factor


def rope_tables(spec: ModelSpec, variant: int, positions: int) -> tuple[FloatArray, FloatArray]:
    """cos and sin for positions 0 … `positions` - 1, float32 ``[positions, rope_dim / 2]`` each."""
    frequencies, factor = inverse_frequencies(spec, variant)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)


def _llama3(base: FloatArray, scaling: RopeScaling) -> FloatArray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended (Llama 3.1's release code)."""
    wavelengths = 2.0 * math.pi / base
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((scaling.original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    return ((1.0 - blend) * base / scaling.factor + blend * base).astype(np.float32)


def _yarn(base: FloatArray, spec: ModelSpec) -> FloatArray:
    """Interpolate slow pairs, keep fast ones, with a linear ramp between (arXiv 2309.00071, section 3.2)."""
    scaling, dim = spec.rope_scaling, spec.rope_dim

    def pair_of(rotations: float) -> float:
        return dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0.0, 1.0)
    return (base / scaling.factor * ramp + base * (1.0 - ramp)).astype(np.float32)
