"""``ruvllm sona merge --patterns`` and ``export --patterns`` against dense float64 arithmetic and peft's rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ruvllm_core.cli.app import App
from ruvllm_core.protocols import LowRank
from ruvllm_sona.command_place import Place, open_place
from ruvllm_sona.peft_import import import_peft

Call = Callable[..., Any]


def dense(delta: LowRank) -> np.ndarray:
    return delta.scale * delta.b.astype(np.float64) @ delta.a.astype(np.float64)


def expected(place: Place, how: str) -> dict[str, np.ndarray]:
    """The merged change of every matrix, from the versions of both patterns and their counts of feedback."""
    theirs = pytest.importorskip("peft.utils.merge_utils")
    both, shares, found = [place.deltas(pattern, None)[1] for pattern in (0, 1)], (24 / 40, 16 / 40), {}
    for site in both[0]:
        wholes = [dense(one[site]) for one in both]
        if how == "ties":
            weights = torch.tensor([2 * share for share in shares]).double()
            found[site] = theirs.ties([torch.tensor(one) for one in wholes], weights, 0.2).numpy()
            continue
        if how == "dare":
            seeded = np.random.default_rng(0)  # every site is pruned with the same numbers
            wholes = [one * (seeded.random(one.shape) < 0.5) / 0.5 for one in wholes]
        found[site] = sum(share * one for share, one in zip(shares, wholes, strict=True))
    return found


@pytest.mark.parametrize("how", ["exact", "ties", "dare"])
def test_all_patterns_become_one_file(
    sona: Call, two_patterns: Callable[..., Place], tiny: Path, tmp_path: Path, how: str
) -> None:
    source, target = tmp_path / "tiny.gguf", tmp_path / "merged.gguf"
    assert sona(tiny, source, "--scheme", "f32", group="quantize").code == 0
    place = two_patterns(source, rank=3)
    who = ("merge", target, source, "--user", "ann", "--patterns", how, "--scheme", "f32")
    report = sona(*who, *(() if how == "exact" else ("--rank", 96)), "--json").json
    assert (report["patterns"], report["how"]) == ({"0": 1, "1": 1}, how) and report["cut"] < 1e-6
    merged = open_place(App(), str(target), "", new=True).model.weights
    changes = expected(place, how)
    for site, change in changes.items():
        found = merged[site].dequantize().astype(np.float64) - place.model.weights[site].dequantize()
        assert np.abs(change).max() > 0.05
        np.testing.assert_allclose(found, change, atol=1e-5)
    low = sona(*who, "--force", "--rank", 4, "--json").json["cut"]
    off = total = 0.0
    for change in changes.values():
        values = np.linalg.svd(change, compute_uv=False)
        off, total = off + float((values[4:] ** 2).sum()), total + float((values**2).sum())
    assert low == pytest.approx((off / total) ** 0.5, rel=1e-6) and low > 0.2
    assert (
        f"patterns 0 (version 1), 1 (version 1) merged, {how}, {low:.1%} cut" in sona(*who, "--force", "--rank", 4).out
    )


def test_all_patterns_become_one_adapter(
    sona: Call, two_patterns: Callable[..., Place], tiny: Path, tmp_path: Path
) -> None:
    place = two_patterns(tiny)
    assert (
        "merged, exact, 0.0% cut off"
        in sona("export", tmp_path / "peft", tiny, "--user", "ann", "--patterns", "exact").out
    )
    found = import_peft(tmp_path / "peft", place.model.spec, place.model.sources, weights=place.model.weights)
    for site, change in expected(place, "exact").items():
        np.testing.assert_allclose(dense(found[site]), change, atol=1e-6)


def test_what_makes_no_sense(sona: Call, two_patterns: Callable[..., Place], tiny: Path, tmp_path: Path) -> None:
    two_patterns(tiny)
    who = ("export", tmp_path / "peft", tiny, "--user", "ann")
    sona(*who, "--patterns", "exact", "--version", 1).failed(2, "leave --pattern and --version out")
    sona(*who, "--patterns", "exact", "--pattern", 1).failed(2, "leave --pattern and --version out")
    sona(*who, "--rank", 3).failed(2, "--rank is of what --patterns makes")
    sona(*who, "--patterns", "mean").failed(2, "exact")
    for pattern in (0, 1):
        sona("rollback", 0, tiny, "--user", "ann", "--pattern", pattern)
    sona(*who, "--patterns", "ties").failed(1, "nothing to merge")
    sona("forget", tiny, "--user", "ann", "--all", "--yes")
    sona(*who, "--patterns", "ties").failed(1, "one pattern only", "leave --patterns out")
    assert not (tmp_path / "peft").exists()
