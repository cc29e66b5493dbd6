"""Attention over NumPy arrays with the kernels of this plugin: flash attention, and its form for grouped queries."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import ConfigError, OutOfMemoryError
from ruvllm_kernels_neon.library import load

FloatArray = npt.NDArray[np.float32]
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class AttentionConfig:
    """Shapes and rules of `grouped_query_attention_neon`.

    Attributes:
        num_heads: query heads H.
        num_kv_heads: key/value heads K; H / K query heads share one (arXiv 2305.13245).
        head_dim: D.
        causal: whether a query sees only keys up to its own position; the T queries are the last of the S positions.
        scale: of the scores; None means 1 / sqrt(D).
        window: how many of the latest keys, its own included, a query sees; None means all. Needs `causal`.
        softcap: scores become softcap * tanh(score / softcap); None means they stay.

    Raises `ConfigError` for values that make no sense.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 < value <= _LARGEST:
                raise ConfigError(f"AttentionConfig.{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"AttentionConfig: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads",
                hint="num_heads must be a multiple of num_kv_heads",
            )
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ConfigError(
                f"AttentionConfig.window {self.window} with causal={self.causal}",
                hint="a window is at least 1, and only causal attention has one",
            )
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise ConfigError(f"AttentionConfig.{name} must be positive and finite, got {value!r}")


class _Call(ctypes.Structure):
    """``RvNeonAttention`` of ``native/neon.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_int64) for name in ("tokens", "keys", "window")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "head_dim", "causal")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


def flash_attention_neon(
    query: npt.NDArray[Any], key: npt.NDArray[Any], value: npt.NDArray[Any], scale: float, causal: bool
) -> FloatArray:
    """softmax(scale * query @ key.T) @ value of each head, without ever holding all scores (arXiv 2307.08691).

    Args:
        query: ``[T, D]`` of one head or ``[H, T, D]``; any float type, computed in float32.
        key, value: ``[S, D]`` or ``[H, S, D]``.
        scale: of the scores, usually 1 / sqrt(D).
        causal: whether a query sees only keys up to its own position; the T queries are the last of the S positions.

    Returns:
        An array like `query`, float32.

    Runs on one thread. Raises `ConfigError` for arrays that do not fit together, and `PluginError` where there is no
    ARM64 processor.
    """
    query, key, value = np.asarray(query), np.asarray(key), np.asarray(value)
    if query.ndim == key.ndim == value.ndim == 2:
        return np.asarray(flash_attention_neon(query[None], key[None], value[None], scale, causal)[0])
    for name, one in (("query", query), ("key", key), ("value", value)):
        if one.ndim != 3:
            raise ConfigError(f"{name} has shape {one.shape}", hint="all three are [T, D], or all are [H, T, D]")
    heads, dim = query.shape[0], query.shape[2]
    config = AttentionConfig(heads, heads, dim, causal=bool(causal), scale=float(scale))
    return grouped_query_attention_neon(query, key, value, config)


def grouped_query_attention_neon(
    queries: npt.NDArray[Any], keys: npt.NDArray[Any], values: npt.NDArray[Any], config: AttentionConfig
) -> FloatArray:
    """Attention of H query heads over K key/value heads; those that share one are computed together.

    Args:
        queries: ``[H, T, D]``; any float type, computed in float32.
        keys, values: ``[K, S, D]``.
        config: H, K, D and the rules.

    Returns:
        ``[H, T, D]``, float32.

    Runs on one thread. Raises `ConfigError` for arrays that do not fit `config` or each other, `OutOfMemoryError`, and
    `PluginError` where there is no ARM64 processor.
    """
    query, key, value = _checked(queries, keys, values, config)
    library = load()
    tokens = np.ascontiguousarray(query.transpose(1, 0, 2), dtype=np.float32)
    key, value = (np.ascontiguousarray(one, dtype=np.float32) for one in (key, value))
    out = np.empty_like(tokens)
    call = _Call(
        query=tokens.ctypes.data,
        key=key.ctypes.data,
        value=value.ctypes.data,
        out=out.ctypes.data,
        tokens=len(tokens),
        keys=key.shape[1],
        window=config.window or 0,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        causal=config.causal,
        scale=config.scale if config.scale is not None else config.head_dim**-0.5,
        softcap=config.softcap or 0.0,
    )
    if len(tokens) and library.rvneon_attention(ctypes.byref(call)):
        raise OutOfMemoryError("kernels neon: no memory for attention", hint="pass fewer queries at a time")
    return np.ascontiguousarray(out.transpose(1, 0, 2))


def _checked(queries: Any, keys: Any, values: Any, config: AttentionConfig) -> list[npt.NDArray[Any]]:
    named = {"queries": (queries, config.num_heads), "keys": (keys, config.num_kv_heads)}
    named["values"] = (values, config.num_kv_heads)
    found = []
    for name, (array, heads) in named.items():
        one = np.asarray(array)
        if one.dtype.kind != "f":
            raise ConfigError(f"{name} must be floats, got {one.dtype}")
        if one.ndim != 3 or one.shape[0] != heads or one.shape[2] != config.head_dim or one.shape[1] > _LARGEST:
            raise ConfigError(f"{name} must be [{heads}, length, {config.head_dim}], got {list(one.shape)}")
        found.append(one)
    tokens, length = found[0].shape[1], found[1].shape[1]
    if found[2].shape[1] != length:
        raise ConfigError(f"{length} keys but {found[2].shape[1]} values")
    if tokens and (not length or (config.causal and tokens > length)):
        raise ConfigError(
            f"{tokens} queries for {length} keys",
            hint="causal queries are the last of the keys' positions: there cannot be more of them",
        )
    return found
