"""`Gate`: what an adapter has to prove before a request may run with it.

It is compared with the base model, never with the version before it: many small harms that each pass would add up.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import ConfigError, LearningError
from ruvllm_core.protocols import FloatArray, LowRank
from ruvllm_sona.records import Example
from ruvllm_sona.sites import Deltas

Tokens = Sequence[int]
_LEAST = 4  # good and bad answers each, for an effect to be more than luck
RESCUE = (1.0, 0.5, 0.25)  # scales of a candidate, the largest that passes wins
PARTS = (1.0, 0.8, 0.6, 0.4, 0.2)  # the same of previews and of what took long to train


@dataclass(frozen=True, eq=False)
class Measured:
    """What a model says about one text of n tokens.

    Attributes:
        logprobs: float32 ``[n - 1]``, natural log-probability of each token but the first.
        kl: float32 ``[n - 1]``, nats by which the distribution it was predicted with is away from the base model's,
            KL(adapted ‖ base); zeros without deltas.
    """

    logprobs: FloatArray
    kl: FloatArray


class Measure(Protocol):
    """Runs texts through the model with `deltas`, or without; yields between slices, returns one `Measured` a text."""

    def __call__(self, deltas: Deltas | None, texts: Sequence[Tokens]) -> Generator[None, None, list[Measured]]: ...


@dataclass(frozen=True)
class GateConfig:
    """The limits; a candidate at a limit passes.

    A token's log-probability moves by about the square root of twice the KL: .16 nats at .013. Over 600 tokens of texts
    that is a standard error of .0065, a third of `max_mean_loss`. So a loss has to be above its limit by more than is
    likely to be an accident of these few texts. Four times as many tokens make the gate twice as sharp.

    Attributes:
        max_mean_loss: nats per token by which the texts among the anchors, taken together, may become less likely; .01
            is 1 % more perplexity.
        max_worst_loss: the same for the text that suffers most.
        sigmas: standard errors by which losses may exceed their limits; the worst anchor by as many more as it takes to
            be as sure of it, since it was picked from all.
        max_kl: nats per token between the adapted and the base model, mean over all anchors.
        max_relative_norm: of a site's delta, Frobenius, over that of the weight it is added to.
        min_effect: nats per token by which good answers have to gain on bad ones. Only a candidate that is below with
            two standard errors fails, and only where there are four answers of either kind.
    """

    max_mean_loss: float = 0.02
    max_worst_loss: float = 0.03
    sigmas: float = 1.0
    max_kl: float = 0.2
    max_relative_norm: float = 0.3
    min_effect: float = 0.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not math.isfinite(value) or (value < 0 and limit.name != "min_effect"):
                raise ConfigError(f"{limit.name} of the gate is {value}", hint="limits are finite and not below zero")


@dataclass(frozen=True)
class Figures:
    """What was measured; None is what was not, because the candidate had failed before or there was nothing to measure.

    Attributes:
        mean_loss: nats per token that texts lost, `mean_loss_error` its standard error over tokens.
        worst_loss: that of the text which is most surely above others, the one with number `worst_anchor`.
        worst_loss_error: the standard error of it.
        kl: nats per token on all anchors, `text_kl` on texts alone.
        effect: nats per token that good answers gained more than bad ones, `effect_error` its standard error over
            answers.
        relative_norm: the largest, which is at `largest_site`.
        tokens: of all anchors.
    """

    relative_norm: float | None = None
    largest_site: str = ""
    mean_loss: float | None = None
    mean_loss_error: float | None = None
    worst_loss: float | None = None
    worst_loss_error: float | None = None
    worst_anchor: int | None = None
    kl: float | None = None
    text_kl: float | None = None
    effect: float | None = None
    effect_error: float | None = None
    tokens: int = 0


@dataclass(frozen=True, eq=False)
class Verdict:
    """Whether a candidate may be published.

    Attributes:
        reasons: why not; empty if it passed.
        scale: of the candidate that was judged last; `deltas` are at this scale.
        deltas: what to publish, None if it did not pass: then the version in force stays in force.
        scales: how many were tried.
    """

    passed: bool
    reasons: tuple[str, ...]
    figures: Figures
    scale: float = 1.0
    deltas: Deltas | None = None
    scales: int = 1

    def record(self) -> dict[str, Any]:
        """For an audit log: what JSON can hold."""
        known = {name: value for name, value in asdict(self.figures).items() if value is not None}
        for name, value in known.items():
            if isinstance(value, float) and not math.isfinite(value):
                known[name] = str(value)
        return {"passed": self.passed, "reasons": list(self.reasons), "scale": self.scale, "figures": known}


class Gate:
    """Judges candidates for one model.

    Args:
        anchors: texts as tokens, each of at least two, that are to stay as likely as they are.
        weight_norms: Frobenius norm of the weight at each site that may have a delta.
        config: the limits.
        baseline: what `baseline` gave for the same model and anchors; measured at the first check if left out.
        chats: how many of the anchors, its last ones, are conversations. How these are answered is what feedback is to
            change: whoever asks for lists makes an answer without one less likely. So their loss is no harm, and they
            count in `kl` alone.
    """

    def __init__(
        self,
        anchors: Sequence[Tokens],
        weight_norms: Mapping[str, float],
        config: GateConfig | None = None,
        baseline: Sequence[FloatArray] | None = None,
        chats: int = 0,
    ) -> None:
        if not anchors or min(map(len, anchors)) < 2:
            raise LearningError("the gate needs anchor texts of at least two tokens each")
        if not 0 <= chats < len(anchors):
            raise LearningError(f"of {len(anchors)} anchors {chats} cannot be conversations: texts are needed, too")
        self.config, self._anchors, self._norms = config or GateConfig(), anchors, weight_norms
        self._baseline, self._texts = None if baseline is None else list(baseline), len(anchors) - chats
        normal = NormalDist()
        self._sigmas_of_worst = -normal.inv_cdf(normal.cdf(-self.config.sigmas) / self._texts)
        if baseline is not None and [len(one) + 1 for one in baseline] != [len(one) for one in anchors]:
            raise LearningError("the baseline of the gate belongs to other anchors", hint="have it measured again")

    @property
    def baseline(self) -> tuple[FloatArray, ...] | None:
        """Log-probabilities of the anchors by the base model, float32 ``[n - 1]`` each; None before the first check."""
        return None if self._baseline is None else tuple(self._baseline)

    def check(
        self,
        measure: Measure,
        candidate: Deltas,
        examples: Sequence[Example] = (),
        scales: Sequence[float] = (1.0,),
    ) -> Generator[None, None, Verdict]:
        """Whether `candidate` passes, or the first of it times `scales` that does; yields where `measure` does.

        Args:
            measure: runs the model.
            candidate: all deltas of the version that would be published.
            examples: answers with feedback; they are good from quality .5 up. Best those the candidate has not seen.
            scales: `RESCUE` looks for the largest part of the candidate that passes.

        Raises:
            LearningError: a site is not one of the weights, or `measure` returns what its protocol does not say.
        """
        verdict, effects = Verdict(False, ("no scale was tried",), Figures()), _Effects(measure, examples)
        for tried, scale in enumerate(scales, 1):
            deltas = scaled(candidate, scale)
            figures = self._norm(deltas)
            reasons = self._failures(figures)
            if not reasons:
                figures = yield from self._harm(measure, deltas, figures)
                reasons = self._failures(figures)
            if not reasons and effects.enough:
                effect, error = yield from effects.of(deltas)
                figures = replace(figures, effect=effect, effect_error=error)
                reasons = self._failures(figures)
            passed = not reasons
            verdict = Verdict(passed, tuple(reasons), figures, scale, deltas if passed else None, tried)
            if passed or (figures.relative_norm is not None and not math.isfinite(figures.relative_norm)):
                break  # what is not finite is so at any scale
        return verdict

    def _norm(self, deltas: Deltas) -> Figures:
        if unknown := set(deltas) - set(self._norms):
            raise LearningError(f"the gate knows no weight at {', '.join(sorted(unknown))}")
        relative = {site: _ratio(delta_norm(delta), self._norms[site]) for site, delta in deltas.items()}
        # max() would pass over a NaN.
        site = max(relative, key=lambda name: math.inf if math.isnan(relative[name]) else relative[name], default="")
        return Figures(relative_norm=relative.get(site, 0.0), largest_site=site, tokens=sum(map(len, self._anchors)))

    def _harm(self, measure: Measure, deltas: Deltas, figures: Figures) -> Generator[None, None, Figures]:
        if self._baseline is None:
            base = yield from _run(measure, None, self._anchors)
            if not all(np.isfinite(one.logprobs).all() for one in base):
                raise LearningError("the base model itself gives anchors a probability that is not finite")
            self._baseline = [one.logprobs for one in base]
        found = yield from _run(measure, deltas, self._anchors)
        pairs = zip(self._baseline[: self._texts], found[: self._texts], strict=True)
        losses = [np.subtract(before, after.logprobs, dtype=np.float64) for before, after in pairs]
        with np.errstate(invalid="ignore"):
            means = np.array([loss.mean() for loss in losses])
            errors = np.array([_standard_error(loss) for loss in losses])
            sure = means - self._sigmas_of_worst * errors
        worst = int(np.argmax(np.where(np.isnan(sure), np.inf, sure)))
        every, far = np.concatenate(losses), [one.kl.astype(np.float64) for one in found]
        with np.errstate(invalid="ignore"):
            mean = float(every.mean())
        return replace(
            figures,
            mean_loss=mean,
            mean_loss_error=_standard_error(every),
            worst_loss=float(means[worst]),
            worst_loss_error=float(errors[worst]),
            worst_anchor=worst,
            kl=float(np.concatenate(far).mean()),
            text_kl=float(np.concatenate(far[: self._texts]).mean()),
        )

    def _failures(self, figures: Figures) -> list[str]:
        """Why a candidate with these figures does not pass; what is not finite never does."""
        config, reasons = self.config, []
        by_accident = config.sigmas * (figures.mean_loss_error or 0.0)
        worst_by_accident = self._sigmas_of_worst * (figures.worst_loss_error or 0.0)
        unit = " nats per token"
        limits = (
            ("relative_norm", config.max_relative_norm, 0.0, f" at {figures.largest_site}"),
            ("mean_loss", config.max_mean_loss, by_accident, unit),
            (
                "worst_loss",
                config.max_worst_loss,
                worst_by_accident,
                f"{unit} on anchor {figures.worst_anchor}",
            ),
            ("kl", config.max_kl, 0.0, unit),
        )
        for name, limit, accident, where in limits:
            value = getattr(figures, name)
            if value is not None and not (math.isfinite(value) and value - accident <= limit):
                allowed = f"{limit:.4g}" + (f" and {accident:.2g} by accident" if accident else "")
                reasons.append(f"{name} is {value:.4g}{where}, allowed is {allowed}")
        if figures.effect is not None and figures.effect_error is not None:
            best = figures.effect + 2 * figures.effect_error
            if not (math.isfinite(best) and best >= config.min_effect):
                reasons.append(f"effect is {figures.effect:.4g} nats per token, needed is {config.min_effect:.4g}")
        return reasons


class _Effects:
    """What deltas do to answers with feedback, against the base model, which is measured once."""

    def __init__(self, measure: Measure, examples: Sequence[Example]) -> None:
        if any(not one.prompt_ids or not one.output_ids for one in examples):
            raise LearningError("an example without a prompt or an answer has no effect to be measured")
        self._measure = measure
        self._texts = [(*one.prompt_ids, *one.output_ids) for one in examples]
        self._starts = [len(one.prompt_ids) - 1 for one in examples]
        self._good = np.array([one.quality >= 0.5 for one in examples], bool)
        self._base: list[Measured] | None = None
        self.enough = min(self._good.sum(), (~self._good).sum()) >= _LEAST

    def of(self, deltas: Deltas) -> Generator[None, None, tuple[float, float]]:
        """Nats per token that good answers gained more than bad ones, and the standard error of it."""
        if self._base is None:
            self._base = yield from _run(self._measure, None, self._texts)
        found = yield from _run(self._measure, deltas, self._texts)
        rows = zip(self._starts, self._base, found, strict=True)
        with np.errstate(invalid="ignore"):
            gains = [np.subtract(b.logprobs[at:], a.logprobs[at:], dtype=np.float64).mean() for at, a, b in rows]
            good, bad = np.array(gains)[self._good], np.array(gains)[~self._good]
            return float(good.mean() - bad.mean()), math.hypot(_standard_error(good), _standard_error(bad))


@dataclass
class Backoff:
    """Smaller steps while candidates are rejected: half of it after each `patience` in a row, back by a half for each
    that passes.

    Attributes:
        step: what to multiply the learning rate with, from `smallest` to 1.
    """

    patience: int = 3
    smallest: float = 1 / 16
    step: float = 1.0
    rejected: int = 0

    @property
    def scales(self) -> tuple[float, ...]:
        """What to give `Gate.check`: a rescue costs more measuring, so only for what has been rejected often."""
        return RESCUE if self.rejected >= self.patience else RESCUE[:1]

    def note(self, verdict: Verdict) -> None:
        """Take a verdict into account; one that passed at a smaller scale is no reason for larger steps."""
        if not verdict.passed:
            self.rejected += 1
            if self.rejected % self.patience == 0:
                self.step = max(self.step / 2, self.smallest)
            return
        self.rejected = 0
        if verdict.scale == 1.0:
            self.step = min(self.step * 1.5, 1.0)


def scaled(deltas: Deltas, factor: float) -> Deltas:
    """The same deltas, `factor` times as large: exactly, since s·B·A is linear in s."""
    return {site: replace(delta, scale=delta.scale * factor) for site, delta in deltas.items()}


def delta_norm(delta: LowRank) -> float:
    """Frobenius norm of scale·B·A without making that matrix: the trace of (BᵀB)(AAᵀ), in double precision."""
    a, b = delta.a.astype(np.float64), delta.b.astype(np.float64)
    square = float(np.einsum("ij,ij->", b.T @ b, a @ a.T))
    return abs(delta.scale) * math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan


def _ratio(norm: float, of: float) -> float:
    return norm / of if of > 0 else math.inf if norm != 0 else 0.0


def _standard_error(values: npt.NDArray[np.float64]) -> float:
    """Of the mean of values as if independent; 0 for a single one."""
    with np.errstate(invalid="ignore"):  # what is infinite has no deviation, and fails by its mean
        return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _run(measure: Measure, deltas: Deltas | None, texts: Sequence[Tokens]) -> Generator[None, None, list[Measured]]:
    """What `measure` returns, once it is of the shapes that it has to be of."""
    found = yield from measure(deltas, texts)
    wanted = [(len(text) - 1,) for text in texts]
    for kind in ("logprobs", "kl"):
        shapes = [getattr(one, kind).shape for one in found]
        if shapes != wanted:
            raise LearningError(f"measuring gave {kind} of shapes {shapes} instead of {wanted}")
    return found
