"""Products with packed matrices against float64 products of what core unpacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux on x86-64")

from ruvllm_core.decode import reference
from ruvllm_core.errors import ConfigError
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_kernels_cuda.gemm import TileConfig, gemm, tile_config_for
from ruvllm_kernels_cuda.gemv import Config, config_for, gemv
from ruvllm_kernels_cuda.matmul import Thresholds, matmul
from ruvllm_kernels_cuda.packing import LAYOUTS, PackedPart, pack
from ruvllm_kernels_cuda.scratch import Scratch

Make = Callable[..., QuantTensor]
EPS = 1e-5
#: On the ordinary cores everything is float32; weights of f32 and q2_k are rounded when they are packed.
EXACT = {"f32": 4e-3, "q2_k": 5e-4}
ROUNDED = 1e-2  # weights and activations in bfloat16


@pytest.fixture
def scratch(device: str) -> Scratch:
    """Small, so that large matrices need several pieces, and poisoned."""
    made = Scratch.on(device, partial=1 << 13, arrived=64, dense=1 << 13)
    made.partial.fill_(float("nan"))
    made.dense.fill_(float("nan"))
    return made


def width(scheme: str) -> int:
    return 768 if SCHEMES[scheme].block_size == 256 else 608


def off(mine: torch.Tensor, reference: np.ndarray) -> float:
    values = mine.double().cpu().numpy()
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


class Case:
    """A product with everything that can be fused into it."""

    def __init__(self, tensors: list[QuantTensor], count: int, device: str, kind: torch.dtype = torch.float32) -> None:
        rng = np.random.default_rng(count)
        self.packed, self.device, self.kind = pack(tensors, device), device, kind
        self.weights = np.concatenate([tensor.dequantize() for tensor in tensors]).astype(np.float64)
        rows, columns = self.weights.shape
        self.x = self.tensor(rng.normal(size=(count, columns)) + 0.2, kind)
        self.bias = self.tensor(rng.normal(size=rows), torch.float32)
        self.residual = self.tensor(rng.normal(size=(count, rows)), torch.float32)
        self.norm = self.tensor(rng.normal(1.0, 0.3, columns), torch.float32)

    def tensor(self, values: Any, kind: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, kind)

    def poisoned(self, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((len(self.x), len(self.weights)), float("nan"), dtype=kind, device=self.device)

    def expected(self, fused: tuple[str, ...] = ()) -> np.ndarray:
        x, bias, residual, norm = (t.double().cpu().numpy() for t in (self.x, self.bias, self.residual, self.norm))
        if "norm" in fused:
            x = x / np.sqrt((x * x).mean(1, keepdims=True) + EPS) * norm
        total: np.ndarray = x @ self.weights.T
        return total + ("bias" in fused) * bias + ("residual" in fused) * residual

    def fused(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names} | ({"eps": EPS} if "norm" in names else {})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("count", "config"), [(1, Config(2, 2, 1)), (3, Config(1, 2, 2))])
def test_few_rows(scheme: str, count: int, config: Config, random_tensor: Make, device: str, scratch: Scratch) -> None:
    case = Case([random_tensor(scheme, 77, width(scheme))], count, device)
    out = gemv(case.x, case.packed.parts[0], case.poisoned(), scratch, config)
    assert off(out, case.expected()) < EXACT.get(scheme, 3e-5)


@pytest.mark.parametrize("scheme", ["q4_k", "q6_k", "f16"])
@pytest.mark.parametrize("fused", [("bias",), ("residual",), ("norm",), ("norm", "bias", "residual")])
def test_what_is_fused_into_few_rows(
    scheme: str, fused: tuple[str, ...], random_tensor: Make, device: str, scratch: Scratch
) -> None:
    case = Case([random_tensor(scheme, 70, 768)], 2, device)
    config = Config(1, 2, 1 if scheme == "f16" else 2)
    out = gemv(case.x, case.packed.parts[0], case.poisoned(), scratch, config, **case.fused(fused))
    assert off(out, case.expected(fused)) < 3e-5


@pytest.mark.parametrize("split", [2, 5])
def test_pieces_are_added_in_their_order(split: int, random_tensor: Make, device: str, scratch: Scratch) -> None:
    """More pieces than records, too; counters are left at zero, and a second launch gives the same bits."""
    case = Case([random_tensor("q4_0", 90, 608)], 1, device)
    for launch in (
        lambda out: gemv(case.x, case.packed.parts[0], out, scratch, Config(1, 1, split)),
        lambda out: gemm(case.x, case.packed.parts[0], out, scratch, TileConfig(64, 16, 2, 4, 2, split)),
    ):
        outs = [launch(case.poisoned()) for _ in range(2)]
        assert off(outs[0], case.expected()) < ROUNDED
        assert torch.equal(*outs)
        assert not scratch.arrived.any()


def test_results_can_overwrite_the_residual(random_tensor: Make, device: str, scratch: Scratch) -> None:
    case = Case([random_tensor("q4_k", 40, 512)], 2, device)
    expected = case.expected(("residual",))
    matmul(case.x, case.packed, scratch, out=case.residual, residual=case.residual)
    assert off(case.residual, expected) < 3e-5


@pytest.mark.parametrize("scheme", LAYOUTS)
@pytest.mark.parametrize(
    ("count", "config"),
    [(5, TileConfig(64, 16, 8, 4, 2, 1)), (19, TileConfig(32, 16, 2, 4, 2, 2))],
)
def test_tensor_cores(
    scheme: str, count: int, config: TileConfig, random_tensor: Make, device: str, scratch: Scratch
) -> None:
    case = Case([random_tensor(scheme, 77, width(scheme))], count, device)
    fused = ("bias", "residual")
    out = gemm(case.x, case.packed.parts[0], case.poisoned(), scratch, config, **case.fused(fused))
    assert off(out, case.expected(fused)) < ROUNDED


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 6, 40])
def test_every_way_agrees(count: int, kind: torch.dtype, random_tensor: Make, device: str, scratch: Scratch) -> None:
    """Parts of several schemes, and thresholds between which each kernel gets its turn."""
    tensors = [random_tensor(s, rows, 512, rows) for s, rows in (("q4_k", 33), ("q8_0", 20), ("f16", 10), ("bf16", 9))]
    case = Case(tensors, count, device, kind)
    limits = Thresholds(vector=1, vector_floats=2, tiles=16)
    for fused in ((), ("norm", "bias", "residual")):
        out = matmul(case.x, case.packed, scratch, thresholds=limits, dtype=torch.float32, **case.fused(fused))
        assert off(out, case.expected(fused)) < ROUNDED, fused
    out = matmul(case.x, case.packed, scratch, thresholds=limits, out=case.poisoned(torch.bfloat16))
    assert off(out, case.expected()) < ROUNDED


def test_rows_with_gaps(random_tensor: Make, device: str, scratch: Scratch) -> None:
    case = Case([random_tensor("q6_k", 33, 512)], 3, device)
    wide = torch.full((3, 700), float("nan"), device=device)
    wide[:, 100:612] = case.x
    out = torch.full((3, 50), float("nan"), device=device)
    for limits in (Thresholds(vector=4), Thresholds(vector=0), Thresholds(vector=0, tiles=0)):
        matmul(wide[:, 100:612], case.packed, scratch, out=out[:, 5:38], thresholds=limits)
        assert off(out[:, 5:38], case.expected()) < ROUNDED
        assert out[:, :5].isnan().all()
        assert out[:, 38:].isnan().all()


def test_nothing_to_multiply(random_tensor: Make, device: str, scratch: Scratch) -> None:
    packed = pack([random_tensor("q4_k", 5, 256)], device)
    assert matmul(torch.empty(0, 256, device=device), packed, scratch).shape == (0, 5)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 255), r"x must be \[2, 256\], got \[2, 255\]"),
        ("out", (2, 6), r"out must be \[2, 5\]"),
        ("bias", (4,), r"bias must be \[5\]"),
        ("residual", (1, 5), r"residual must be \[2, 5\]"),
        ("norm", (5,), r"norm must be \[256\]"),
    ],
)
def test_shapes_that_do_not_fit(
    name: str, shape: tuple[int, ...], message: str, random_tensor: Make, device: str, scratch: Scratch
) -> None:
    packed = pack([random_tensor("q4_k", 5, 256)], device)
    given = {"x": torch.zeros(2, 256, device=device), name: torch.zeros(shape, device=device)}
    with pytest.raises(ConfigError, match=message):
        matmul(given.pop("x"), packed, scratch, **given)


@pytest.mark.parametrize("rows", [64, 3584, 152064])
@pytest.mark.parametrize("scheme", ["q4_k", "q6_k", "bf16"])
def test_rules_fill_the_processors_and_stay_in_bounds(rows: int, scheme: str) -> None:
    """Of a matrix that exists only as a shape."""
    part = PackedPart(scheme, 0, rows, 3584, torch.empty(0))
    for count in (1, 2, 4):
        found = config_for(part, count, 132)
        assert 1 <= found.split <= part.records
        assert found.warps in (1, 2, 4, 8)
        if rows == 3584 and part.layout:
            assert -(-rows // (32 * found.repeat)) * found.split >= 132
    for count in (1, 16, 17, 200):
        tiles = tile_config_for(part, count, 132)
        assert tiles.tokens >= min(count, 128)
        assert 1 <= tiles.split <= part.records


@pytest.mark.parametrize(
    ("rows", "columns", "best"),
    [
        (4608, 3584, Config(2, 4, 4)),
        (3584, 3584, Config(2, 4, 4)),
        (37888, 3584, Config(4, 2, 4)),
        (3584, 18944, Config(2, 4, 8)),
    ],
)
def test_the_rule_has_what_was_best_on_an_h100(rows: int, columns: int, best: Config) -> None:
    assert config_for(PackedPart("q4_k", 0, rows, columns, torch.empty(0)), 1, 132) == best


@pytest.mark.parametrize("processors", [1, 56, 132, 264])
@pytest.mark.parametrize("scheme", ["q4_k", "q6_k"])
def test_splits_of_the_rule_fit_records_and_scratch(scheme: str, processors: int) -> None:
    """As many as there are records for each warp of, and partial sums and counters that `Scratch` has room for."""
    scratch = Scratch.on("meta")
    for rows, columns in ((64, 288), (3584, 18944), (37888, 3584), (57344, 8192), (152064, 3584), (262144, 3840)):
        part = PackedPart(scheme, 0, rows, columns, torch.empty(0))
        for count in (1, 2, 4):
            found = config_for(part, count, processors)
            assert (found.split - 1) * found.warps < part.records
            if found.split > 1:
                assert found.split * count * rows <= scratch.partial.numel()
                assert -(-rows // (32 * found.repeat)) <= scratch.arrived.numel()
            if rows >= 152064 and processors == 132:
                assert found.split == 1


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(
    ("schemes", "count", "config"),
    [
        (("q4_k",), 1, Config(4, 2, 2)),
        (("q4_k",), 1, Config(4, 2, 4)),  # more pieces than records
        (("q6_k",), 2, Config(2, 2, 1)),
        (("q8_0",), 1, Config(2, 1, 3)),
        (("bf16",), 3, Config(8, 2, 1)),
        (("q4_k",), 1, Config(1, 2, 1)),  # a row a lane: gates and their values are apart
        (("q4_k", "q6_k"), 1, Config(2, 2, 1)),  # as they are in two parts
        (("q4_k",), 7, Config(2, 2, 1)),
    ],
)
def test_gates(
    schemes: tuple[str, ...], count: int, config: Config, activation: str, random_tensor: Make, device: str,
    scratch: Scratch,
) -> None:  # fmt: skip
    """Applied by the launch that multiplies where it has both halves, after it otherwise; 45 of them fill no tile."""
    case = Case([random_tensor(scheme, 90 // len(schemes), 512, n) for n, scheme in enumerate(schemes)], count, device)
    case.norm *= 0.02  # so that gates are neither open nor shut
    fused = ("norm", "bias")
    both = torch.from_numpy(case.expected(fused))
    expected = reference.gated(both, activation).numpy()
    limits = Thresholds(configure=lambda *_: config)
    found = matmul(case.x, case.packed, scratch, gate=activation, thresholds=limits, **case.fused(fused))
    assert found.shape == (count, 45)
    assert off(found, expected) < (2 * ROUNDED if count > 4 else 1e-4)
    with pytest.raises(ConfigError, match="no residual"):
        matmul(case.x, case.packed, scratch, gate=activation, residual=found)
