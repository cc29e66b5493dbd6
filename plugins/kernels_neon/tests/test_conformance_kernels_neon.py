"""On ARM64 processors: core's kernel suite for every level that this one has, and the public functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core.errors import ConfigError
from ruvllm_core.protocols import DecoderOptions, KernelProvider
from ruvllm_core.testing import KernelSuite
from ruvllm_kernels_neon import AttentionConfig, flash_attention_neon, grouped_query_attention_neon, library
from ruvllm_kernels_neon.provider import NeonKernels

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


class TestNeon(KernelSuite):
    isa = "neon"
    # Activations are rounded to 16 bits; up to 3e-4 was seen.
    quantized_tolerance = 1e-3

    def make_provider(self, options: DecoderOptions) -> KernelProvider:
        try:
            return NeonKernels(options, isa=self.isa)
        except ConfigError as error:
            pytest.skip(str(error))


class TestNeonDotprod(TestNeon):
    isa = "neon-dotprod"


class TestNeonI8mm(TestNeon):
    isa = "neon-i8mm"


def plain(query: npt.NDArray[Any], key: npt.NDArray[Any], value: npt.NDArray[Any], causal: bool) -> npt.NDArray[Any]:
    """Attention of one head in float64."""
    scores = query.astype(np.float64) @ key.T.astype(np.float64) * query.shape[1] ** -0.5
    if causal:
        scores[np.triu_indices(len(query), 1 + len(key) - len(query), len(key))] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ value


@pytest.mark.parametrize("causal", [True, False])
def test_public_functions(causal: bool) -> None:
    rng = np.random.default_rng(1)
    query, key, value = (rng.normal(size=(heads, n, 48)) for heads, n in ((6, 11), (2, 70), (2, 70)))
    expected = np.stack([plain(query[h], key[h // 3], value[h // 3], causal) for h in range(6)])
    found = grouped_query_attention_neon(query, key, value, AttentionConfig(6, 2, 48, causal=causal))
    assert found.shape == query.shape
    assert np.abs(found - expected).max() < 1e-5
    alone = flash_attention_neon(query[4], key[1], value[1], 48**-0.5, causal)
    assert np.abs(alone - expected[4]).max() < 1e-5
