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


def compare_texts(
    network: Network, deltas: Deltas | None, texts: Sequence[Sequence[int]]
) -> Iterator[list[tuple[FloatArray, FloatArray, FloatArray]] | None]:
    """Of each text: log-probabilities of all tokens but the first, those under the base model, and KL(adapted ‖ base).

    Nats, float32 ``[n - 1]`` each. Yields None between slices, and all of it at last.
    """
    tokens = padded(texts, network.device)
    hidden = []
    for one in (deltas, None):
        way = Pass(network, stack_of(network, one), tokens=tokens, keep=False)
        for _ in way.forward():
            yield None
        hidden.append(way.x)
    found = []
    for row, text in enumerate(texts):
        targets = tokens[row, 1 : len(text), None]
        with torch.no_grad():
            adapted, base = (torch.log_softmax(network.logits(x[row, : len(text) - 1]), -1) for x in hidden)
            kl = (adapted.exp() * (adapted - base)).sum(-1)
        parts = adapted.gather(1, targets)[:, 0], base.gather(1, targets)[:, 0], kl
        a, b, c = (part.float().cpu().numpy() for part in parts)
        found.append((a, b, c))
        yield None
    yield found


def stack_of(network: Network, deltas: Deltas | None) -> AdapterStack:
    """The deltas as one adapter for all rows; none changes nothing."""
    return AdapterStack.of([deltas], network.device) if deltas else AdapterStack({}, {})
