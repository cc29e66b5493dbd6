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

from ruvllm_core.generate.depth import Costs, Depth, mean
from ruvllm_core.generate.request import SpeculationStats, TokenEvent
from ruvllm_core.generate.sampler import Distribution
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import Draft, FloatArray, Proposer

if TYPE_CHECKING:
    from ruvllm_core.generate.sequence import Sequence

NOTHING, _NONE = Draft(()), SpeculationStats(0, 0, 0.0, None)
_FIRST = 4  # steps without drafts before the first draft, so that there is something to compare with
_log = get_logger("speculative")


def accept_or_resample(target: Distribution, uniform: Callable[[], float], drafted: int, drawn_from: FloatArray) -> int:
    """`drafted` with probability ``min(1, p / q)``, else a token from ``max(0, p - q)``: together, one drawn from p.

    Args:
        target: p.
        uniform: a new random number in ``[0, 1)`` at every call.
        drafted: a token drawn from q.
        drawn_from: q, float32 ``[V]``.
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
    what the draft of this step took, `costs` what steps take by its depth.
    """

    depth: Depth = field(default_factory=Depth)
    stats: SpeculationStats = _NONE
    seconds: float = 0.0
    plain: float = 0.0
    proposing: float = 0.0
    costs: SequenceOf[float] = ()


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
        self._steps, self._proposal_s, self._compared, self._knows = Costs(), 0.0, 0, False
        self._records: dict[str, _Record] = {}
        self._mark = self._step_s = 0.0  # when the last call ended; what the last step took, 0 if it cannot be compared

    def draft(self, sequence: Sequence, sequences: int) -> Draft:
        """What may follow the tokens of `sequence`, one of `sequences` in the next step."""
        request, began = sequence.request, self._clock()
        record = self._records.setdefault(request.id, _Record())
        draft, self._mark, follows, record.proposing = NOTHING, began, record.proposing > 0, 0.0
        if (best := record.depth.best) is None and self._compared >= _FIRST:
            costs = self._steps(sequences * (1 + (depths := np.arange(self._most + 1))))
            record.costs, proposing = costs.tolist(), sequences * self._proposal_s * depths
            best = self._most if self._knows else record.depth.choose(costs + proposing)
        wanted = min(best or 0, request.max_new_tokens - sequence.generated - 1)
        if wanted > 0 and sequence.hidden is not None:
            try:
                draft = self._proposer.propose(request, sequence.token_ids, wanted, sequence.hidden)
                _check(draft, wanted, sequence.sampler.vocab_size)
            except Exception as error:  # a proposer may be foreign code, and no answer depends on it
                what = f"{type(error).__name__}: {error}"
                _log.warning("drafting failed: this request goes on without", request=request.id, error=what)
                draft, record.depth.best = NOTHING, 0
            self._knows = draft.likely is not None
            if draft.likely is not None:
                keep, q = record.depth.cut(draft.likely, record.costs), draft.probabilities
                draft = Draft(draft.tokens[:keep], None if q is None else q[:keep], draft.likely[:keep])
            self._mark = self._clock()
            record.proposing = self._mark - began
            if follows:  # the first one after a pause also takes in the text since the last
                self._proposal_s = mean(self._proposal_s, record.proposing / wanted)
        return draft

    def computed(self, tokens: int, comparable: bool) -> None:
        """The step has computed `tokens`; it is comparable if they are all of answers and drafts."""
        now = self._clock()
        self._step_s, self._mark = (now - self._mark if comparable else 0.0), now
        if comparable:
            self._steps.add(tokens, self._step_s)
            self._compared += 1

    def learn(self, sequence: Sequence, sequences: int, drawn: SequenceOf[TokenEvent]) -> SpeculationStats:
        """A step of `sequences` has `drawn` tokens of one of them; its statistics so far."""
        drafted = sequence.draft.tokens
        now, record = self._clock(), self._records.setdefault(sequence.request.id, _Record())
        right = [event.token_id == token for event, token in zip(drawn, drafted, strict=False)].count(True)
        if (likely := sequence.draft.likely) is not None:
            record.depth.judge(likely, right, record.costs, sequences * record.proposing)
        else:
            record.depth.learn(len(drafted), right)
        if self._step_s and (plain := self._steps.seconds.get(sequences)) is not None:
            record.seconds += self._step_s + record.proposing + now - self._mark
            record.plain += len(drawn) * plain + now - self._mark
        self._mark, stats = now, record.stats
        speedup = record.plain / record.seconds if record.seconds else None
        accepted, tokens = stats.accepted + len(drawn) - 1, sequence.generated - 1  # the first one is the prompt's
        per_step = tokens / max(tokens - accepted, 1)
        record.stats = SpeculationStats(stats.proposed + len(drafted), accepted, per_step, speedup)
        return record.stats

    def forget(self, request_id: str) -> None:
        """A request has ended; one that is not known is ignored."""
        self._records.pop(request_id, None)
        self._proposer.forget(request_id)

    def close(self) -> None:
        """Free what the proposer holds."""
        self._proposer.close()


def _check(draft: Draft, wanted: int, vocab_size: int) -> None:
    """Raise `ValueError` for a draft that cannot be computed or judged."""
    tokens, q = draft.tokens, draft.probabilities
    likely = tokens if draft.likely is None else draft.likely
    if not len(likely) == len(tokens) <= wanted or not all(0 <= token < vocab_size for token in tokens):
        raise ValueError(f"expected up to {wanted} tokens below {vocab_size}, got {list(tokens)}, {len(likely)} likely")
    if q is not None and q.shape != (len(tokens), vocab_size):
        raise ValueError(f"expected probabilities [{len(tokens)}, {vocab_size}], got {list(q.shape)}")
