"""What a whole-network update descends on: rated answers become likelier or unlikelier, on a leash to the base model.

For an answer y to a prompt x, with the adapted model p and the base model p₀, the loss is

    −c · w · mean_t log p^(1/τ)(y_t)  +  λ · mean_t KL(p ‖ p₀)

The first term is the policy gradient (Williams 1992) at the temperature τ the answer was drawn at; `c` says how much
better the answer was than expected. `w` is the saturation of KTO (arXiv 2402.01306): 4σ(u)(1 − σ(u)) with
u = β (log p(y) − log p₀(y)), signed so that only what has moved far *with* its verdict is slowed. The second is the
leash.
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
        saturation: β, per nat of the whole answer; 0 never slows.
    """

    leash: float = 0.03
    saturation: float = 0.1


@dataclass(frozen=True, eq=False)
class Rows:
    """What some answer tokens say of the loss; N tokens.

    Attributes:
        policy: gradient of each token's tempered log-probability by its hidden state ``[N, C]``.
        leash: gradient of each token's KL(p ‖ p₀), likewise.
        logprob, base_logprob: of the tokens at temperature 1, ``[N]``.
        kl: nats, ``[N]``.
    """

    policy: Tensor
    leash: Tensor
    logprob: Tensor
    base_logprob: Tensor
    kl: Tensor


def token_gradients(
    network: Network, hidden: Tensor, base_hidden: Tensor | None, targets: Tensor, temperature: Tensor
) -> Rows:
    """Both gradients for N answer tokens, from their hidden states ``[N, C]`` with and without the adapter.

    Without `base_hidden` there is no leash, and the base log-probabilities are those of the model itself.
    """
    hidden = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = network.logits(hidden)
    with torch.no_grad():
        index, columns = torch.arange(len(targets), device=hidden.device), targets
        warm = temperature[:, None]
        d_policy = torch.softmax(logits / warm, -1).neg_()
        d_policy[index, columns] += 1.0
        d_policy /= warm
        (policy,) = torch.autograd.grad(logits, hidden, d_policy, retain_graph=base_hidden is not None)
        logp = torch.log_softmax(logits, -1)
        logprob = logp[index, columns]
        if base_hidden is None:
            return Rows(policy, torch.zeros_like(policy), logprob, logprob, torch.zeros_like(logprob))
        base = torch.log_softmax(network.logits(base_hidden), -1)
        base_logprob = base[index, columns]
        p = logp.exp()
        logp -= base
        kl = (p * logp).sum(-1)
        logp -= kl[:, None]
        (leash,) = torch.autograd.grad(logits, hidden, logp.mul_(p))
    return Rows(policy, leash, logprob, base_logprob, kl)


def saturated(advantage: Tensor, moved: Tensor, beta: float) -> Tensor:
    """``c · w`` of answers whose log-probability has `moved` by so many nats from the base model's, both ``[M]``."""
    ahead = torch.clamp(beta * moved * torch.sign(advantage), min=0.0)
    s = torch.sigmoid(ahead)
    return advantage * 4.0 * s * (1.0 - s)
