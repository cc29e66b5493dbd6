"""Eligibility: in which direction the final-site adapter must go for an answer to become likelier.

The gradient of the log-probability of what was drawn, under the distribution it really was drawn from (Williams 1992,
"Simple statistical gradient-following algorithms", the characteristic eligibility). With ``h′ = h + s·B·A·h``, logits
``z = W h′`` and the truncated, tempered ``p̃``, each token adds, for ``g = W_Sᵀ(1_y − p̃)/τ``,

    E_B += s · g (A h)ᵀ        E_A += s · (Bᵀ g) hᵀ

``g`` itself, as wide as the model, is never needed: everything goes through ``W_S`` times two or four vectors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError
from ruvllm_core.generate.sampler import Distribution
from ruvllm_core.model.dequant import dequantize
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import FloatArray, LowRank

Array = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

#: Values of the output projection that are kept between two passes over it: 16 MiB. More are decoded twice.
_HELD_VALUES = 1 << 22
#: Multiplications in one product: few enough for a core's cache, and for BLAS libraries to leave it to one thread.
#: Spread over cores that others use, such thin products wait far longer than they compute.
_BLOCK_PRODUCTS = 1 << 18
#: What a support may lack of 1 and still be called whole.
_WHOLE = 1e-9


@dataclass(frozen=True, eq=False)
class Trace:
    """The gradient of an answer's log-probability with respect to the two factors of the final-site adapter.

    Attributes:
        a, b: E_A ``[r, C]`` and E_B ``[C, r]``, summed over tokens; nats per unit of the parameter.
        tokens: n, of the answer.
        version: of the adapter it was taken at.
        curvature: second derivative of the Kullback-Leibler divergence from the distributions drawn from, summed over
            the answer's tokens, along the gradient: a step ``α·(a, b)`` costs about ``α²·curvature/2`` nats.
        exact: whether everything a token could have been was recorded; if not, the rest was left out of ``p̃``.
    """

    a: Array
    b: Array
    tokens: int
    version: str = ""
    curvature: float = 0.0
    exact: bool = True


@dataclass(frozen=True, eq=False)
class Head:
    """The output projection, of which only the rows asked for are decoded.

    Attributes:
        weight: W ``[V, C]``.
        softcap: c of ``c·tanh(z/c)`` on the logits, None for no cap.
    """

    weight: QuantTensor
    softcap: float | None = None

    @classmethod
    def of(cls, spec: ModelSpec, weights: Mapping[str, QuantTensor]) -> Head:
        """A model's; that of tied embeddings is the embedding."""
        return cls(weights["embed" if spec.tied_embeddings else "lm_head"], spec.logit_softcap)

    def rows(self, ids: Ints, out: FloatArray | None = None) -> FloatArray:
        """Float32 ``[k, C]``, in `out` if given. Raises `LearningError` for a token that the model does not have."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.weight.num_rows:
            raise LearningError(
                f"tokens {int(ids.min())} to {int(ids.max())} do not fit a vocabulary of {self.weight.num_rows}",
                hint="the answer was drawn by another model",
            )
        picked = QuantTensor(self.weight.scheme, (len(ids), self.weight.columns), self.weight.data[ids])
        return dequantize(picked, out, threads=1)


def why_untraceable(
    hidden: Array | None, output_ids: Sequence[int], drawn_from: Sequence[Distribution], temperature: float
) -> str:
    """Why an answer has no trace; empty if it has one."""
    if not output_ids:
        return "the answer is empty"
    if temperature <= 0.0:
        return "the answer is greedy: nothing was drawn, so no draw can be made likelier"
    if hidden is None:
        return "its hidden states were not recorded"
    if not drawn_from:
        return "what its tokens were drawn from was not recorded"
    return ""


def eligibility(
    hidden: Array | None,
    output_ids: Sequence[int],
    drawn_from: Sequence[Distribution],
    temperature: float,
    delta: LowRank,
    head: Head,
    *,
    version: str = "",
    repetition_penalty: float = 1.0,
    prompt_ids: Sequence[int] = (),
) -> Trace | None:
    """The trace of one answer, or None where there is none (see `why_untraceable`).

    The other penalties and a logit bias only shift logits; they are in `drawn_from` already.

    Args:
        hidden: ``[n, C]``, the states tokens were drawn from, before any adapter. In float64, all is computed so.
        drawn_from: what each token was drawn from, or the likeliest of it. A drawn token that is not among them counts
            as one of probability 0.
        delta: the final-site adapter that the answer was drawn with.
        repetition_penalty, prompt_ids: as sampled with; this penalty scales logits, and so their derivative.

    Raises:
        LearningError: the arguments do not fit each other.
    """
    if hidden is None or why_untraceable(hidden, output_ids, drawn_from, temperature):
        return None
    support = _Support(hidden, output_ids, drawn_from, temperature, delta, head, repetition_penalty, prompt_ids)
    return support.trace(version)


def gradients(
    hidden: Array,
    output_ids: Sequence[int],
    drawn_from: Sequence[Distribution],
    temperature: float,
    delta: LowRank,
    head: Head,
    *,
    repetition_penalty: float = 1.0,
    prompt_ids: Sequence[int] = (),
) -> Array:
    """``g`` of each token, ``[n, C]``: the gradient of its log-probability with respect to ``h′``.

    What the Fisher information of the final site is estimated from; costs more than a trace. Arguments and errors are
    those of `eligibility`, for an answer that has a trace.
    """
    support = _Support(hidden, output_ids, drawn_from, temperature, delta, head, repetition_penalty, prompt_ids)
    found = np.zeros_like(support.hidden)
    for ids, weights in support.blocks():
        entries = support.entries(ids)
        dense = np.zeros((len(found), len(weights)), found.dtype)
        dense[support.token[entries], support.row[entries] - ids.start] = support.pull[entries]
        found += dense @ weights
    return found


class _Support:
    """All pairs (token of the answer, id it could have been), by rising id, and rows of W block after block."""

    def __init__(
        self, hidden: Array, output_ids: Sequence[int], drawn_from: Sequence[Distribution], temperature: float,
        delta: LowRank, head: Head, repetition_penalty: float, prompt_ids: Sequence[int],
    ) -> None:  # fmt: skip
        count = len(output_ids)
        if hidden.shape != (count, head.weight.columns) or len(drawn_from) != count:
            raise LearningError(
                f"{count} tokens of a model {head.weight.columns} wide, but hidden states {hidden.shape} "
                f"and {len(drawn_from)} distributions",
                hint="all three must be of the same answer",
            )
        if delta.a.shape[1] != hidden.shape[1] or delta.b.shape != delta.a.T.shape:
            raise LearningError(f"factors {delta.a.shape} and {delta.b.shape} do not fit a width of {hidden.shape[1]}")
        self.hidden = hidden if hidden.dtype == np.float64 else np.asarray(hidden, np.float32)
        self.head, self.scale = head, delta.scale
        self.a, self.b = (np.asarray(factor, self.hidden.dtype) for factor in (delta.a, delta.b))
        drawn = np.asarray(output_ids, np.int64)
        token = np.repeat(np.arange(count), [len(each.ids) for each in drawn_from])
        ids = np.concatenate([each.ids for each in drawn_from])
        share = np.concatenate([each.probabilities for each in drawn_from])
        mass = np.bincount(token, share, count)
        absent = np.flatnonzero(np.bincount(token, ids == drawn[token], count) == 0)
        self.exact = bool(np.abs(mass - 1.0).max() <= _WHOLE) and not absent.size
        share = share / mass[token]
        if absent.size:
            token, ids = np.concatenate([token, absent]), np.concatenate([ids, drawn[absent]])
            share = np.concatenate([share, np.zeros(len(absent))])
        order = np.argsort(ids, kind="stable")
        self.token, ids, self.share = token[order], ids[order], share[order]
        first = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
        self.ids, self._starts = ids[first], np.append(first, len(ids))
        self.row = np.repeat(np.arange(len(first)), np.diff(self._starts))
        self.slope = np.full(len(ids), 1.0 / temperature)
        self._kept: list[tuple[slice, Array]] = []
        if head.softcap is not None or repetition_penalty != 1.0:
            self._bend(ids, drawn, repetition_penalty, prompt_ids)
        self.pull = ((ids == drawn[self.token]) - self.share) * self.slope

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """W block after block, ``[k, C]``, and which of `ids` its rows are of; good until the next support's."""
        if self._kept:
            yield from self._kept
            return
        rank, width = self.a.shape
        step = max(_BLOCK_PRODUCTS // (rank * width), 16)
        keep = len(self.ids) * width <= _HELD_VALUES
        kept, space = [], _space(len(self.ids) if keep else step, width)
        for start in range(0, len(self.ids), step):
            ids = slice(start, min(start + step, len(self.ids)))
            room = space[ids] if keep else space[: ids.stop - start]
            block = ids, self.head.rows(self.ids[ids], room).astype(self.hidden.dtype, copy=False)
            if keep:
                kept.append(block)
            yield block
        self._kept = kept

    def entries(self, ids: slice) -> slice:
        """The pairs that are about some of `ids`."""
        return slice(int(self._starts[ids.start]), int(self._starts[ids.stop]))

    def trace(self, version: str) -> Trace:
        """One pass over the rows of W for the gradient, one for the curvature along it."""
        dtype, (rank, width), count = self.hidden.dtype, self.a.shape, len(self.hidden)
        inner = (self.a @ self.hidden.T).astype(np.float64)  # A h, [r, n]
        pulled = _spread(self.row, self.pull, inner, self.token, len(self.ids)).T.astype(dtype)
        grad_b = np.zeros((width, rank), dtype)
        along = np.empty((len(self.ids), rank), dtype)  # W B
        for ids, weights in self.blocks():
            along[ids] = weights @ self.b
            grad_b += weights.T @ pulled[ids]
        grad_b *= self.scale
        projected = along.T.astype(np.float64)
        back = _spread(self.token, self.pull, projected, self.row, count)  # Bᵀ g of each token
        grad_a = self.scale * (back.astype(dtype) @ self.hidden)
        for ids, weights in self.blocks():
            along[ids] = weights @ grad_b
        turned = (grad_a @ self.hidden.T).astype(np.float64)
        # How fast each logit changes along the gradient; the divergence curves as their variance does.
        pairs = ((along.T.astype(np.float64), inner), (projected, turned))
        change = sum(left[k][self.row] * right[k][self.token] for left, right in pairs for k in range(rank))
        change = change * self.slope * self.scale
        mean = np.bincount(self.token, self.share * change, count)
        curvature = float(self.share @ change**2) - float(mean @ mean)
        return Trace(grad_a, grad_b, count, version, max(curvature, 0.0), self.exact)

    def _bend(self, ids: Ints, drawn: Ints, penalty: float, prompt_ids: Sequence[int]) -> None:
        """Multiply slopes by the derivatives of the soft cap and of the repetition penalty (CTRL, arXiv 1909.05858)."""
        logits = np.empty(len(ids))
        adapted = self.hidden + self.scale * ((self.hidden @ self.a.T) @ self.b.T)
        for rows, weights in self.blocks():
            entries = self.entries(rows)
            states = adapted[self.token[entries]]
            logits[entries] = np.einsum("ec,ec->e", states, weights[self.row[entries] - rows.start])
        if (cap := self.head.softcap) is not None:
            logits = cap * np.tanh(logits / cap)
            self.slope *= 1.0 - (logits / cap) ** 2
        if penalty != 1.0:
            # An id has been seen by token t if the prompt has it, or if the answer's first of them comes before t.
            values, first = np.unique(drawn, return_index=True)
            place = np.minimum(np.searchsorted(values, ids), len(values) - 1)
            seen = (values[place] == ids) & (first[place] < self.token)
            seen |= np.isin(ids, np.asarray(prompt_ids, np.int64))
            self.slope *= np.where(seen, np.where(logits > 0, 1.0 / penalty, penalty), 1.0)


_own = threading.local()


def _space(rows: int, width: int) -> FloatArray:
    """Room for rows of W, each thread's own and the same every time: new memory costs as much as decoding into it."""
    flat: FloatArray | None = getattr(_own, "flat", None)
    if flat is None or len(flat) < rows * width:
        flat = _own.flat = np.empty(rows * width, np.float32)
    return flat[: rows * width].reshape(rows, width)


def _spread(
    index: Ints, weight: npt.NDArray[np.float64], vectors: npt.NDArray[np.float64], of: Ints, size: int
) -> npt.NDArray[np.float64]:
    """Σ of ``weight_e · vectors[:, of_e]`` over the entries e of each index, ``[r, size]``."""
    return np.stack([np.bincount(index, weight * row[of], size) for row in vectors])
