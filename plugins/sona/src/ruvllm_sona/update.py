"""One whole-network update: a forward and a backward pass through frozen weights, then one step of Adam.

Everything is a generator that yields between slices, so that whoever runs it decides when to go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.network import Network, padded
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
    """

    def __init__(
        self, network: Network, adapters: AdapterStack, *, tokens: Tensor, keep: bool, inputs: bool = False
    ) -> None:
        self._network, self._adapters, self._keep, self._inputs = network, adapters, keep, inputs
        self._rope = network.rope(tokens.shape[1])
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
                    else self._network.layer(n, x, self._rope, self._adapters)
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
) -> Iterator[Outcome | None]:
    """Add the gradient of the loss (see `objective`) to the adapters' ``grad``; the last thing yielded is the outcome.

    Args:
        adapters: one for each example, or one for all; the loss is a sum over examples.
        advantages: ``c`` of each example; 0 leaves only the leash.
        reference: what the leash is tied to, a model of the same vocabulary; None is the base model.
    """
    device = network.device
    tokens = padded([[*one.prompt_ids, *one.output_ids] for one in examples], device)
    lengths = torch.tensor([len(one.output_ids) for one in examples], device=device)
    owner = torch.repeat_interleave(torch.arange(len(examples), device=device), lengths)
    places = torch.cat([torch.arange(len(one.output_ids), device=device) + len(one.prompt_ids) for one in examples])
    targets, places = tokens[owner, places], places - 1
    way = Pass(network, adapters, tokens=tokens, keep=True)
    for _ in way.forward():
        yield None
    drawn_at = torch.tensor([one.temperature or 1.0 for one in examples], device=device)
    piece_size = _PIECE if device.type == "cpu" else _LARGE_PIECE
    hidden, step = way.x[owner, places], max(piece_size // network.spec.vocab_size, 1)
    parts, pieces = [slice(at, at + step) for at in range(0, len(owner), step)], []
    for part in parts:
        pieces.append(AnswerTokens(network, hidden[part], targets[part], owner[part], drawn_at, lengths))
        yield None
    if config.saturation or config.leash:
        tied, stack = reference or (network, AdapterStack({}, {}))
        base = Pass(tied, stack, tokens=tokens, keep=False)
        for _ in base.forward():
            yield None
        hidden = base.x[owner, places]
        for part, piece in zip(parts, pieces, strict=True):
            with torch.no_grad():
                logits = tied.logits(hidden[part])
            yield None
            piece.compare(logits)
            del logits
            yield None
    kl, moved = sum(piece.kl for piece in pieces), sum(piece.moved for piece in pieces)
    assert isinstance(kl, Tensor) and isinstance(moved, Tensor)
    weight = saturated(torch.tensor(advantages, device=device), moved, config.saturation)
    grad = torch.zeros_like(way.x)
    for part in parts:
        piece = pieces.pop(0)
        piece.kl = kl
        grad[owner[part], places[part]] = piece.gradient(weight, config.leash, config.budget)
        yield None
    for _ in way.backward(grad):
        yield None
    yield Outcome(kl, moved, weight)


def text_gradients(
    network: Network,
    adapters: AdapterStack,
    texts: Sequence[Example],
    config: ObjectiveConfig,
    reference: tuple[Network, AdapterStack] | None = None,
) -> Iterator[None]:
    """Add the gradient of the leash on texts that nobody rated; they are shorter than answers, and go by themselves."""
    if texts and config.text_leash:
        alone = replace(config, leash=config.text_leash, saturation=0.0, budget=float("inf"))
        for _ in gradients(network, adapters, texts, [0.0] * len(texts), alone, reference):
            yield
