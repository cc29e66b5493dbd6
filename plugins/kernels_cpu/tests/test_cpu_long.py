"""Sequences and adapters beyond what core's suite takes: more tokens than any tile, piece or run of keys holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ruvllm_core.errors import ConfigError
from ruvllm_core.model.spec import ModelSpec, llama_tensor_names
from ruvllm_core.protocols import Adapter, DecoderOptions, LowRank
from ruvllm_core.testing import tiny
from ruvllm_kernels_cpu.library import ISAS
from ruvllm_kernels_cpu.provider import CpuKernels

LENGTH = 620
TOKENS = np.random.default_rng(3).integers(0, 264, LENGTH).tolist()


def adapter_of(spec: ModelSpec, rank: int) -> Adapter:
    rng = np.random.default_rng(rank)
    shapes = {name: s.shape for name, s in llama_tensor_names(spec).items() if len(s.shape) == 2 and "layers" in name}
    sites = {
        name: LowRank(
            rng.normal(0.0, 0.1, (rank, width)).astype(np.float32),
            rng.normal(0.0, 0.1, (rows, rank)).astype(np.float32),
            scale=0.5,
        )
        for name, (rows, width) in shapes.items()
    }
    return Adapter(f"rank {rank}", sites)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("isa", ISAS[1:])
def test_long_sequences(isa: str, window: int | None, head_dim: int) -> None:
    """At once, and as a prompt, single tokens and a few together: with an adapter, and beside another sequence."""
    spec = tiny.tiny_spec(max_context=LENGTH, sliding_window=window, head_dim=head_dim)
    options = DecoderOptions(dtype="float32", device="cpu", threads=2, max_context=LENGTH)
    try:
        decoder = CpuKernels(options, isa=isa).decoder(spec, tiny.tiny_weights(spec), options)
    except ConfigError:
        pytest.skip(f"this processor has no {isa}")
    assert decoder is not None
    adapter = adapter_of(spec, 3)
    expected = tiny.whole(tiny.tiny_decoder(spec), TOKENS, LENGTH, adapter)
    tiny.assert_close(tiny.whole(decoder, TOKENS, LENGTH, adapter), expected, 2e-4, "at once")
    feeder = tiny.Feeder(decoder)
    feeder.open("long", TOKENS, LENGTH, adapter=adapter)
    feeder.open("other", TOKENS[::-1], LENGTH)
    found = [feeder.feed(long=300, other=70), feeder.feed(long=1, other=1), feeder.feed(long=5, other=300)]
    found += [feeder.feed(long=LENGTH - 308), feeder.feed(long=1), feeder.feed(long=1, other=7)]
    pieces = np.concatenate([one["long"] for one in found])
    tiny.assert_close(pieces, expected, 2e-4, "in pieces")
    decoder.close()


@pytest.mark.parametrize("rank", [1, 2, 4, 7])
def test_adapters_of_any_rank(rank: int) -> None:
    options = DecoderOptions(dtype="float32", device="cpu", threads=1, max_context=tiny.CONTEXT)
    spec = tiny.tiny_spec()
    decoder = CpuKernels(options).decoder(spec, tiny.tiny_weights(spec), options)
    assert decoder is not None
    adapter, tokens = adapter_of(spec, rank), tiny.TEXTS["c"]
    found = tiny.whole(decoder, tokens, adapter=adapter)
    tiny.assert_close(found, tiny.whole(tiny.tiny_decoder(spec), tokens, adapter=adapter), 1e-4, f"rank {rank}")
    assert not np.allclose(found, tiny.whole(decoder, tokens), atol=1e-2), "the adapter changes nothing"
    doubled = replace(adapter, version="doubled", sites={n: replace(d, scale=1.0) for n, d in adapter.sites.items()})
    assert not np.allclose(found, tiny.whole(decoder, tokens, adapter=doubled), atol=1e-2), "another one is the same"
    decoder.close()


@pytest.mark.parametrize("scheme", ["q4_1", "q6_k", "q8_0"])
@pytest.mark.parametrize("isa", ISAS[1:])
def test_a_few_tokens_are_computed_as_if_alone(isa: str, scheme: str) -> None:
    """To the last bit, so that a draft cannot change what it is compared with."""
    spec = tiny.tiny_spec(max_context=400, hidden_size=256, intermediate_size=256, num_heads=8, head_dim=64)
    options = DecoderOptions(device="cpu", threads=2, max_context=400)
    try:
        decoder = CpuKernels(options, isa=isa).decoder(spec, tiny.tiny_weights(spec, (scheme,)), options)
    except ConfigError:
        pytest.skip(f"this processor has no {isa}")
    assert decoder is not None
    feeder = tiny.Feeder(decoder)
    for adapter in (None, adapter_of(spec, 1), adapter_of(spec, 3)):
        rank = adapter.version if adapter else "no adapter"
        alone, together = f"alone, {rank}", f"together, {rank}"
        for name in (alone, together):
            feeder.open(name, TOKENS[:400], 400, adapter=adapter)
            feeder.feed(**{name: 120})
        for count in (2, 3, 4, 5, 8, 9, 16):  # across the ends of runs of keys, too
            found = feeder.feed(**{together: count})[together]
            expected = np.concatenate([feeder.feed(**{alone: 1})[alone] for _ in range(count)])
            np.testing.assert_array_equal(found, expected, err_msg=f"{count} tokens, {rank}")
        for name in (alone, together):
            feeder.cache.close(name)
    decoder.close()


@pytest.mark.parametrize("isa", ISAS[1:])
def test_each_sequence_has_its_own_adapter(isa: str) -> None:
    """Any matrices, each of its own rank, beside sequences with others and with none: as each would be alone."""
    spec = tiny.tiny_spec(hidden_size=96, intermediate_size=160, num_heads=3, num_kv_heads=1, head_dim=24)
    options = DecoderOptions(dtype="float32", device="cpu", threads=2, max_context=tiny.CONTEXT)
    try:
        decoder = CpuKernels(options, isa=isa).decoder(spec, tiny.tiny_weights(spec), options)
    except ConfigError:
        pytest.skip(f"this processor has no {isa}")
    assert decoder is not None
    reference, tokens = tiny.tiny_decoder(spec), tiny.TEXTS["c"]
    sites = {rank: adapter_of(spec, rank).sites for rank in (1, 2, 5)}
    named = {
        "keys": [("attn.k", 1)],
        "parts": [("attn.v", 5), ("attn.q", 1), ("mlp.up", 2), ("mlp.down", 5)],
        "second": [("attn.o", 2), ("mlp.gate", 1)],
    }
    adapters: dict[str, Adapter | None] = {"none": None}
    for name, chosen in named.items():
        first = 1 if name == "second" else 0
        places = [(f"layers.{n}.{site}", rank) for n in range(first, spec.num_layers) for site, rank in chosen]
        adapters[name] = Adapter(name, {place: sites[rank][place] for place, rank in places})
    feeder = tiny.Feeder(decoder)
    for name, adapter in adapters.items():
        feeder.open(name, tokens, adapter=adapter)
    counts = ({"none": 1, "keys": 2, "parts": 1, "second": 1}, {"parts": 9, "none": 3, "second": 1}, {"parts": 1})
    found = [feeder.feed(**one) for one in counts]
    plain = tiny.whole(reference, tokens)
    for name, adapter in adapters.items():
        rows = np.concatenate([logits[name] for logits in found if name in logits])
        expected = tiny.whole(reference, tokens, adapter=adapter)[: len(rows)]
        tiny.assert_close(rows, expected, 1e-4, name)
        assert adapter is None or not np.allclose(rows, plain[: len(rows)], atol=1e-3), f"{name} changes nothing"
    decoder.close()
