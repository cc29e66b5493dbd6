"""The whole-model decoder against core's in float32; without a GPU everything but the capturing of graphs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux on x86-64")

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.errors import ConfigError, GenerationError, ModelError
from ruvllm_core.generate.sampler import Sampler
from ruvllm_core.generate.sequence import Sequence, make_batch
from ruvllm_core.protocols import Adapter, CacheContext, DecoderOptions, FusedDecoder, LowRank
from ruvllm_core.settings import CacheConfig
from ruvllm_core.testing import tiny
from ruvllm_core.testing.kernels import ScatteredCache
from ruvllm_kernels_cuda.adapters import AdapterPools
from ruvllm_kernels_cuda.decoder import CudaDecoder
from ruvllm_kernels_cuda.graphs import bucket_of
from ruvllm_kernels_cuda.scratch import Scratch
from ruvllm_kv_cache.paged import PagedCache
from ruvllm_kv_cache.settings import CacheSettings
from ruvllm_kv_cache.two_tier import TwoTierCache

TOLERANCE = 3e-2  # in relative norm: all operands are bfloat16, and attention of these models is sharp
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter takes too long")
QUICK = ("biases", "tied, 7 queries a key")
MODELS = [pytest.param(name, marks=() if name in QUICK else on_gpu) for name in tiny.FLAVOURS]
WIDE = tiny.tiny_spec(hidden_size=256, intermediate_size=256, head_dim=64, qkv_bias=True, max_context=112)


def build(device, spec, schemes=("bf16",), dtype="float32"):
    """A decoder with little scratch memory, and core's over the same weights."""
    weights, options = tiny.tiny_weights(spec, schemes), DecoderOptions(dtype=dtype, max_context=spec.max_context)
    scratch = Scratch.on(device, partial=1 << 16, arrived=1 << 10, dense=1 << 14)
    return CudaDecoder(spec, weights, options, torch.device(device), scratch=scratch), tiny.tiny_decoder(spec, weights)


@pytest.fixture(scope="module")
def pair(device):
    return build(device, tiny.FLAVOURS["plain"])


def check(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape and found.dtype == np.float32
    off = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert off <= tolerance, f"off by {off:.2e} in relative norm"
    best = np.argsort(expected, -1)
    first, second = (np.take_along_axis(expected, best[:, [n]], -1) for n in (-1, -2))
    sure = (first - second)[:, 0] > 4 * tolerance * expected.std()
    assert (found.argmax(-1) == best[:, -1])[sure].all()
    return sure.sum()  # positions where the likeliest token is not in doubt


@pytest.mark.parametrize("name", MODELS)
def test_mixed_batches_of_every_kind_of_model(device, name):
    """Pieces of prompts and single tokens, scattered over two segments, with and without an adapter at every site."""
    decoder, reference = build(device, tiny.FLAVOURS[name])
    adapters = {"b": tiny.tiny_adapter(decoder.spec)}
    pieces = tiny.Feeder(decoder, ScatteredCache(tiny.cache_context(decoder))).ragged(**adapters)
    sure = 0
    for text, tokens in tiny.TEXTS.items():
        sure += check(pieces[text], tiny.whole(reference, tokens, tiny.CAPACITIES[text], adapters.get(text)))
    assert sure  # in a text, not in each: a softcap brings the likeliest ones close together
    assert isinstance(decoder, FusedDecoder)
    decoder.close()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=on_gpu)])
@pytest.mark.parametrize(
    "policy", [*(pytest.param(name, marks=on_gpu) for name in ("contiguous", "paged")), "two_tier"]
)
def test_policies(device, policy, dtype):
    """A prompt, then single tokens, through each cache policy; tokens are coded in steps that are graphs."""
    decoder, reference = build(device, WIDE, ("q4_k", "q6_k", "f16", "q8_0"), dtype)
    options = CacheSettings(
        block_size=16, tail_length=20, sink_tokens=3, migration_batch=16, store_precision="q8", tail_precision="f32"
    )
    made = {"contiguous": ContiguousCache, "paged": PagedCache, "two_tier": TwoTierCache}[policy]
    if dtype == "bfloat16" and policy == "two_tier":
        options = options.model_copy(update={"tail_precision": "bf16", "store_precision": "q4"})
    tokens, found = np.random.default_rng(3).integers(0, 256, 64).tolist(), []
    for one in (decoder, reference):
        context = CacheContext(one.spec, one, CacheConfig(), 112, 2, 64, options)
        feeder = tiny.Feeder(one, made(context))
        feeder.open("a", tokens, 100)
        feeder.open("b", tokens[20:], 100)
        logits = [feeder.feed(a=53, b=2), *(feeder.feed(a=1, b=1) for _ in range(2))]
        found.append(np.concatenate([np.concatenate([some["a"], some["b"]]) for some in logits]))
    assert check(*found)
    assert len(decoder.graphs) == {"contiguous": 1, "paged": 1, "two_tier": 2}[policy]


def test_storage(device, pair):
    decoder, _ = pair
    storage = decoder.allocate_kv(3, 5, "fp8")
    assert storage.nbytes == 2 * 2 * 3 * 2 * 5 * 16 and storage.keys[1].shape == (3, 2, 5, 16)
    assert decoder.kv_schemes == ("f32", "f16", "bf16", "q8", "q4")
    coded = decoder.allocate_kv(2, 16, "q4")
    assert coded.nbytes == 2 * 2 * 2 * (2 * 16 * (16 // 2 + 2) + 16 + 2)
    with pytest.raises(ConfigError, match="kernels cuda have f32"):
        decoder.allocate_kv(1, 1, "q2_k")


class Run:
    """Sequences of a decoder, of which each step draws the next token."""

    def __init__(self, decoder, *requests):
        self.decoder, self.cache = decoder, ContiguousCache(tiny.cache_context(decoder, 8))
        self.sequences = [Sequence(request, self.cache, decoder.spec) for request in requests]
        self.requests = requests
        self.batch(*(len(request.prompt_ids) - 1 for request in requests))

    def batch(self, *counts):
        """Compute some tokens of each sequence."""
        counts = counts or (1,) * len(self.sequences)
        work = [(s, n) for s, n in zip(self.sequences, counts, strict=True) if n]
        for sequence, count in work:
            self.cache.extend(sequence.request.id, count)
        batch = make_batch(self.cache, work)
        for sequence, count in work:
            self.cache.commit(sequence.request.id)
            sequence.computed += count
        if counts != (1,) * len(self.sequences):
            self.decoder.forward(batch)
        return batch

    def step(self):
        tokens = self.decoder.step(self.batch(), self.requests)
        for sequence, token in zip(self.sequences, tokens.tolist(), strict=True):
            sequence.token_ids.append(token)
        return tokens


PARAMS = (
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.5, "top_k": 20, "seed": 5},
    {"temperature": 1.1, "top_p": 0.7, "min_p": 0.02, "seed": 6},
    {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {7: 2.0}, "seed": 7},
)


def test_steps_draw_what_the_host_would(pair):
    """Greedy, sampled, and with penalties, in one batch; each request draws its own random numbers."""
    decoder, _ = pair
    requests = [tiny.tiny_request(tiny.TEXTS["c"][n : n + 4], **params) for n, params in enumerate(PARAMS)]
    run = Run(decoder, *requests)
    samplers = [Sampler(one.params, one.prompt_ids, decoder.spec.vocab_size) for one in requests]
    for _ in range(3):
        batch = run.batch()
        logits = decoder.logits(decoder.forward(batch), batch)
        expected = [sampler.sample(row).token for sampler, row in zip(samplers, logits, strict=True)]
        found = decoder.step(batch, requests)  # writes the same keys and values once more
        assert found.dtype == np.int64 and found.tolist() == expected
        for sequence, token in zip(run.sequences, expected, strict=True):
            sequence.token_ids.append(token)
    with pytest.raises(ValueError, match="1 requests for the 5 rows"):
        decoder.step(batch, requests[:1])


def test_steps_that_follow_each_other_on_the_device(pair):
    """The same tokens as one by one; the graph's buffers are filled again by the next call."""
    decoder, _ = pair
    for seed in (1, 2):
        asked = [{"temperature": 1.0, "seed": seed}, {}, {"temperature": 0.7, "top_p": 0.8, "seed": seed + 7}]
        runs = []
        for _ in range(2):
            requests = [tiny.tiny_request(tiny.TEXTS["c"][n : n + 3 + n], **how) for n, how in enumerate(asked)]
            runs.append(Run(decoder, *requests))
        one_by_one = np.stack([runs[0].step() for _ in range(3)])
        found = decoder.decode(runs[1].batch(), 3, runs[1].requests)
        assert found.tolist() == one_by_one.tolist()
    with pytest.raises(ValueError, match="beyond the 48 tokens"):
        decoder.decode(runs[0].batch(), 60)


def test_graphs_are_used_again(pair):
    """By batches of the same bucket; others, new storage and wider block tables get their own."""
    decoder, reference = pair
    requests = [tiny.tiny_request(tiny.TEXTS["c"][n : n + 3]) for n in range(5)]
    sizes = []
    runs = [Run(decoder, *requests[:4])]
    for _ in range(2):
        runs[0].step()
        sizes.append(len(decoder.graphs))
    smaller = runs[0]
    smaller.sequences, smaller.requests = smaller.sequences[1:], smaller.requests[1:]
    tokens = smaller.step()  # three sequences in the buffers of four: the fourth is of the last step
    sizes.append(len(decoder.graphs))
    assert sizes == [1, 1, 1]
    for sequence, token in zip(smaller.sequences, tokens.tolist(), strict=True):
        logits = tiny.whole(reference, sequence.token_ids[:-1])[-1]
        assert logits[token] > logits.max() - 0.1 * logits.std()
    before = decoder.graphs
    decoder.allocate_kv(1, 4, "f32")
    assert len(before) == 0
    assert [bucket_of(n) for n in (1, 3, 4, 200, 257)] == [1, 4, 4, 256, None]


def final_adapter(spec, seed, rank=1):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 0.5, (2, 4, spec.hidden_size)).astype(np.float32)[:, :rank]
    return Adapter(f"v{seed}", {"final": LowRank(a, np.ascontiguousarray(b.T), 0.7)})


def test_a_new_adapter_is_seen_by_the_next_token_in_the_same_graph(pair):
    decoder, reference = pair
    spec, prompt = decoder.spec, tiny.TEXTS["b"][:4]
    seen, graphs, run, sure = [], set(), None, 0
    for seed in range(6):  # more than there are slots
        adapter = final_adapter(spec, seed)
        both = tiny.tiny_request(prompt, adapter=adapter), tiny.tiny_request(prompt)
        run = run or Run(decoder, *both)
        run.sequences[0].request = both[0]
        run.cache._held = {r.id: h for r, h in zip(both, run.cache._held.values(), strict=True)}
        run.sequences[1].request, run.requests = both[1], both
        if seed:
            for sequence in run.sequences:  # the same token once more
                run.cache.truncate(sequence.request.id, len(prompt) - 1)
                sequence.computed -= 1
        batch = run.batch()
        tokens = decoder.step(batch, both)
        graphs.add((len(decoder.graphs), decoder._adapters.generation))
        hidden = decoder.forward(batch)
        expected = SimpleNamespace(rows=batch.rows, cu_q=batch.cu_q, adapters=(adapter, None))
        logits = reference.logits(hidden, expected)
        sure += check(decoder.logits(hidden, batch), logits)
        assert all(row[token] > row.max() - 0.1 * row.std() for row, token in zip(logits, tokens, strict=True))
        seen.append(int(tokens[0]))
    assert len(set(seen)) > 1 and len({generation for _, generation in graphs}) == 1
    assert sure and max(count for count, _ in graphs) == 2  # of states, and of tokens


def test_pools_of_adapters(device):
    spec = tiny.tiny_spec()
    pools = AdapterPools(spec, torch.device(device))
    some = [final_adapter(spec, n) for n in range(9)]
    assert pools.slots_of((some[0], None, some[1], some[0])) == [0, -1, 1, 0]
    generation = pools.generation
    assert pools.slots_of(some[2:4]) == [2, 3] and pools.slots_of([some[0]]) == [0]
    assert pools.slots_of([some[4]]) == [1] and pools.slots_of([some[0]]) == [0]  # the least recently used went
    assert pools.generation == generation
    assert sorted(pools.slots_of(some)) == list(range(9)) and pools.generation == generation + 1
    pools.slots_of([final_adapter(spec, 20, rank=3)])
    assert pools.generation == generation + 2
    with pytest.raises(ValueError, match=r"has no site layers\.9"):
        pools.slots_of([Adapter("x", {"layers.9.attn.q": some[0].sites["final"]})])
    with pytest.raises(ValueError, match=r"must be \[r, 64\] and \[96, r\]"):
        pools.slots_of([Adapter("x", {"layers.0.mlp.up": some[0].sites["final"]})])


def test_what_cannot_be_done_says_so(device):
    spec = tiny.tiny_spec()
    decoder, reference = build(device, spec)
    run = Run(reference, tiny.tiny_request([1, 2, 3]))
    with pytest.raises(GenerationError, match="another decoder"):
        decoder.forward(run.batch())
    with pytest.raises(ValueError, match="must be \\[rows, 64\\]"):
        decoder.logits(np.zeros((1, 3), np.float32))
    decoder.close()
    with pytest.raises(GenerationError, match="closed"):
        decoder.logits(np.zeros((1, 64), np.float32))
    weights = tiny.tiny_weights(spec)
    options = DecoderOptions(max_context=8)
    with pytest.raises(ModelError, match=r"layers.1.attn.q is missing"):
        CudaDecoder(spec, {k: w for k, w in weights.items() if k != "layers.1.attn.q"}, options, torch.device(device))
