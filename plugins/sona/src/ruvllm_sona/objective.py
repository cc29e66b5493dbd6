"""What a whole-network update descends on: rated answers become likelier or unlikelier, on a leash to the base model.

For an answer y to a prompt x, with the adapted model p and the base model p₀, the loss is

    −c · w · mean_t log p^(1/τ)(y_t)  +  λ · mean_t KL(p ‖ p₀)

The first term is the policy gradient (Williams 1992) at the temperature τ the answer was drawn at; `c` says how much
better the answer was than expected. `w` is the saturation of KTO (arXiv 2402.01306): 4σ(u)(1 − σ(u)) with
u = β (log p(y) − log p₀(y)), signed so that only what has moved far *with* its verdict is slowed. The second is the
leash, which is all there is for a text that nobody rated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ruvllm_sona.network import Network


@dataclass(frozen=True)
class ObjectiveConfig:
    """The constants of the loss.

    Attributes:
        leash: λ.
        text_leash: λ of texts that nobody rated; 0 leaves them out.
        saturation: β, per nat of the whole answer; 0 never slows.
        budget: nats that a whole answer may be away from the base model; beyond, the leash is as many times tighter as
            the answer is further. A wish that the base model fulfils by chance with probability q needs −log q.
    """

    leash: float = 0.03
    saturation: float = 0.1
    budget: float = float("inf")
    text_leash: float = 0.0


class AnswerTokens:
    """The loss over N tokens of M answers, in steps that each read the output projection once.

    Long answers are done in pieces. Then `kl` and `moved` of all pieces have to be added up before `gradient`.

    Args:
        network: of the adapted model.
        hidden: its states before each token, ``[N, C]``.
        targets: the tokens, int64 ``[N]``.
        owner: which answer each belongs to, int64 ``[N]``.
        temperature: each answer was drawn at, ``[M]``.
        lengths: tokens of each whole answer, ``[M]``; those given here unless there are other pieces.

    Attributes:
        kl: nats a token from the base model, mean of each answer ``[M]``.
        moved: nats by which each answer is likelier than under the base model, ``[M]``.
    """

    def __init__(
        self,
        network: Network,
        hidden: Tensor,
        targets: Tensor,
        owner: Tensor,
        temperature: Tensor,
        lengths: Tensor | None = None,
    ) -> None:
        self._hidden = hidden.detach().requires_grad_(True)
        self._targets, self._owner, self._temperature = targets, owner, temperature
        lengths = torch.bincount(owner, minlength=len(temperature)) if lengths is None else lengths
        self._lengths = lengths.to(hidden.dtype)
        with torch.enable_grad():
            self._logits = network.logits(self._hidden)
        with torch.no_grad():
            self._logp = torch.log_softmax(self._logits, -1)
        self.kl = self.moved = torch.zeros_like(self._lengths)
        self._leash: Tensor | None = None

    @torch.no_grad()
    def compare(self, base_logits: Tensor) -> None:
        """Look at the base model's logits ``[N, V]``; without this there is no leash, and nothing has moved."""
        base = torch.log_softmax(base_logits, -1)
        at = self._targets[:, None]
        self.moved = self._sum((self._logp.gather(1, at) - base.gather(1, at))[:, 0])
        p = self._logp.exp()
        self._leash = self._logp - base
        kl = (p * self._leash).sum(-1)
        self._leash.sub_(kl[:, None]).mul_(p)
        self.kl = self._sum(kl) / self._lengths

    @torch.no_grad()
    def gradient(self, weight: Tensor, leash: Tensor, budget: Tensor) -> Tensor:
        """The loss's gradient by the hidden states, ``[N, C]``, with ``c · w``, λ and the budget of each ``[M]``."""
        share = (weight / self._temperature / self._lengths)[self._owner, None]
        d = torch.softmax(self._logits / self._temperature[self._owner, None], -1).mul_(share)
        d.scatter_add_(1, self._targets[:, None], -share)
        if self._leash is not None:
            tightened = leash * torch.clamp(self.kl * self._lengths / budget, min=1.0)
            d.add_(self._leash.mul_((tightened / self._lengths)[self._owner, None]))
        (found,) = torch.autograd.grad(self._logits, self._hidden, d)
        return found

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros_like(self._lengths).index_add_(0, self._owner, values)


def saturated(advantage: Tensor, moved: Tensor, beta: float) -> Tensor:
    """``c · w`` of answers whose log-probability has `moved` by so many nats from the base model's, both ``[M]``."""
    ahead = torch.clamp(beta * moved * torch.sign(advantage), min=0.0)
    s = torch.sigmoid(ahead)
    return advantage * 4.0 * s * (1.0 - s)
