"""MicroLoRA: an adapter of rank 1 or 2 after the last norm that learns from feedback in microseconds.

``h′ = h + s·B·A·h``. One verdict is one small step along the trace of the answer (see `ruvllm_sona.trace`), kept within
a trust region, near an anchor, and below a norm. What is in force is one immutable state, replaced as a whole: readers
need no lock, and every kept state can come back bit for bit.
"""

from __future__ import annotations

import json
import math
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.errors import ConfigError, LearningError
from ruvllm_core.protocols import FloatArray, LowRank
from ruvllm_sona.ewc import Anchor, prox_site
from ruvllm_sona.micro_config import AdaptFeedback, MicroLoRAConfig
from ruvllm_sona.sites import start
from ruvllm_sona.trace import Array, Trace

__all__ = ["AdaptFeedback", "MicroLoRA", "MicroLoRAConfig", "MicroStats", "Pending", "Step"]


@dataclass(frozen=True)
class Step:
    """What became of a verdict.

    Attributes:
        applied: whether `version` is a new one, with other numbers.
        reason: why it was not applied.
        nats: predicted change of the answer's log-probability, by the first order; None where no token's gradient was
            known.
        version: in force now.
    """

    applied: bool
    version: str
    reason: str = ""
    nats: float | None = None


@dataclass(frozen=True)
class Pending:
    """What `MicroLoRA.adapt` did: whether it took the feedback in, why not, and how many wait for `apply_updates`."""

    accepted: bool
    count: int
    reason: str = ""


@dataclass(frozen=True)
class MicroStats:
    """How a `MicroLoRA` stands; `norm` is that of ΔW, `updates` and `refused` count since it was made."""

    version: str
    updates: int
    refused: int
    pending: int
    norm: float
    baseline: float
    kept: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _State:
    delta: LowRank
    version: str
    baseline: float


class MicroLoRA:
    """The adapter of one user, or of one pattern, and its last versions.

    Any thread may read at any time; steps wait for each other.

    Args:
        name: begins the version of every state made here; by default one that nothing else has.
    """

    def __init__(self, config: MicroLoRAConfig, name: str = "") -> None:
        self.config = config
        self._name = name or uuid.uuid4().hex[:12]
        self._number = 0
        delta = start({FINAL_SITE: (config.hidden_dim, config.hidden_dim)}, config.rank, config.seed, config.scale)
        self._state = _State(delta[FINAL_SITE], f"{self._name}.0", config.baseline)
        self._kept = {self._state.version: self._state}
        self._anchor: Anchor | None = None
        self._lock = threading.Lock()
        self._updates = self._refused = self._waiting = 0
        self._pending_baseline: float | None = None
        self._known = True
        self._sum_a, self._sum_b = np.zeros_like(self.current.a), np.zeros_like(self.current.b)

    @property
    def current(self) -> LowRank:
        """The factors in force; nobody may write to them."""
        return self._state.delta

    @property
    def version(self) -> str:
        """Of the factors in force: a name, a dot, and a number that only grows."""
        return self._state.version

    @property
    def versions(self) -> tuple[str, ...]:
        """Those that `rollback` knows, the oldest first."""
        return tuple(self._kept)

    @property
    def anchor(self) -> Anchor | None:
        """What steps stay near to; its site is `FINAL_SITE`."""
        return self._anchor

    @anchor.setter
    def anchor(self, anchor: Anchor | None) -> None:
        if anchor is not None:
            width, site = self.config.hidden_dim, anchor.fisher.sites.get(FINAL_SITE)
            if site is None or (len(site[0]), len(site[1])) != (width, width):
                raise LearningError(f"an anchor that does not hold the final site of a model {width} wide")
        self._anchor = anchor

    def apply(self, hidden: FloatArray) -> FloatArray:
        """``h′`` of float32 ``[…, C]``."""
        delta = self.current
        changed: FloatArray = hidden + np.float32(delta.scale) * ((hidden @ delta.a.T) @ delta.b.T)
        return changed

    def learn(self, trace: Trace, quality: float) -> Step:
        """One step for one verdict on the answer of `trace`; a refusal leaves everything as it was.

        The answer's length does not set the step's: the gradient is that of the mean over its tokens. How much better
        or worse than usual the verdict is does, saturated by how much likelier learning has made the answer already:
        the weight is the derivative of KTO's value, ``4 σ(βr) σ(−βr)``, with the log-ratio to the base model
        ``r ≈ ⟨E_B, B⟩``.

        Raises:
            LearningError: `quality` is not in ``[0, 1]``, or the trace is of another width or rank.
        """
        quality = AdaptFeedback(quality).quality
        with self._lock, np.errstate(all="ignore"):
            state, config = self._state, self.config
            delta = state.delta
            if trace.a.shape != delta.a.shape or trace.b.shape != delta.b.shape or trace.tokens < 1:
                raise LearningError(f"a trace {trace.a.shape} does not fit factors {delta.a.shape}")
            grad_a, grad_b = np.asarray(trace.a, np.float32), np.asarray(trace.b, np.float32)
            if trace.version not in self._kept:
                return self._refuse(f"the trace is of version {trace.version!r}, too old to go by")
            size = float(np.vdot(grad_a, grad_a)) + float(np.vdot(grad_b, grad_b))
            if not math.isfinite(size + trace.curvature):
                return self._refuse("the trace is not finite")
            if size == 0.0:
                return self._refuse("the trace is zero: nothing makes this answer likelier")
            advantage = quality - state.baseline
            if advantage == 0.0:
                return self._refuse("as good as usual: nothing to learn")
            weight = _saturated(config.saturation * float(np.vdot(grad_b, delta.b)))
            rate = config.learning_rate * advantage * weight / trace.tokens
            limit = config.trust_nats * abs(advantage)
            farthest = limit / size
            if trace.curvature > 0.0:
                farthest = min(farthest, math.sqrt(2.0 * limit / trace.curvature))
            rate = math.copysign(min(abs(rate), farthest), rate)
            baseline = self._mixed(state.baseline, quality)
            return self._move(grad_a, grad_b, size, rate, limit, config.learning_rate, baseline)

    def adapt(
        self, input_embedding: FloatArray, feedback: AdaptFeedback, gradient: FloatArray | None = None
    ) -> Pending:
        """Take in feedback on a state, for the next `apply_updates`.

        With `gradient`, that of a token's log-probability with respect to ``h′``, this is the policy gradient of one
        token. Without, no token is known that could become likelier. What is learned then is how sure to be: the state,
        scaled to a root mean square of 1, is its own gradient, so a good verdict makes ``h′`` and with it all logits
        larger for states like this one, and what the model would say there anyway more certain; a bad verdict less.

        Args:
            input_embedding: float32 ``[C]``, a state before the adapter.
            gradient: float32 ``[C]``.

        Raises:
            LearningError: other shapes, or numbers that are not finite.
        """
        width = (self.config.hidden_dim,)
        for what, values in (("input_embedding", input_embedding), ("gradient", gradient)):
            if values is not None and (values.shape != width or not np.isfinite(values).all()):
                raise LearningError(f"{what} of shape {values.shape}", hint=f"needed are {width[0]} finite numbers")
        with self._lock:
            advantage = feedback.quality - self._baseline_of_pending()
            hidden = np.asarray(input_embedding, np.float32)
            if gradient is None:
                size = float(np.linalg.norm(hidden.astype(np.float64)))
                hidden = hidden * np.float32(math.sqrt(width[0]) / size) if size > 0.0 else hidden
                gradient = hidden
            delta = self._state.delta
            scale = np.float32(delta.scale * advantage)
            grad_a = scale * np.outer(delta.b.T @ gradient, hidden)
            grad_b = scale * np.outer(gradient, delta.a @ hidden)
            if not (grad_a.any() or grad_b.any()):
                reason = "as good as usual" if advantage == 0.0 else "no step of this adapter changes this state"
                return Pending(False, self._waiting, reason)
            self._sum_a, self._sum_b = self._sum_a + grad_a, self._sum_b + grad_b
            self._known = self._known and gradient is not hidden
            self._pending_baseline = self._mixed(self._baseline_of_pending(), feedback.quality)
            self._waiting += 1
            return Pending(True, self._waiting)

    def apply_updates(self, learning_rate: float | None = None) -> Step:
        """Move along the mean of what `adapt` took in, times the learning rate, by default that of the config."""
        rate = self.config.learning_rate if learning_rate is None else learning_rate
        if not 0.0 < rate < math.inf:
            raise LearningError(f"a learning rate of {rate}", hint="it must be positive and finite")
        with self._lock, np.errstate(all="ignore"):
            if not self._waiting:
                return self._refuse("no feedback is waiting")
            a, b, count = self._sum_a, self._sum_b, self._waiting
            known, baseline = self._known, self._baseline_of_pending()
            size = float(np.vdot(a, a)) + float(np.vdot(b, b))
            self._clear()
            if not math.isfinite(size) or size == 0.0:
                return self._refuse("the feedback adds up to nothing that is finite and not zero")
            step = rate / count
            limit = self.config.trust_nats if known else None
            if limit is not None:
                step = min(step, limit / size)
            return self._move(a, b, size, step, limit, rate, baseline)

    def rollback(self, version: str) -> None:
        """Put a kept version back in force, bit for bit. Raises `LearningError` for another."""
        with self._lock:
            if version not in self._kept:
                raise LearningError(f"version {version!r} is not kept", hint="kept are " + ", ".join(self._kept))
            self._state = self._kept[version]
            self._clear()

    def shrink(self, part: float) -> None:
        """Put a new version in force whose delta is `part` of the one that is."""
        with self._lock:
            delta = self._state.delta
            self._put(replace(delta, b=delta.b * np.float32(part)), self._state.baseline)

    def stats(self) -> MicroStats:
        """How it stands."""
        state, kept = self._state, tuple(self._kept)
        norm = _norm(state.delta.a, state.delta.b, state.delta.scale)
        return MicroStats(state.version, self._updates, self._refused, self._waiting, norm, state.baseline, kept)

    def state(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
        """All kept versions as arrays and the rest as strings: what a safetensors file holds. Pending feedback is not
        among them, nor is the anchor."""
        with self._lock:
            states = list(self._kept.values())
            arrays: dict[str, npt.NDArray[Any]] = {
                "a": np.stack([each.delta.a for each in states]),
                "b": np.stack([each.delta.b for each in states]),
                "baseline": np.array([each.baseline for each in states], np.float64),
            }
            metadata = {
                "config": json.dumps(asdict(self.config)),
                "versions": json.dumps([each.version for each in states]),
                "current": self._state.version,
                "number": str(self._number),
            }
            return arrays, metadata

    @classmethod
    def restore(cls, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str], name: str = "") -> MicroLoRA:
        """What `state` saved, bit for bit. Raises `LearningError` if it is damaged."""
        try:
            found = json.loads(metadata["config"])
            config = MicroLoRAConfig(**{field.name: found[field.name] for field in fields(MicroLoRAConfig)})
            versions, current, number = json.loads(metadata["versions"]), metadata["current"], int(metadata["number"])
            a, b, baselines = arrays["a"], arrays["b"], arrays["baseline"]
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise LearningError(f"a saved MicroLoRA lacks or has a wrong {error}") from error
        count, rank, width = len(versions), config.rank, config.hidden_dim
        for values, shape, dtype in (
            (a, (count, rank, width), np.float32),
            (b, (count, width, rank), np.float32),
            (baselines, (count,), np.float64),
        ):
            if values.shape != shape or values.dtype != dtype or not np.isfinite(values).all():
                raise LearningError(
                    f"an array of a saved MicroLoRA is {values.dtype} {values.shape}",
                    hint=f"{count} versions need finite {np.dtype(dtype)} {shape}",
                )
        if current not in versions:
            raise LearningError(f"the current version {current!r} is not among those saved")
        made = cls(config, name)
        made._number = number
        each = zip(versions, a, b, baselines.tolist(), strict=True)
        made._kept = {v: _State(LowRank(a.copy(), b.copy(), config.scale), v, base) for v, a, b, base in each}
        made._state = made._kept[current]
        return made

    def _move(
        self, a: Array, b: Array, size: float, rate: float, limit: float | None, pull: float, baseline: float
    ) -> Step:
        """θ + rate·(a, b), of squared length `size`, drawn to the anchor within `limit` nats, capped, and published."""
        config, old = self.config, self._state.delta
        new_a: FloatArray = old.a + np.float32(rate) * a
        new_b: FloatArray = old.b + np.float32(rate) * b
        nats = rate * size
        if (anchor := self._anchor) is not None and config.ewc_lambda > 0.0:
            near = LowRank(new_a, new_b, old.scale)
            held = prox_site(near, anchor.holds[FINAL_SITE], pull * config.ewc_lambda)
            new_a, new_b = held.a, held.b
            nats = _along(a, b, old, new_a, new_b)
            if limit is not None and abs(nats) > limit:
                part = np.float32(limit / abs(nats))
                new_a, new_b = old.a + part * (new_a - old.a), old.b + part * (new_b - old.b)
                nats = math.copysign(limit, nats)
        bound = _bound(new_a, new_b, old.scale)
        if not math.isfinite(bound + nats):
            return self._refuse("the step is not finite")
        if bound > config.max_norm and (norm := _norm(new_a, new_b, old.scale)) > config.max_norm:
            new_b = new_b * np.float32(config.max_norm / norm)
            nats = _along(a, b, old, new_a, new_b)
        if np.array_equal(new_b, old.b) and np.array_equal(new_a, old.a):
            return self._refuse("the step is too small to change a number")
        self._updates += 1
        self._put(LowRank(new_a, new_b, old.scale), baseline)
        return Step(True, self._state.version, nats=nats if limit is not None else None)

    def _put(self, delta: LowRank, baseline: float) -> None:
        """A new version, in force from now on; the oldest ones are not kept any more."""
        self._number += 1
        state = _State(delta, f"{self._name}.{self._number}", baseline)
        kept = {**self._kept, state.version: state}
        for version in list(kept)[: max(len(kept) - self.config.keep, 0)]:
            del kept[version]
        self._kept, self._state = kept, state

    def _refuse(self, reason: str) -> Step:
        self._refused += 1
        return Step(False, self._state.version, reason)

    def _clear(self) -> None:
        self._sum_a, self._sum_b = np.zeros_like(self._sum_a), np.zeros_like(self._sum_b)
        self._waiting, self._known = 0, True
        self._pending_baseline = None

    def _baseline_of_pending(self) -> float:
        return self._state.baseline if self._pending_baseline is None else self._pending_baseline

    def _mixed(self, baseline: float, quality: float) -> float:
        return self.config.baseline_decay * baseline + (1.0 - self.config.baseline_decay) * quality


def _saturated(x: float) -> float:
    """``4 σ(x) σ(−x)``: 1 at 0, falling to 0 on both sides."""
    return 1.0 / math.cosh(0.5 * min(max(x, -700.0), 700.0)) ** 2


def _norm(a: Array, b: Array, scale: float) -> float:
    """Frobenius norm of ``s·B·A``, through the factors' Gram matrices."""
    # Of copies, since products of an array with itself take a path in BLAS that is slow on ones this thin.
    grams = (a.copy() @ a.T).astype(np.float64), (b.T.copy() @ b).astype(np.float64)
    return scale * math.sqrt(max(float(np.vdot(*grams)), 0.0))


def _bound(a: Array, b: Array, scale: float) -> float:
    """What `_norm` cannot exceed, at a fraction of its cost."""
    return scale * math.sqrt(float(np.vdot(a, a)) * float(np.vdot(b, b)))


def _along(a: Array, b: Array, old: LowRank, new_a: Array, new_b: Array) -> float:
    return float(np.vdot(a, new_a - old.a)) + float(np.vdot(b, new_b - old.b))
