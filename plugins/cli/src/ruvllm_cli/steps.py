"""Steps of a decoder over a cache, without a backend: what benchmarks time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.lora import apply_final
from ruvllm_core.protocols import Adapter, Decoder, FloatArray, KVCachePolicy

_IDS = npt.NDArray[np.int64]


class Steps:
    """Computes tokens of sequences that are open in `cache`; `chunk` is the most of a prompt computed at once.

    Attributes:
        adapter: which every sequence has from now on.
    """

    def __init__(self, decoder: Decoder, cache: KVCachePolicy, rope_variant: int, chunk: int) -> None:
        self._decoder, self._cache, self._variant, self._chunk = decoder, cache, rope_variant, chunk
        self.adapter: Adapter | None = None

    def prefill(self, name: str, prompt: _IDS, start: int, stop: int) -> FloatArray:
        """Positions ``[start, stop)`` in chunks; what the last one's logits come from, float32 ``[1, C]``."""
        hidden = np.empty((0, self._decoder.spec.hidden_size), dtype=np.float32)
        for position in range(start, stop, self._chunk):
            own, batch = self._forward([name], prompt[position : min(position + self._chunk, stop)], position)
            hidden = apply_final(own, batch)
        return hidden

    def decode(self, names: Sequence[str], tokens: _IDS, position: int, steps: int) -> _IDS:
        """So many steps of each of `names`, from `tokens` at `position` on; the likeliest tokens at the end."""
        for step in range(steps):
            tokens = self.likeliest(*self._forward(names, tokens, position + step))
        return tokens

    def likeliest(self, hidden: FloatArray, batch: Batch | None = None) -> _IDS:
        """Token ids, int64 ``[R]``."""
        ids: _IDS = self._decoder.logits(hidden, batch).argmax(-1)
        return ids

    def _forward(self, names: Sequence[str], tokens: _IDS, position: int) -> tuple[FloatArray, Batch]:
        """Compute as many tokens for each of `names`, from `position` on; hidden states of the last of each."""
        each = len(tokens) // len(names)
        for name in names:
            self._cache.extend(name, each)
        ends = np.arange(1, len(names) + 1) * each
        batch = Batch(
            tokens=np.ascontiguousarray(tokens, dtype=np.int64),
            positions=np.tile(np.arange(position, position + each, dtype=np.int64), len(names)),
            cu_q=np.concatenate([[0], ends]).astype(np.int32),
            rows=ends.astype(np.int64) - 1,
            kv=self._cache.view(names),
            rope_variants=np.full(len(names), self._variant, dtype=np.uint8),
        )
        batch.adapters = (self.adapter,) * len(names) if self.adapter else ()
        hidden = self._decoder.forward(batch)
        for name in names:
            self._cache.commit(name)
        return hidden, batch
