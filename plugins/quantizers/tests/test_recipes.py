"""Which tensor gets which scheme."""

from __future__ import annotations

from collections import Counter

import gguf
import pytest

from ruvllm_core.model.quant import SCHEMES
from ruvllm_quantizers import hooks
from ruvllm_quantizers.recipes import RECIPES

NAMES = sorted(vars(RECIPES))
MATRICES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


def layout(recipe: str, num_layers: int = 32, hidden: int = 4096) -> dict[str, str]:
    scheme_for = getattr(RECIPES, recipe).scheme_for
    names = [f"blk.{n}.{m}.weight" for n in range(num_layers) for m in MATRICES]
    names += ["token_embd.weight", "output.weight"]
    return {name: scheme_for(name, (hidden, hidden), num_layers) for name in names}


def test_hooks_offer_exactly_the_recipes() -> None:
    offers = hooks.quantizers()
    assert sorted(offer.name for offer in offers) == NAMES
    assert {offer.target for offer in offers} == {f"ruvllm_quantizers.recipes:RECIPES.{name}" for name in NAMES}
    assert all(offer.summary for offer in offers)
    assert set(SCHEMES) < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_file_types_are_those_of_the_gguf_package(name: str) -> None:
    label = {"f32": "ALL_F32", "q3_k": "MOSTLY_Q3_K_S", "q4_k": "MOSTLY_Q4_K_S", "q5_k": "MOSTLY_Q5_K_S"}.get(
        name, f"MOSTLY_{name.upper()}"
    )
    assert getattr(RECIPES, name).file_type == gguf.LlamaFileType[label]


def test_plain_schemes_treat_all_matrices_alike() -> None:
    for scheme in ("f32", "f16", "bf16", "q8_0", "q3_k", "q4_k", "q5_k", "q6_k"):
        assert set(layout(scheme).values()) == {scheme}


def test_q4_k_m_counts() -> None:
    found = layout("q4_k_m")
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]  # a 32-layer file made by llama.cpp has these
    for role in ("attn_v", "ffn_down"):
        assert [n for n in range(32) if found[f"blk.{n}.{role}.weight"] == "q6_k"] == more
    assert found["output.weight"] == "q6_k" and found["token_embd.weight"] == "q4_k"
    assert Counter(found.values()) == {"q4_k": 32 * 7 + 1 - 32, "q6_k": 32 + 1}


def test_other_recipes() -> None:
    assert Counter(layout("q5_k_s").values()) == {"q5_k": 32 * 7 + 1, "q6_k": 1}
    assert Counter(layout("q4_k_s").values()) == {"q4_k": 32 * 7 + 1 - 8, "q5_k": 8, "q6_k": 1}
    assert Counter(layout("q3_k_m").values()) == {"q3_k": 32 * 4 + 1, "q5_k": 4, "q4_k": 92, "q6_k": 1}
    assert Counter(layout("q3_k_l").values()) == {"q3_k": 32 * 4 + 1, "q5_k": 96, "q6_k": 1}
    assert Counter(layout("q2_k").values()) == {"q2_k": 32 * 4 + 1, "q3_k": 96, "q6_k": 1}
    assert RECIPES.q2_k.scheme_for("blk.0.attn_v.weight", (1024, 4096), 32) == "q4_k"
    assert RECIPES.q4_k_m.scheme_for("blk.5.attn_qkv.weight", (9216, 3072), 32) == "q5_k"


@pytest.mark.parametrize("name", NAMES)
def test_vectors_and_norms_stay_f32(name: str) -> None:
    scheme_for = getattr(RECIPES, name).scheme_for
    assert scheme_for("output_norm.weight", (4096,), 32) == "f32"
    assert scheme_for("blk.0.attn_norm.weight", (4096,), 32) == "f32"
    assert scheme_for("blk.0.attn_q.bias", (4096,), 32) == "f32"
    assert scheme_for("rope_freqs.weight", (64,), 32) == "f32"
    assert scheme_for("blk.0.ffn_gate_inp.weight", (8, 4096), 32) == "f32"


def test_rows_that_do_not_fill_blocks_fall_back() -> None:
    for recipe, at_576, at_48 in [
        ("q2_k", "q4_0", "f16"),
        ("q3_k", "q4_0", "f16"),
        ("q4_k", "q5_0", "f16"),
        ("q5_k", "q5_1", "f16"),
        ("q6_k", "q8_0", "f16"),
        ("q8_0", "q8_0", "f16"),
        ("bf16", "bf16", "bf16"),
    ]:
        assert getattr(RECIPES, recipe).scheme_for("blk.0.ffn_up.weight", (64, 576), 2) == at_576
        assert getattr(RECIPES, recipe).scheme_for("blk.0.ffn_up.weight", (64, 48), 2) == at_48
