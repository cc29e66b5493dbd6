"""Tiny random models and what it takes to run them: no file, no download, made in milliseconds."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm_core import protocols as p
from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.generate import load, request, sequence
from ruvllm_core.generate.engine import Engine
from ruvllm_core.model import codec, loader, tokenizer
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_core.model.spec import ModelSpec, RopeScaling, llama_tensor_names
from ruvllm_core.settings import CacheConfig, Settings

Tokens = Sequence[int]
CONTEXT = 48
#: Token ids of three sequences, and the capacity each is opened with.
TEXTS = {name: np.random.default_rng(n).integers(0, 256, 18 + 6 * n).tolist() for n, name in enumerate("abc")}
CAPACITIES = {"a": 18, "b": 30, "c": CONTEXT}
#: Where a block of each scheme has its 16-bit floats (block layouts of the GGML library).
_FLOATS = {"f16": [0], "bf16": [0], "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0]}
_FLOATS |= {"q2_k": [80, 82], "q3_k": [108], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208]}


def tiny_spec(**changes: Any) -> ModelSpec:
    """A model of two layers over bytes; `changes` are fields of `ModelSpec`."""
    sizes = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "max_context": CONTEXT}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "norm_eps": 1e-5}
    return ModelSpec(**{"architecture": "tiny", **sizes, **heads, **changes})


_LONG = RopeScaling("longrope", 2.0, 24, short_factors=(1.0,) * 8, long_factors=tuple(1.5 + i for i in range(8)))
#: Everything in which families differ.
FLAVOURS = {
    "plain": tiny_spec(),
    "biases": tiny_spec(qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    "tied, 7 queries a key": tiny_spec(tied_embeddings=True, num_heads=7, num_kv_heads=1, head_dim=24),
    "window in one layer": tiny_spec(sliding_window=5, sliding_layers=(True, False)),
    "interleaved partial rope": tiny_spec(rope_interleaved=True, rope_dim=8, num_heads=6, head_dim=80),
    "longrope": tiny_spec(rope_scaling=_LONG),
    "softcaps and gelu": tiny_spec(attention_softcap=4.0, logit_softcap=3.0, activation="gelu_tanh"),
}


def tiny_weights(spec: ModelSpec, schemes: Iterable[str] = ("f32",)) -> dict[str, QuantTensor]:
    """Random weights by canonical name, the matrices taking turns through `schemes`.

    They are larger than trained ones, so that attention is sharp and a wrong position shows.
    """
    rng, turns, weights = np.random.default_rng(0), itertools.cycle(schemes), {}
    for name, source in llama_tensor_names(spec).items():
        shape, size = source.shape, 2.0 * source.shape[-1] ** -0.5
        values = rng.normal(0.0, size, shape) if len(shape) == 2 else rng.normal(1.0, 0.2, shape)
        weights[name] = QuantTensor.from_float(values.astype(np.float32))
        if len(shape) == 1 or (scheme := SCHEMES[next(turns)]).name == "f32":
            continue
        data = rng.integers(0, 256, (shape[0], scheme.row_bytes(shape[1])), dtype=np.uint8)
        weights[name], blocks = QuantTensor(scheme.name, shape, data), data.reshape(-1, scheme.block_bytes)
        floats = rng.uniform(-1.0, 1.0, (len(blocks), 1)).astype(np.float32)
        for _ in range(2):  # the first time to see how large the values get
            short = floats.view(np.uint16)[:, 1:] if scheme.name == "bf16" else floats.astype(np.float16)
            for offset in _FLOATS[scheme.name]:
                blocks[:, offset : offset + 2] = np.ascontiguousarray(short).view(np.uint8)
            floats *= size / weights[name].dequantize().std()
    return weights


def tiny_adapter(spec: ModelSpec) -> p.Adapter:
    """A random adapter of rank 2 at every site there is."""
    rng, shapes = np.random.default_rng(5), {"final": (spec.hidden_size, spec.hidden_size)}
    shapes |= {name: s.shape for name, s in llama_tensor_names(spec).items() if len(s.shape) == 2 and "layers" in name}
    ab = {name: rng.normal(0.0, 0.2, (2, sum(shape))).astype(np.float32) for name, shape in shapes.items()}
    sites = {name: p.LowRank(x[:, shapes[name][0] :], x[:, : shapes[name][0]].T) for name, x in ab.items()}
    return p.Adapter("tiny", sites)


def tiny_decoder(spec: ModelSpec, weights: p.Weights | None = None) -> p.Decoder:
    """The eager decoder over the reference operations, in float32 on the CPU."""
    from ruvllm_core.decode import decoder, reference

    options = p.DecoderOptions(dtype="float32", device="cpu", max_context=spec.max_context)
    return decoder.EagerDecoder(spec, weights or tiny_weights(spec), reference.TorchKernels(options), options)


def cache_context(decoder: p.Decoder, max_sequences: int = 4) -> p.CacheContext:
    return p.CacheContext(decoder.spec, decoder, CacheConfig(), decoder.spec.max_context, max_sequences)


def tiny_request(prompt: Tokens, capacity: int = CONTEXT, **fields: Any) -> request.Request:
    """A greedy request; `fields` are those of `Request` and of `GenerateParams`."""
    own = {name: fields.pop(name) for name in list(fields) if name in request.Request.__dataclass_fields__}
    params = request.GenerateParams(**{"temperature": 0.0, "max_tokens": 8, **fields})
    own = {"id": request.new_request_id(), "stop_ids": frozenset(), **own}
    return request.Request(prompt_ids=tuple(prompt), params=params, capacity=capacity, **own)


def tiny_engine(make_backend: Callable[[p.BackendContext], p.Backend], decoder: p.Decoder) -> Engine:
    """An engine over a decoder of a tiny model; its tokens are bytes, and 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fast = Tokenizer(models.BPE(vocab=codec.BYTE_OF_CHAR, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    text = tokenizer.Tokenizer(codec.FastCodec(fast, "tiny"), name="tiny", eos=256)
    context = p.BackendContext(decoder.spec, decoder, lambda n: ContiguousCache(cache_context(decoder, n)), 8)
    info = load.EngineInfo("tiny", Path(), "tiny", "f32", "tiny", "torch", "cpu", "contiguous", CONTEXT, (), 0.0)
    model = loader.ModelFile(Path(), decoder.spec, {}, {}, 0)
    return Engine(load.Parts(info, model, text, decoder, context.cache, make_backend(context), ()), Settings())


class Feeder:
    """Feeds tokens of several sequences through a decoder and a cache policy, as a backend would."""

    def __init__(self, decoder: p.Decoder, cache: p.KVCachePolicy | None = None) -> None:
        self.decoder, self.cache = decoder, cache or ContiguousCache(cache_context(decoder))
        self.running: dict[str, sequence.Sequence] = {}

    def open(self, name: str, tokens: Tokens, capacity: int = CONTEXT, **fields: Any) -> None:
        """Start a sequence, with a cache key of its own unless `fields` say otherwise."""
        asked = tiny_request(tokens, capacity, id=name, **{"cache_key": request.new_request_id(), **fields})
        self.running[name] = sequence.Sequence(asked, self.cache, self.decoder.spec)

    def feed(self, **counts: int) -> dict[str, p.FloatArray]:
        """Logits ``[count, V]`` after each of the next `count` tokens of each sequence, all in one batch."""
        for name, count in counts.items():
            self.cache.extend(name, count)
        work = [(self.running[name], count) for name, count in counts.items()]
        hidden, batch = sequence.advance(self.decoder, self.cache, work, every=True)
        logits = self.decoder.logits(hidden, batch)
        return dict(zip(counts, np.split(logits, batch.cu_q[1:-1]), strict=True))

    def ragged(self, **adapters: p.Adapter) -> dict[str, p.FloatArray]:
        """Logits after each token of `TEXTS`, computed in mixed batches of prompt pieces and single tokens."""
        for name, tokens in TEXTS.items():
            self.open(name, tokens, CAPACITIES[name], adapter=adapters.get(name))
        rounds = ({"a": 1, "b": 13}, {"a": 9, "b": 1, "c": 21}, {"a": 1, "c": 1}, {"a": 7, "b": 10, "c": 8})
        found = [self.feed(**counts) for counts in rounds]
        return {name: np.concatenate([logits[name] for logits in found if name in logits]) for name in TEXTS}


def whole(decoder: p.Decoder, tokens: Tokens, capacity: int = CONTEXT, adapter: p.Adapter | None = None) -> Any:
    """Logits after each of `tokens`, float32 ``[n, V]``, computed at once and alone."""
    feeder = Feeder(decoder)
    feeder.open("alone", tokens, capacity, adapter=adapter)
    return feeder.feed(alone=len(tokens))["alone"]


def assert_close(got: Any, expected: Any, tolerance: float, what: str, outliers: float = 0.0) -> None:
    """No element further off than `tolerance` times the largest expected one, but in this share of the rows; no NaN."""
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    off = abs(got - expected)
    if outliers and np.isfinite(off).all():
        rows = off.reshape(len(off), -1).max(-1)
        off = np.sort(rows)[: len(rows) - int(outliers * len(rows))]
    off = float(off.max() / abs(expected).max())
    assert off <= tolerance, f"{what}: off by {off:.1e} of the largest value, allowed is {tolerance:.1e}"
