"""One rank of several: computes what `jobs.pickle` in a folder asks for. Arguments: the folder, rank, number of ranks.

Results go to `RANK.npz`. Ranks meet through a file, in Gloo; a peer that is gone ends the others.
"""

from __future__ import annotations

import pickle
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ruvllm_core.decode.reference import TorchKernels
from ruvllm_core.generate.sampler import Sampler
from ruvllm_core.generate.sequence import advance
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Decoder, DecoderOptions
from ruvllm_core.testing import tiny
from ruvllm_core.testing.kernels import ScatteredCache

SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
TOKENS = 12  # generated in each answer


class Job(NamedTuple):
    """A model and what to do with it: whole texts in mixed batches, or a few steps that are interpreted."""

    name: str
    spec: ModelSpec
    schemes: tuple[str, ...]
    fused: bool = False


def texts(decoder: Decoder, spec: ModelSpec) -> dict[str, Any]:
    """Logits after each token of three texts, one of them with an adapter at every site, and an answer's tokens."""
    feeder = tiny.Feeder(decoder, ScatteredCache(tiny.cache_context(decoder)))
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


def run(job: Job, group: Any) -> dict[str, Any]:
    """As one rank of `group`, or alone if that is None."""
    weights = tiny.tiny_weights(job.spec, job.schemes)
    options = DecoderOptions(dtype="float32", device="cpu", max_context=job.spec.max_context)
    if not job.fused:
        if group is None:
            return texts(tiny.tiny_decoder(job.spec, weights), job.spec)
        from ruvllm_kernels_cuda.parallel import ParallelEagerDecoder

        return texts(ParallelEagerDecoder(job.spec, weights, TorchKernels(options), options, group), job.spec)
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
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
