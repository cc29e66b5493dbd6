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
    for name in ("alone", "together"):
        feeder.open(name, TOKENS[:400], 400)
        feeder.feed(**{name: 120})
    for count in (2, 3, 4, 5, 8, 9, 16):  # across the ends of runs of keys, too
        together = feeder.feed(together=count)["together"]
        alone = np.concatenate([feeder.feed(alone=1)["alone"] for _ in range(count)])
        np.testing.assert_array_equal(together, alone, err_msg=f"{count} tokens")
    decoder.close()
