"""EWC++ on tensors: against dense matrices in float64, and the Fisher information against gradients one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import LowRank
from ruvllm_core.testing import tiny
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.consolidate import (
    Probe,
    all_alike,
    answer_fisher,
    averaged,
    held,
    normalized,
    penalty,
    prox,
)
from ruvllm_sona.network import Network, padded
from ruvllm_sona.sites import linear_sites

SHAPES = {"one": (6, 5), "two": (6, 5), "three": (4, 7)}
ROWS, RANK = 3, 2


def stack(seed: int, rank: int = RANK, shapes: dict[str, tuple[int, int]] = SHAPES, rows: int = ROWS) -> AdapterStack:
    rng = np.random.default_rng(seed)
    return AdapterStack.of(
        [
            {
                name: LowRank(
                    rng.normal(0, 0.5, (rank, columns)).astype(np.float32),
                    rng.normal(0, 0.5, (out, rank)).astype(np.float32),
                    0.7,
                )
                for name, (out, columns) in shapes.items()
            }
            for _ in range(rows)
        ]
    )


def information(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, (out, columns) in SHAPES.items():
        v = torch.rand(ROWS, columns, generator=rng)
        found[name] = 10.0 * torch.rand(ROWS, out, generator=rng), v / v.sum(-1, keepdim=True)
    return found


def dense(adapters: AdapterStack, name: str, row: int) -> torch.Tensor:
    a, b = adapters.sites[name]
    return adapters.scales[name] * b[row].detach().double() @ a[row].detach().double()


def test_penalty_is_that_of_dense_matrices() -> None:
    now, anchor, fisher = stack(0), stack(1, rank=3), information(2)
    found = penalty(now, anchor, fisher)
    for row in range(ROWS):
        wanted = sum(
            0.5 * (u[row, :, None].double() * v[row].double() * (dense(now, n, row) - dense(anchor, n, row)) ** 2).sum()
            for n, (u, v) in fisher.items()
        )
        assert float(found[row]) == pytest.approx(float(wanted), rel=1e-5)


def test_penalty_and_prox_do_not_depend_on_how_the_anchor_is_factored() -> None:
    anchor, fisher, strength = stack(1), information(2), torch.full((ROWS,), 0.3)
    turn = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    other = AdapterStack(
        {name: (turn @ a, b @ torch.linalg.inv(turn)) for name, (a, b) in anchor.sites.items()}, anchor.scales
    )
    first, second = stack(0), stack(0)
    torch.testing.assert_close(penalty(first, anchor, fisher), penalty(first, other, fisher), rtol=1e-4, atol=1e-4)
    prox(first, anchor, fisher, strength)
    prox(second, other, fisher, strength)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [1, RANK])
def test_prox_solves_for_b_and_then_for_a(rank: int) -> None:
    """At what it finds, the gradient of the objective by B (with the old A) and by A (with the new B) is zero."""
    begun, now, anchor, fisher = stack(0, rank), stack(0, rank), stack(1), information(2)
    strength = torch.tensor([0.01, 0.5, 20.0])
    prox(now, anchor, fisher, strength)
    for name, (u, v) in fisher.items():
        for row in range(ROWS):
            (a0, b0), (a1, b1) = ([factor[row].double() for factor in one.sites[name]] for one in (begun, now))
            target, weight = dense(anchor, name, row), strength[row] * u[row, :, None].double() * v[row].double()
            for a, b, wrt, start in ((a0, b1, "b", b0), (a1, b1, "a", a0)):
                a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
                free = a if wrt == "a" else b
                loss = 0.5 * ((free - start) ** 2).sum() + 0.5 * (weight * (0.7 * b @ a - target) ** 2).sum()
                (grad,) = torch.autograd.grad(loss, free)
                assert float(grad.abs().max()) < 1e-4 * max(1.0, float(weight.max()))


def test_prox_leaves_rows_of_no_strength_alone_and_cannot_blow_up() -> None:
    begun, now, anchor, fisher = stack(0), stack(0), stack(1), information(2)
    prox(now, anchor, fisher, torch.tensor([0.0, 1.0, 1e12]))
    for old, new in zip(begun.parameters(), now.parameters(), strict=True):
        assert torch.equal(old[0], new[0])
        assert not torch.equal(old[1], new[1])
        assert bool(torch.isfinite(new).all())
    before, after = penalty(begun, anchor, fisher), penalty(now, anchor, fisher)
    assert after[0] == before[0]
    assert after[1] < before[1]
    assert after[2] < before[2] * 1e-6


def test_prox_from_where_lora_starts() -> None:
    """B is zero there; an anchor of zero keeps it, and another one is come nearer to."""
    now, fisher = stack(0), information(2)
    for _, b in now.sites.values():
        b.zero_()
    begun = held(now)
    prox(now, begun, fisher, torch.ones(ROWS))
    for old, new in zip(begun.parameters(), now.parameters(), strict=True):
        torch.testing.assert_close(old, new)
    anchor = stack(1)
    before = penalty(now, anchor, fisher)
    prox(now, anchor, fisher, torch.ones(ROWS))
    assert bool((penalty(now, anchor, fisher) < before).all())


def test_nonsense_is_refused() -> None:
    now, fisher = stack(0), information(2)
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(LearningError, match="finite"):
            prox(now, held(now), fisher, torch.tensor([0.0, strength, 1.0]))
    with pytest.raises(LearningError, match="no delta"):
        prox(now, held(now), {"elsewhere": fisher["one"]}, torch.ones(ROWS))
    with pytest.raises(LearningError, match="shapes"):
        prox(now, held(now), {"one": fisher["three"]}, torch.ones(ROWS))
    with pytest.raises(LearningError, match="no gradient"):
        normalized(Probe(now))


def test_average_keeps_the_sums_of_rows_and_columns() -> None:
    one, two = information(1), information(2)
    found = averaged(one, two, 0.25)
    for name, (u, v) in found.items():
        matrices = [x[:, :, None] * y[:, None] for x, y in (one[name], two[name], (u, v))]
        wanted = 0.75 * matrices[0] + 0.25 * matrices[1]
        for axis in (1, 2):
            torch.testing.assert_close(matrices[2].sum(axis), wanted.sum(axis))


def test_l2_is_one_everywhere() -> None:
    for u, v in all_alike(stack(0)).values():
        torch.testing.assert_close(u[:, :, None] * v[:, None], torch.ones(ROWS, u.shape[1], v.shape[1]))


def test_fisher_has_the_sums_of_squared_gradients_of_every_token() -> None:
    """Two cells of two texts each, in one batch, against outer products token by token, one text after another."""
    spec = tiny.tiny_spec()
    network = Network(spec, tiny.tiny_weights(spec, ("f32",)), dtype=torch.float32)
    for _ in network.load():
        pass
    adapters = stack(3, shapes=linear_sites(spec), rows=2)
    texts = [tiny.TEXTS["a"][:6], tiny.TEXTS["b"][:4], tiny.TEXTS["b"][:5], tiny.TEXTS["a"][:3]]
    places = torch.tensor([len(text) - 1 for text in texts])

    class Spread(AdapterStack):
        def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if name not in self.sites:
                return y
            a, b = (factor.repeat_interleave(2, 0) for factor in self.sites[name])
            return y + self.scales[name] * x @ a.mT @ b.mT

    probe = Probe(Spread(adapters.trainable().sites, adapters.scales))
    for _ in answer_fisher(network, probe, padded(texts), places, torch.Generator().manual_seed(5)):
        pass
    with torch.no_grad():  # the same draws
        hidden = network.hidden(padded(texts), Spread(adapters.sites, adapters.scales))
        p = torch.softmax(network.logits(hidden[torch.arange(4), places]), -1)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(5))[:, 0]

    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    class Keep(AdapterStack):
        def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            y = super().add(name, x, y)
            if name in self.sites:
                y.retain_grad()
                seen[name] = x, y
            return y

    wanted: dict[tuple[str, int], torch.Tensor] = {}
    for n, text in enumerate(texts):
        row = n // 2
        own = {name: (a[row : row + 1], b[row : row + 1]) for name, (a, b) in adapters.sites.items()}
        logits = network.logits(network.hidden(padded([text]), Keep(own, adapters.scales))[0, -1])
        torch.log_softmax(logits, -1)[drawn[n]].backward()
        for name, (x, y) in seen.items():
            squares = (y.grad[0].square()[:, :, None] * x.detach()[0].square()[:, None]).sum(0)
            wanted[name, row] = wanted.get((name, row), torch.zeros(())) + squares
    for (name, row), matrix in wanted.items():
        scale = float(matrix.sum())
        torch.testing.assert_close(probe.rows[name][row], matrix.sum(1), rtol=1e-3, atol=1e-6 * scale)
        torch.testing.assert_close(probe.columns[name][row], matrix.sum(0), rtol=1e-3, atol=1e-6 * scale)
    found = normalized(probe)
    for row in range(2):
        total = sum(float(u[row].sum() * v[row].sum()) for u, v in found.values())
        assert total == pytest.approx(sum(out * columns for out, columns in linear_sites(spec).values()), rel=1e-4)
