"""One whole-network update: a forward and a backward pass through frozen weights, then one step of Adam.

Everything is a generator that yields between slices, so that whoever runs it decides when to go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.network import Attend, Network, padded
from ruvllm_sona.objective import AnswerTokens, ObjectiveConfig, saturated
from ruvllm_sona.records import Example

#: Logits that are looked at in one slice, which must be short where answers are decoded and need not on other devices.
_PIECE, _LARGE_PIECE = 1 << 20, 1 << 30


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a backward pass found, one number for each of M answers.

    Attributes:
        kl: nats a token from the base model on these answers, before the step.
        moved: nats by which each answer is likelier than under the base model.
        weight: what its gradient was multiplied with.
    """

    kl: Tensor
    moved: Tensor
    weight: Tensor


class Pass:
    """A batch of texts on its way through the layers, forth and back.

    Args:
        network: the model.
        adapters: those of every row, or one for all.
        tokens: int64 ``[M, T]``.
        keep: remember what the way back needs.
        inputs: go back to the first layer's input, though nothing there is trained.
        ends: where texts end that are one row, after one another; empty if each has a row of its own.
    """

    def __init__(
        self,
        network: Network,
        adapters: AdapterStack,
        *,
        tokens: Tensor,
        keep: bool,
        inputs: bool = False,
        ends: Sequence[int] = (),
    ) -> None:
        self._network, self._adapters, self._keep, self._inputs = network, adapters, keep, inputs
        self._rope = network.rope(tokens.shape[1])
        self._attend: Attend = network.causal
        if ends:
            lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
            at = torch.cat([torch.arange(length, device=tokens.device) for length in lengths])
            self._rope, self._attend = network.rope(max(lengths), at[None]), network.apart(ends)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self.x = network.embed(tokens)

    def forward(self) -> Iterator[None]:
        """Every layer, then the last norm; afterwards `x` is the hidden states ``[M, T, C]``."""
        layers = self._network.spec.num_layers
        for n in range(layers + 1):
            with torch.set_grad_enabled(self._keep):
                x = self.x.detach().requires_grad_(self._keep and (n > 0 or self._inputs))
                y = (
                    self._network.norm(x, self._adapters)
                    if n == layers
                    else self._network.layer(n, x, self._rope, self._adapters, self._attend)
                )
            if self._keep:
                self._kept.append((x, y))
            self.x = y.detach()
            yield

    def backward(self, grad: Tensor) -> Iterator[None]:
        """From the gradient by the hidden states to those of the adapters, which are added to their ``grad``."""
        while self._kept:
            x, y = self._kept.pop()
            if y.requires_grad:
                y.backward(grad)  # type: ignore[no-untyped-call]
            if x.grad is None:
                break
            grad = x.grad
            yield


def gradients(
    network: Network,
    adapters: AdapterStack,
    examples: Sequence[Example],
    advantages: Sequence[float],
    config: ObjectiveConfig,
    reference: tuple[Network, AdapterStack] | None = None,
    texts: Sequence[Example] = (),
) -> Iterator[Outcome | None]:
    """Add the gradient of the loss (see `objective`) to the adapters' ``grad``; the last thing yielded is the outcome.

    With no examples, and no texts or no weight on them, nothing happens.

    Args:
        adapters: one for each of examples and texts, or one for all; the loss is a sum over them. With one for all they
            go through the network after one another in one row, so that no time is spent on padding.
        advantages: ``c`` of each example; 0 leaves only the leash.
        reference: what the leash is tied to, a model of the same vocabulary; None is the base model.
        texts: that nobody rated: of them there is only the leash, with its own weight, and nothing in the outcome.
    """
    device, both = network.device, [*examples, *(texts if config.text_leash else ())]
    if not both:
        return
    ids = [[*one.prompt_ids, *one.output_ids] for one in both]
    ends = np.cumsum([len(one) for one in ids]).tolist() if adapters.shared else []
    tokens = padded([[token for one in ids for token in one]] if ends else ids, device)
    starts = [0, *ends[:-1]] if ends else [0] * len(ids)
    lengths = torch.tensor([len(one.output_ids) for one in both], device=device)
    owner = torch.repeat_interleave(torch.arange(len(both), device=device), lengths)
    rows = torch.zeros_like(owner) if ends else owner
    begins = [start + len(one.prompt_ids) for start, one in zip(starts, both, strict=True)]
    places = torch.cat(
        [torch.arange(at, at + len(one.output_ids), device=device) for at, one in zip(begins, both, strict=True)]
    )
    targets, places = tokens[rows, places], places - 1
    way = Pass(network, adapters, tokens=tokens, keep=True, ends=ends)
    for _ in way.forward():
        yield None
    drawn_at = torch.tensor([one.temperature or 1.0 for one in both], device=device)
    piece_size = _PIECE if device.type == "cpu" else _LARGE_PIECE
    hidden, step = way.x[rows, places], max(piece_size // network.spec.vocab_size, 1)
    parts, pieces = [slice(at, at + step) for at in range(0, len(owner), step)], []
    for part in parts:
        pieces.append(AnswerTokens(network, hidden[part], targets[part], owner[part], drawn_at, lengths))
        yield None
    if config.saturation or config.leash or len(both) > len(examples):
        tied, stack = reference or (network, AdapterStack({}, {}))
        base = Pass(tied, stack, tokens=tokens, keep=False, ends=ends)
        for _ in base.forward():
            yield None
        hidden = base.x[rows, places]
        for part, piece in zip(parts, pieces, strict=True):
            with torch.no_grad():
                logits = tied.logits(hidden[part])
            yield None
            piece.compare(logits)
            del logits
            yield None
    kl, moved = sum(piece.kl for piece in pieces), sum(piece.moved for piece in pieces)
    assert isinstance(kl, Tensor) and isinstance(moved, Tensor)
    rated, extra = len(examples), len(both) - len(examples)
    c = torch.tensor([*advantages, *[0.0] * extra], device=device)
    leash = torch.tensor([config.leash] * rated + [config.text_leash] * extra, device=device)
    budget = torch.tensor([config.budget] * rated + [float("inf")] * extra, device=device)
    weight = saturated(c, moved, config.saturation)
    grad = torch.zeros_like(way.x)
    for part in parts:
        piece = pieces.pop(0)
        piece.kl = kl
        grad[rows[part], places[part]] = piece.gradient(weight, leash, budget)
        yield None
    for _ in way.backward(grad):
        yield None
    yield Outcome(kl[:rated], moved[:rated], weight[:rated])
