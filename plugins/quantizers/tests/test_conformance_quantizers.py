"""Every recipe of the plugin through the suite of core."""

from __future__ import annotations

import pytest

from ruvllm_core.model.quant import FLOAT_SCHEMES
from ruvllm_core.testing import QuantizerSuite
from ruvllm_quantizers.recipes import RECIPES


class TestRecipes(QuantizerSuite):
    exact_again = FLOAT_SCHEMES | {"q4_0", "q5_0", "q8_0"}

    @pytest.fixture(autouse=True, params=vars(RECIPES).values(), ids=vars(RECIPES))
    def each(self, request: pytest.FixtureRequest) -> None:
        self.quantizer = request.param
