"""From logits to tokens on the device, the tokens that `ruvllm_core.generate.sampler` would draw.

What a filter keeps is a beginning of the tokens by falling logit, so a threshold says it all, and none has to be
sorted: logits as whole numbers in their order have 32 bits, and each pass finds 6 of them by adding up, for 64
thresholds at once, the weights (top-p) or the number (top-k) of tokens above. Sums are float64 in fixed order, so a
draw comes out as on the host. A pass reads 12 bytes a token from the L2 cache with a program every `CHUNK` tokens.
"""
# ruff: noqa: SIM102

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvllm_kernels_cuda.attention_tiles import INTERPRETED
from ruvllm_kernels_cuda.penalties import Penalties, count_tokens, penalize

CHUNK = 2048
SHIFTS = (26, 20, 14, 8, 2, 0)
WAYS = tl.constexpr(64)
#: Tokens that a program compares with all thresholds at a time; the interpreter takes as long for many as for few.
SUB = CHUNK if INTERPRETED.value else 32


@dataclass(frozen=True, eq=False)
class SamplingRows:
    """How each row is sampled (`ruvllm_core.generate.request.SamplingFields`); all ``[R]`` on the device.

    Attributes:
        temperature: float64; 0 is greedy.
        top_k: int32; 0 is all.
        top_p, min_p: float64; 1 and 0 are off.
        uniform: float64 in ``[0, 1)``, what the host's sampler would draw from its generator for this token.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


@triton.jit
def _order(x):
    """Floats as whole numbers from 0 to 2^32 in the same order; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64) + 2147483648


@triton.jit
def _maxima(logits, maxima, places, width, CHUNK: tl.constexpr):
    """The largest logit of each chunk and the first token that has it; infinity if any is not a number."""
    row, chunk = tl.program_id(1), tl.program_id(0)
    n = tl.arange(0, CHUNK)
    column = chunk * CHUNK + n
    x = tl.load(logits + row.to(tl.int64) * width + column, mask=column < width, other=float("-inf"))
    x = tl.where(x == x, x, float("inf"))
    top = tl.max(x, 0)
    at = row * tl.num_programs(0) + chunk
    tl.store(maxima + at, top)
    tl.store(places + at, chunk * CHUNK + tl.min(tl.where(x == top, n, CHUNK), 0))


@triton.jit
def _top_of(maxima, row, chunks, CP: tl.constexpr):
    c = tl.arange(0, CP)
    return tl.max(tl.load(maxima + row * chunks + c, mask=c < chunks, other=float("-inf")), 0)


@triton.jit
def _weigh(logits, maxima, temperatures, weights, sums, masses, width, CHUNK: tl.constexpr, CP: tl.constexpr):
    """Weights at the row's temperature, the sum of them, and the sum at temperature 1, float64, of each chunk."""
    row, chunk = tl.program_id(1), tl.program_id(0)
    chunks = tl.num_programs(0)
    top = _top_of(maxima, row, chunks, CP)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < width
    x = tl.load(logits + row.to(tl.int64) * width + column, mask=inside, other=float("-inf"))
    lower = x.to(tl.float64) - top.to(tl.float64)
    temperature = tl.load(temperatures + row)
    weight = tl.exp(lower / tl.where(temperature > 0.0, temperature, 1.0))
    tl.store(weights + row.to(tl.int64) * width + column, weight, mask=inside)
    tl.store(masses + row * chunks + chunk, tl.sum(tl.where(inside, weight, 0.0), 0))
    tl.store(sums + row * chunks + chunk, tl.sum(tl.where(inside, tl.exp(lower), 0.0), 0))


@triton.jit
def _narrowed(partial, bases, row, goal, chunks, SHIFT: tl.constexpr):
    """The largest of a pass's thresholds with as much above it as is wanted."""
    j = tl.arange(0, WAYS)
    found = tl.zeros((WAYS,), tl.float64)
    for chunk in range(chunks):
        found += tl.load(partial + (row * chunks + chunk) * WAYS + j)
    step = tl.max(tl.where(found >= goal, j, 0), 0)
    return tl.load(bases + row) + (step.to(tl.int64) << SHIFT)


@triton.jit
def _goal(row, limits, shares, totals, chunks, CP: tl.constexpr, BY_COUNT: tl.constexpr, width):
    """How much is wanted above the threshold, and whether anything is to be left out at all."""
    if BY_COUNT:
        wanted = tl.load(limits + row)
        goal = tl.minimum(wanted, width).to(tl.float64)
        active = wanted > 0
    else:
        c = tl.arange(0, CP)
        share = tl.load(shares + row)
        goal = share * tl.sum(tl.load(totals + row * chunks + c, mask=c < chunks, other=0.0), 0)
        active = share < 1.0
    return goal, active


@triton.jit
def _search(
    logits, weights, limits, shares, totals, before, after, bases, next_bases, width,
    FIRST: tl.constexpr, LAST: tl.constexpr, SHIFT: tl.constexpr, OLD_SHIFT: tl.constexpr,
    BY_COUNT: tl.constexpr, CHUNK: tl.constexpr, CP: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One pass: what the last one found becomes the base, and sums above 64 thresholds from there on are made."""
    row, chunk = tl.program_id(1), tl.program_id(0)
    chunks = (width + CHUNK - 1) // CHUNK
    goal, active = _goal(row, limits, shares, totals, chunks, CP, BY_COUNT, width)
    if not active:
        if chunk == 0:
            tl.store(next_bases + row, tl.full((), 0, tl.int64))
        return
    base = tl.full((), 0, tl.int64)
    if not FIRST:
        base = _narrowed(before, bases, row, goal, chunks, OLD_SHIFT)
    if chunk == 0:
        tl.store(next_bases + row, base)
    if not LAST:
        thresholds = base + (tl.arange(0, WAYS).to(tl.int64) << SHIFT)
        found = tl.zeros((SUB, WAYS), tl.float64)
        for at in range(0, CHUNK, SUB):
            column = chunk * CHUNK + at + tl.arange(0, SUB)
            inside = column < width
            place = row.to(tl.int64) * width + column
            x = tl.load(logits + place, mask=inside, other=0.0)
            if BY_COUNT:
                weight = inside.to(tl.float64)
            else:
                weight = tl.load(weights + place, mask=inside, other=0.0)
            found += tl.where(_order(x)[:, None] >= thresholds[None, :], weight[:, None], 0.0)
        tl.store(after + (row * chunks + chunk) * WAYS + tl.arange(0, WAYS), tl.sum(found, 0))


@triton.jit
def _tally(
    logits, weights, count_bases, mass_bases, min_shares, above, kept, counts, ties, tie_weights, width,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Of each chunk: mass above the threshold, what min-p keeps of it, its tokens, and the tokens at the threshold."""
    row, chunk = tl.program_id(1), tl.program_id(0)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < width
    place = row.to(tl.int64) * width + column
    order = _order(tl.load(logits + place, mask=inside, other=0.0))
    weight = tl.load(weights + place, mask=inside, other=0.0)
    threshold = tl.maximum(tl.load(count_bases + row), tl.load(mass_bases + row))
    over = inside & (order > threshold)
    equal = inside & (order == threshold)
    at = row * tl.num_programs(0) + chunk
    tl.store(above + at, tl.sum(tl.where(over, weight, 0.0), 0))
    tl.store(kept + at, tl.sum(tl.where(over & (weight >= tl.load(min_shares + row)), weight, 0.0), 0))
    tl.store(counts + at, tl.sum(over.to(tl.int32), 0))
    tl.store(ties + at, tl.sum(equal.to(tl.int32), 0))
    tl.store(tie_weights + at, tl.max(tl.where(equal, weight, 0.0), 0))


@triton.jit
def _within_count(row, limits, counts, chunks, CP: tl.constexpr):
    """How many tokens at the threshold are among the first k."""
    c = tl.arange(0, CP)
    return tl.load(limits + row) - tl.sum(tl.load(counts + row * chunks + c, mask=c < chunks, other=0), 0)


@triton.jit
def _total_of_top(limits, above, counts, ties, tie_weights, masses, totals, chunks, CP: tl.constexpr):
    """The mass of the k likeliest instead of that of all, where k is set: what top-p is a share of."""
    row = tl.program_id(0)
    c = tl.arange(0, CP)
    at = row * chunks + c
    mass = tl.load(masses + at, mask=c < chunks, other=0.0)
    if tl.load(limits + row) > 0:
        number = tl.minimum(
            _within_count(row, limits, counts, chunks, CP), tl.sum(tl.load(ties + at, mask=c < chunks, other=0), 0)
        )
        tie = tl.max(tl.load(tie_weights + at, mask=c < chunks, other=0.0), 0)
        mass = tl.load(above + at, mask=c < chunks, other=0.0) + tl.where(c == 0, number.to(tl.float64) * tie, 0.0)
    tl.store(totals + at, mass, mask=c < chunks)


@triton.jit
def _draw(
    logits, weights, maxima, places, sums, temperatures, limits, shares, totals, min_shares, uniforms,
    count_bases, mass_bases, above, kept, counts, ties, tie_weights, tokens, logprobs, width,
    CHUNK: tl.constexpr, CP: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """The token of a row: the likeliest if greedy, otherwise the first, in the order of ids, to reach the uniform."""
    row = tl.program_id(0)
    chunks = (width + CHUNK - 1) // CHUNK
    c = tl.arange(0, CP)
    real = c < chunks
    at = row * chunks + c
    top = _top_of(maxima, row, chunks, CP)
    maximum = tl.load(maxima + at, mask=real, other=float("-inf"))
    token = tl.min(tl.where(maximum == top, tl.load(places + at, mask=real, other=2147483647), 2147483647), 0)
    if SAMPLED:
        if tl.load(temperatures + row) > 0.0:
            count_base, mass_base = tl.load(count_bases + row), tl.load(mass_bases + row)
            threshold = tl.maximum(count_base, mass_base)
            least = tl.load(min_shares + row)
            tie = tl.max(tl.load(tie_weights + at, mask=real, other=0.0), 0)
            tied = tl.load(ties + at, mask=real, other=0)
            number = tl.sum(tied, 0)
            if (tl.load(limits + row) > 0) & (threshold == count_base):
                number = tl.minimum(number, _within_count(row, limits, counts, chunks, CP))
            goal, active = _goal(row, limits, shares, totals, chunks, CP, False, width)
            if active & (threshold == mass_base):
                mass = tl.sum(tl.load(above + at, mask=real, other=0.0), 0)
                # The first one is kept if what is above does not reach the goal, the next if it does not with that…
                number = tl.minimum(number, tl.maximum(tl.ceil((goal - mass) / tie), 1.0).to(tl.int32))
            number = tl.where(tie >= least, number, 0)
            earlier = tl.cumsum(tied, 0) - tied
            here = tl.minimum(tl.maximum(number - earlier, 0), tied).to(tl.float64)
            mass = tl.load(kept + at, mask=real, other=0.0) + here * tie
            target = tl.load(uniforms + row) * tl.sum(mass, 0)
            reached = tl.cumsum(mass, 0)
            chunk = tl.minimum(tl.sum((reached <= target).to(tl.int32), 0), tl.max(tl.where(mass > 0.0, c, 0), 0))
            before = tl.sum(tl.where(c < chunk, mass, 0.0), 0)
            left = number - tl.sum(tl.where(c < chunk, tied, 0), 0)
            n = tl.arange(0, CHUNK)
            column = chunk * CHUNK + n
            inside = column < width
            place = row.to(tl.int64) * width + column
            order = _order(tl.load(logits + place, mask=inside, other=0.0))
            weight = tl.load(weights + place, mask=inside, other=0.0)
            equal = inside & (order == threshold)
            first_ones = equal & (tl.cumsum(equal.to(tl.int32), 0) <= left)
            keep = (inside & (order > threshold) & (weight >= least)) | first_ones
            reached = before + tl.cumsum(tl.where(keep, weight, 0.0), 0)
            index = tl.sum((reached <= target).to(tl.int32), 0)
            token = chunk * CHUNK + tl.minimum(index, tl.max(tl.where(keep & (weight > 0.0), n, 0), 0))
    finite = (top < float("inf")) & (top > float("-inf"))
    x = tl.load(logits + row.to(tl.int64) * width + tl.where(finite, token, 0)).to(tl.float64)
    total = tl.sum(tl.load(sums + at, mask=real, other=0.0), 0)
    tl.store(tokens + row, tl.where(finite, token, -1).to(tl.int64))
    tl.store(logprobs + row, x - top.to(tl.float64) - tl.log(total))


class SamplingWorkspace:
    """Device memory that `sample` uses between its kernels, for at most `rows` rows of `width` logits."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        chunks = triton.cdiv(width, CHUNK)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        def whole(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.weights = floats(rows, width)
        self.maxima = torch.zeros(rows, chunks, dtype=torch.float32, device=device)
        self.places, self.counts, self.ties = (whole(rows, chunks) for _ in range(3))
        self.sums, self.masses, self.totals, self.above, self.kept, self.tie_weights = (
            floats(rows, chunks) for _ in range(6)
        )
        self.partials = floats(2, rows, chunks, WAYS.value)
        self.bases = whole(2, 2, rows, dtype=torch.int64)
        self.none, self.greedy = whole(rows, dtype=torch.int64), floats(rows)  # zeros
        self.tokens, self.logprobs = whole(rows, dtype=torch.int64), floats(rows)


def sample(
    logits: Tensor,
    rows: SamplingRows | None,
    workspace: SamplingWorkspace,
    penalties: Penalties | None = None,
    *,
    top_k: bool = True,
    top_p: bool = True,
) -> tuple[Tensor, Tensor]:
    """A token for each row of float32 logits ``[R, V]``, contiguous, and its log-probability at temperature 1.

    With `penalties` the logits are changed in place first, and the tokens are counted afterwards. `rows` None is greedy
    for everybody. `top_k` and `top_p` False leave out passes that no row needs. Returned are int64 ``[R]`` and float64
    ``[R]`` in the workspace, which the next call overwrites; a token of -1 says that the row's logits are not numbers,
    are infinite, or leave no token to choose.
    """
    if penalties is not None:
        penalize(logits, penalties)
    count, width = logits.shape
    chunks = triton.cdiv(width, CHUNK)
    w, grid, cp = workspace, (chunks, count), triton.next_power_of_2(chunks)
    _maxima[grid](logits, w.maxima, w.places, width, CHUNK=CHUNK)
    given = rows or SamplingRows(w.sums, w.sums, w.sums, w.sums, w.sums)  # of which nothing is read
    temperature = w.greedy if rows is None else rows.temperature
    _weigh[grid](logits, w.maxima, temperature, w.weights, w.sums, w.masses, width, CHUNK=CHUNK, CP=cp)
    count_base = mass_base = w.none
    totals = w.masses
    tallied = w.above, w.kept, w.counts, w.ties, w.tie_weights
    if rows is not None:
        if top_k:
            count_base = _threshold(logits, rows, w, totals, cp, by_count=True)
        if top_k and top_p:
            _tally[grid](logits, w.weights, count_base, w.none, rows.min_p, *tallied, width, CHUNK=CHUNK)
            _total_of_top[(count,)](
                rows.top_k, w.above, w.counts, w.ties, w.tie_weights, w.masses, w.totals, chunks, CP=cp
            )
            totals = w.totals
        if top_p:
            mass_base = _threshold(logits, rows, w, totals, cp, by_count=False)
        _tally[grid](logits, w.weights, count_base, mass_base, rows.min_p, *tallied, width, CHUNK=CHUNK)
    _draw[(count,)](
        logits, w.weights, w.maxima, w.places, w.sums, temperature, given.top_k, given.top_p, totals, given.min_p,
        given.uniform, count_base, mass_base, *tallied, w.tokens, w.logprobs, width,
        CHUNK=CHUNK, CP=cp, SAMPLED=rows is not None, num_warps=8,
    )  # fmt: skip
    if penalties is not None:
        count_tokens(w.tokens[:count], penalties)
    return w.tokens[:count], w.logprobs[:count]


def _threshold(
    logits: Tensor, rows: SamplingRows, w: SamplingWorkspace, totals: Tensor, cp: int, *, by_count: bool
) -> Tensor:
    """The order of the last logit that is kept, int64 ``[R]``; 0 where nothing is left out."""
    count, width = logits.shape
    bases = w.bases[int(by_count)]
    for n in range(len(SHIFTS) + 1):
        last = n == len(SHIFTS)
        _search[(1 if last else triton.cdiv(width, CHUNK), count)](
            logits, w.weights, rows.top_k, rows.top_p, totals, w.partials[(n + 1) % 2], w.partials[n % 2],
            bases[(n + 1) % 2], bases[n % 2], width,
            FIRST=n == 0, LAST=last, SHIFT=0 if last else SHIFTS[n], OLD_SHIFT=SHIFTS[n - 1] if n else 0,
            BY_COUNT=by_count, CHUNK=CHUNK, CP=cp, SUB=SUB,
        )  # fmt: skip
    return bases[len(SHIFTS) % 2]
