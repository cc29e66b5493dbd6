"""Quantizers, against the encoders and decoders of the `gguf` package and against bounds on their error."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core.errors import QuantizationError
from ruvllm_core.model.quant import SCHEMES
from ruvllm_quantizers.encode import quantize

Floats = npt.NDArray[np.float32]
DEFINED = ["f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
SEARCHED = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
BLOCKS = [name for name in SCHEMES if SCHEMES[name].block_size > 1]
# Root mean square error on normally distributed weights, as a part of their standard deviation. llama.cpp's encoders,
# without an importance matrix, reach 0.297, 0.151, 0.0713, 0.0361 and 0.0178.
BOUNDS = {"q2_k": 0.28, "q3_k": 0.148, "q4_k": 0.073, "q5_k": 0.037, "q6_k": 0.0178} | {
    "q4_0": 0.09,
    "q4_1": 0.082,
    "q5_0": 0.045,
    "q5_1": 0.04,
    "q8_0": 0.0056,
    "f16": 3e-4,
    "bf16": 2e-3,
    "f32": 0.0,
}


def weights(rows: int = 64, columns: int = 1024, seed: int = 0, scale: float = 0.02) -> Floats:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * scale).astype(np.float32)


def rms(values: Floats) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


def samples() -> dict[str, Floats]:
    rng = np.random.default_rng(5)
    mixed = weights(64, 256, 1) * np.exp(rng.uniform(-12, 6, (64, 1))).astype(np.float32)
    return {
        "normal": weights(),
        "heavy tails": (rng.standard_t(2, (32, 512)) * 0.05).astype(np.float32),
        "many magnitudes": mixed,
        "positive": np.abs(weights(8, 256)) + np.float32(0.5),
        "negative": -np.abs(weights(8, 256)) - np.float32(0.5),
        "zeros": np.zeros((4, 256), np.float32),
        "halves": rng.integers(-254, 255, (16, 256)).astype(np.float32) / np.float32(2),
        "mostly zero": np.where(rng.random((16, 256)) < 0.97, 0, weights(16, 256)).astype(np.float32),
    }


@pytest.mark.parametrize("scheme", DEFINED)
@pytest.mark.parametrize("kind", samples())
def test_bytes_equal_the_gguf_package(scheme: str, kind: str) -> None:
    values = samples()[kind]
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType(SCHEMES[scheme].ggml_type))
    ours = quantize(values, scheme)
    np.testing.assert_array_equal(ours.data, theirs.view(np.uint8).reshape(ours.data.shape))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_is_bounded_and_equals_what_others_decode(scheme: str) -> None:
    values = weights(128, 2048)
    tensor = quantize(values, scheme)
    decoded = tensor.dequantize()
    assert rms(decoded - values) <= BOUNDS[scheme] * rms(values)
    if scheme != "f32":
        theirs = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType(SCHEMES[scheme].ggml_type))
        np.testing.assert_array_equal(decoded, theirs.reshape(decoded.shape))


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_more_bits_mean_less_error(kind: str) -> None:
    values = samples()[kind]
    errors = [rms(quantize(values, scheme).dequantize() - values) for scheme in (*SEARCHED, "q8_0", "f16", "f32")]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    for searched, simple in (("q4_k", "q4_0"), ("q4_k", "q4_1"), ("q5_k", "q5_0"), ("q5_k", "q5_1")):
        by_search = rms(quantize(values, searched).dequantize() - values)
        assert by_search < rms(quantize(values, simple).dequantize() - values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_encoding_again_hardly_changes_anything(scheme: str) -> None:
    values = weights()
    once = quantize(values, scheme).dequantize()
    twice = quantize(once, scheme).dequantize()
    assert rms(twice - once) <= 0.2 * rms(once - values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zero(scheme: str) -> None:
    values = np.zeros((3, 512), np.float32)
    assert not quantize(values, scheme).dequantize().any()
    values[1] = weights(1, 512)  # and do not suffer from their neighbours
    decoded = quantize(values, scheme).dequantize()
    assert not decoded[[0, 2]].any() and decoded[1].any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.037, -123.4, 3e-3])
def test_constant_rows(scheme: str, value: float) -> None:
    decoded = quantize(np.full((2, 256), value, np.float32), scheme).dequantize()
    np.testing.assert_allclose(decoded, value, rtol=6e-3)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in ("f16",)])
def test_powers_of_two_scale_through(scheme: str) -> None:
    values = weights(16, 512, scale=1.0)
    decoded = quantize(values, scheme).dequantize()
    for power in (-3, 4, 8):
        scaled = quantize(np.ldexp(values, power), scheme).dequantize()
        np.testing.assert_array_equal(scaled, np.ldexp(decoded, power))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tiny_values_do_no_harm(scheme: str) -> None:
    for scale in (1e-6, 1e-12, 1e-30, 1e-44):
        values = weights(4, 256, scale=scale)
        decoded = quantize(values, scheme).dequantize()
        assert np.isfinite(decoded).all() and np.abs(decoded - values).max() <= max(1e-6, 4 * scale)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_huge_values(scheme: str) -> None:
    values = weights(4, 256, scale=1e30)
    if scheme in ("f32", "bf16"):
        assert rms(quantize(values, scheme).dequantize() / 1e30 - values / 1e30) < 0.01
    else:
        with pytest.raises(QuantizationError, match=r"tensor 'blk\.0\.ffn_up\.weight' has values up to .*e\+30"):
            quantize(values, scheme, name="blk.0.ffn_up.weight")
    large = weights(4, 256, scale=1e4)
    assert rms(quantize(large, scheme).dequantize() - large) <= 1.2 * BOUNDS[scheme] * rms(large)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [4, 1100])
def test_non_finite_values_are_refused(scheme: str, bad: float, rows: int) -> None:
    values = weights(rows, 256)
    values[rows - 1, 77] = bad
    with pytest.raises(QuantizationError, match=r"tensor 'output\.weight' has NaN or infinite"):
        quantize(values, scheme, name="output.weight")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_do_not_depend_on_each_other(scheme: str) -> None:
    values = weights(1100, 256)  # enough for several chunks and threads
    whole = quantize(values, scheme)
    for row in (0, 1, 127, 128, 129, 1099):
        np.testing.assert_array_equal(whole.data[row], quantize(values[row : row + 1], scheme).data[0])


def test_shapes() -> None:
    assert quantize(weights(1, 256)[0], "q4_k").shape == (256,)
    assert quantize(weights(6, 256).reshape(2, 3, 256), "q4_k").shape == (2, 3, 256)
    strided = weights(8, 512)[:, ::2]
    np.testing.assert_array_equal(quantize(strided, "q4_0").data, quantize(strided.copy(), "q4_0").data)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"tensor 'x': a row of 48 values cannot be stored as q4_0"):
        quantize(weights(2, 48), "q4_0", name="x")
    with pytest.raises(QuantizationError, match="there is no scheme 'q9_z'"):
        quantize(weights(2, 64), "q9_z")
    with pytest.raises(QuantizationError, match="nothing to quantize"):
        quantize(np.empty((0, 256), np.float32), "q4_k")
