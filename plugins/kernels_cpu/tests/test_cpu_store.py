"""Moves, boundaries and quantized keys and values, against the reference and against floats of the same values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.coded import rotation
from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.decode.kv import STORE_BITS, KVStorage, KVView, Move, Segment, store_group
from ruvllm_core.errors import ConfigError
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import CacheContext, Decoder, DecoderOptions
from ruvllm_core.testing import tiny
from ruvllm_kernels_cpu import hooks
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
    sequence are not in order. The first `sinks` tokens are a segment of their own.
    """

    def __init__(
        self, context: CacheContext, schemes: Sequence[str], block: int = 32, tail: int = 20, sinks: int = 0
    ) -> None:
        super().__init__(context)
        self.block, self.tail, self.sinks = block, tail, sinks
        count = -(-context.max_context // block) * context.max_sequences
        self.storages = [context.decoder.allocate_kv(count, block, scheme) for scheme in schemes]
        self.order = np.random.default_rng(1).permutation(count).reshape(context.max_sequences, -1)
        self.moved: dict[str, int] = {}

    def open(self, sequence: str, *arguments: Any) -> int:
        self.moved[sequence] = 0
        return super().open(sequence, *arguments)

    def view(self, sequences: Sequence[str]) -> KVView:
        view = super().view(sequences)
        moves: list[Move] = []
        stored, bounds = [], []
        for name in sequences:
            held, size = self._held[name], self.block
            own = np.arange(held.length, held.length + held.reserved)
            older = np.maximum(own - self.tail - self.sinks, 0) // size * size
            bounds.append(np.where(older, older + self.sinks, 0))
            stored.append(int(older[-1]))
            if stored[-1] > self.moved[name]:
                moves += self._moves(held.block, np.arange(self.moved[name], stored[-1]))
                self.moved[name] = stored[-1]
        table = np.array([self.order[self._held[name].block] for name in sequences], np.int32)
        lengths = np.array(stored, np.int32)
        segments = [Segment(self.storages[-1], table, lengths, np.full_like(lengths, self.sinks)), *view.segments]
        if self.sinks:
            newest, zero = view.segments[0], np.zeros_like(lengths)
            segments.insert(0, Segment(newest.storage, newest.block_table, np.where(lengths, self.sinks, zero), zero))
        return KVView(segments, view.slots, moves, np.concatenate(bounds).astype(np.int32))

    def _moves(self, block: int, tokens: Any) -> list[Move]:
        slots = self.order[block][tokens // self.block] * self.block + tokens % self.block
        positions = tokens + self.sinks
        first = Move(self._storage, self.storages[0], positions + block * self._storage.block_size, slots, positions)
        pairs = zip(self.storages[:-1], self.storages[1:], strict=True)
        return [first, *(Move(source, target, slots, slots, positions) for source, target in pairs)]


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
    assert not np.allclose(run(decoder, [scheme]), run(decoder, []), atol=1e-3), "nothing was rounded"
    for n, pieces in enumerate(PIECES):
        block, sinks = ((32, 0), (16, 5), (48, 64))[n]
        expected = run(decoder, [scheme, "f32"], pieces, block=block, sinks=sinks)
        found = run(decoder, [scheme], pieces, block=block, sinks=sinks)
        tiny.assert_close(found, expected, 2e-3, f"{shape} in {scheme}, {len(pieces)} pieces")
    decoder.close()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", ISAS[1:])
def test_against_the_reference(isa: str, shape: str) -> None:
    """Floats moved twice are what they were; quantized, a value here and there rounds to the code beside it."""
    spec = SHAPES[shape]
    decoder, reference = native(spec, isa), tiny.tiny_decoder(spec, weights_of(spec))
    plain = run(reference, [])
    for n, pieces in enumerate(PIECES):
        for schemes in ([], ["f32"], ["f32", "f32"]):
            tiny.assert_close(run(decoder, schemes, pieces, sinks=5 * n), plain, 2e-4, f"{shape} in {schemes}")
    for scheme, tolerance in (("q8", 1e-2), ("q4", 5e-2)):
        found, expected = run(decoder, [scheme], PIECES[2]), run(reference, [scheme])
        tiny.assert_close(found, expected, tolerance, f"{shape} in {scheme}")
        assert abs(found - expected).mean() < 0.1 * abs(plain - expected).mean()
    decoder.close()


def test_pieces_and_neighbours_do_not_matter() -> None:
    spec = spec_of(layers=2)
    decoder = native(spec)
    for scheme, tolerance in (("f32", 2e-4), ("q8", 1e-2), ("q4", 5e-2)):
        expected = run(decoder, [scheme])
        for pieces in PIECES[1:]:
            tiny.assert_close(run(decoder, [scheme], pieces), expected, tolerance, f"{scheme} in {len(pieces)} pieces")
        feeder = tiny.Feeder(decoder, Tiers(tiny.cache_context(decoder, 2), [scheme]))
        feeder.open("s", TOKENS, LENGTH)
        feeder.open("other", TOKENS[::-1], LENGTH)
        rounds = [(70, 3), (1, 100), (60, 1), (9, 9), (1, 1), (LENGTH - 141, 70)]
        found = np.concatenate([feeder.feed(s=mine, other=theirs)["s"] for mine, theirs in rounds])
        tiny.assert_close(found, expected, tolerance, f"{scheme} beside another")
    decoder.close()


def test_threads_change_no_bit() -> None:
    results = []
    for threads in (1, 2, 5):
        decoder = native(spec_of(128, 7, layers=2, qkv_bias=True), threads=threads)
        results.append(run(decoder, ["q4"], PIECES[2]))
        decoder.close()
    for other in results[1:]:
        assert np.array_equal(results[0], other)


def test_operations_one_by_one() -> None:
    from ruvllm_core.decode.decoder import EagerDecoder

    spec = spec_of(qkv_bias=True)
    options = DecoderOptions(dtype="float32", device="cpu", threads=1, max_context=LENGTH)
    provider = CpuKernels(replace(options, plugin=hooks.Settings(decoder=False)))
    eager = EagerDecoder(spec, weights_of(spec), provider, options)
    reference = tiny.tiny_decoder(spec, weights_of(spec))
    tiny.assert_close(run(eager, ["f32"], PIECES[2]), run(reference, []), 2e-4, "f32")
    tiny.assert_close(run(eager, ["q8"], PIECES[2]), run(reference, ["q8"]), 1e-2, "q8")


def carry_out(decoder: Decoder, *moves: Move) -> None:
    """In a step of one token, of which nobody wants to know."""
    feeder = tiny.Feeder(decoder)
    feeder.cache.open("s", [1], 8)
    feeder.cache.extend("s", 1)
    view = replace(feeder.cache.view(["s"]), moves=moves)
    one = np.zeros(1, np.int64)
    decoder.forward(Batch(one, one, np.array([0, 1], np.int32), one, view, np.zeros(1, np.uint8)))


def filled(decoder: Decoder, num_blocks: int, block_size: int, scheme: str = "f32") -> KVStorage:
    """Random keys and values, some channels far larger than others and off centre."""
    storage, rng = decoder.allocate_kv(num_blocks, block_size, scheme), np.random.default_rng(4)
    for array in (*storage.keys, *storage.values):
        values = rng.normal(size=array.shape) * np.where(np.arange(array.shape[-1]) % 7, 1.0, 9.0) + 2.0
        exact = values.astype(np.float16).astype(np.float32)  # what all types hold of it
        array[:] = exact.view(np.uint32) >> 16 if scheme == "bf16" else exact
    return storage


def floats(storage: KVStorage, array: Any) -> Any:
    return (array.astype(np.uint32) << 16).view(np.float32) if storage.scheme == "bf16" else array.astype(np.float32)


@pytest.mark.parametrize("scheme", STORE_BITS)
@pytest.mark.parametrize("shape", ["plain", "head 24, group 7", "head 96", "head 128, group 7", "key bias"])
@pytest.mark.parametrize("isa", ISAS[1:])
def test_what_is_restored_is_within_half_a_step(isa: str, shape: str, scheme: str) -> None:
    spec = SHAPES[shape]
    decoder, (blocks, size), bits = native(spec, isa), (3, 48), STORE_BITS[scheme]
    source, back = filled(decoder, blocks, size), decoder.allocate_kv(5, 32, "f32")
    store = decoder.allocate_kv(blocks + 2, size, scheme)
    rng = np.random.default_rng(0)
    into = (rng.permutation(blocks + 2)[:blocks, None] * size + np.arange(size)).ravel()
    where, positions = rng.permutation(160)[: len(into)], rng.integers(0, LENGTH, len(into))
    carry_out(decoder, Move(source, store, np.arange(len(into)), into, positions))
    some = rng.permutation(len(into))
    carry_out(decoder, Move(store, back, into[some], where[some], positions[some]))

    reference = tiny.tiny_decoder(spec, weights_of(spec))
    coded = reference.allocate_kv(blocks, size, scheme)
    bias = np.zeros((len(into), spec.num_kv_heads, spec.head_dim))
    if coded.center is not None:
        bias = coded.center(0, torch.from_numpy(positions)).numpy().astype(np.float64)
    turn, middle = rotation(spec.head_dim).double().numpy(), 2.0 ** (bits - 1) - 0.5
    group, shape_of = store_group(spec.head_dim), (blocks, size, spec.num_kv_heads, spec.head_dim)
    given, found = [], []
    for array, restored, less in ((source.keys[0], back.keys[0], bias), (source.values[0], back.values[0], 0 * bias)):
        given.append(array.transpose(0, 2, 1, 3).reshape(-1, *shape_of[2:]) - less)
        found.append(restored.transpose(0, 2, 1, 3).reshape(-1, *shape_of[2:])[where] - less)
    key, value = (torch.from_numpy(one.astype(np.float32)) for one in given)
    coded.write(0, np.arange(len(into)), key, value)
    expected = [one.transpose(1, 2).flatten(0, 1).numpy() for one in coded.read(0, torch.arange(blocks))]
    for n, (one, other, theirs) in enumerate(zip(given, found, expected, strict=True)):
        turned, mine = ((array @ turn).reshape(shape_of) for array in (one, other))
        mean = turned.mean(1, keepdims=True) * (n == 0)
        slack = abs(mean).max(-1, keepdims=True) / 255.0 + 1e-4
        top = abs(turned - mean).reshape(*shape_of[:-1], -1, group).max(-1) + slack
        step, off = top / middle, (turned - mine).reshape(*shape_of[:-1], -1, group)
        if bits == 8:
            assert (abs(off) <= 0.501 * step[..., None] + 1e-4).all()
        assert (np.sqrt((off**2).mean(-1)) <= 0.501 * step + 1e-4).all()
        # A value that lies between two codes, or a block whose best scale does, may turn out the other way.
        apart = abs(mine - (theirs @ turn).reshape(shape_of)) > 0.01 * step.repeat(group, -1)
        assert apart.mean() < 0.01, f"{apart.mean():.2%} of the codes are not the reference's"
    decoder.close()


def test_floats_are_copied_as_they_are() -> None:
    decoder = native(spec_of(24, 7, layers=2))
    rng = np.random.default_rng(0)
    for source_scheme in ("f32", "f16", "bf16"):
        for target_scheme in ("f32", "f16", "bf16"):
            source, target = filled(decoder, 6, 16, source_scheme), filled(decoder, 3, 40, target_scheme)
            if source_scheme == target_scheme == "f16":
                target = source
            places = rng.permutation(90)
            start, to = places[:40], places[40:]
            to = to[: len(start)]
            before = [floats(source, array) for array in (*source.keys, *source.values)]
            carry_out(decoder, Move(source, target, start, to, start))
            for was, array in zip(before, (*target.keys, *target.values), strict=True):
                moved = was[start // 16, :, start % 16]
                if target_scheme == "bf16":
                    moved = torch.from_numpy(moved).bfloat16().float().numpy()
                size = target.block_size
                assert np.array_equal(floats(target, array)[to // size, :, to % size], moved)
    decoder.close()


def test_quantized_storages_are_small() -> None:
    decoder = native(spec_of(64), dtype="auto")
    assert decoder.kv_schemes == ("f16", "f32", "bf16", "q8", "q4")
    plain, small = (decoder.allocate_kv(100, 64, scheme) for scheme in ("f16", "q4"))
    arrays = (*small.keys, *small.values, *small.means)
    assert sum(array.nbytes for array in arrays) <= small.nbytes <= plain.nbytes / 3.7
    with pytest.raises(ConfigError, match="blocks of 24 tokens"):
        decoder.allocate_kv(1, 24, "q4")
    with pytest.raises(ConfigError, match="head_dim 20 is not divisible"):
        native(spec_of(20)).allocate_kv(1, 32, "q8")


def test_bad_moves_never_reach_the_library() -> None:
    decoder = native(spec_of(24, 7))
    other = tiny.tiny_decoder(spec_of(24, 7))
    source, store = filled(decoder, 2, 32), decoder.allocate_kv(2, 16, "q4")
    slots = np.arange(16)
    good = Move(source, store, slots, slots + 16, slots)
    carry_out(decoder, good)
    for changes, error, says in (
        ({"from_slots": slots + 60}, ValueError, "from_slots of a move must be in"),
        ({"from_slots": slots - 1}, ValueError, "from_slots of a move must be in"),
        ({"to_slots": slots + 32}, ValueError, "to_slots of a move must be in"),
        ({"to_slots": slots[:8]}, ValueError, "to_slots of a move must be"),
        ({"to_slots": slots + 8}, ValueError, "must be whole blocks of 16"),
        ({"to_slots": slots[::-1]}, ValueError, "must be whole blocks of 16"),
        (dict.fromkeys(("from_slots", "to_slots", "positions"), slots[:8]), ValueError, "must be whole blocks"),
        ({"positions": slots + LENGTH}, ValueError, "positions of a move must be in"),
        ({"target": source, "to_slots": slots + 8}, ValueError, "among its from_slots"),
        ({"target": source, "to_slots": slots // 2 + 32}, ValueError, "a place twice"),
        ({"target": other.allocate_kv(2, 16, "q4")}, ValueError, "made by this decoder"),
        ({"source": other.allocate_kv(2, 32, "f32")}, ValueError, "made by this decoder"),
        ({"source": replace(source, scheme="q5")}, ConfigError, "cannot read keys and values in q5"),
        ({"target": replace(store, means=[])}, ValueError, "storage has 0 layers"),
        ({"target": replace(store, block_size=8)}, ValueError, "made by this decoder"),
    ):
        with pytest.raises(error, match=says):
            carry_out(decoder, replace(good, **changes))
    feeder = tiny.Feeder(decoder)
    feeder.cache.open("s", [1], 8)
    feeder.cache.extend("s", 1)
    view = feeder.cache.view(["s"])
    one = np.zeros(1, np.int64)
    batch = Batch(one, one, np.array([0, 1], np.int32), one, view, np.zeros(1, np.uint8))
    for change, says in (
        ({"boundary": np.zeros(2, np.int32)}, "boundary must be"),
        ({"boundary": np.full(1, -1, np.int32)}, "boundary must be in"),
        ({"segments": [replace(view.segments[0], storage=store)]}, "it must be floats, not q4"),
    ):
        with pytest.raises(ValueError, match=says):
            decoder.forward(replace(batch, kv=replace(view, **change)))
    decoder.close()
