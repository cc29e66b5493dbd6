"""How likely texts are to the network, with and without adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ruvllm_core.protocols import FloatArray
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.network import Network, padded
from ruvllm_sona.sites import Deltas
from ruvllm_sona.update import Pass


def answer_logprobs(
    network: Network, deltas: Deltas | None, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> Iterator[FloatArray | None]:
    """Natural log-probability of every answer token, float32 ``[n]``; yields None between slices, and that at last."""
    tokens = padded([[*prompt_ids, *output_ids]], network.device)
    way = Pass(network, stack_of(network, deltas), tokens=tokens, keep=False)
    for _ in way.forward():
        yield None
    with torch.no_grad():
        logp = torch.log_softmax(network.logits(way.x[0, len(prompt_ids) - 1 : -1]), -1)
        found = logp.gather(1, tokens[0, len(prompt_ids) :, None])[:, 0]
    yield found.float().cpu().numpy()


def stack_of(network: Network, deltas: Deltas | None) -> AdapterStack:
    """The deltas as one adapter for all rows; none changes nothing."""
    return AdapterStack.of([deltas], network.device) if deltas else AdapterStack({}, {})
