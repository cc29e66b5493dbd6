"""Packed weights hold what the file held, in as many bytes; unpacked and looked up they are what core says they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux on x86-64")

from ruvllm_core.errors import ConfigError, QuantizationError
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_kernels_cuda import packing
from ruvllm_kernels_cuda.dequant import dequantize_rows
from ruvllm_kernels_cuda.embed import embed
from ruvllm_kernels_cuda.packing import pack

Make = Callable[..., QuantTensor]
#: Codes are exact; the last bits of scale * q - minimum depend on the order of operations. f32 and q2_k are rounded.
TOLERANCES = {"f32": 4e-3, "q2_k": 5e-4}


def width(scheme: str) -> int:
    """Two records and, where a block is smaller, part of a third."""
    return 512 if SCHEMES[scheme].block_size == 256 else 608


def off(mine: torch.Tensor, reference: np.ndarray) -> float:
    values = mine.double().cpu().numpy()
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpacked_weights_are_those_of_the_file(scheme: str, random_tensor: Make, device: str) -> None:
    tensor = random_tensor(scheme, 37, width(scheme))
    (part,) = pack([tensor], device).parts
    out = torch.full((37 * tensor.columns + 5,), float("nan"), device=device)
    view = dequantize_rows(part, out)
    assert view.shape == tensor.shape
    assert off(view, tensor.dequantize()) < TOLERANCES.get(scheme, 1e-5)
    assert out[-5:].isnan().all(), "wrote beyond the matrix"


@pytest.mark.parametrize("scheme", ["q4_0", "q5_1", "q8_0", "q4_k", "q6_k"])
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x0F, 0xAA])
def test_the_ends_of_the_range(scheme: str, byte: int, device: str) -> None:
    layout = SCHEMES[scheme]
    data = np.full((3, layout.row_bytes(256)), byte, dtype=np.uint8)
    blocks = data.reshape(-1, layout.block_bytes)
    for at in {"q5_1": (0, 2), "q4_k": (0, 2), "q6_k": (208,)}.get(scheme, (0,)):
        blocks[:, at : at + 2] = np.array([0.75], np.float16).view(np.uint8)
    tensor = QuantTensor(scheme, (3, 256), data)
    out = torch.empty(3, 256, device=device)
    np.testing.assert_allclose(
        dequantize_rows(pack([tensor], device).parts[0], out).cpu(), tensor.dequantize(), rtol=1e-5, atol=1e-3
    )


def test_rows_from_the_middle_as_bfloat16(random_tensor: Make, device: str) -> None:
    tensor = random_tensor("q5_k", 50, 512)
    (part,) = pack([tensor], device).parts
    out = torch.empty(20, 512, dtype=torch.bfloat16, device=device)
    view = dequantize_rows(part, out, first=17, count=20)
    assert off(view, tensor.dequantize()[17:37]) < 4e-3
    with pytest.raises(ConfigError, match="do not fit"):
        dequantize_rows(part, out, first=0, count=21)
    with pytest.raises(ConfigError, match="do not fit"):
        dequantize_rows(part, out, first=40, count=11)


@pytest.mark.parametrize("scheme", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"])
def test_bytes_are_those_of_the_file(scheme: str, random_tensor: Make) -> None:
    tensor = random_tensor(scheme, 6, 1024)
    assert pack([tensor], "cpu").nbytes == tensor.nbytes


@pytest.mark.parametrize("scheme", ["q5_1", "q8_0", "q4_k", "q6_k", "bf16"])
def test_repacking_in_panels_changes_nothing(scheme: str, random_tensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [random_tensor(scheme, rows, 512, seed=rows) for rows in (11, 6)]
    whole = pack(tensors, "cpu").parts[0]
    monkeypatch.setattr(packing, "_PANEL", 4 * 512)
    pieces = pack(tensors, "cpu").parts[0]
    assert torch.equal(whole.data, pieces.data)
    assert whole.factors is None or torch.equal(whole.factors, pieces.factors)


def test_neighbours_of_one_scheme_are_one_part(random_tensor: Make, device: str) -> None:
    schemes = (("q4_k", 5), ("q4_k", 3), ("q6_k", 4), ("q3_k", 2), ("q4_k", 1))
    tensors = [random_tensor(scheme, rows, 256, seed) for seed, (scheme, rows) in enumerate(schemes)]
    packed = pack(tensors, device)
    assert [(part.scheme, part.first, part.rows) for part in packed.parts] == [
        ("q4_k", 0, 8),
        ("q6_k", 8, 6),
        ("q4_k", 14, 1),
    ]
    assert (packed.rows, packed.columns) == (15, 256)
    expected = np.concatenate([tensor.dequantize() for tensor in tensors])
    found = [dequantize_rows(part, torch.empty(part.rows, 256, device=device)) for part in packed.parts]
    assert off(torch.cat(found), expected) < 1e-5


def test_what_cannot_be_stacked(random_tensor: Make) -> None:
    with pytest.raises(QuantizationError, match="equal width"):
        pack([random_tensor("q4_0", 2, 64), random_tensor("q4_0", 2, 32)], "cpu")
    with pytest.raises(QuantizationError, match="equal width"):
        pack([], "cpu")


@pytest.mark.parametrize("scheme", ["q4_k", "q6_k", "q8_0", "q5_1", "f16"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_embedding(scheme: str, kind: torch.dtype, random_tensor: Make, device: str) -> None:
    first, second = random_tensor(scheme, 21, width(scheme)), random_tensor("bf16", 8, width(scheme))
    table = np.concatenate([first.dequantize(), second.dequantize()])
    tokens = [20, 0, 28, 7, 7, 21, 3]
    out = torch.full((7, first.columns), float("nan"), device=device)
    embed(pack([first, second], device), torch.tensor(tokens, dtype=kind, device=device), out)
    assert off(out, table[tokens]) < 1e-5


def test_a_token_that_there_is_not_shows(random_tensor: Make, device: str) -> None:
    tensor = random_tensor("q4_k", 9, 256)
    out = torch.zeros(3, 256, dtype=torch.bfloat16, device=device)
    embed(pack([tensor], device), torch.tensor([9, 8, -1], device=device), out)
    assert out.isnan().all(1).tolist() == [True, False, True]
    assert not out[1].isnan().any()
