"""How a `MicroLoRA` learns, and the verdicts it learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ruvllm_core.errors import ConfigError, LearningError


@dataclass(frozen=True)
class MicroLoRAConfig:
    """How a `MicroLoRA` learns. Raises `ConfigError` for what makes no sense.

    Attributes:
        hidden_dim: C, the model's width.
        rank: 1 or 2.
        scale: s, multiplies the product of the factors.
        learning_rate: a verdict that is better than usual by 1 moves the factors by this, times the gradient of the
            answer's mean log-probability per token.
        trust_nats: most that one verdict may change the log-probability of its answer, by the first order, and the most
            the model may diverge from itself on it, by the second; both times the verdict's distance from the usual.
        max_norm: of ``ΔW = s·B·A``, Frobenius; the identity it is added to stretches each direction by 1.
        ewc_lambda: how firmly the anchor holds, if there is one (see `ruvllm_sona.ewc`).
        baseline, baseline_decay: the usual quality at the start, and how much of it stays at each verdict.
        saturation: β of KTO (arXiv 2402.01306): an answer that learning has made 1/β nats likelier, or unlikelier,
            moves the factors 0.79 times as much as a new one, at 5/β nats 0.03 times.
        keep: versions that one can go back to.
        seed: of A; B is zero at the start.
    """

    hidden_dim: int
    rank: int = 2
    scale: float = 1.0
    learning_rate: float = 0.3
    trust_nats: float = 2.0
    max_norm: float = 1.0
    ewc_lambda: float = 1.0
    baseline: float = 0.5
    baseline_decay: float = 0.9
    saturation: float = 0.1
    keep: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("scale", "learning_rate", "trust_nats", "max_norm")
        for name, low, high in (
            ("hidden_dim", 1, math.inf),
            ("rank", 1, 2),
            *((name, 1e-30, 1e30) for name in positive),
            ("ewc_lambda", 0.0, 1e30),
            ("baseline", 0.0, 1.0),
            ("baseline_decay", 0.0, 1.0),
            ("saturation", 0.0, 1e30),
            ("keep", 1, math.inf),
            ("seed", 0, math.inf),
        ):
            value = getattr(self, name)
            whole = name in ("hidden_dim", "rank", "keep", "seed")
            if not low <= value <= high or (whole and not isinstance(value, int)):
                raise ConfigError(f"{name} of MicroLoRA is {value}", hint=f"it must be from {low:g} to {high:g}")

    @classmethod
    def for_hidden_dim(cls, hidden_dim: int) -> MicroLoRAConfig:
        """The defaults for a model of this width."""
        return cls(hidden_dim)


@dataclass(frozen=True)
class AdaptFeedback:
    """A verdict in ``[0, 1]``. Raises `LearningError` for any other number."""

    quality: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.quality <= 1.0:
            raise LearningError(f"a quality of {self.quality}", hint="it goes from 0, bad, to 1, good")

    @classmethod
    def from_quality(cls, quality: float) -> AdaptFeedback:
        return cls(quality)
