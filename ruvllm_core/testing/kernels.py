"""`KernelSuite`: operations and whole-model decoders of a kernel provider."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.decode.kv import KVView, Segment
from ruvllm_core.model.quant import SCHEMES
from ruvllm_core.protocols import CacheContext, DecoderOptions, KernelProvider
from ruvllm_core.testing import tiny

_WIDE = tiny.tiny_spec(hidden_size=256, intermediate_size=512, head_dim=64)
MODELS: dict[str, Any] = {name: (spec, ("f32",)) for name, spec in tiny.FLAVOURS.items()}
MODELS |= {scheme: (_WIDE, (scheme,)) for scheme in SCHEMES} | {"mixed": (_WIDE, ("q4_k", "q6_k", "f16", "q8_0"))}


class ScatteredCache(ContiguousCache):
    """The worst attention has to expect: small blocks in any order, in two segments; the older one may be empty."""

    def __init__(self, context: CacheContext) -> None:
        super().__init__(context)
        self.stores, self.old = [], defaultdict[str, int](int)
        for size in (5, 4):
            shape = context.max_sequences, -(-context.max_context // size)
            order = np.random.default_rng(size).permutation(shape[0] * shape[1]).astype(np.int32).reshape(shape)
            storage = context.decoder.allocate_kv(order.size, size, context.decoder.kv_schemes[0])
            self.stores.append((storage, order))

    def slots(self, segment: int, block: int, start: int, stop: int) -> Any:
        (storage, order), at = self.stores[segment], np.arange(start, stop)
        return order[block, at // storage.block_size] * np.int64(storage.block_size) + at % storage.block_size

    def view(self, sequences: Sequence[str]) -> KVView:
        held, old = [self._held[name] for name in sequences], np.array([self.old[name] for name in sequences], np.int32)
        lengths = old, np.array([h.length + h.reserved for h in held], np.int32) - old
        starts, rows = (np.zeros_like(old), old), [h.block for h in held]
        segments = [Segment(s, t[rows], n, at) for (s, t), n, at in zip(self.stores, lengths, starts, strict=True)]
        new = [self.slots(1, h.block, h.length - o, h.length + h.reserved - o) for h, o in zip(held, old, strict=True)]
        return KVView(segments, np.concatenate(new))

    def commit(self, sequence: str, token_ids: Sequence[int] = ()) -> None:
        super().commit(sequence)
        held, old, ((older, _), (newer, _)) = self._held[sequence], self.old[sequence], self.stores
        if held.length - old > 6:  # enough new tokens: they move to the older segment
            moves = [self.slots(1, held.block, 0, held.length - old), self.slots(0, held.block, old, held.length)]
            for a, b in zip(*moves, strict=True):
                for source, target in zip((*newer.keys, *newer.values), (*older.keys, *older.values), strict=True):
                    moved = source[a // newer.block_size, :, a % newer.block_size]
                    target[b // older.block_size, :, b % older.block_size] = moved
            self.old[sequence] = held.length


def checked(provider: KernelProvider, tolerance: float) -> Any:
    """`provider` with each operation compared with the reference's on the same input, whenever it runs.

    What ``kv_append`` writes shows in what attention finds.
    """
    import torch

    from ruvllm_core.decode.reference import reference_ops

    reference = reference_ops(torch.device(provider.device), torch.float32)

    def run(name: str, *args: Any) -> Any:  # the reference first: an operation may reuse the memory of its input
        sides = enumerate((getattr(reference, name), provider.ops()[name]))
        both = [op(*(arg[n] if isinstance(arg, tuple) else arg for arg in args)) for n, op in sides]
        if name == "prepare":  # a weight is a pair, one for each side
            return tuple(both)
        for theirs, mine in zip(*(x if isinstance(x, tuple) else (x,) for x in both), strict=True):
            tiny.assert_close(mine, theirs, tolerance, f"operation {name}")
        return both[1]

    table = {name: op if name == "kv_append" else partial(run, name) for name, op in provider.ops().items()}
    return SimpleNamespace(ops=lambda: table)


class KernelSuite:
    """Define `make_provider`. Tolerances are relative to the largest value; state what your rounding costs.

    Attributes:
        outliers: share of a text's positions that whole models may have further off: where two keys are all but equal,
            rounding to 16 bits takes sharp attention to the other one. Single operations get none.
    """

    options = DecoderOptions(dtype="float32", device="cpu", max_context=tiny.CONTEXT)
    tolerance = 1e-4
    quantized_tolerance = 1e-4  # of weights that are not floats: raise it if activations are rounded, too
    outliers = 0.0

    def make_provider(self, options: DecoderOptions) -> KernelProvider:
        raise NotImplementedError

    @pytest.mark.parametrize("model", MODELS)
    def test_model(self, model: str) -> None:
        """Each operation, whole prompts, and pieces of them in mixed batches, for each kind of model and weights."""
        from ruvllm_core.decode.decoder import EagerDecoder

        spec, schemes = MODELS[model]
        weights, adapters = tiny.tiny_weights(spec, schemes), {"b": tiny.tiny_adapter(spec)}
        tolerance = self.tolerance if SCHEMES[schemes[0]].block_size == 1 else self.quantized_tolerance
        provider, reference = self.make_provider(self.options), tiny.tiny_decoder(spec, weights)
        own = provider.decoder(spec, weights, self.options)
        decoders = [] if own is None else [own]
        if own is None or provider.ops():
            decoders.append(EagerDecoder(spec, weights, checked(provider, tolerance), self.options))
        for decoder in decoders:
            pieces = tiny.Feeder(decoder, ScatteredCache(tiny.cache_context(decoder))).ragged(**adapters)
            for name, text in tiny.TEXTS.items():
                how = text, tiny.CAPACITIES[name], adapters.get(name)
                expected = tiny.whole(reference, *how)
                found = {"a prompt at once": tiny.whole(decoder, *how), "pieces in mixed batches": pieces[name]}
                for what, logits in found.items():
                    tiny.assert_close(logits, expected, tolerance, what, self.outliers)
            decoder.close()
