"""Fixtures for the tests of model families: tiny random models of transformers as the oracle of our own logits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import ruvllm_candle_like.hooks
import ruvllm_mistral.hooks
from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.decode.decoder import EagerDecoder
from ruvllm_core.decode.reference import TorchKernels
from ruvllm_core.model.loader import ModelFile, open_model
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import CacheContext, DecoderOptions
from ruvllm_core.registry import Registry
from ruvllm_core.settings import CacheConfig, Settings
from ruvllm_quantizers.gguf_writer import PendingTensor, write_gguf

# Without a GPU the kernels written in Triton are interpreted. Triton wants to know before it is imported, which many
# other packages do as well.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

#: Both sides compute in float32 but add up in another order.
TOLERANCE = 1e-4


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    # Weights far larger than usual, so that attention is sharp and a wrong position or window shows.
    "initializer_range": 0.2,
}


def _registry() -> Registry:
    registry = Registry(Settings())
    registry.register(ruvllm_candle_like.hooks, "candle_like", "ruvllm-candle-like", "0.1.0")
    registry.register(ruvllm_mistral.hooks, "mistral", "ruvllm-mistral", "0.1.0")
    assert not registry.quarantined
    return registry


@pytest.fixture(scope="session")
def registry() -> Registry:
    """The families of our own plugins, whether or not they are installed."""
    return _registry()


@pytest.fixture(scope="session")
def open_file(registry: Registry) -> Callable[[Path], ModelFile]:
    return lambda path: open_model(path, registry)


@pytest.fixture(scope="session")
def our_logits() -> Callable[..., npt.NDArray[Any]]:
    """Logits of our eager decoder, see `run_eager`."""
    return run_eager


def run_eager(model: ModelFile, tokens: Sequence[int], chunks: Sequence[int], capacity: int) -> npt.NDArray[Any]:
    """Logits after every token, with the tokens fed in runs of `chunks`, the rest one by one."""
    options = DecoderOptions(dtype="float32", device="cpu", max_context=capacity)
    decoder = EagerDecoder(model.spec, model.weights, TorchKernels(options), options)
    cache = ContiguousCache(CacheContext(model.spec, decoder, CacheConfig(), capacity, 1))
    cache.open("s", tokens, capacity)
    variant = np.array([model.spec.rope_variant(capacity)], dtype=np.uint8)
    runs = [*chunks, *[1] * (len(tokens) - sum(chunks))]
    out, start = [], 0
    for run in runs:
        cache.extend("s", run)
        batch = Batch(
            tokens=np.array(tokens[start : start + run], dtype=np.int64),
            positions=np.arange(start, start + run, dtype=np.int64),
            cu_q=np.array([0, run], dtype=np.int32),
            rows=np.arange(run, dtype=np.int64),
            kv=cache.view(["s"]),
            rope_variants=variant,
        )
        out.append(decoder.logits(decoder.forward(batch)))
        cache.commit("s")
        start += run
    return np.concatenate(out)


class Oracle:
    """A tiny random model of transformers, on disk, and what it says."""

    def __init__(self, config: Any, folder: Path, registry: Registry) -> None:
        import transformers

        torch.manual_seed(7)
        self.config = config
        self.folder = folder
        self.registry = registry
        self.model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():  # biases and norms start as zeros and ones, which would hide mistakes
            for parameter in self.model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        self.model.save_pretrained(folder)
        self.tokens = np.random.default_rng(3).integers(3, config.vocab_size, 40).tolist()

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[Any]:
        with torch.inference_mode():
            return self.model(torch.tensor([list(tokens)])).logits[0].float().numpy()

    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        return {name: value.numpy() for name, value in self.model.state_dict().items()}

    def edit_config(self, **changes: Any) -> None:
        """Change the saved ``config.json``; a value of None deletes the field."""
        path = self.folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    def check(self, path: Path | None = None, *, length: int = 40, capacity: int | None = None) -> ModelFile:
        """Compare logits at every position, in one go, in chunks, and token by token."""
        model = open_model(path or self.folder, self.registry)
        tokens = self.tokens[:length]
        expected = self.logits(tokens)
        assert np.abs(expected).max() > 1.0, "an oracle that says nothing proves nothing"
        for chunks in ([length], [11, 1, 7], [5]):
            difference = np.abs(run_eager(model, tokens, chunks, capacity or length) - expected).max()
            assert difference <= TOLERANCE, f"chunks {chunks}: off by {difference}"
        return model

    def write_gguf(self, path: Path, metadata: dict[str, Any], tensors: dict[str, npt.NDArray[np.float32]]) -> Path:
        """A GGUF file of `tensors`, sizes and norm as llama.cpp's converter writes them."""
        config, arch = self.config, metadata["general.architecture"]
        fields = {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "vocab_size": config.vocab_size,
        }
        special = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0}
        write_gguf(
            path,
            {**{f"{arch}.{name}": value for name, value in fields.items()}, **special, **metadata},
            [PendingTensor.of(name, QuantTensor.from_float(value)) for name, value in tensors.items()],
        )
        return path

    def check_their_reading(self, path: Path) -> None:
        """That transformers reads a GGUF file of ours as the same model."""
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
        with torch.inference_mode():
            logits = theirs(torch.tensor([self.tokens])).logits[0].numpy()
        assert np.abs(logits - self.logits(self.tokens)).max() <= TOLERANCE

    def gguf_tensors(self, *, permute: bool) -> dict[str, npt.NDArray[np.float32]]:
        """The weights under their GGUF names; `permute` puts the pairs of the rotation side by side."""
        names = {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        tensors = {}
        for hf, value in self.state().items():
            if hf == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            stem, _, kind = hf.rpartition(".")
            prefix = ""
            if stem.startswith("model.layers."):
                layer, _, stem = stem.removeprefix("model.layers.").partition(".")
                prefix = f"blk.{layer}."
            if permute and stem in ("self_attn.q_proj", "self_attn.k_proj"):
                config = self.config
                heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
                halves = value.reshape(heads, 2, -1, *value.shape[1:])
                value = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
            tensors[f"{prefix}{names[stem]}.{kind}"] = value
        return tensors


@pytest.fixture
def check_names(registry: Registry) -> Callable[[Any, str], ModelSpec]:
    """Compares tensor names, shapes and the number of parameters with a transformers model that has no weights."""

    def check(config: Any, architecture: str) -> ModelSpec:
        import transformers

        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(config)
        expected = {name: tuple(value.shape) for name, value in theirs.named_parameters()}
        family = registry.load("architectures", architecture)
        assert type(theirs).__name__ in family.hf_names
        spec: ModelSpec = family.spec_from_hf(config.to_dict())
        rows: dict[str, int] = {}
        for source in family.tensor_names(spec).values():
            start, stop = source.hf_rows or (0, source.shape[0])
            assert stop - start == source.shape[0]
            assert start == rows.get(source.hf, 0), f"{source.hf}: rows leave a gap or overlap"
            rows[source.hf] = stop
            assert source.shape[1:] == expected[source.hf][1:]
        assert rows == {name: shape[0] for name, shape in expected.items()}
        assert spec.parameters == sum(parameter.numel() for parameter in theirs.parameters())
        return spec

    return check


@pytest.fixture
def oracle(tmp_path: Path, registry: Registry) -> Callable[[Any], Oracle]:
    """Makes a tiny random model from a transformers configuration and saves it in a folder of its own."""
    made = 0

    def make(config: Any) -> Oracle:
        nonlocal made
        made += 1
        return Oracle(config, tmp_path / f"model{made}", registry)

    return make


@pytest.fixture
def sizes() -> dict[str, Any]:
    """Sizes of a tiny model, as arguments of a transformers configuration."""
    return dict(SIZES)
