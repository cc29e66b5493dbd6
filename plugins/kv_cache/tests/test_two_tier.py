"""The policy ``two_tier`` under a model: accuracy, independence of batches, memory, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from ruvllm_core import machine
from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.errors import CacheFull, ConfigError, OutOfMemoryError
from ruvllm_core.generate.sampler import log_softmax
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.protocols import CacheContext, Decoder
from ruvllm_core.settings import CacheConfig
from ruvllm_core.testing import tiny
from ruvllm_kv_cache.settings import CacheSettings
from ruvllm_kv_cache.two_tier import TwoTierCache

LENGTH = 2048
SMALL = {"tail_length": 20, "migration_batch": 16, "sink_tokens": 3}


@cache
def qwen_like(bias: float) -> Decoder:
    """Qwen2's shape, small and random; each layer's key bias has the norm `bias`."""
    spec = tiny.tiny_spec(
        hidden_size=256,
        intermediate_size=512,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_context=LENGTH,
        qkv_bias=True,
        rope_theta=1e6,
    )
    weights, rng = tiny.tiny_weights(spec), np.random.default_rng(3)
    for name, tensor in weights.items():
        values = tensor.dequantize()
        if name.endswith("attn.k.bias"):
            values = rng.normal(size=values.shape).astype(np.float32)
            values *= np.float32(bias) / np.linalg.norm(values)
        elif name.endswith("bias"):
            values = np.zeros_like(values)
        elif values.ndim == 2:  # as a layer is initialised
            values = values / 2
        weights[name] = QuantTensor.from_float(values)
    return tiny.tiny_decoder(spec, weights)


def context(decoder: Decoder, max_sequences: int = 2, **options: Any) -> CacheContext:
    return replace(tiny.cache_context(decoder, max_sequences), options=CacheSettings(**options))


def logits(decoder: Decoder, policy: Any, tokens: list[int]) -> Any:
    feed = tiny.Feeder(decoder, policy)
    feed.open("s", tokens, len(tokens))
    return np.concatenate([feed.feed(s=min(512, len(tokens) - at))["s"] for at in range(0, len(tokens), 512)])


@cache
def floats(bias: float) -> tuple[list[int], Any]:
    """A text that the model finds likely, and its logits over a cache of f16."""
    decoder, tokens = qwen_like(bias), np.random.default_rng(8).integers(0, 256, LENGTH).tolist()
    cache = ContiguousCache(replace(tiny.cache_context(decoder, 1), config=CacheConfig(precision="f16")))
    return tokens, logits(decoder, cache, tokens)


@pytest.mark.parametrize("bias", [0.0, 600.0])
@pytest.mark.parametrize(("precision", "perplexity", "agreement"), [("q4", 0.01, 0.95), ("q8", 0.001, 0.99)])
def test_accuracy_against_floats(precision: str, bias: float, perplexity: float, agreement: float) -> None:
    tokens, expected = floats(bias)
    found = logits(qwen_like(bias), TwoTierCache(context(qwen_like(bias), store_precision=precision)), tokens)
    assert (found != expected)[400:].any()
    losses = [-np.take_along_axis(log_softmax(x)[:-1], np.array(tokens)[1:, None], 1).mean() for x in (found, expected)]
    print(precision, bias, np.exp(losses[0] - losses[1]) - 1, np.mean(found.argmax(-1) == expected.argmax(-1)), losses)
    assert abs(np.exp(losses[0] - losses[1]) - 1) <= perplexity
    assert np.mean(found.argmax(-1) == expected.argmax(-1)) >= agreement
