"""The one input of a decoder: a ragged batch of tokens of several sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.kv import KVView

if TYPE_CHECKING:
    from ruvllm_core.protocols import Adapter


@dataclass(eq=False)
class Batch:
    """T tokens of B sequences, one after the other, without padding; prefill and decode may be mixed.

    Attributes:
        tokens: int64 ``[T]``, token ids.
        positions: int64 ``[T]``, position of each token in its sequence.
        cu_q: int32 ``[B+1]``, sequence b owns tokens ``cu_q[b]:cu_q[b+1]``.
        rows: int64 ``[R]``, the tokens whose hidden state is wanted, in the order in which it is returned.
        kv: where keys and values of these sequences are, and where the new ones go.
        rope_variants: uint8 ``[B]``, each sequence's table of rotary frequencies (`ModelSpec.rope_variant`).
        adapters: each sequence's low-rank adapter, or None; empty when nobody has one.
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    cu_q: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]
    kv: KVView
    rope_variants: npt.NDArray[np.uint8]
    adapters: tuple[Adapter | None, ...] = ()

    @property
    def num_sequences(self) -> int:
        return len(self.cu_q) - 1
