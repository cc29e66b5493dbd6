"""`quantize`: floats to blocks of any scheme."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ruvllm_core.errors import QuantizationError
from ruvllm_core.model.dequant import count_non_finite
from ruvllm_core.model.quant import SCHEMES, QuantTensor

from . import kquants, simple
from .packing import Bytes
from .simple import Floats

_CHUNK_VALUES = 1 << 15  # 128 KiB of float32: the many passes of a search stay in a core's cache
_THREAD_VALUES = 1 << 18  # below this a thread costs more than it saves

_ENCODERS: dict[str, Callable[[Floats], Bytes]] = {
    scheme: getattr(kquants if scheme.endswith("_k") else simple, f"encode_{scheme}") for scheme in SCHEMES
}


def quantize(values: Floats, scheme: str, *, name: str = "") -> QuantTensor:
    """Encode a matrix ``[rows, columns]`` or a vector.

    Args:
        values: float32; the last axis must be a multiple of the scheme's block size.
        scheme: a key of `ruvllm_core.model.quant.SCHEMES`.
        name: of the tensor, for error messages.

    Raises:
        QuantizationError: unknown scheme, nothing to encode, rows that do not fill whole blocks, NaN or infinite
            values, or values beyond what the scheme's half-precision numbers can hold.
    """
    called = f"tensor '{name}'" if name else "the tensor"
    if scheme not in SCHEMES:
        raise QuantizationError(f"{called}: there is no scheme '{scheme}'", hint=f"known are {', '.join(SCHEMES)}")
    if values.ndim == 0 or values.size == 0:
        raise QuantizationError(f"{called} of shape {values.shape} has nothing to quantize")
    traits = SCHEMES[scheme]
    try:
        row_bytes = traits.row_bytes(values.shape[-1])
    except QuantizationError as error:
        raise QuantizationError(f"{called}: {error.message}", hint=error.hint) from None
    blocks = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, traits.block_size)
    encoded = np.empty((len(blocks), traits.block_bytes), dtype=np.uint8)
    encode = _ENCODERS[scheme]
    step = max(_CHUNK_VALUES // traits.block_size, 1)

    def run(start: int) -> None:
        chunk = blocks[start : start + step]
        if not np.isfinite(chunk).all():
            raise QuantizationError(
                f"{called} has NaN or infinite values and cannot be quantized",
                hint="the source file is damaged, or the model was saved wrongly",
            )
        # Scales beyond half precision turn infinite here and are reported below.
        with np.errstate(all="ignore"):
            encoded[start : start + step] = encode(chunk)

    starts = range(0, len(blocks), step)
    if values.size < _THREAD_VALUES:
        for start in starts:
            run(start)
    else:
        with ThreadPoolExecutor(min(os.cpu_count() or 1, len(starts))) as pool:
            list(pool.map(run, starts))
    tensor = QuantTensor(scheme, values.shape, encoded.reshape(-1, row_bytes))
    if count_non_finite(tensor):
        largest = float(np.abs(values).max())
        raise QuantizationError(
            f"{called} has values up to {largest:.3g}, beyond what {scheme} can hold",
            hint="keep this tensor as f32 or bf16",
        )
    return tensor
