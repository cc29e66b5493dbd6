"""Dequantizing, against the reference decoder of the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core.errors import QuantizationError
from ruvllm_core.model.dequant import count_non_finite, dequantize
from ruvllm_core.model.quant import SCHEMES, QuantTensor

ALL = sorted(SCHEMES)
BLOCKS = [name for name in ALL if SCHEMES[name].block_size > 1]


def random_tensor(scheme: str, shape: tuple[int, ...], seed: int = 0) -> QuantTensor:
    rng = np.random.default_rng(seed)
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    return QuantTensor(
        scheme, shape, rng.integers(0, 256, (rows, SCHEMES[scheme].row_bytes(shape[-1])), dtype=np.uint8)
    )


def reference(tensor: QuantTensor) -> npt.NDArray[np.float32]:
    kind = gguf.GGMLQuantizationType(SCHEMES[tensor.scheme].ggml_type)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(tensor.data, kind).astype(np.float32).reshape(tensor.shape)


def assert_same_bits(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> None:
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), np.ascontiguousarray(theirs).view(np.uint32))


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("shape", [(256,), (1, 256), (37, 512), (2, 3, 768)])
def test_random_bytes_decode_bit_for_bit(scheme: str, shape: tuple[int, ...]) -> None:
    for seed in range(5):  # random bytes hold every kind of f16 scale: denormal, infinite, NaN
        tensor = random_tensor(scheme, shape, seed)
        assert_same_bits(tensor.dequantize(), reference(tensor))


@pytest.mark.parametrize("scheme", ALL)
def test_threads_change_nothing(scheme: str) -> None:
    tensor = random_tensor(scheme, (1031, 1280))  # large enough for threads, and no multiple of a chunk
    expected = reference(tensor)
    for threads in (1, 2, 5):
        assert_same_bits(dequantize(tensor, threads=threads), expected)


@pytest.mark.parametrize("scheme", BLOCKS)
def test_extreme_scales(scheme: str) -> None:
    halves = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01], np.uint16)
    start, stop = scale_bytes(scheme)
    tensor = random_tensor(scheme, (len(halves) ** 2, 256))
    blocks = tensor.data.reshape(-1, SCHEMES[scheme].block_bytes)
    for index in range(len(blocks)):
        pair = np.array([halves[index % 10], halves[index // 10 % 10]])
        blocks[index, start:stop] = pair.view(np.uint8)[: stop - start]
    assert_same_bits(tensor.dequantize(), reference(tensor))


def scale_bytes(scheme: str) -> tuple[int, int]:
    """Where a block keeps its f16 numbers, found by what the reference decoder's output depends on."""
    places = {"q2_k": (80, 84), "q3_k": (108, 110), "q6_k": (208, 210)}
    if scheme in places:
        return places[scheme]
    return (0, 4) if scheme in ("q4_1", "q5_1", "q4_k", "q5_k") else (0, 2)


@pytest.mark.parametrize("scheme", BLOCKS)
def test_out_is_filled_and_returned(scheme: str) -> None:
    tensor = random_tensor(scheme, (8, 512))
    out = np.full((8, 512), 7, np.float32)
    assert dequantize(tensor, out) is out
    assert_same_bits(out, reference(tensor))


def test_wrong_out_is_refused() -> None:
    tensor = random_tensor("q4_0", (8, 64))
    for out in (np.empty((8, 63), np.float32), np.empty((8, 64), np.float64), np.empty((64, 8), np.float32).T):
        with pytest.raises(QuantizationError, match="C-contiguous"):
            dequantize(tensor, out)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ALL)
def test_views_at_odd_addresses(scheme: str) -> None:
    tensor = random_tensor(scheme, (6, 256))
    shifted = np.frombuffer(b"\0" + tensor.data.tobytes(), np.uint8)[1:].reshape(tensor.data.shape)
    assert_same_bits(QuantTensor(scheme, tensor.shape, shifted).dequantize(), reference(tensor))
    assert_same_bits(tensor.rows(2, 5).dequantize(), reference(tensor)[2:5])


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_scales_are_counted(scheme: str, bad: float) -> None:
    traits = SCHEMES[scheme]
    data = np.zeros((4, traits.row_bytes(512)), np.uint8)
    tensor = QuantTensor(scheme, (4, 512), data)
    assert count_non_finite(tensor) == 0
    blocks = data.reshape(-1, traits.block_bytes)
    if scheme == "f32":
        blocks[3] = np.array([bad], "<f4").view(np.uint8)
    elif scheme == "bf16":
        blocks[3] = np.array([bad], "<f4").view(np.uint8)[2:]
    else:
        start, stop = scale_bytes(scheme) if traits.block_size > 1 else (0, 2)
        blocks[3, stop - 2 : stop] = np.array([bad], "<f2").view(np.uint8)
        assert start < stop
    assert count_non_finite(tensor) == 1
    assert not np.isfinite(tensor.dequantize()).all()
