"""One rank of several: computes what `jobs.pickle` in a folder asks for. Arguments: the folder, rank, number of ranks.

Results go to `RANK.npz`. Ranks meet through a file, in Gloo; a peer that is gone ends the others.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import weakref
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ruvllm_core.decode.reference import TorchKernels
from ruvllm_core.errors import GenerationError, OutOfMemoryError
from ruvllm_core.generate.sampler import Sampler
from ruvllm_core.generate.sequence import advance
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Adapter, Decoder, DecoderOptions, LowRank
from ruvllm_core.testing import tiny
from ruvllm_core.testing.kernels import ScatteredCache
from ruvllm_kv_cache.settings import CacheSettings
from ruvllm_kv_cache.two_tier import TwoTierCache

SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
TOKENS = 12  # generated in each answer
FULL = 7  # a block size for which followers have no memory


class Job(NamedTuple):
    """A model and how it is run: ``eager`` or ``led``, texts in mixed batches, or ``fused``, a few interpreted steps.

    Of a job that is led only rank 0 knows the requests; others report what has been asked of them.
    """

    name: str
    spec: ModelSpec
    schemes: tuple[str, ...]
    how: str


def texts(decoder: Decoder, spec: ModelSpec, how: str) -> dict[str, Any]:
    """Logits after each token of three texts, one of them with an adapter at every site, and an answer's tokens."""
    context = tiny.cache_context(decoder)
    if how == "led":  # which must not touch storage itself, as the other cache does
        own = CacheSettings(
            tail_length=4, sink_tokens=2, migration_batch=16, store_precision="q8", tail_precision="f32"
        )
        cache: Any = TwoTierCache(replace(context, options=own))
    else:
        cache = ScatteredCache(context)
    feeder = tiny.Feeder(decoder, cache)
    found: dict[str, Any] = dict(feeder.ragged(b=tiny.tiny_adapter(spec)))
    feeder, prompt = tiny.Feeder(decoder), tiny.TEXTS["a"][:5]
    feeder.open("answer", prompt)
    sampler = Sampler(tiny.tiny_request(prompt, **SAMPLED).params, prompt, spec.vocab_size)
    logits, tokens = feeder.feed(answer=len(prompt)), []
    for _ in range(TOKENS):
        tokens.append(sampler.sample(logits["answer"][-1]).token)
        feeder.running["answer"].token_ids.append(tokens[-1])
        logits = feeder.feed(answer=1)
    return found | {"answer": np.array(tokens)}


def few_steps(decoder: Any, spec: ModelSpec) -> dict[str, Any]:
    """Logits after each token of two prompts, one of them with an adapter, and tokens that the decoder draws itself."""
    feeder = tiny.Feeder(decoder)
    feeder.open("a", tiny.TEXTS["a"])
    feeder.open("b", tiny.TEXTS["b"], adapter=tiny.tiny_adapter(spec))
    pieces = [feeder.feed(a=4, b=2), feeder.feed(a=1, b=1)]
    found = {name: np.concatenate([piece[name] for piece in pieces]) for name in "ab"}
    feeder.open("c", tiny.TEXTS["c"][:1], **SAMPLED)
    sequence, tokens = feeder.running["c"], []
    for _ in range(2):
        feeder.cache.extend("c", 1)
        _, batch = advance(decoder, feeder.cache, [(sequence, 1)])
        tokens += decoder.step(batch, [sequence.request]).tolist()
        sequence.token_ids.append(tokens[-1])
    return found | {"answer": np.array(tokens)}


class Watched:
    """A follower's decoder: what it is asked for, and how many caches are left in the end."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.calls, self.storages, self.left = decoder, list[str](), list[Any](), -1

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self.decoder, name)

    def allocate_kv(self, *how: Any) -> Any:
        if how[1] == FULL:
            raise OutOfMemoryError("full")
        self.storages.append(weakref.ref(made := self.decoder.allocate_kv(*how)))
        return made

    def close(self) -> None:
        self.calls.append("close")
        self.left = sum(one() is not None for one in self.storages)
        self.decoder.close()


def errors(leader: Any) -> dict[str, Any]:
    """What is said where another rank has no memory, and of an adapter that does not fit; all go on afterwards."""
    factors = LowRank(np.zeros((1, 3), np.float32), np.zeros((3, 1), np.float32))
    feeder, messages = tiny.Feeder(leader), []
    feeder.open("wrong", [1, 2], adapter=Adapter("wrong", {"layers.0.attn.o": factors}))
    for call in (lambda: leader.allocate_kv(1, FULL, "f32"), lambda: feeder.feed(wrong=2)):
        try:
            call()
        except (OutOfMemoryError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return {"errors": np.array(messages)}


def ended(leader: Any) -> dict[str, Any]:
    """What a closed decoder says."""
    gc.collect()  # the caches of before
    kept = leader.allocate_kv(1, 4, "f32")
    leader.close()
    leader.close()
    del kept
    with pytest.raises(GenerationError) as caught:
        leader.allocate_kv(1, 4, "f32")
    return {"closed": np.array(str(caught.value))}


def run(job: Job, group: Any) -> dict[str, Any]:
    """As one rank of `group`, or alone if that is None."""
    weights = tiny.tiny_weights(job.spec, job.schemes)
    options = DecoderOptions(dtype="float32", device="cpu", max_context=job.spec.max_context)
    if job.how != "fused":
        if group is None:
            return texts(tiny.tiny_decoder(job.spec, weights), job.spec, job.how)
        from ruvllm_kernels_cuda.lockstep import Leader, follow
        from ruvllm_kernels_cuda.parallel import ParallelEagerDecoder

        decoder: Any = ParallelEagerDecoder(job.spec, weights, TorchKernels(options), options, group)
        if job.how == "eager":
            return texts(decoder, job.spec, job.how)
        if dist.get_rank(group):
            decoder = Watched(decoder)
            follow(decoder, group)
            return {"calls": np.array(decoder.calls), "left": np.array(decoder.left)}
        leader = Leader(decoder, group)
        return errors(leader) | texts(leader, job.spec, job.how) | ended(leader)
    from ruvllm_kernels_cuda.decoder import CudaDecoder
    from ruvllm_kernels_cuda.scratch import Scratch

    scratch = Scratch.on("cpu", partial=1 << 16, arrived=1 << 10, dense=1 << 14)
    fused = CudaDecoder(job.spec, weights, options, torch.device("cpu"), scratch=scratch, group=group)
    return few_steps(fused, job.spec)


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    jobs: list[Job] = [Job(*fields) for fields in pickle.loads((folder / "jobs.pickle").read_bytes())]
    found = {f"{job.name}|{key}": x for job in jobs for key, x in run(job, dist.group.WORLD).items()}
    np.savez(folder / f"{rank}.npz", **found)
    dist.barrier()
    os._exit(0)  # under load Gloo's threads now and then abort a process that ends while others close their connections


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
