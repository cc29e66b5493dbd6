"""Moves, boundaries and quantized keys and values, against the reference and against floats of the same values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.decode.kv import STORE_BITS, KVStorage, KVView, Move, Segment, store_group
from ruvllm_core.errors import ConfigError
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import CacheContext, Decoder, DecoderOptions
from ruvllm_core.testing import tiny
from ruvllm_kernels_cpu.decoder import CpuDecoder
from ruvllm_kernels_cpu.library import ISAS
from ruvllm_kernels_cpu.provider import CpuKernels

LENGTH = 210
TOKENS = np.random.default_rng(7).integers(0, 264, LENGTH).tolist()
PIECES = ([LENGTH], [100, *[1] * 70, 3, 16, 21], [1, 2, 60, 5, 5, 7, 130])


def spec_of(head_dim: int = 64, group: int = 3, layers: int = 1, **changes: Any) -> ModelSpec:
    """One layer: keys of a second one would round off by a whole code where those of the first are off by a bit."""
    return tiny.tiny_spec(head_dim=head_dim, num_heads=2 * group, num_layers=layers, max_context=LENGTH, **changes)


def weights_of(spec: ModelSpec, bias_norm: float = 600.0) -> dict[str, QuantTensor]:
    """Tiny weights; key biases of huge norm, as Qwen2 has them."""
    weights, rng = tiny.tiny_weights(spec), np.random.default_rng(2)
    for n in range(spec.num_layers if spec.qkv_bias else 0):
        bias = rng.normal(size=spec.num_kv_heads * spec.head_dim) * bias_norm * spec.head_dim**-0.5
        weights[f"layers.{n}.attn.k.bias"] = QuantTensor.from_float(bias.astype(np.float32))
    return weights


def native(spec: ModelSpec, isa: str = "auto", threads: int = 2, dtype: Any = "float32") -> CpuDecoder:
    options = DecoderOptions(dtype=dtype, device="cpu", threads=threads, max_context=spec.max_context)
    try:
        found = CpuKernels(options, isa=isa).decoder(spec, weights_of(spec), options)
    except ConfigError:
        pytest.skip(f"this processor has no {isa}")
    assert isinstance(found, CpuDecoder)
    return found


class Tiers(ContiguousCache):
    """All tokens stay where they are written; whole blocks of those older than `tail` are copied to other storages.

    A token reads the last of `schemes`; each is filled from the one before it, the first from the tail. Blocks of a
    sequence are not in order.
    """

    def __init__(self, context: CacheContext, schemes: Sequence[str], block: int = 32, tail: int = 20) -> None:
        super().__init__(context)
        self.block, self.tail, self.blocks = block, tail, -(-context.max_context // block)
        count = self.blocks * context.max_sequences
        self.storages = [context.decoder.allocate_kv(count, block, scheme) for scheme in schemes]
        self.order = np.random.default_rng(1).permutation(count).reshape(context.max_sequences, -1)
        self.moved: dict[str, int] = {}

    def open(self, sequence: str, *arguments: Any) -> int:
        self.moved[sequence] = 0
        return super().open(sequence, *arguments)

    def view(self, sequences: Sequence[str]) -> KVView:
        view, moves, lengths, bounds = super().view(sequences), [], [], []
        for name in sequences:
            held, size = self._held[name], self.block
            own = np.arange(held.length, held.length + held.reserved)
            bounds.append(np.maximum(own - self.tail, 0) // size * size)
            lengths.append(bounds[-1][-1])
            if lengths[-1] == self.moved[name]:
                continue
            at = np.arange(self.moved[name], lengths[-1])
            slots = self.order[held.block][at // size] * size + at % size
            sources = [self._storage, *self.storages[:-1]]
            for n, (source, target) in enumerate(zip(sources, self.storages, strict=True)):
                moves.append(Move(source, target, slots if n else at + held.block * self._storage.block_size, slots, at))
            self.moved[name] = int(lengths[-1])
        table = np.array([self.order[self._held[name].block] for name in sequences], np.int32)
        numbers = np.array(lengths, np.int32)
        older = Segment(self.storages[-1], table, numbers, np.zeros_like(numbers))
        return KVView([older, *view.segments], view.slots, moves, np.concatenate(bounds).astype(np.int32))


def run(decoder: Decoder, schemes: Sequence[str], pieces: Sequence[int] = (LENGTH,), **settings: int) -> Any:
    """Logits after each of `TOKENS`, computed in pieces, with tokens stored as `Tiers` does; no schemes: as usual."""
    context = tiny.cache_context(decoder, 2)
    feeder = tiny.Feeder(decoder, Tiers(context, schemes, **settings) if schemes else ContiguousCache(context))
    feeder.open("s", TOKENS, LENGTH)
    return np.concatenate([feeder.feed(s=count)["s"] for count in pieces])


SHAPES = {
    "plain": spec_of(),
    "head 16": spec_of(16, 1),
    "head 24, group 7": spec_of(24, 7),
    "head 96": spec_of(96, 3),
    "head 128, group 7": spec_of(128, 7),
    "head 80": spec_of(80, 1),
    "window": spec_of(sliding_window=50),
    "softcap": spec_of(attention_softcap=4.0),
    "key bias": spec_of(qkv_bias=True),
    "key bias, group 7, window": spec_of(128, 7, qkv_bias=True, sliding_window=70),
    "key bias, interleaved partial rope": spec_of(qkv_bias=True, rope_interleaved=True, rope_dim=24),
    "key bias, group 1, head 16": spec_of(16, 1, qkv_bias=True),
    "longrope with a bias": spec_of(16, 3, qkv_bias=True, rope_scaling=tiny.FLAVOURS["longrope"].rope_scaling),
}


@pytest.mark.parametrize("scheme", STORE_BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", ISAS[1:])
def test_quantized_tokens_are_read_as_what_is_restored_from_them(isa: str, shape: str, scheme: str) -> None:
    decoder = native(SHAPES[shape], isa)
    expected = run(decoder, [scheme, "f32"])
    assert not np.allclose(expected, run(decoder, []), atol=1e-3), "nothing was rounded"
    for pieces in PIECES:
        tiny.assert_close(run(decoder, [scheme], pieces), expected, 1e-3, f"{shape} in {scheme}, {len(pieces)} pieces")
    decoder.close()
