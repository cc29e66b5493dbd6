"""What is asked for, what comes back, and what learning gets to see."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from ruvllm_core.errors import RequestError, near

if TYPE_CHECKING:
    from ruvllm_core.generate.sampler import Distribution
    from ruvllm_core.protocols import Adapter

FinishReason = Literal["stop", "length", "cancelled", "error"]
_StopString = Annotated[str, Field(min_length=1)]  # an empty one would stop at once


class SamplingFields(BaseModel):
    """How to generate.

    Attributes:
        max_tokens: most tokens to generate; the context may end generation earlier.
        temperature: 0 is greedy.
        top_k: sample among the k most likely tokens; 0 is all of them.
        top_p: nucleus sampling (arXiv 1904.09751); 1 is off.
        min_p: drop tokens less likely than `min_p` times the most likely one (arXiv 2407.01082); 0 is off.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen so far, prompt included
            (CTRL, arXiv 1909.05858); 1 is off.
        frequency_penalty, presence_penalty: subtracted from the logit of a generated token, per occurrence and once.
        logit_bias: added to logits, by token id.
        seed: makes sampling repeatable; None draws one.
        stop: strings that end the text; they are not part of it.
        ignore_eos: go on to `max_tokens` whatever the model says.
        logprobs: report log-probabilities of this many most likely tokens, 0 for the chosen one alone, None for none.
        hidden_states: keep each generated token's hidden state for the trajectory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.7, ge=0.0, le=100.0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(0.9, gt=0.0, le=1.0)
    min_p: float = Field(0.0, ge=0.0, lt=1.0)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100.0)
    frequency_penalty: float = Field(0.0, ge=-10.0, le=10.0)
    presence_penalty: float = Field(0.0, ge=-10.0, le=10.0)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=0, lt=2**64)
    stop: Annotated[tuple[_StopString, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)] = ()
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=0, le=100)
    hidden_states: bool = False

    @property
    def repeatable(self) -> bool:
        """Whether the same tokens come out every time."""
        return self.temperature == 0.0 or self.seed is not None

    @field_validator("logit_bias")
    @classmethod
    def _finite_bias(cls, value: dict[int, float]) -> dict[int, float]:
        if not all(bias == -np.inf or abs(bias) <= 1e6 for bias in value.values()):
            raise ValueError("a bias must be between -1e6 and 1e6, or -inf, which forbids a token")
        return value


class GenerateParams(SamplingFields):
    """How to generate one answer (see `SamplingFields`). A value that makes no sense raises `RequestError`.

    Attributes:
        cache_salt: cached prefixes are shared only among requests with the same one.
        user: whose answer it is, for loops that learn for each user apart; empty is whoever has no name.
    """

    cache_salt: str = ""
    user: str = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            unknown = [str(e["loc"][-1]) for e in error.errors() if e["type"] == "extra_forbidden"]
            hint = near(unknown[0], type(self).model_fields) if unknown else None
            raise RequestError(f"these generation parameters make no sense: {problems}", hint=hint) from None


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt on its way through a backend.

    Attributes:
        id: unique in this engine.
        prompt_ids: the tokenized prompt, never empty.
        stop_ids: tokens that end generation.
        capacity: most tokens, prompt and answer together, that the sequence may come to.
        adapter: the low-rank adapter it runs with, or None.
        keep_hidden: put hidden states, and what tokens were drawn from, into the token events.
        cache_key: what must not share cached prefixes with others (see `KVCachePolicy.open`).
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: GenerateParams
    stop_ids: frozenset[int]
    capacity: int
    adapter: Adapter | None = None
    keep_hidden: bool = False
    cache_key: str = ""

    @property
    def max_new_tokens(self) -> int:
        return min(self.params.max_tokens, self.capacity - len(self.prompt_ids))


@dataclass(frozen=True, eq=False)
class TokenEvent:
    """One generated token, from the backend.

    Attributes:
        finish_reason: set on a request's last event.
        token_id: None on an event that only ends a request (an error).
        logprob: natural log-probability after penalties and bias, at temperature 1, if asked for.
        top_logprobs: the most likely tokens with theirs, if asked for.
        hidden: float32 ``[C]``, the state whose logits this token was drawn from, before any adapter; if asked for.
        drawn_from: the likeliest of what it was drawn from, at most 64, with their probabilities in all of it; if asked
            for, and not greedy.
        cached_tokens: prompt tokens that needed no computing; on the first event.
        prefill_s: seconds from when work on the request began; on the first event.
        error: why the request failed.
        speculation: statistics of the request so far, if drafts are made.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: Mapping[int, float] | None = None
    hidden: npt.NDArray[np.float32] | None = None
    drawn_from: Distribution | None = None
    cached_tokens: int = 0
    prefill_s: float = 0.0
    error: Exception | None = None
    speculation: SpeculationStats | None = None


@dataclass(frozen=True)
class SpeculationStats:
    """What speculative decoding did for one request.

    Attributes:
        proposed, accepted: tokens drafted, and what they added to the one token that every step gives.
        tokens_per_step: tokens after the first, by the steps they took: 1 without drafts, 0 without such tokens.
        speedup_estimate: how many times faster these steps gave tokens than steps without drafts, as measured, would
            have; None if there was nothing to compare.
    """

    proposed: int
    accepted: int
    tokens_per_step: float
    speedup_estimate: float | None


@dataclass(frozen=True)
class StreamEvent:
    """A piece of the answer, for whoever asked. `text` may be empty while a character is incomplete."""

    request_id: str
    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: Mapping[int, float] | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. `cached_tokens` of the prompt needed no computing."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens per second of one request.

    Attributes:
        queue_s: from submission until work on it began.
        ttft_s: from submission to the first token.
        prefill_tok_s: prompt tokens computed over the time to the first token, waiting left out.
        decode_tok_s: tokens after the first over the time they took; 0 with a single token.
        total_s: from submission to the last token.
    """

    queue_s: float
    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float
    total_s: float


@dataclass(frozen=True)
class Generation:
    """A finished answer. `speculation` is None if no drafts were made, and so are log-probabilities not asked for."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[Mapping[int, float], ...] | None = None
    speculation: SpeculationStats | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class Trajectory:
    """All that learning gets to see of a finished request.

    Attributes:
        logprobs: float32 ``[n]`` of the generated tokens after penalties and bias, at temperature 1, or None.
        hidden: float32 ``[n, C]``, the state each token was drawn from, before any adapter, or None.
        drawn_from: the likeliest of what each token was drawn from (see `TokenEvent`); empty if greedy or not recorded.
        adapter_version: of the adapter it ran with, or None for the base model.
        speculation: what came of drafts, or None if none were made.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    params: GenerateParams
    adapter_version: str | None = None
    logprobs: npt.NDArray[np.float32] | None = None
    hidden: npt.NDArray[np.float32] | None = None
    drawn_from: tuple[Distribution, ...] = ()
    speculation: SpeculationStats | None = None


_numbers = itertools.count(1)
_process = uuid.uuid4().hex[:8]


def new_request_id() -> str:
    """An id that no other request of this machine has."""
    return f"req-{_process}-{next(_numbers)}"
