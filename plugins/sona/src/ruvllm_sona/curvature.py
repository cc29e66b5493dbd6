"""EWC++ with Fisher information that knows directions, and not only single numbers, of a site's inputs and outputs.

A site's Fisher information is held as ``U ⊗ V`` (Kronecker-factored: Martens and Grosse, arXiv 1503.05671; against
forgetting: Ritter et al., arXiv 1805.07810), with exact partial traces of the sum over tokens of ``ggᵀ ⊗ xxᵀ``: U is
that of ``‖x‖² ggᵀ`` and V that of ``‖g‖² xxᵀ``. Why directions matter: inputs of two tasks share a large mean, and a
change that spares every important number may still go along it, and so change what was learned.

Neither is ever formed. What is summed is ``Y = U Ω`` for a fixed random Ω of a few columns, from which U's largest
eigenvalues come back (Tropp et al., arXiv 1706.05736). Sketches are linear, so their moving average is exactly that of
the matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ruvllm_core.errors import LearningError
from ruvllm_sona.adapters import AdapterStack

_ROUNDING = 1e-10


@dataclass(frozen=True, eq=False)
class Sketch:
    """Of G symmetric matrices ``[n, n]`` that have no negative eigenvalue.

    Attributes:
        image: their product with `directions`, float64 ``[G, n, s]``.
        trace: float64 ``[G]``.
    """

    image: Tensor
    trace: Tensor

    @classmethod
    def of(cls, vectors: Tensor, columns: int) -> Sketch:
        """Of the sum of outer products of ``[G, t, n]``."""
        wide = vectors.double()
        return cls(wide.mT @ (wide @ directions(wide.shape[-1], columns, wide.device)), wide.square().sum((1, 2)))

    def mixed(self, other: Sketch, mine: Tensor | float, theirs: Tensor | float) -> Sketch:
        """``mine · self + theirs · other``; factors are numbers, or ``[G]``."""
        first, second = (torch.as_tensor(one, dtype=torch.float64, device=self.trace.device) for one in (mine, theirs))
        image = first[..., None, None] * self.image + second[..., None, None] * other.image
        return Sketch(image, first * self.trace + second * other.trace)

    def times(self, factor: Tensor) -> Sketch:
        """Times ``[G]``."""
        return Sketch(self.image * factor[:, None, None], self.trace * factor)

    def rounded(self) -> Sketch:
        """With an image that float32 can hold."""
        return Sketch(self.image.float().double(), self.trace)

    def spectrum(self) -> Spectrum:
        """The largest eigenvalues and what they belong to; the rest of the trace is spread evenly."""
        omega = directions(*self.image.shape[1:], self.image.device)
        core = omega.mT @ self.image
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        real = values > _ROUNDING * values[:, -1:].clamp(min=0)
        inverse = torch.where(real, values, 1.0).rsqrt() * real
        half = self.image @ (vectors * inverse[:, None])  # half halfᵀ is the matrix, as far as the sketch saw it
        values, vectors = torch.linalg.eigh(half.mT @ half)
        real = values > _ROUNDING * values[:, -1:].clamp(min=0)
        inverse = torch.where(real, values, 1.0).rsqrt() * real
        values = values * real
        left = (self.trace - values.sum(-1)).clamp(min=0) / max(1, self.image.shape[1] - self.image.shape[2])
        above = (values - left[:, None]).clamp(min=0)  # what is below the rest is part of it
        total = above.sum(-1) + left * self.image.shape[1]
        exact = torch.where(total > 0, self.trace / torch.where(total > 0, total, 1.0), 1.0)
        return Spectrum(left, above, half @ (vectors * inverse[:, None])).scaled(exact)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """``σ I + Q diag(ε) Qᵀ`` for G matrices: `rest` is σ ``[G]``, `values` ε ``[G, k]``, `vectors` Q ``[G, n, k]``."""

    rest: Tensor
    values: Tensor
    vectors: Tensor

    def scaled(self, factor: Tensor) -> Spectrum:
        """Times ``[G]``."""
        return Spectrum(self.rest * factor, self.values * factor[:, None], self.vectors)

    def damped(self, share: float) -> Spectrum:
        """Mixed with the identity of the same trace, ``share`` of that to 1 of this: no direction is quite free."""
        mean = self.rest + self.values.sum(-1) / self.vectors.shape[1]
        mixed = Spectrum(self.rest + share * mean, self.values, self.vectors)
        return mixed.scaled(torch.full_like(mean, 1.0 / (1.0 + share)))

    def of_rows(self, x: Tensor) -> Tensor:
        """The product with each row of ``[G, r, n]``."""
        return self.rest[:, None, None] * x + ((x @ self.vectors) * self.values[:, None]) @ self.vectors.mT


Sketches = Mapping[str, tuple[Sketch, Sketch]]


class DirectionProbe(AdapterStack):
    """Adds what `stack` adds to G·n rows of a batch, and sketches U and V of each site when gradients come back.

    Args:
        columns: of the sketches; half as many directions are seen well.

    Attributes:
        found: by site, sketches of U and of V, apart for each of G.
    """

    def __init__(self, stack: AdapterStack, columns: int = 32) -> None:
        super().__init__(stack.sites, stack.scales, stack.below)
        self._stack, self._columns = stack, columns
        self.found: dict[str, tuple[Sketch, Sketch]] = {}

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        y = self._stack.add(name, x, y)
        if name not in self.sites or not y.requires_grad:
            return y
        x = x.detach()

        def back(grad: Tensor) -> None:
            groups = len(self.sites[name][0])
            g, s = (one.reshape(groups, -1, one.shape[-1]) for one in (grad, x))
            weighted = g * s.norm(dim=-1, keepdim=True), s * g.norm(dim=-1, keepdim=True)
            u, v = (Sketch.of(one, min(self._columns, one.shape[-1])) for one in weighted)
            if name in self.found:
                old_u, old_v = self.found[name]
                u, v = old_u.mixed(u, 1.0, 1.0), old_v.mixed(v, 1.0, 1.0)
            self.found[name] = u, v

        y.register_hook(back)  # type: ignore[no-untyped-call]
        return y


def normalized(found: Sketches, names: Iterable[str] | None = None) -> dict[str, tuple[Sketch, Sketch]]:
    """In units of the mean of F's diagonal over all numbers of all sites' ΔW, apart for each row; V has trace 1.

    Of the sites `names` only, or of all. Raises `LearningError` if nothing came back, or if a row of it is not finite
    or all zero.
    """
    if not found:
        raise LearningError("there is no Fisher information: no gradient came back", hint="probe before the way back")
    total = torch.stack([u.trace for u, _ in found.values()]).sum(0)
    if not bool((torch.isfinite(total) & (total > 0)).all()):
        raise LearningError("Fisher information is not finite, or zero everywhere")
    entries = sum(u.image.shape[1] * v.image.shape[1] for u, v in found.values())
    scaled = {}
    for name in found if names is None else names:
        u, v = found[name]
        share = torch.where(v.trace > 0, v.trace, 1.0).reciprocal()
        scaled[name] = u.times(entries / total), v.times(share)
    return scaled


def averaged(before: Sketches, now: Sketches, weight: float) -> dict[str, tuple[Sketch, Sketch]]:
    """The moving average ``weight · now + (1 − weight) · before``; its partial traces are exact."""
    found = {}
    for name, (u, v) in before.items():
        new_u, new_v = now[name]
        mine, theirs = (1.0 - weight) * u.trace, weight * new_u.trace
        total = torch.where(mine + theirs > 0, mine + theirs, 1.0)
        found[name] = u.mixed(new_u, 1.0 - weight, weight), v.mixed(new_v, mine / total, theirs / total)
    return found


class _Group(NamedTuple):
    """Sites of one shape, G rows of each after one another: the anchor's A and s·B, and spectra of U and V."""

    names: list[str]
    a: Tensor
    b: Tensor
    u: Spectrum
    v: Spectrum


class Hold:
    """What must not be forgotten: deltas as they were, and spectra of the Fisher information around them.

    Args:
        anchor: the deltas, G rows.
        fisher: normalized sketches of the sites that are held.
        damping: how much of the identity is mixed into both of U and V, since sketches know only what they saw.
    """

    def __init__(self, anchor: AdapterStack, fisher: Sketches, damping: float = 0.0) -> None:
        alike: dict[tuple[object, ...], list[str]] = {}
        for name in fisher:
            if name not in anchor.sites:
                raise LearningError(f"there is Fisher information of {name}, but no delta")
            alike.setdefault(tuple(factor.shape for factor in anchor.sites[name]), []).append(name)
        self._groups = []
        for names in alike.values():
            a = torch.cat([anchor.sites[name][0] for name in names]).detach().double()
            b = torch.cat([anchor.scales[name] * anchor.sites[name][1] for name in names]).detach().double()
            u, v = (_joined([fisher[name][n] for name in names]).spectrum().damped(damping) for n in (0, 1))
            if (u.vectors.shape[:2], v.vectors.shape[:2]) != (b.shape[:2], (len(a), a.shape[2])):
                raise LearningError(f"{names[0]}: delta and Fisher information are of different shapes")
            self._groups.append(_Group(names, a, b, u, v))

    @torch.no_grad()
    def penalty(self, stack: AdapterStack) -> Tensor:
        """``½ tr(U (ΔW − ΔW*) V (ΔW − ΔW*)ᵀ)`` over all sites, for each row ``[G]``."""
        parts = []
        for group in self._groups:
            a, b, scale = self._factors(stack, group)
            both_a, both_b = torch.cat([a, group.a], 1), torch.cat([scale * b, -group.b], 2)
            left, right = group.u.of_rows(both_b.mT) @ both_b, group.v.of_rows(both_a) @ both_a.mT
            parts.append(0.5 * (left * right).sum((1, 2)).view(len(group.names), -1).sum(0))
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def prox(self, stack: AdapterStack, strength: Tensor) -> None:
        """The proximal step of the penalty, in place: exactly for B, then exactly for A; in float64.

        Lowers ``½‖A − A⁰‖² + ½‖B − B⁰‖² + strength · penalty`` at every site that is held, and cannot raise it, so no
        strength is too large. Sites of one shape are solved together.

        Args:
            strength: learning rate times λ of each row ``[G]``; 0 changes nothing there.
        """
        if not bool((torch.isfinite(strength) & (strength >= 0)).all()):
            raise LearningError(f"strengths of a proximal step must be finite and not negative: {strength.tolist()}")
        for group in self._groups:
            old_a, old_b, scale = self._factors(stack, group)
            pull = strength.double().repeat(len(group.names))
            b = _solve(old_b, old_a, group.b, group.a, group.u.scaled(pull), group.v, scale)
            a = _solve(old_a.mT, b.mT, group.a.mT, group.b.mT, group.v.scaled(pull), group.u, scale).mT
            free = (pull == 0)[:, None, None]
            for n, new in enumerate((torch.where(free, old_a, a), torch.where(free, old_b, b))):
                for name, part in zip(group.names, new.chunk(len(group.names)), strict=True):
                    stack.sites[name][n].copy_(part)

    def _factors(self, stack: AdapterStack, group: _Group) -> tuple[Tensor, Tensor, Tensor]:
        for name in group.names:
            if name not in stack.sites:
                raise LearningError(f"{name} is held, but there is no delta")
        a, b = (torch.cat([stack.sites[name][n] for name in group.names]).double() for n in (0, 1))
        scale = torch.tensor([stack.scales[name] for name in group.names], dtype=a.dtype, device=a.device)
        return a, b, scale.repeat_interleave(len(a) // len(group.names))[:, None, None]


def _joined(parts: Sequence[Sketch]) -> Sketch:
    return Sketch(torch.cat([part.image for part in parts]), torch.cat([part.trace for part in parts]))


def _solve(
    start: Tensor, fixed: Tensor, left: Tensor, right: Tensor, rows: Spectrum, columns: Spectrum, scale: Tensor
) -> Tensor:
    """X ``[G, n, r]`` with the least ``½‖X − X⁰‖² + ½ tr(R (s·X·fixed − left·right) C (…)ᵀ)``.

    In the eigenvectors of R and of ``fixed C fixedᵀ`` every number is on its own.
    """
    weighted = scale * columns.of_rows(fixed)
    values, turned = torch.linalg.eigh(scale * (weighted @ fixed.mT))
    values = values.clamp(min=0)[:, None]
    target = left @ ((right @ weighted.mT) @ turned)
    miss = target - (start @ turned) * values  # how far each number is from where the penalty wants it, times its pull
    rest, among = rows.rest[:, None, None], (rows.rest[:, None] + rows.values)[..., None]
    step = miss * (rest / (1.0 + rest * values))
    within = among / (1.0 + among * values) - rest / (1.0 + rest * values)
    step = step + rows.vectors @ (within * (rows.vectors.mT @ miss))
    found: Tensor = start + step @ turned.mT
    return found


@lru_cache(maxsize=64)
def directions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Random columns at right angles, float64 ``[n, s]``: the same whenever asked for."""
    random = torch.Generator().manual_seed(rows)
    found: Tensor = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=random))[0]
    return found.to(device)
