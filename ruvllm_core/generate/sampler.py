"""From logits to a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import GenerationError
from ruvllm_core.generate.request import SamplingFields
from ruvllm_core.protocols import FloatArray

_LIKELY = 1e-4  # of the likeliest token: what a nucleus is looked for in first
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampled:
    """A drawn token; the log-probabilities are those of the model after penalties and bias, at temperature 1.

    `drawn_from` is None if greedy.
    """

    token: int
    logprob: float | None = None
    top_logprobs: Mapping[int, float] | None = None
    drawn_from: Distribution | None = None


@dataclass(frozen=True, eq=False)
class Distribution:
    """The truncated, tempered distribution a token is drawn from: `ids` by falling `probabilities` (float64)."""

    ids: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]

    def head(self, count: int) -> Distribution:
        """The `count` likeliest, a copy; probabilities stay those in the whole."""
        return Distribution(self.ids[:count].copy(), self.probabilities[:count].copy())

    def draw(self, uniform: float) -> int:
        """The token at `uniform` in ``[0, 1)`` of the cumulative distribution."""
        # In the order of ids: in that of probabilities, rounding of two that are almost equal could change the token.
        order = np.argsort(self.ids)
        cumulative = np.cumsum(self.probabilities[order])
        place = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
        return int(self.ids[order[min(place, len(order) - 1)]])


#: Takes a token from a distribution; the function gives a new random number in ``[0, 1)`` at every call.
Pick = Callable[[Distribution, Callable[[], float]], int]


class Sampler:
    """Draws the tokens of one request; keeps its random state and what its penalties count.

    Filters come in the order of Hugging Face's: penalties, bias, temperature, top-k, top-p, min-p.

    Args:
        params: how to sample.
        prompt_ids: the repetition penalty counts them too.
        vocab_size: V; the logit bias names no token beyond it.
    """

    def __init__(self, params: SamplingFields, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._params = params
        self._random = np.random.Generator(np.random.Philox(params.seed))
        self._counts: npt.NDArray[np.int32] | None = None
        self._seen: npt.NDArray[np.bool_] | None = None
        if params.frequency_penalty or params.presence_penalty:
            self._counts = np.zeros(vocab_size, dtype=np.int32)
        if params.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab_size, dtype=bool)
            self._seen[np.asarray(prompt_ids, dtype=np.int64)] = True
        self._bias_ids = np.fromiter(params.logit_bias, dtype=np.int64, count=len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), dtype=np.float32, count=len(params.logit_bias))

    def sample(self, logits: FloatArray, pick: Pick | None = None) -> Sampled:
        """Draw a token from ``[V]`` logits, or have it picked, and count it; if greedy, take the likeliest.

        Raises `GenerationError` if no token is possible.
        """
        adjusted = self.adjust(logits)
        token = int(adjusted.argmax())
        if not np.isfinite(adjusted[token]):  # the maximum of anything with a NaN in it is NaN
            raise GenerationError("the model's logits are NaN, infinite, or leave no token to choose")
        target = self.distribution(adjusted) if self._params.temperature > 0.0 else None
        if target is not None:
            token = pick(target, self._random.random) if pick else target.draw(self._random.random())
        self.count(token)
        logprob, likely = self._describe(adjusted, token) if self._params.logprobs is not None else (None, None)
        return Sampled(token, logprob, likely, target)

    def count(self, token: int) -> None:
        """Let the penalties know of a generated token."""
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    def adjust(self, logits: FloatArray) -> FloatArray:
        """Logits after penalties and bias; the same array if there are none."""
        params = self._params
        if self._seen is None and self._counts is None and not self._bias_ids.size:
            return logits
        adjusted: FloatArray = logits.copy()
        if self._seen is not None:
            seen = adjusted[self._seen]
            penalty = np.float32(params.repetition_penalty)
            adjusted[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts is not None:
            adjusted -= np.float32(params.frequency_penalty) * self._counts
            adjusted -= np.float32(params.presence_penalty) * (self._counts > 0)
        adjusted[self._bias_ids] += self._bias
        return adjusted

    def distribution(self, adjusted: FloatArray) -> Distribution:
        """What a token is drawn from, for a temperature above 0; `adjusted` comes from `adjust`."""
        params = self._params
        # From the maximum down, so that no temperature is too small to divide by: -inf is a probability of 0.
        scaled = np.subtract(adjusted, adjusted.max(), dtype=np.float64)
        with np.errstate(over="ignore"):
            scaled /= params.temperature
        every = np.exp(scaled)
        total = every.sum() if params.top_p < 1.0 and not params.top_k else 0.0
        ids = self._most_likely(scaled, every, total)
        weights = every[ids]
        keep = weights >= params.min_p
        if params.top_p < 1.0:
            keep &= np.cumsum(weights) - weights < params.top_p * (total or weights.sum())
        count = max(int(np.count_nonzero(keep)), 1)  # both filters keep a beginning, and the first in any case
        return Distribution(ids[:count], weights[:count] / weights[:count].sum())

    def _most_likely(self, scaled: Array, weights: Array, total: float) -> npt.NDArray[np.int64]:
        """Token ids by falling score: all that any filter can keep, and no more sorted than needed."""
        params, size = self._params, len(scaled)
        if params.top_k:
            return _top(scaled, min(params.top_k, size))
        # With the second at the latest, what is not looked at is less than half of what the nucleus leaves out.
        for least in (_LIKELY, (1.0 - params.top_p) / 2 * total / size) if total else (0.0,):
            likely = np.flatnonzero(weights >= max(least, params.min_p))
            if weights[likely].sum() > (1.0 + params.top_p) / 2 * total:
                break
        return likely[np.argsort(-scaled[likely], kind="stable")]

    def _describe(self, adjusted: FloatArray, token: int) -> tuple[float, Mapping[int, float] | None]:
        logprobs, count = log_softmax(adjusted), min(self._params.logprobs or 0, len(adjusted))
        likely = [int(i) for i in _top(logprobs, count) if np.isfinite(logprobs[i])] if count else []
        return float(logprobs[token]), {i: float(logprobs[i]) for i in likely} if count else None


def log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Natural log-probabilities of logits ``[…, V]``, in float64."""
    shifted: npt.NDArray[np.float64] = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def _top(scores: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """The `count` ids of the highest scores, falling; ties by id, so that no order depends on how they were found."""
    ids = np.argpartition(scores, len(scores) - count)[len(scores) - count :]
    return np.asarray(ids[np.lexsort((ids, -scores[ids]))], dtype=np.int64)
