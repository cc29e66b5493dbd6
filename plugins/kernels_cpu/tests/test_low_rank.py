"""Adapters against float64: products of factors, and the weights that factors would make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core.decode.decoder import EagerDecoder
from ruvllm_core.errors import ConfigError
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec, llama_tensor_names
from ruvllm_core.protocols import Adapter, DecoderOptions, FloatArray, LowRank, Weights
from ruvllm_core.testing import tiny
from ruvllm_kernels_cpu.decoder import CpuDecoder
from ruvllm_kernels_cpu.library import ISAS
from ruvllm_kernels_cpu.provider import CpuKernels

OPTIONS = DecoderOptions(dtype="float32", device="cpu", threads=2, max_context=tiny.CONTEXT)
# 72 and 136 are no multiples of a panel's sixteen rows.
SPEC = tiny.tiny_spec(hidden_size=72, intermediate_size=136, num_heads=3, num_kv_heads=1, head_dim=24)


def make(isa: str, spec: ModelSpec, weights: Weights) -> CpuDecoder:
    try:
        found = CpuKernels(OPTIONS, isa=isa).decoder(spec, weights, OPTIONS)
    except ConfigError:
        pytest.skip(f"this processor has no {isa}")
    assert isinstance(found, CpuDecoder)
    return found


def delta(rng: np.random.Generator, rows: int, width: int, rank: int) -> LowRank:
    a, b = (rng.normal(0.0, 0.1, shape).astype(np.float32) for shape in ((rank, width), (rows, rank)))
    return LowRank(a, b, scale=0.75)


def shapes_of(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {name: s.shape for name, s in llama_tensor_names(spec).items() if len(s.shape) == 2 and "layers" in name}


def exact(low: LowRank) -> npt.NDArray[np.float64]:
    product: npt.NDArray[np.float64] = low.scale * (low.b.astype(np.float64) @ low.a.astype(np.float64))
    return product


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
@pytest.mark.parametrize("isa", ISAS[1:])
def test_factors_do_what_weights_made_of_them_do(isa: str, rank: int) -> None:
    """At once, where factors are not fetched ahead, and a few tokens at a time, where they are."""
    rng, weights = np.random.default_rng(rank), dict(tiny.tiny_weights(SPEC))
    sites = {name: delta(rng, *shape, rank) for name, shape in shapes_of(SPEC).items()}
    decoder, tokens = make(isa, SPEC, weights), tiny.TEXTS["c"]
    merged = {name: (weights[name].dequantize() + exact(low)).astype(np.float32) for name, low in sites.items()}
    weights |= {name: QuantTensor.from_float(array) for name, array in merged.items()}
    expected = tiny.whole(make(isa, SPEC, weights), tokens)
    feeder = tiny.Feeder(decoder)
    feeder.open("pieces", tokens, adapter=Adapter("factors", sites))
    sizes = (9, 1, 1, 2, 3, 1)
    pieces = np.concatenate([feeder.feed(pieces=size)["pieces"] for size in sizes])
    tiny.assert_close(pieces, expected[: sum(sizes)], 1e-4, f"rank {rank}")
    assert not np.allclose(pieces, tiny.whole(decoder, tokens)[: sum(sizes)], atol=1e-2), "factors do nothing"


@pytest.mark.parametrize("isa", ISAS[1:])
def test_final_sites_of_a_mixed_batch(isa: str) -> None:
    """Of several ranks, beside sequences with none, for rows in any order: h + scale * B (A h), in float64."""
    rng, width = np.random.default_rng(1), SPEC.hidden_size
    decoder, other = make(isa, SPEC, tiny.tiny_weights(SPEC)), tiny.tiny_decoder(SPEC)
    layer = {"layers.1.mlp.down": delta(rng, width, SPEC.intermediate_size, 2)}
    finals = [delta(rng, width, width, rank) for rank in (2, 5)]
    adapters = (
        Adapter("final", {"final": finals[0]}),
        None,
        Adapter("both", {"final": finals[1], **layer}),
        Adapter("layers", layer),
    )
    feeder = tiny.Feeder(other)
    for name in "abcd":
        feeder.open(name, tiny.TEXTS["c"])
        feeder.cache.extend(name, 2)
    batch = tiny.sequence.make_batch(feeder.cache, [(feeder.running[name], 2) for name in "abcd"])
    batch.adapters, batch.rows = adapters, np.array([7, 0, 5, 1, 3, 4, 1])
    hidden = rng.normal(0.0, 1.0, (len(batch.rows), width)).astype(np.float32)
    states = hidden.astype(np.float64)
    for state, row in zip(states, batch.rows // 2, strict=True):
        adapter = adapters[row]
        if adapter is not None and "final" in adapter.sites:
            state += exact(adapter.sites["final"]) @ state
    head = tiny.tiny_weights(SPEC)["embed" if SPEC.tied_embeddings else "lm_head"].dequantize().astype(np.float64)
    assert isinstance(other, EagerDecoder)
    for found in (decoder.logits(hidden, batch), other.logits(hidden, batch)):
        tiny.assert_close(found, (states @ head.T).astype(np.float32), 1e-5, "with each one's adapter")
    without: FloatArray = decoder.logits(hidden)
    tiny.assert_close(without, (hidden.astype(np.float64) @ head.T).astype(np.float32), 1e-5, "without any")
    together = decoder.logits(hidden[:4], replace(batch, rows=batch.rows[:4]))  # as few as are computed like one
    for index, row in enumerate(batch.rows[:4].tolist()):
        alone = replace(batch, rows=np.array([row]))
        np.testing.assert_array_equal(decoder.logits(hidden[index : index + 1], alone)[0], together[index])


@pytest.mark.parametrize("scheme", ["f32", "q4_1"])
@pytest.mark.parametrize("isa", ISAS[1:])
def test_sequences_without_an_adapter_change_in_no_bit(isa: str, scheme: str) -> None:
    """Beside others that have one, alone, and with an adapter that only the final site has, in the layers."""
    spec = tiny.tiny_spec(hidden_size=128, intermediate_size=160, head_dim=32)
    decoder = make(isa, spec, tiny.tiny_weights(spec, (scheme,)))
    rng, tokens = np.random.default_rng(2), tiny.TEXTS["c"]
    sites = {name: delta(rng, *shape, 1) for name, shape in shapes_of(spec).items()}
    feeder = tiny.Feeder(decoder)
    for name in ("plain", "alone"):
        feeder.open(name, tokens)
    feeder.open("adapted", tokens, adapter=Adapter("all", sites))
    for plain, adapted in ((5, 3), (1, 1), (1, 2)):
        beside = feeder.feed(plain=plain, adapted=adapted)["plain"]
        np.testing.assert_array_equal(beside, feeder.feed(alone=plain)["alone"])
    for name in ("plain", "alone", "adapted"):
        feeder.cache.close(name)
    final = Adapter("final", {"final": delta(rng, spec.hidden_size, spec.hidden_size, 2)})
    states = []
    for name, adapter in (("base", None), ("final", final)):
        feeder.open(name, tokens, adapter=adapter)
        feeder.cache.extend(name, 3)
        states.append(tiny.sequence.advance(decoder, feeder.cache, [(feeder.running[name], 3)], every=True)[0])
    np.testing.assert_array_equal(*states)
