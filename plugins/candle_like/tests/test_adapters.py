"""Low-rank adapters in the eager decoder against peft, each sequence of a batch with its own."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.decode.decoder import EagerDecoder
from ruvllm_core.decode.lora import apply_final, combine
from ruvllm_core.decode.reference import TorchKernels
from ruvllm_core.model.loader import open_model
from ruvllm_core.protocols import Adapter, CacheContext, DecoderOptions, LowRank
from ruvllm_core.settings import CacheConfig

SITES = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


def of_peft(model: torch.nn.Module, scale: float) -> Adapter:
    """Our form of the adapter that peft put into `model`."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, value in model.named_parameters():
        if found := re.search(r"layers\.(\d+)\.(.+)\.lora_(A|B)\.default\.weight", name):
            site = f"layers.{found[1]}.{SITES[found[2]]}"
            factors.setdefault(site, {})[found[3]] = value.detach().numpy().copy()
    return Adapter("peft", {site: LowRank(both["A"], both["B"], scale) for site, both in factors.items()})


def run(made: Any, adapters: tuple[Adapter | None, ...], tokens: list[int]) -> np.ndarray:
    """Logits ``[B, n, V]`` of the same tokens under each adapter, as one ragged batch in two chunks."""
    model = open_model(made.folder, made.registry)
    options = DecoderOptions(dtype="float32", device="cpu", max_context=64)
    decoder = EagerDecoder(model.spec, model.weights, TorchKernels(options), options)
    cache = ContiguousCache(CacheContext(model.spec, decoder, CacheConfig(), 64, len(adapters)))
    names = [str(b) for b in range(len(adapters))]
    for name in names:
        cache.open(name, tokens, 64)
    parts = []
    for start, stop in ((0, 9), (9, len(tokens))):
        count = stop - start
        for name in names:
            cache.extend(name, count)
        batch = Batch(
            tokens=np.tile(np.array(tokens[start:stop], dtype=np.int64), len(names)),
            positions=np.tile(np.arange(start, stop, dtype=np.int64), len(names)),
            cu_q=np.arange(len(names) + 1, dtype=np.int32) * count,
            rows=np.arange(count * len(names), dtype=np.int64),
            kv=cache.view(names),
            rope_variants=np.zeros(len(names), dtype=np.uint8),
            adapters=adapters,
        )
        logits = decoder.logits(apply_final(decoder.forward(batch), batch))
        parts.append(logits.reshape(len(names), count, -1))
        for name in names:
            cache.commit(name)
    return np.concatenate(parts, axis=1)


@pytest.fixture
def made(oracle: Any, sizes: Any) -> Any:
    return oracle(LlamaConfig(**sizes))


def test_linear_sites_equal_peft(made: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = made.logits(made.tokens)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[site.rpartition(".")[2] for site in SITES])
    tuned = get_peft_model(made.model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapter = of_peft(tuned, scale=1.5)
    assert len(adapter.sites) == 7 * made.config.num_hidden_layers
    assert adapter.changes_cache
    with torch.inference_mode():
        expected = tuned(torch.tensor([made.tokens])).logits[0].numpy()
    ours = run(made, (adapter, None), made.tokens)
    np.testing.assert_allclose(ours[0], expected, atol=1e-4)
    np.testing.assert_allclose(ours[1], plain, atol=1e-4)
    assert np.abs(expected - plain).max() > 0.1


def test_final_site_is_a_delta_before_the_output_projection(made: Any) -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((2, 64), (64, 2)))
    adapter = Adapter("final", {"final": LowRank(a, b, 2.0)})
    assert not adapter.changes_cache
    ours = run(made, (None, adapter), made.tokens)
    with torch.inference_mode():
        hidden = made.model.model(torch.tensor([made.tokens])).last_hidden_state[0].double().numpy()
    head = made.model.lm_head.weight.detach().double().numpy()
    np.testing.assert_allclose(ours[1], (hidden + 2.0 * hidden @ a.T @ b.T) @ head.T, atol=1e-4)
    np.testing.assert_allclose(ours[0], made.logits(made.tokens), atol=1e-4)


def test_combined_adapters_add_up(made: Any) -> None:
    random = np.random.default_rng(1)

    def low_rank(rows: int, columns: int, rank: int, scale: float) -> LowRank:
        a = random.standard_normal((rank, columns)).astype(np.float32) * 0.1
        return LowRank(a, random.standard_normal((rows, rank)).astype(np.float32) * 0.1, scale)

    first = Adapter("a", {"final": low_rank(64, 64, 1, 2.0), "layers.1.mlp.down": low_rank(64, 96, 2, 0.5)})
    second = Adapter("b", {"layers.1.mlp.down": low_rank(64, 96, 1, 3.0)})
    both = combine([first, second])
    assert both.version == "a+b"
    for site, delta in both.sites.items():
        parts = [adapter.sites[site] for adapter in (first, second) if site in adapter.sites]
        total = sum(part.scale * (part.b @ part.a) for part in parts)
        np.testing.assert_allclose(delta.scale * (delta.b @ delta.a), total, atol=1e-6)
    assert combine([first]) is first
    logits = run(made, (both, first), made.tokens)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
