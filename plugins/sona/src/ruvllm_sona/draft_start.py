"""Where the training of a draft head starts: at the best linear guess of the next state, found in closed form.

The model's own output projection makes logits of that guess, so a head knows something of every token before its first
step of gradient descent. Everything comes in slices of a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 128  # of data, a slice
_BLOCK = 96  # columns of a factorization, a slice
_ROUNDS = 12  # of subspace iteration

Slices = Generator[None, None, "Tensor"]


def gram(chunks: Iterable[tuple[Tensor, Tensor]]) -> Generator[None, None, tuple[Tensor, Tensor]]:
    """Sums of ``XᵀX`` and ``XᵀY`` over chunks of rows."""
    sums: tuple[Tensor, Tensor] | None = None
    for x, y in chunks:
        if sums is None:
            sums = x.T @ x, x.T @ y
        else:
            sums[0].addmm_(x.T, x)
            sums[1].addmm_(x.T, y)
        yield
    assert sums is not None, "no rows"
    return sums


def solve(matrix: Tensor, right: Tensor) -> Slices:
    """``matrix⁻¹ right`` for a symmetric positive definite matrix, by a Cholesky factorization in blocks of columns."""
    import torch

    size, factor, solution = len(matrix), torch.zeros_like(matrix), right.clone()
    starts = range(0, size, _BLOCK)
    for j in starts:
        end = min(j + _BLOCK, size)
        column = matrix[j:, j:end] - factor[j:, :j] @ factor[j:end, :j].T
        top = torch.linalg.cholesky(column[: end - j])
        factor[j:end, j:end] = top
        factor[end:, j:end] = torch.linalg.solve_triangular(top, column[end - j :].T, upper=False).T
        yield
    for j in starts:
        end = min(j + _BLOCK, size)
        rest = solution[j:end] - factor[j:end, :j] @ solution[:j]
        solution[j:end] = torch.linalg.solve_triangular(factor[j:end, j:end], rest, upper=False)
        yield
    for j in reversed(starts):
        end = min(j + _BLOCK, size)
        rest = solution[j:end] - factor[end:, j:end].T @ solution[end:]
        solution[j:end] = torch.linalg.solve_triangular(factor[j:end, j:end].T, rest, upper=True)
        yield
    return solution


def leading(matrix: Tensor, count: int, seed: int) -> Slices:
    """An orthonormal basis ``[n, count]`` of about the leading eigenvectors of a symmetric ``[n, n]`` matrix."""
    import torch

    start = torch.Generator().manual_seed(seed)
    basis: Tensor = torch.linalg.qr(torch.randn(len(matrix), count, generator=start))[0]
    yield
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ basis)[0]
        yield
    return basis
