"""Fisher information that knows directions: against dense Kronecker products in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import LowRank
from ruvllm_core.testing import tiny
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.consolidate import answer_fisher
from ruvllm_sona.curvature import DirectionProbe, Hold, Sketch, averaged, directions, normalized
from ruvllm_sona.network import Network, padded
from ruvllm_sona.sites import linear_sites

SHAPES = {"one": (6, 9), "two": (6, 9), "three": (8, 7)}
ROWS, SEEN = 3, 2


def stack(seed: int, rank: int = 2) -> AdapterStack:
    rng = np.random.default_rng(seed)

    def delta(out: int, columns: int) -> LowRank:
        a, b = rng.normal(0, 0.5, (rank, columns)), rng.normal(0, 0.5, (out, rank))
        return LowRank(a.astype(np.float32), b.astype(np.float32), 0.7)

    return AdapterStack.of([{name: delta(*shape) for name, shape in SHAPES.items()} for _ in range(ROWS)])


def low(seed: int, size: int, rank: int = SEEN) -> torch.Tensor:
    return torch.randn(ROWS, rank, size, generator=torch.Generator().manual_seed(seed))


def sketches(seed: int) -> dict[str, tuple[Sketch, Sketch]]:
    """Of matrices of rank two, which sketches of four columns see exactly."""
    found = {}
    for n, (name, (out, columns)) in enumerate(SHAPES.items()):
        found[name] = Sketch.of(low(seed + n, out), 4), Sketch.of(low(seed + n + 9, columns), 4)
    return found


def dense(spectrum) -> torch.Tensor:
    size = spectrum.vectors.shape[1]
    core = spectrum.vectors @ (spectrum.values[..., None] * spectrum.vectors.mT)
    return core + spectrum.rest[:, None, None] * torch.eye(size, dtype=torch.float64)


def product(adapters: AdapterStack, name: str, row: int) -> torch.Tensor:
    a, b = adapters.sites[name]
    return adapters.scales[name] * b[row].detach().double() @ a[row].detach().double()


def test_sketch_gives_back_a_matrix_of_low_rank() -> None:
    vectors = low(0, 12)
    found = dense(Sketch.of(vectors, 4).spectrum())
    torch.testing.assert_close(found, (vectors.mT @ vectors).double(), rtol=1e-5, atol=1e-5)


def test_sketch_keeps_the_trace_and_most_of_what_is_large() -> None:
    vectors = torch.cat([low(1, 30, 1) * 30.0, low(2, 30, 40)], 1)
    sketch = Sketch.of(vectors, 8)
    found, exact = sketch.spectrum(), (vectors.mT @ vectors).double()
    torch.testing.assert_close(dense(found).diagonal(dim1=1, dim2=2).sum(-1), sketch.trace)
    torch.testing.assert_close(sketch.trace, exact.diagonal(dim1=1, dim2=2).sum(-1))
    largest, wanted = torch.linalg.eigvalsh(dense(found))[:, -1], torch.linalg.eigvalsh(exact)[:, -1]
    torch.testing.assert_close(largest, wanted, rtol=0.02, atol=0.0)
    assert bool((torch.linalg.eigvalsh(dense(found)) > -1e-6 * wanted[:, None]).all())


def test_damping_mixes_with_the_identity_and_keeps_the_trace() -> None:
    spectrum = Sketch.of(low(0, 12), 4).spectrum()
    exact = dense(spectrum)
    trace = exact.diagonal(dim1=1, dim2=2).sum(-1)
    wanted = (exact + 0.5 * (trace / 12)[:, None, None] * torch.eye(12, dtype=torch.float64)) / 1.5
    torch.testing.assert_close(dense(spectrum.damped(0.5)), wanted)
    torch.testing.assert_close(dense(spectrum.damped(0.0)), exact)


def test_sketches_are_linear() -> None:
    one, two = low(3, 12), low(4, 12)
    mixed = Sketch.of(one, 6).mixed(Sketch.of(two, 6), 0.25, torch.tensor([1.0, 2.0, 3.0]))
    wanted = torch.cat([0.5 * one, torch.tensor([1.0, 2.0, 3.0]).sqrt()[:, None, None] * two], 1)
    torch.testing.assert_close(mixed.image, Sketch.of(wanted, 6).image, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mixed.trace, Sketch.of(wanted, 6).trace, rtol=1e-5, atol=1e-4)


def test_penalty_is_that_of_dense_matrices_however_the_anchor_is_factored() -> None:
    now, anchor, fisher = stack(0), stack(1, rank=3), sketches(2)
    turn = torch.tensor([[2.0, 1.0, 0.0], [0.5, -1.0, 0.3], [0.0, 0.2, 1.0]])
    other = AdapterStack(
        {name: (turn @ a, b @ torch.linalg.inv(turn)) for name, (a, b) in anchor.sites.items()}, anchor.scales
    )
    found = Hold(anchor, fisher).penalty(now)
    torch.testing.assert_close(Hold(other, fisher).penalty(now), found, rtol=1e-4, atol=1e-4)
    for row in range(ROWS):
        wanted = 0.0
        for name, (u, v) in fisher.items():
            change = product(now, name, row) - product(anchor, name, row)
            wanted += 0.5 * float((dense(u.spectrum())[row] @ change @ dense(v.spectrum())[row] * change).sum())
        assert float(found[row]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_prox_solves_for_b_and_then_for_a(rank: int) -> None:
    """At what it finds, the gradient of the objective by B (with the old A) and by A (with the new B) is zero."""
    begun, now, anchor, fisher = stack(0, rank), stack(0, rank), stack(1), sketches(2)
    strength = torch.tensor([0.01, 0.5, 20.0])
    Hold(anchor, fisher).prox(now, strength)
    for name, (u, v) in fisher.items():
        for row in range(ROWS):
            left, right = dense(u.spectrum())[row], dense(v.spectrum())[row]
            (a0, b0), (a1, b1) = ([factor[row].double() for factor in one.sites[name]] for one in (begun, now))
            for a, b, wrt, start in ((a0, b1, "b", b0), (a1, b1, "a", a0)):
                a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
                free, change = a if wrt == "a" else b, 0.7 * b @ a - product(anchor, name, row)
                loss = 0.5 * ((free - start) ** 2).sum() + 0.5 * strength[row] * (left @ change @ right * change).sum()
                (grad,) = torch.autograd.grad(loss, free)
                size = float(strength[row] * left.trace() * right.trace())
                assert float(grad.abs().max()) < 1e-6 * max(1.0, size)


def test_prox_leaves_rows_of_no_strength_alone_and_cannot_blow_up() -> None:
    begun, now, hold = stack(0), stack(0), Hold(stack(1), sketches(2))
    hold.prox(now, torch.tensor([0.0, 1.0, 1e12]))
    for old, new in zip(begun.parameters(), now.parameters(), strict=True):
        assert torch.equal(old[0], new[0])
        assert not torch.equal(old[1], new[1])
        assert bool(torch.isfinite(new).all())
    before, after = hold.penalty(begun), hold.penalty(now)
    assert after[1] < before[1]
    assert after[2] < before[2] * 1e-6


def test_what_is_orthogonal_to_all_inputs_seen_is_free() -> None:
    """The point of directions: a change along inputs that no earlier text had is not held back at all."""
    begun, fisher = stack(0), sketches(2)
    anchor = AdapterStack({name: (a.clone(), b.clone()) for name, (a, b) in begun.sites.items()}, begun.scales)
    hold = Hold(anchor, fisher)
    for name, (a, _) in begun.sites.items():
        v = fisher[name][1].spectrum()
        real = (v.values > 1e-6 * v.values.max()).to(a.dtype)[:, None]
        seen = v.vectors.float() * real
        a += 3.0 * (a - (a @ seen) @ seen.mT)
    moved = AdapterStack({name: (a.clone(), b.clone()) for name, (a, b) in begun.sites.items()}, begun.scales)
    assert float(hold.penalty(moved).max()) < 1e-6
    hold.prox(moved, torch.full((ROWS,), 10.0))
    for old, new in zip(begun.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-4, atol=1e-4)


def test_nonsense_is_refused() -> None:
    now = stack(0)
    hold = Hold(now, sketches(2))
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(LearningError, match="finite"):
            hold.prox(now, torch.tensor([0.0, strength, 1.0]))
    with pytest.raises(LearningError, match="no gradient"):
        normalized({})
    with pytest.raises(LearningError, match="no delta"):
        Hold(AdapterStack({}, {}), sketches(2))
    with pytest.raises(LearningError, match="no delta"):
        hold.prox(AdapterStack({}, {}), torch.ones(ROWS))


def test_average_has_the_partial_traces_of_the_average() -> None:
    one, two = normalized(sketches(1)), normalized(sketches(20))
    for name, (u, v) in averaged(one, two, 0.25).items():
        wanted_u = 0.75 * one[name][0].image + 0.25 * two[name][0].image  # V has trace 1 in both
        torch.testing.assert_close(u.image, wanted_u)
        shares = 0.75 * one[name][0].trace, 0.25 * two[name][0].trace
        wanted_v = sum(w[:, None, None] * s[name][1].image for w, s in zip(shares, (one, two), strict=True))
        torch.testing.assert_close(v.image * u.trace[:, None, None], wanted_v)
        torch.testing.assert_close(v.trace, torch.ones_like(v.trace))


def test_probe_sums_outer_products_of_every_token() -> None:
    spec = tiny.tiny_spec()
    network = Network(spec, tiny.tiny_weights(spec, ("f32",)), dtype=torch.float32)
    for _ in network.load():
        pass
    rng, rows = np.random.default_rng(3), []
    for _ in range(2):
        rows.append(
            {
                name: LowRank(
                    rng.normal(0, 0.1, (2, columns)).astype(np.float32), rng.normal(0, 0.1, (out, 2)).astype(np.float32)
                )
                for name, (out, columns) in linear_sites(spec).items()
            }
        )
    adapters = AdapterStack.of(rows).trainable()
    texts = [tiny.TEXTS["a"][:6], tiny.TEXTS["b"][:4]]
    places = torch.tensor([len(text) - 1 for text in texts])
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    class Keep(AdapterStack):
        def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            y = super().add(name, x, y)
            if name in self.sites:
                y.register_hook(lambda grad: seen.__setitem__(name, (x.detach(), grad)))
            return y

    probe = DirectionProbe(Keep(adapters.sites, adapters.scales), 5)
    for _ in answer_fisher(network, probe, padded(texts), places, torch.Generator().manual_seed(5)):
        pass
    assert set(probe.found) == set(linear_sites(spec))
    for name, (u, v) in probe.found.items():
        x, g = (one.double() for one in seen[name])
        both = torch.einsum("gto,gti->gtoi", g, x)
        torch.testing.assert_close(u.trace, both.square().sum((1, 2, 3)), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(v.trace, u.trace, rtol=1e-5, atol=0.0)
        exact = torch.einsum("gtoi,gtpi->gop", both, both), torch.einsum("gtoi,gtoj->gij", both, both)
        for sketch, matrix in zip((u, v), exact, strict=True):
            wanted = matrix @ directions(*sketch.image.shape[1:], matrix.device)
            torch.testing.assert_close(sketch.image, wanted, rtol=1e-5, atol=1e-6 * float(matrix.abs().max()))
