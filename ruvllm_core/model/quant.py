"""Quantization schemes and `QuantTensor`, the one form in which weights travel through ruvllm.

A scheme is a GGUF block format: every row of a tensor is cut into blocks of `block_size` values, each stored in
`block_bytes` bytes. Plain floats are schemes with one value a block, so code that moves tensors needs no second case.
Source: the GGML type table in the GGUF specification.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import QuantizationError


@dataclass(frozen=True)
class Scheme:
    """How values become bytes.

    Attributes:
        name: lower-case GGML name, as in ``q4_k``.
        ggml_type: the number GGUF files use for it.
        block_size: values per block.
        block_bytes: bytes per block.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.block_bytes / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` values. Raises `QuantizationError` if they do not fill whole blocks."""
        if columns % self.block_size:
            raise QuantizationError(
                f"a row of {columns} values cannot be stored as {self.name}, whose blocks hold {self.block_size}",
                hint="choose a scheme with smaller blocks, such as q8_0 or f16",
            )
        return columns // self.block_size * self.block_bytes


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("f32", 0, 1, 4),
        Scheme("f16", 1, 1, 2),
        Scheme("bf16", 30, 1, 2),
        Scheme("q4_0", 2, 32, 18),
        Scheme("q4_1", 3, 32, 20),
        Scheme("q5_0", 6, 32, 22),
        Scheme("q5_1", 7, 32, 24),
        Scheme("q8_0", 8, 32, 34),
        Scheme("q2_k", 10, 256, 84),
        Scheme("q3_k", 11, 256, 110),
        Scheme("q4_k", 12, 256, 144),
        Scheme("q5_k", 13, 256, 176),
        Scheme("q6_k", 14, 256, 210),
    )
}
SCHEME_OF_GGML_TYPE: dict[int, Scheme] = {s.ggml_type: s for s in SCHEMES.values()}
FLOAT_SCHEMES = frozenset({"f32", "f16", "bf16"})


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A tensor as rows of encoded blocks.

    Attributes:
        scheme: a key of `SCHEMES`.
        shape: logical shape in row-major order; the last axis is the one cut into blocks. A vector has shape ``(n,)``.
        data: uint8 array ``[rows, row_bytes]``, rows being the product of all axes but the last. Usually a read-only
            view of a memory-mapped file; nobody may write to it.
    """

    scheme: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        expected = (self.num_rows, SCHEMES[self.scheme].row_bytes(self.columns))
        if self.data.dtype != np.uint8 or self.data.shape != expected:
            raise QuantizationError(
                f"{self.scheme} tensor of shape {self.shape} needs uint8 data of shape {expected}, "
                f"got {self.data.dtype} {self.data.shape}"
            )

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def num_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def rows(self, start: int, stop: int) -> QuantTensor:
        """Rows ``[start, stop)`` of a matrix, sharing memory."""
        if len(self.shape) != 2 or not 0 <= start < stop <= self.shape[0]:
            raise QuantizationError(f"cannot take rows {start}:{stop} of a tensor of shape {self.shape}")
        return QuantTensor(self.scheme, (stop - start, self.columns), self.data[start:stop])

    def dequantize(self) -> npt.NDArray[np.float32]:
        """All values as a new float32 array of `shape`."""
        from ruvllm_core.model.dequant import dequantize

        return dequantize(self)

    @classmethod
    def from_float(cls, values: npt.NDArray[np.float32]) -> QuantTensor:
        """Float32 values as an ``f32`` tensor (shares memory when `values` is contiguous)."""
        contiguous = np.ascontiguousarray(values, dtype=np.float32)
        return cls("f32", contiguous.shape, contiguous.view(np.uint8).reshape(-1, 4 * contiguous.shape[-1]))
