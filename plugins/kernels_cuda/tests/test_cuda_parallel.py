"""Several ranks compute what one does: real processes that meet in Gloo, on the CPU, models of every kind."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ruvllm_core.errors import ConfigError, ModelError
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import llama_tensor_names
from ruvllm_core.protocols import Adapter, DecoderOptions, LowRank
from ruvllm_core.testing import tiny
from ruvllm_kernels_cuda.lockstep import join
from ruvllm_kernels_cuda.provider import CudaKernels
from ruvllm_kernels_cuda.settings import CudaSettings
from ruvllm_kernels_cuda.shard import Shard, ShardedWeights, Split

PROGRAM = Path(__file__).with_name("parallel_rank.py")
WIDE = tiny.tiny_spec(hidden_size=256, intermediate_size=768, head_dim=64)
#: Neither heads, nor blocks of 256 columns, nor tokens can be shared out evenly.
ODD = replace(WIDE, vocab_size=259, num_heads=16, num_kv_heads=2, head_dim=48, rope_dim=48)
EAGER = {name: (spec, ("f32",)) for name, spec in tiny.FLAVOURS.items()}
EAGER |= {scheme: (WIDE, (scheme,)) for scheme in ("q4_0", "q8_0", "q4_k", "q6_k")}
EAGER["mixed and tied"] = replace(WIDE, tied_embeddings=True), ("q4_k", "q6_k", "f16", "q8_0")
MORE = {"odd": (ODD, ("q6_k", "q4_k")), "biases": EAGER["biases"], "windows": EAGER["window in one layer"]}
FUSED = {
    "biases": (replace(tiny.FLAVOURS["biases"], num_layers=1), ("bf16",)),
    "tied inside a block": (
        replace(WIDE, hidden_size=64, intermediate_size=512, tied_embeddings=True, num_layers=1),
        ("bf16", "bf16", "bf16", "bf16", "q4_k", "bf16", "bf16", "q4_k"),  # embed; q, k, v, o; gate, up, down
    ),
}
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def alone() -> Any:
    """The program's functions, to do in this process what a rank does."""
    found = importlib.util.spec_from_file_location("parallel_rank", PROGRAM)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Results]]:
    """Runs jobs on a number of ranks, once for all tests: each rank's arrays by job and name."""
    done: dict[Any, list[Results]] = {}

    def run(world: int, models: dict[str, Any], how: str = "eager") -> list[Results]:
        key = world, tuple(models), how
        if key in done:
            return done[key]
        folder = tmp_path_factory.mktemp("ranks")
        jobs = [(name, *model, how) for name, model in models.items()]
        (folder / "jobs.pickle").write_bytes(pickle.dumps(jobs))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if how == "fused":
            environment["TRITON_INTERPRET"] = "1"
        started = [
            subprocess.Popen(
                [sys.executable, str(PROGRAM), str(folder), str(rank), str(world)],
                env=environment, stdout=subprocess.DEVNULL, stderr=(folder / f"{rank}.log").open("wb"),
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            codes = [one.wait(timeout=150) for one in started]
        finally:
            for one in started:
                one.kill()
        logs = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(world))
        assert codes == [0] * world, logs
        found: list[Results] = []
        for rank in range(world):
            found.append({name: {} for name in models})
            with np.load(folder / f"{rank}.npz") as arrays:
                for name, values in arrays.items():
                    job, _, what = name.partition("|")
                    found[-1][job][what] = values
        return done.setdefault(key, found)

    return run


@pytest.mark.parametrize(
    ("world", "model"), [*((2, name) for name in EAGER), *((world, name) for world in (3, 4) for name in MORE)]
)
def test_the_eager_decoder_on_several_ranks(alone: Any, ranks: Any, world: int, model: str) -> None:
    """Logits of ragged batches, with adapters, and the tokens of a sampled answer: those of one process."""
    models = EAGER if world == 2 else MORE
    expected = alone.run(alone.Job(model, *models[model], "eager"), None)
    first, *others = (rank[model] for rank in ranks(world, models))
    for name in tiny.TEXTS:
        tiny.assert_close(first[name], expected[name], 2e-5, name)
    assert first["answer"].tolist() == expected["answer"].tolist()
    assert len(set(first["answer"].tolist())) > 3
    for other in others:
        for name, values in first.items():
            np.testing.assert_array_equal(other[name], values, name)  # so that no rank draws another token


def test_one_rank_leads(alone: Any, ranks: Any) -> None:
    """The others make its calls, forget its caches, and outlive errors, until it closes."""
    leader, *followers = (rank["odd"] for rank in ranks(3, {"odd": MORE["odd"]}, "led"))
    expected = alone.run(alone.Job("odd", *MORE["odd"], "led"), None)
    for name in tiny.TEXTS:  # a key that is coded as its neighbour makes far more of a difference than its rounding
        tiny.assert_close(leader[name], expected[name], 1e-2, name)
    assert leader["answer"].tolist() == expected["answer"].tolist()
    full, wrong = leader["errors"].tolist()
    assert full.startswith("OutOfMemoryError: keys and values of 1 x 7 tokens in f32 do not fit on every GPU")
    assert wrong.startswith("ValueError: adapter wrong, layers.0.attn.o: a (1, 3) and b (3, 1) are not of a weight")
    assert leader["closed"] == "this decoder is closed"
    for follower in followers:
        calls = follower["calls"].tolist()
        assert calls.count("close") == 1 and calls[-1] == "close"
        assert calls.count("forward") == 1 + calls.count("logits") > 1 + alone.TOKENS  # one has failed
        assert follower["left"] == 1  # the one that the leader had, too


@pytest.mark.parametrize("model", FUSED)
def test_the_fused_decoder_on_two_ranks(alone: Any, ranks: Any, model: str) -> None:
    """Interpreted: logits, also with an adapter, and drawn tokens. Operands are rounded to bfloat16, as on one GPU."""
    pytest.importorskip("triton", reason="needs Triton, which there is for Linux on x86-64")
    spec, schemes = FUSED[model]
    first, second = (rank[model] for rank in ranks(2, FUSED, "fused"))
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values, name)
    decoder = tiny.tiny_decoder(spec, tiny.tiny_weights(spec, schemes))
    for name, adapter in (("a", None), ("b", tiny.tiny_adapter(spec))):
        expected = tiny.whole(decoder, tiny.TEXTS[name][: len(first[name])], adapter=adapter)
        off = np.linalg.norm(first[name] - expected) / np.linalg.norm(expected)
        assert off <= 5e-2, f"{name}: off by {off:.2e} in relative norm"
    assert len(first["answer"]) == 2


@pytest.mark.parametrize("world", [2, 3, 5, 8, 16])
def test_parts_are_the_whole(world: int) -> None:
    """Every row, column and token is somebody's, in order; only keys and values may be several ranks'."""
    weights = tiny.tiny_weights(ODD, ("q6_k", "f16", "q4_k"))
    splits = [Split.of(ODD, weights, rank, world) for rank in range(world)]
    for ranges, end in (
        ([split.heads for split in splits], 16),
        ([split.inner for split in splits], 768),
        (splits[0].vocabulary, 259),
    ):
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == end and all(start < stop for start, stop in ranges)
    for split in splits:
        group = ODD.num_heads // ODD.num_kv_heads
        assert split.kv_heads[0] * group <= split.heads[0] and split.heads[1] <= split.kv_heads[1] * group
    for name in ("layers.0.attn.o", "layers.1.mlp.down"):
        pieces = []
        for split in splits:
            part = ShardedWeights(weights, split)[name]
            before, after = (part.before, part.after) if isinstance(part, Shard) else (0, 0)
            pieces.append(part.dequantize()[:, before : part.columns - after])
        np.testing.assert_array_equal(np.concatenate(pieces, 1), weights[name].dequantize())
    logits = [ShardedWeights(weights, split)["lm_head"].dequantize() for split in splits]
    np.testing.assert_array_equal(np.concatenate(logits), weights["lm_head"].dequantize())


def test_a_70b_model_splits_evenly() -> None:
    """Llama 3.1 70B over 8 GPUs: one key/value head each, no block is cut, and an eighth of every layer."""
    spec = tiny.tiny_spec(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=1, num_heads=64, num_kv_heads=8,
        head_dim=128,
    )  # fmt: skip
    weights = {}
    for name, source in llama_tensor_names(spec).items():  # no memory is touched
        row = source.shape[-1] // 256 * 144
        shape = (1, 4 * source.shape[0]) if len(source.shape) == 1 else (source.shape[0], row)
        weights[name] = QuantTensor("f32" if shape[0] == 1 else "q4_k", source.shape, np.empty(shape, np.uint8))
    for rank in range(8):
        split = Split.of(spec, weights, rank, 8)
        assert (split.spec.num_heads, split.spec.num_kv_heads, split.spec.intermediate_size) == (8, 1, 3584)
        parts = ShardedWeights(weights, split)
        for name, tensor in parts.items():
            whole = name == "embed" or name.endswith("norm")
            assert tensor.nbytes * (1 if whole else 8) == weights[name].nbytes, name
            assert not isinstance(tensor, Shard) or name == "lm_head"


def test_processes_have_to_be_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="the environment has no RANK"):
        join(torch.device("cuda:0"))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="one model a process"):
        join(torch.device("cuda:0"))
    with pytest.raises(ConfigError, match="every process takes a GPU of its own"):
        CudaKernels(DecoderOptions(device="cuda:1", plugin=CudaSettings(tensor_parallel=True)))


def test_what_cannot_be_split_says_so() -> None:
    weights = tiny.tiny_weights(WIDE)
    with pytest.raises(ConfigError, match=r"4 query heads, .* cannot be split over 5 GPUs") as caught:
        Split.of(WIDE, weights, 0, 5)
    assert caught.value.hint == "use at most 4; divisors of 2 give every GPU the same work"
    with pytest.raises(ConfigError, match="rank 2 is not one of 2"):
        Split.of(WIDE, weights, 2, 2)
    split = Split.of(WIDE, weights, 1, 2)
    with pytest.raises(ModelError, match=r"layers.0.attn.q has shape \(256, 256\), the model needs \(512, 256\)"):
        ShardedWeights(weights, Split.of(replace(WIDE, num_heads=8), weights, 0, 2))["layers.0.attn.q"]
    wrong = LowRank(np.zeros((1, 256), np.float32), np.zeros((999, 1), np.float32))
    with pytest.raises(ValueError, match=r"adapter x, layers.0.mlp.up: .* are not of a weight of \(768, 256\)"):
        split.adapter(Adapter("x", {"layers.0.mlp.up": wrong}))
    with pytest.raises(KeyError):
        ShardedWeights(weights, split)["layers.9.attn.q"]
