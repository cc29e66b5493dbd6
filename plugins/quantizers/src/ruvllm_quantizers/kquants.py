"""Encoders of the 256-value super-blocks q2_k … q6_k.

A super-block has one or two half-precision numbers, and each of its sub-blocks a small integer scale (and minimum)
relative to them. The encoder looks for the grid of least weighted squared error: for each sub-block it tries several
grid widths, solves the least-squares problem of each rounding in closed form, keeps the best, rounds the scales to
integers, and then alternates between rounding the values and re-fitting the super-block's own numbers.
Larger values get larger weights: they matter more for the products a matrix is used in.

Working arrays hold one sub-block per column, ``[size, sub-blocks]``, so every step runs along long contiguous rows.
Source: the block layouts of the GGML library; the search is weighted least squares over a line of candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .packing import Bytes, pack_nibbles, pack_planes, pack_scale_min, pack_six_bit_scales
from .simple import Floats, half_bytes, inverse

SUPER_BLOCK = 256
_REFITS = 2
_SINGULAR = 1e-5  # determinants below this part of their first term are rounding noise


class _Affine(NamedTuple):
    """``value = scale * scales[g] * quant - minimum * minima[g]``."""

    scale: Floats  # [n, 1]
    minimum: Floats  # [n, 1]
    scales: Bytes  # [n, groups]
    minima: Bytes  # [n, groups]
    quants: Bytes  # [n, 256]


class _Symmetric(NamedTuple):
    """``value = scale * scales[g] * quant``."""

    scale: Floats  # [n, 1]
    scales: npt.NDArray[np.int8]  # [n, groups]
    quants: npt.NDArray[np.int8]  # [n, 256]


def encode_q2_k(blocks: Floats) -> Bytes:
    fit = _affine(blocks, size=16, levels=3, scale_levels=15, widths=np.linspace(-0.6, 1.2, 10))
    planes = pack_planes(fit.quants.reshape(-1, 128), 4, 2).reshape(-1, 64)
    return np.concatenate([fit.scales | (fit.minima << np.uint8(4)), planes, _halves(fit)], axis=1)


def encode_q3_k(blocks: Floats) -> Bytes:
    fit = _symmetric(blocks, size=16, half=4, scale_half=32, widths=np.linspace(-1.2, 0.8, 11))
    quants = (fit.quants + np.int8(4)).view(np.uint8)
    low = pack_planes((quants & np.uint8(3)).reshape(-1, 128), 4, 2).reshape(-1, 64)
    high = pack_planes(quants >> np.uint8(2), 8, 1)
    scales = pack_six_bit_scales((fit.scales + np.int8(32)).view(np.uint8))
    return np.concatenate([high, low, scales, half_bytes(fit.scale)], axis=1)


def encode_q4_k(blocks: Floats) -> Bytes:
    fit = _affine(blocks, size=32, levels=15, scale_levels=63, widths=np.linspace(-1.2, 1.0, 12))
    scales = pack_scale_min(fit.scales, fit.minima)
    return np.concatenate([_halves(fit), scales, pack_nibbles(fit.quants, 32)], axis=1)


def encode_q5_k(blocks: Floats) -> Bytes:
    fit = _affine(blocks, size=32, levels=31, scale_levels=63, widths=np.linspace(-1.5, 1.0, 12))
    scales = pack_scale_min(fit.scales, fit.minima)
    high = pack_planes(fit.quants >> np.uint8(4), 8, 1)
    return np.concatenate([_halves(fit), scales, high, pack_nibbles(fit.quants & np.uint8(15), 32)], axis=1)


def encode_q6_k(blocks: Floats) -> Bytes:
    fit = _symmetric(blocks, size=16, half=32, scale_half=128, widths=np.linspace(-1.5, 0.9, 10))
    quants = (fit.quants + np.int8(32)).view(np.uint8)
    low = pack_nibbles(quants & np.uint8(15), 64)
    high = pack_planes((quants >> np.uint8(4)).reshape(-1, 128), 4, 2).reshape(-1, 64)
    return np.concatenate([low, high, fit.scales.view(np.uint8), half_bytes(fit.scale)], axis=1)


def _halves(fit: _Affine) -> Bytes:
    return half_bytes(np.concatenate([fit.scale, fit.minimum], axis=1))


# --- the search --------------------------------------------------------------------------------------------------


class _Columns:
    """Super-blocks laid out for the search, each divided by a power of two so that squares stay in range."""

    def __init__(self, blocks: Floats, size: int) -> None:
        self.n = len(blocks)
        self.groups = SUPER_BLOCK // size
        self.exponent = np.frexp(np.abs(blocks).max(axis=1, keepdims=True))[1]  # [n, 1]
        normal = np.ldexp(blocks, -self.exponent)
        self.x = np.ascontiguousarray(normal.reshape(-1, size).T)
        size_of = np.abs(self.x)
        self.w = size_of + np.sqrt(np.square(self.x).mean(axis=0))
        self.wx = self.w * self.x
        self.sum_w = self.w.sum(axis=0)
        self.sum_wx = self.wx.sum(axis=0)

    def per_block(self, columns: Floats) -> Floats:
        """Sums over the sub-blocks of each super-block, ``[n, 1]``."""
        sums: Floats = columns.reshape(self.n, self.groups).sum(axis=1, keepdims=True)
        return sums

    def storable(self, factor: Floats) -> tuple[Floats, Floats]:
        """`factor` as half precision can hold it: in units of the input, and in normalized units."""
        stored = np.ldexp(factor, self.exponent).astype(np.float16).astype(np.float32)
        return stored, np.ldexp(stored, -self.exponent)

    def blocks(self, quants: Floats) -> Floats:
        """Back from columns to super-blocks, ``[n, 256]``."""
        return np.ascontiguousarray(quants.T).reshape(self.n, SUPER_BLOCK)


def _round(x: Floats, factor: Floats, shift: Floats | float, low: int, high: int) -> Floats:
    """``clip(rint(x * factor + shift))`` with one array allocated."""
    quants = x * factor
    quants += shift
    np.rint(quants, out=quants)
    np.clip(quants, low, high, out=quants)
    return quants


def _affine(blocks: Floats, *, size: int, levels: int, scale_levels: int, widths: npt.NDArray[np.float64]) -> _Affine:
    c = _Columns(blocks, size)
    scale, minimum = _search_affine(c, levels, widths)

    d = scale.reshape(c.n, -1).max(axis=1, keepdims=True) / scale_levels
    m = minimum.reshape(c.n, -1).max(axis=1, keepdims=True) / scale_levels
    (d_out, d), (m_out, m) = c.storable(d), c.storable(m)
    scales = np.clip(np.rint(scale.reshape(c.n, -1) * inverse(d)), 0, scale_levels)
    minima = np.clip(np.rint(minimum.reshape(c.n, -1) * inverse(m)), 0, scale_levels)

    best: tuple[Floats, ...] = ()
    best_error = np.full((c.n, 1), np.inf, dtype=np.float32)
    for attempt in range(_REFITS + 1):
        s, b = (scales * d).reshape(-1), (minima * m).reshape(-1)
        step = inverse(s)
        q = _round(c.x, step, b * step, 0, levels)
        error = c.per_block((c.w * np.square(q * s - b - c.x)).sum(axis=0))
        better = error < best_error  # never where the first scale is beyond half precision: the caller reports that
        best_error = np.where(better, error, best_error) if attempt else error
        columns = np.repeat(better[:, 0], c.groups)
        best = (
            (np.where(better, d_out, best[0]), np.where(better, m_out, best[1]), np.where(columns, q, best[2]))
            if best
            else (d_out, m_out, q)
        )
        if attempt == _REFITS:
            break
        # Least squares for the two numbers of the super-block, all integers being as they are.
        wq = c.w * q
        a, k = scales.reshape(-1), minima.reshape(-1)
        aa = c.per_block(a * a * (wq * q).sum(axis=0))
        ab = c.per_block(a * k * wq.sum(axis=0))
        bb = c.per_block(k * k * c.sum_w)
        ax = c.per_block(a * (wq * c.x).sum(axis=0))
        bx = c.per_block(k * c.sum_wx)
        determinant = aa * bb - ab * ab
        usable = determinant > _SINGULAR * aa * bb
        inv = inverse(np.where(usable, determinant, 0))
        d = np.where(usable, (ax * bb - ab * bx) * inv, ax * inverse(aa))
        m = np.where(usable, (ab * ax - aa * bx) * inv, 0)
        (d_out, d), (m_out, m) = c.storable(np.maximum(d, 0)), c.storable(np.maximum(m, 0))
    d_out, m_out, q = best
    return _Affine(d_out, m_out, scales.astype(np.uint8), minima.astype(np.uint8), c.blocks(q).astype(np.uint8))


def _search_affine(c: _Columns, levels: int, widths: npt.NDArray[np.float64]) -> tuple[Floats, Floats]:
    """Scale and (negated) minimum of each column, both at least 0."""
    low = np.minimum(c.x.min(axis=0), 0)
    span = inverse(c.x.max(axis=0) - low)
    best_scale = np.zeros_like(low)
    best_min = -low
    best_gain = best_min * (-2 * c.sum_wx - best_min * c.sum_w)  # how much less error than with all zeros
    for width in widths:
        step = span * np.float32(levels + width)
        q = _round(c.x, step, -low * step, 0, levels)
        wq = c.w * q
        s_q = wq.sum(axis=0)
        s_qx = (wq * c.x).sum(axis=0)
        wq *= q
        s_qq = wq.sum(axis=0)
        determinant = c.sum_w * s_qq - s_q * s_q
        inv = inverse(determinant)
        scale = (c.sum_w * s_qx - s_q * c.sum_wx) * inv
        minimum = (s_q * s_qx - s_qq * c.sum_wx) * inv
        # The format cannot lift the grid above zero, and equal quants leave the minimum undetermined.
        lone = (minimum < 0) | (determinant < _SINGULAR * c.sum_w * s_qq)
        scale = np.maximum(np.where(lone, s_qx * inverse(s_qq), scale), 0)
        minimum = np.where(lone, 0, minimum)
        gain = 2 * (scale * s_qx - minimum * c.sum_wx) - (
            scale * scale * s_qq - 2 * scale * minimum * s_q + minimum * minimum * c.sum_w
        )
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        best_scale = np.where(better, scale, best_scale)
        best_min = np.where(better, minimum, best_min)
    return best_scale, best_min


def _symmetric(blocks: Floats, *, size: int, half: int, scale_half: int, widths: npt.NDArray[np.float64]) -> _Symmetric:
    c = _Columns(blocks, size)
    scale = _search_symmetric(c, half, widths).reshape(c.n, -1)
    index = np.abs(scale).argmax(axis=1)[:, None]
    d_out, d = c.storable(np.take_along_axis(scale, index, axis=1) / np.float32(-scale_half))
    scales = np.clip(np.rint(scale * inverse(d)), -scale_half, scale_half - 1)
    a = scales.reshape(-1)

    best: tuple[Floats, ...] = ()
    best_error = np.full((c.n, 1), np.inf, dtype=np.float32)
    for attempt in range(_REFITS + 1):
        s = (scales * d).reshape(-1)
        q = _round(c.x, inverse(s), 0, -half, half - 1)
        error = c.per_block((c.w * np.square(q * s - c.x)).sum(axis=0))
        better = error < best_error  # never where the first scale is beyond half precision: the caller reports that
        best_error = np.where(better, error, best_error) if attempt else error
        columns = np.repeat(better[:, 0], c.groups)
        best = (np.where(better, d_out, best[0]), np.where(columns, q, best[1])) if best else (d_out, q)
        if attempt == _REFITS:
            break
        wq = c.w * q
        ax = c.per_block(a * (wq * c.x).sum(axis=0))
        d_out, d = c.storable(ax * inverse(c.per_block(a * a * (wq * q).sum(axis=0))))
    d_out, q = best
    return _Symmetric(d_out, scales.astype(np.int8), c.blocks(q).astype(np.int8))


def _search_symmetric(c: _Columns, half: int, widths: npt.NDArray[np.float64]) -> Floats:
    """Signed scale of each column: the value farthest from zero lands near ``-half``, where there is one more level."""
    index = np.abs(c.x).argmax(axis=0)[None, :]
    unit = inverse(np.take_along_axis(c.x, index, axis=0)[0])
    best_scale = np.zeros_like(unit)
    best_gain = np.zeros_like(unit)
    for width in widths:
        q = _round(c.x, unit * np.float32(-half - width), 0, -half, half - 1)
        wq = c.w * q
        s_qx = (wq * c.x).sum(axis=0)
        wq *= q
        inv = inverse(wq.sum(axis=0))
        gain = s_qx * s_qx * inv
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        best_scale = np.where(better, s_qx * inv, best_scale)
    return best_scale
