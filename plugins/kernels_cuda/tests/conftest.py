"""What the tests share. Without a GPU the kernels are interpreted: `plugins/conftest.py` sees to that."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ruvllm_core.model.quant import SCHEMES, QuantTensor

#: Where a block of each scheme has its f16 scales (block layouts of the GGML library).
_SCALES = {"q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0], "q2_k": [80, 82], "q3_k": [108]}
_SCALES |= {"q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208]}


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: a GPU if there is one, else the interpreter on tensors of the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def random_tensor() -> Callable[..., QuantTensor]:
    """Makes a tensor of a scheme in which every bit of a code is random."""

    def make(scheme: str, rows: int, columns: int, seed: int = 0) -> QuantTensor:
        rng, layout = np.random.default_rng(seed), SCHEMES[scheme]
        if layout.block_size == 1:
            values = torch.from_numpy(rng.normal(size=(rows, columns)).astype(np.float32))
            short = values.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[scheme])
            return QuantTensor(scheme, (rows, columns), short.view(torch.uint8).numpy())
        data = rng.integers(0, 256, (rows, layout.row_bytes(columns)), dtype=np.uint8)
        blocks = data.reshape(-1, layout.block_bytes)
        for at in _SCALES[scheme]:
            scales = rng.uniform(-0.02, 0.02, (len(blocks), 1)).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8)
        return QuantTensor(scheme, (rows, columns), data)

    return make
