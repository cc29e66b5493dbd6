"""EWC++ over a whole network, on tensors: what `ewc` says of one site in numpy, for every row of an `AdapterStack`.

The Fisher information of a site's ``ΔW [out, in]`` is held as ``F_ij = u_i v_j``, with the exact sums over rows and
columns of the mean of ``g_i² x_j²`` over tokens, g being the gradient by the site's output and x its input. Kirkpatrick
et al., arXiv 1612.00796; the moving average is that of RWalk, Chaudhry et al., arXiv 1801.10112.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ruvllm_core.errors import LearningError
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.network import Network
from ruvllm_sona.update import Pass

#: By site: u ``[G, out]`` and v ``[G, in]``, v adding up to 1 in every row.
Factors = Mapping[str, tuple[Tensor, Tensor]]
_ROUNDING = 1e-12


class Probe(AdapterStack):
    """Adds what `stack` adds to G·n rows of a batch, and sums squares when gradients come back, apart for each of G.

    Attributes:
        rows: by site, ``Σ_t g_i² ‖x‖²`` ``[G, out]``.
        columns: by site, ``Σ_t ‖g‖² x_j²`` ``[G, in]``.
    """

    def __init__(self, stack: AdapterStack) -> None:
        super().__init__(stack.sites, stack.scales, stack.below)
        self._stack = stack
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        y = self._stack.add(name, x, y)
        if name not in self.sites or not y.requires_grad:
            return y
        x = x.detach()

        def back(grad: Tensor) -> None:
            groups = len(self.sites[name][0])
            g = grad.square().reshape(groups, -1, grad.shape[-1])
            s = x.square().reshape(groups, -1, x.shape[-1])
            found = torch.einsum("gto,gt->go", g, s.sum(-1)), torch.einsum("gti,gt->gi", s, g.sum(-1))
            for held, sums in zip((self.rows, self.columns), found, strict=True):
                held[name] = held[name] + sums if name in held else sums

        y.register_hook(back)  # type: ignore[no-untyped-call]
        return y


def answer_fisher(
    network: Network, probe: AdapterStack, tokens: Tensor, places: Tensor, random: torch.Generator
) -> Iterator[None]:
    """Show a probe the gradients of ``log p(y)`` at one place a row, or at several, y drawn from the model itself.

    Args:
        tokens: int64 ``[G·n, T]``.
        places: int64 ``[G·n]``, or ``[G·n, k]`` of different ones, after which token y would come.
    """
    way = Pass(network, probe, tokens=tokens, keep=True, inputs=True)
    for _ in way.forward():
        yield
    each = torch.arange(len(tokens), device=tokens.device)
    if places.dim() > 1:
        each, places = each.repeat_interleave(places.shape[1]), places.flatten()
    hidden = way.x[each, places].requires_grad_(True)
    with torch.enable_grad():
        logp = torch.log_softmax(network.logits(hidden), -1)
    drawn = torch.multinomial(logp.detach().exp(), 1, generator=random)
    yield
    (found,) = torch.autograd.grad(logp.gather(1, drawn).sum(), hidden)
    grad = torch.zeros_like(way.x)
    grad[each, places] = found
    yield
    yield from way.backward(grad)


def normalized(probe: Probe) -> dict[str, tuple[Tensor, Tensor]]:
    """What a probe has found, in units of its mean over all numbers of all sites' ΔW, which makes it 1 in each row.

    So λ means the same for any task and any number of texts. Raises `LearningError` if nothing came back, or if a row
    of it is not finite or all zero.
    """
    if not probe.rows:
        raise LearningError("there is no Fisher information: no gradient came back", hint="probe before the way back")
    total = torch.stack([u.sum(-1) for u in probe.rows.values()]).sum(0)
    if not bool((torch.isfinite(total) & (total > 0)).all()):
        raise LearningError("Fisher information is not finite, or zero everywhere")
    entries = sum(u.shape[-1] * probe.columns[name].shape[-1] for name, u in probe.rows.items())
    return {name: (u * (entries / total)[:, None], _shares(probe.columns[name])) for name, u in probe.rows.items()}


def averaged(before: Factors, now: Factors, weight: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The moving average ``weight · now + (1 − weight) · before``; its sums over rows and columns are exact."""
    found = {}
    for name, (u, v) in before.items():
        new_u, new_v = now[name]
        u, new_u = (1.0 - weight) * u, weight * new_u
        columns = u.sum(-1, keepdim=True) * v + new_u.sum(-1, keepdim=True) * new_v
        found[name] = u + new_u, _shares(columns)
    return found


def held(stack: AdapterStack) -> AdapterStack:
    """A copy of what the factors are now, for an anchor."""
    sites = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in stack.sites.items()}
    return AdapterStack(sites, stack.scales)


@torch.no_grad()
def penalty(stack: AdapterStack, anchor: AdapterStack, fisher: Factors) -> Tensor:
    """``½ Σ F_ij (ΔW_ij − ΔW*_ij)²`` over all sites with Fisher information, for each row ``[G]``, in float64."""
    parts = []
    for name, (u, v) in fisher.items():
        a, b = (factor.double() for factor in stack.sites[name])
        held_a, held_b = (factor.double() for factor in anchor.sites[name])
        both_a = torch.cat([a, held_a], 1)
        both_b = torch.cat([stack.scales[name] * b, -anchor.scales[name] * held_b], 2)
        left = torch.einsum("gor,go,gos->grs", both_b, u.double(), both_b)
        right = torch.einsum("gri,gi,gsi->grs", both_a, v.double(), both_a)
        parts.append(0.5 * (left * right).sum((1, 2)))
    return torch.stack(parts).sum(0)


@torch.no_grad()
def prox(stack: AdapterStack, anchor: AdapterStack, fisher: Factors, strength: Tensor) -> None:
    """The proximal step of the penalty, in place: exactly for B, then exactly for A; in float64.

    Lowers ``½‖A − A⁰‖² + ½‖B − B⁰‖² + strength · penalty`` at every site with Fisher information. No strength is too
    large: neither solution can raise it. Sites of one shape are solved together.

    Args:
        strength: learning rate times λ of each row ``[G]``; 0 changes nothing there, to the last bit.
    """
    if not bool((torch.isfinite(strength) & (strength >= 0)).all()):
        raise LearningError(f"strengths of a proximal step must be finite and not negative: {strength.tolist()}")
    picked = torch.nonzero(strength)[:, 0]
    if not len(picked):
        return
    for names in _alike(stack, anchor, fisher):
        a, b, held_a, held_b, u, v = (
            torch.stack([one[picked] for one in of_site]).double()
            for of_site in zip(
                *(
                    (*stack.sites[name], anchor.sites[name][0], anchor.sites[name][1] * anchor.scales[name],
                     *fisher[name])
                    for name in names
                ),
                strict=True,
            )
        )  # fmt: skip
        u, scale = u * strength[picked, None].double(), stack.scales[names[0]]
        b = _solve(b, a, held_b, held_a, u, v, scale)
        a = _solve(a.mT, b.mT, held_a.mT, held_b.mT, v, u, scale).mT
        for n, name in enumerate(names):
            stack.sites[name][0][picked] = a[n].float()
            stack.sites[name][1][picked] = b[n].float()


def _solve(
    start: Tensor, fixed: Tensor, left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, scale: float
) -> Tensor:
    """Each row x of ``[…, n, r]`` with the least ``½|x − x⁰|² + ½ rows_i Σ_j columns_j (s·x·fixed − left_i·right)_j²``.

    The matrices of all rows have the same eigenvectors, so one small decomposition solves them all.
    """
    weighted = fixed * (columns * scale)[..., None, :]
    cross = right @ weighted.mT
    values, vectors = torch.linalg.eigh(scale * (weighted @ fixed.mT))
    real = values > _ROUNDING * values[..., -1:].clamp(min=0)
    values, weight = (values * real)[..., None, :], rows[..., None]
    target = left @ (cross @ vectors * real[..., None, :])
    step = (target - (start @ vectors) * values) * (weight / (1.0 + weight * values))
    found: Tensor = start + step @ vectors.mT
    return found


def _alike(stack: AdapterStack, anchor: AdapterStack, fisher: Factors) -> list[list[str]]:
    """Names of sites of one shape and scale."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, (u, v) in fisher.items():
        if name not in stack.sites or name not in anchor.sites:
            raise LearningError(f"there is Fisher information of {name}, but no delta or no anchor")
        (a, b), (held_a, held_b) = stack.sites[name], anchor.sites[name]
        if (b.shape[1], a.shape[2]) != (held_b.shape[1], held_a.shape[2]) or (b.shape[1], a.shape[2]) != (
            u.shape[1],
            v.shape[1],
        ):
            raise LearningError(f"{name}: delta, anchor and Fisher information are of different shapes")
        groups.setdefault((a.shape, b.shape, held_a.shape, stack.scales[name]), []).append(name)
    return list(groups.values())


def _shares(columns: Tensor) -> Tensor:
    total = columns.sum(-1, keepdim=True)
    return torch.where(total > 0, columns / total.clamp(min=torch.finfo(columns.dtype).tiny), 1.0 / columns.shape[-1])


def all_alike(stack: AdapterStack) -> dict[str, tuple[Tensor, Tensor]]:
    """Fisher information that tells no number from another: 1 everywhere. The penalty is then that of plain L2."""
    found = {}
    for name, (a, b) in stack.sites.items():
        u = torch.full((len(b), b.shape[1]), float(a.shape[2]), device=b.device)
        found[name] = u, torch.full((len(a), a.shape[2]), 1.0 / a.shape[2], device=a.device)
    return found
