"""Weights as the kernels read them: GGUF blocks in another order, in the same number of bytes.

A record holds 256 columns of one row in chunks of 16 bytes: scales first, then high bits, then low ones. Chunks of the
same number of consecutive rows lie side by side, int32 ``[records of a row, chunks, rows, 4]``, so that a warp with one
row a lane reads 512 bytes at once, each lane 16, and every lane needs the same activations. Bits a weight are those of
the file (q4_k 4.5, q5_k 5.5, q6_k 6.5625, q8_0 8.5): scales multiplied out as pairs of f16 would make 5.0 of q4_k's
4.5, 11 % more to read, for about a third of an instruction a weight less.

Of the bits in a chunk, word j has those of columns 4b + j: in bits 4b to 4b+3 (q8_0: 8b to 8b+7). A chunk of high bits
serves several chunks of low ones; byte p of its word j has the high bits of b = 2p from bit 0 on and those of
b = 2p + 1 from bit 4 on, chunk after chunk. `blocks.py` and `gemv.py` take them apart.
Source: the block layouts of the GGML library, as in `ruvllm_core.model.dequant`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ruvllm_core.errors import QuantizationError
from ruvllm_core.model.quant import SCHEMES, QuantTensor

#: How the scale and the minimum of a group are stored.
CODES, HALF, PAIR, BYTE = range(4)
RECORD = 256  # columns
_PANEL = 1 << 24  # weights that are repacked at a time, which bounds the memory it takes


@dataclass(frozen=True)
class Layout:
    """How a record is laid out; a weight is ``scale * q - minimum``.

    Attributes:
        scales: `CODES`: f16 factors of scales and minima, then sixteen 6-bit codes; `HALF`: eight f16 scales, the
            minimum is half the range of q times that; `PAIR`: eight f16 scales, eight f16 minima, added;
            `BYTE`: sixteen int8 scales for 16 columns each, and an f16 factor in an array of its own, minima as `HALF`.
        bits: of q: 4, 5, 6 or 8.
    """

    scales: int
    bits: int

    @property
    def scale_chunks(self) -> int:
        return 2 if self.scales == PAIR else 1

    @property
    def chunks(self) -> int:
        return self.scale_chunks + 2 * self.bits


LAYOUTS = {
    "q4_0": Layout(HALF, 4),
    "q5_0": Layout(HALF, 5),
    "q8_0": Layout(HALF, 8),
    "q4_1": Layout(PAIR, 4),
    "q5_1": Layout(PAIR, 5),
    "q4_k": Layout(CODES, 4),
    "q5_k": Layout(CODES, 5),
    "q6_k": Layout(BYTE, 6),
}
#: What is kept in another scheme: q3_k exactly, in 6.56 bits for 3.44; the others rounded.
STORED_AS = {"q3_k": "q6_k", "q2_k": "f16", "f32": "bf16"}


@dataclass(frozen=True, eq=False)
class PackedPart:
    """Rows of one scheme.

    Attributes:
        scheme: a key of `LAYOUTS`, ``f16`` or ``bf16``.
        first: row of the matrix at which it starts.
        rows, columns: its size.
        data: records int32 ``[records of a row, chunks, rows, 4]``, or a float matrix ``[rows, columns]``.
        factors: of `BYTE` scales, f16 ``[records of a row / 4, rows, 4]``; else None.
    """

    scheme: str
    first: int
    rows: int
    columns: int
    data: Tensor
    factors: Tensor | None = None

    @property
    def layout(self) -> Layout | None:
        """None of a float matrix."""
        return LAYOUTS.get(self.scheme)

    @property
    def records(self) -> int:
        """Records of a row."""
        return -(-self.columns // RECORD)

    @property
    def nbytes(self) -> int:
        factors = 0 if self.factors is None else self.factors.numel() * self.factors.element_size()
        return self.data.numel() * self.data.element_size() + factors


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix ``[rows, columns]`` as parts of one scheme each, in the order of its rows."""

    rows: int
    columns: int
    parts: tuple[PackedPart, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        return self.parts[0].data.device


def pack(weights: Sequence[QuantTensor], device: torch.device | str) -> PackedMatrix:
    """Matrices of equal width, stacked by rows, repacked on `device`.

    Neighbours of one scheme become one part. Raises `QuantizationError` for shapes that cannot be stacked.
    """
    if not weights or any(len(w.shape) != 2 or w.columns != weights[0].columns for w in weights):
        raise QuantizationError(f"matrices of equal width are needed, got {[w.shape for w in weights]}")
    runs: list[tuple[str, list[QuantTensor]]] = []
    for weight in weights:
        scheme = STORED_AS.get(weight.scheme, weight.scheme)
        if not runs or runs[-1][0] != scheme:
            runs.append((scheme, []))
        runs[-1][1].append(weight)
    parts: list[PackedPart] = []
    first = 0
    for scheme, tensors in runs:
        parts.append(_pack_part(scheme, first, tensors, torch.device(device)))
        first += parts[-1].rows
    return PackedMatrix(first, weights[0].columns, tuple(parts))


def _pack_part(scheme: str, first: int, tensors: list[QuantTensor], device: torch.device) -> PackedPart:
    rows, columns, layout = sum(t.num_rows for t in tensors), tensors[0].columns, LAYOUTS.get(scheme)
    factors = None
    if layout is None:
        dtype = torch.float16 if scheme == "f16" else torch.bfloat16
        data = torch.empty((rows, columns), dtype=dtype, device=device)
    else:
        records = -(-columns // RECORD)
        if 4 * records * layout.chunks * rows > 2**31 - 1:  # offsets are 32 bits wide in the kernels
            raise QuantizationError(
                f"a matrix of {rows} x {columns} in {scheme} has more than 8 GiB", hint="split it over several GPUs"
            )
        data = torch.empty((records, layout.chunks, rows, 4), dtype=torch.int32, device=device)
        if layout.scales == BYTE:
            factors = torch.zeros((-(-records // 4), rows, 4), dtype=torch.float16, device=device)
    at = 0
    for tensor in tensors:
        step = max(1, _PANEL // columns)
        for start in range(0, tensor.num_rows, step):
            piece = tensor.rows(start, min(start + step, tensor.num_rows))
            here = slice(at, at + piece.num_rows)
            if layout is None:
                data[here] = _floats(piece, device)
            else:
                chunks, factor = _records(piece, layout, device)
                data[:, :, here] = chunks.permute(1, 2, 0, 3)
                if factors is not None and factor is not None:
                    fours = torch.nn.functional.pad(factor, (0, -factor.shape[1] % 4)).unflatten(1, (-1, 4))
                    factors[:, here] = fours.transpose(0, 1)
            at += piece.num_rows
    return PackedPart(scheme, first, rows, columns, data, factors)


def _upload(tensor: QuantTensor, device: torch.device) -> Tensor:
    """Its bytes ``[rows, row bytes]`` on `device`."""
    with warnings.catch_warnings():  # the mapping is read-only, which PyTorch cannot express
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(tensor.data).to(device)


def _floats(tensor: QuantTensor, device: torch.device) -> Tensor:
    if tensor.scheme == "q2_k":
        return torch.from_numpy(tensor.dequantize()).to(device)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[tensor.scheme]
    return _upload(tensor, device).view(dtype)


def _records(tensor: QuantTensor, layout: Layout, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Chunks int32 ``[rows, records, chunks, 4]`` and, of `BYTE` scales, factors f16 ``[rows, records]``."""
    scheme = SCHEMES[tensor.scheme]
    raw = _upload(tensor, device).reshape(tensor.num_rows, -1, scheme.block_bytes)
    codes, scales, factors = _READERS[tensor.scheme](raw)
    missing = -tensor.columns % RECORD  # of schemes with blocks of 32, the last record may not be full
    rows, records = tensor.num_rows, -(-tensor.columns // RECORD)
    codes = torch.nn.functional.pad(codes.reshape(rows, -1), (0, missing)).view(rows, records, RECORD)
    if layout.scales in (HALF, PAIR):  # one f16 a block, eight of them a chunk
        kinds = scales.shape[-1]
        padded = torch.nn.functional.pad(scales, (0, 0, 0, missing // 32)).view(rows, records, 8, kinds)
        scales = padded.transpose(2, 3).clone(memory_format=torch.contiguous_format).view(torch.int32)
    else:
        scales = scales.view(rows, records, 1, 4)
    return torch.cat([scales, *_bits(codes, layout.bits)], 2), factors


def _bits(codes: Tensor, bits: int) -> list[Tensor]:
    """Chunks int32 ``[rows, records, n, 4]`` of codes uint8 ``[rows, records, 256]``: high bits, low ones."""
    rows, records = codes.shape[:2]
    if bits == 8:
        return [_words(codes.view(rows, records, 16, 4, 4).transpose(3, 4))]
    low = (codes & 15).view(rows, records, 8, 4, 2, 4)  # chunk, byte p, b's parity, word j
    found = [_words((low[..., 0, :] | low[..., 1, :] << 4).transpose(3, 4))]
    if high := bits - 4:
        serves = 4 // high
        fields = (codes >> 4).view(rows, records, 8 // serves, serves, 4, 2, 4)
        packed = torch.zeros_like(fields[:, :, :, 0, :, 0])
        for q in range(serves):
            packed |= fields[:, :, :, q, :, 0] << high * q | fields[:, :, :, q, :, 1] << 4 + high * q
        found.insert(0, _words(packed.transpose(3, 4)))
    return found


def _words(quads: Tensor) -> Tensor:
    """uint8 ``[..., 4, 4]`` as int32 ``[..., 4]``, the first byte lowest."""
    return quads.contiguous().view(torch.int32).squeeze(-1)


# --- blocks uint8 [rows, blocks, bytes] -> codes [rows, blocks, block size], scales, factors ------------------------

_Read = tuple[Tensor, Tensor, "Tensor | None"]


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """Of each `run` bytes first the low halves, then the high halves."""
    groups = packed.unflatten(-1, (-1, 1, run))
    return torch.cat((groups & 15, groups >> 4), -2).flatten(-3)


def _planes(packed: Tensor, width: int) -> Tensor:
    """``[..., k]`` bytes as ``[..., 8 / width * k]`` numbers of `width` bits, the lowest of all bytes first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return (packed[..., None, :] >> shifts[:, None] & (1 << width) - 1).flatten(-2)


def _two_bits(packed: Tensor) -> Tensor:
    return _planes(packed.unflatten(-1, (2, 32)), 2).flatten(-2)


def _half(raw: Tensor, start: int, count: int = 1) -> Tensor:
    return raw[..., start : start + 2 * count].contiguous().view(torch.float16)


def _q4_0(raw: Tensor) -> _Read:
    return _nibbles(raw[..., 2:], 16), _half(raw, 0), None


def _q4_1(raw: Tensor) -> _Read:
    return _nibbles(raw[..., 4:], 16), _half(raw, 0, 2), None


def _five_bits(raw: Tensor, start: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)
    high = (raw[..., start : start + 4, None] >> shifts & 1).flatten(-2)
    return _nibbles(raw[..., start + 4 :], 16) | high << 4


def _q5_0(raw: Tensor) -> _Read:
    return _five_bits(raw, 2), _half(raw, 0), None


def _q5_1(raw: Tensor) -> _Read:
    return _five_bits(raw, 4), _half(raw, 0, 2), None


def _q8_0(raw: Tensor) -> _Read:
    return raw[..., 2:] ^ 128, _half(raw, 0), None  # -128 … 127 as 0 … 255


def _six_bit_words(raw: Tensor) -> Tensor:
    """The first 16 bytes of q4_k and q5_k as words: both factors, then five codes each, of the last code two bits each.

    Codes 0 to 7 are scales, 8 to 15 minima.
    """
    first, second, third = (raw[..., at : at + 4] for at in (4, 8, 12))
    scales = (first & 63, third & 15 | first >> 2 & 48)
    codes = torch.cat((*scales, second & 63, third >> 4 | second >> 2 & 48), -1).long()
    factors = raw[..., :4].contiguous().view(torch.int32)
    shifts = torch.arange(0, 30, 6, device=raw.device)
    words = (codes[..., :15].unflatten(-1, (3, 5)) << shifts).sum(-1)
    words |= (codes[..., 15:] >> torch.arange(0, 6, 2, device=raw.device) & 3) << 30
    signed = words - (words >> 31 << 32)  # the same 32 bits
    return torch.cat((factors, signed.to(torch.int32)), -1)


def _q4_k(raw: Tensor) -> _Read:
    return _nibbles(raw[..., 16:], 32), _six_bit_words(raw), None


def _q5_k(raw: Tensor) -> _Read:
    return _nibbles(raw[..., 48:], 32) | _planes(raw[..., 16:48], 1) << 4, _six_bit_words(raw), None


def _q6_k(raw: Tensor) -> _Read:
    codes = _nibbles(raw[..., :128], 64) | _two_bits(raw[..., 128:192]) << 4
    return codes, raw[..., 192:208].contiguous().view(torch.int32), _half(raw, 208).squeeze(-1)


def _q3_k(raw: Tensor) -> _Read:
    codes = _two_bits(raw[..., 32:96]) | _planes(raw[..., :32], 1) << 2
    packed = raw[..., 96:108]
    scales = _nibbles(packed[..., :8], 8) | _planes(packed[..., 8:], 2) << 4
    scales = (scales - 32).contiguous().view(torch.int32)  # modulo 256, read as int8
    return codes + 28, scales, _half(raw, 108).squeeze(-1)  # q - 4 as q6_k's q - 32


_READERS: dict[str, Callable[[Tensor], _Read]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
