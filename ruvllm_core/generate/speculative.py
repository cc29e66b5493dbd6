"""Speculative decoding: draft tokens cheaply, compute them all in one step, keep those the model would have drawn.

What is kept is distributed as without drafts, whatever was drafted (Leviathan et al., arXiv 2211.17192; Chen et al.,
arXiv 2302.01318). `run_batch` walks the drafted tokens; here are the rule for one of them and the choice of how many.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ruvllm_core.generate.depth import Costs, Depth
from ruvllm_core.generate.request import SpeculationStats, TokenEvent
from ruvllm_core.generate.sampler import Distribution
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import Draft, FloatArray, Proposer

if TYPE_CHECKING:
    from ruvllm_core.generate.sequence import Sequence

NOTHING = Draft(())
_log = get_logger("speculative")


def accept_or_resample(target: Distribution, drafted: int, drawn_from: FloatArray, uniform: Callable[[], float]) -> int:
    """`drafted` with probability ``min(1, p / q)``, else a token from ``max(0, p - q)``: together, one drawn from p.

    Args:
        target: p.
        drafted: a token drawn from q.
        drawn_from: q, float32 ``[V]``.
        uniform: a new random number in ``[0, 1)`` at every call.
    """
    p = target.probabilities
    if uniform() * drawn_from[drafted] < p[target.ids == drafted].sum():
        return drafted
    rest = np.maximum(p - drawn_from[target.ids], 0.0)
    return Distribution(target.ids, rest if rest.any() else p).draw(uniform())


@dataclass
class _Record:
    """What is known of a request: how far to draft for it, and what came of that.

    `seconds` is what some of its tokens took, `plain` what steps of one token would have taken for them, `proposing`
    what the draft of this step took.
    """

    depth: Depth = field(default_factory=Depth)
    proposed: int = 0
    accepted: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    plain: float = 0.0
    proposing: float = 0.0
    drafted: bool = False
    broken: bool = False


class Speculator:
    """Decides when and how far to draft, has it done, and keeps count. For one engine, called from one thread.

    A step calls `draft` for the sequences that it only needs the next token of, then `computed`, then `learn` for each
    sequence that has drawn.

    Args:
        proposer: drafts.
        most: drafts have at most so many tokens.
        clock: seconds from any start.
    """

    def __init__(self, proposer: Proposer, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._proposer, self._most, self._clock = proposer, most, clock
        self._steps, self._proposals = Costs({}), Costs({0: 0.0})
        self._records: dict[str, _Record] = {}
        self._mark = self._step_s = 0.0  # when the last call ended; what the last step took, 0 if it cannot be compared

    def draft(self, sequence: Sequence, sequences: int) -> Draft:
        """What may follow the tokens of `sequence`, one of `sequences` in the next step."""
        request, began = sequence.request, self._clock()
        record = self._records.setdefault(request.id, _Record())
        room = min(self._most, request.max_new_tokens - sequence.generated - 1)
        draft, self._mark, record.proposing, follows = NOTHING, began, 0.0, record.drafted
        record.drafted = False
        if record.broken or record.depth.waiting or room < 1 or not self._steps.seconds:
            return draft
        depths = np.arange(room + 1)
        costs = self._steps(sequences * (1 + depths)) + sequences * self._proposals(depths)
        if wanted := record.depth.choose(costs):
            try:
                assert sequence.hidden is not None
                draft = self._proposer.propose(request, sequence.token_ids, wanted, sequence.hidden)
                _check(draft, wanted, sequence.sampler.vocab_size)
            except Exception as error:  # a proposer may be foreign code, and no answer depends on it
                what = f"{type(error).__name__}: {error}"
                _log.warning("drafting failed: this request goes on without", request=request.id, error=what)
                draft, record.broken = NOTHING, True
            self._mark = self._clock()
            record.proposing, record.drafted = self._mark - began, True
            if follows:  # the first one after a pause also takes in the text since the last
                self._proposals.add(wanted, record.proposing)
        return draft

    def computed(self, tokens: int, comparable: bool) -> None:
        """The step has computed `tokens`; it is comparable if they are all of answers and drafts."""
        now = self._clock()
        self._step_s, self._mark = (now - self._mark if comparable else 0.0), now
        if comparable:
            self._steps.add(tokens, self._step_s)

    def learn(
        self, sequence: Sequence, sequences: int, draft: Draft, drawn: SequenceOf[TokenEvent]
    ) -> SpeculationStats:
        """A step of `sequences` has `drawn` tokens of one of them, after `draft`; its statistics so far."""
        now, record = self._clock(), self._records.setdefault(sequence.request.id, _Record())
        right = [event.token_id == token for event, token in zip(drawn, draft.tokens, strict=False)].count(True)
        record.depth.learn(len(draft.tokens), right)
        record.proposed += len(draft.tokens)
        record.accepted += right
        if sequence.generated > len(drawn):  # the first token comes of the prompt
            record.tokens += len(drawn)
            record.steps += 1
        plain = self._steps.seconds.get(sequences)
        if self._step_s and plain is not None:
            drawing = now - self._mark
            record.seconds += self._step_s + drawing + record.proposing
            record.plain += len(drawn) * plain + drawing
        self._mark = now
        return SpeculationStats(
            proposed=record.proposed,
            accepted=record.accepted,
            tokens_per_step=record.tokens / max(record.steps, 1),
            speedup_estimate=record.plain / record.seconds if record.seconds else None,
        )

    def forget(self, request_id: str) -> None:
        """A request has ended; one that is not known is ignored."""
        self._records.pop(request_id, None)
        self._proposer.forget(request_id)

    def close(self) -> None:
        """Free what the proposer holds."""
        self._proposer.close()


def _check(draft: Draft, wanted: int, vocab_size: int) -> None:
    """Raise `ValueError` for a draft that cannot be computed or judged."""
    q, count = draft.probabilities, len(draft.tokens)
    fits = count <= wanted and all(0 <= token < vocab_size for token in draft.tokens)
    if not fits or (q is not None and q.shape != (count, vocab_size)):
        raise ValueError(
            f"expected up to {wanted} tokens below {vocab_size}, with one distribution each or none: {draft}"
        )
