"""A request while it runs, and the one way in which backends run a batch of them."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial

import numpy as np

from ruvllm_core.decode.batch import Batch
from ruvllm_core.errors import CacheFull, GenerationError
from ruvllm_core.generate.request import FinishReason, Request, TokenEvent
from ruvllm_core.generate.sampler import Sampler
from ruvllm_core.generate.speculative import NOTHING, Speculator, accept_or_resample
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Decoder, FloatArray, KVCachePolicy

_KEPT = 64  # tokens of a distribution that learning gets to see: almost all of it


class Sequence:
    """What a backend keeps of a running request.

    Attributes:
        token_ids: prompt and answer so far.
        computed: how many of them have their keys and values in the cache.
        draft: of the latest step; while that computes, its tokens are the last of `token_ids`.
        hidden: the state the last token was drawn from, ``[C]``, before any adapter; None before the first one.
        rope_variant: the table of rotary frequencies all its keys use.

    Raises `CacheFull` if the cache cannot take it.
    """

    def __init__(self, request: Request, cache: KVCachePolicy, spec: ModelSpec) -> None:
        self.request = request
        self.token_ids = list(request.prompt_ids)
        self.draft = NOTHING
        self.hidden: FloatArray | None = None
        self.rope_variant = spec.rope_variant(request.capacity)
        self.sampler = Sampler(request.params, request.prompt_ids, spec.vocab_size)
        self.started = time.perf_counter()
        self.cached = self.computed = cache.open(request.id, self.token_ids, request.capacity, request.cache_key)

    @property
    def pending(self) -> int:
        """Tokens still to be computed before the next one can be drawn."""
        return len(self.token_ids) - self.computed

    @property
    def generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    def accept(self, token: int) -> FinishReason | None:
        """Append a drawn token; why it is the last one, if it is."""
        self.token_ids.append(token)
        if token in self.request.stop_ids and not self.request.params.ignore_eos:
            return "stop"
        return "length" if self.generated >= self.request.max_new_tokens else None


#: Sequences, and how many of their next tokens to compute.
Work = SequenceOf[tuple[Sequence, int]]


def advance(decoder: Decoder, cache: KVCachePolicy, work: Work, *, every: bool = False) -> tuple[FloatArray, Batch]:
    """Compute the next `count` tokens of each sequence, for which `cache` has made room.

    Returns the hidden states ``[R, C]`` of the last token of those then up to date, or of `every` token.
    """
    batch = make_batch(cache, work)
    if every:
        batch.rows = np.arange(len(batch.tokens))
    hidden = decoder.forward(batch)
    for sequence, count in work:
        cache.commit(sequence.request.id, sequence.token_ids[sequence.computed : sequence.computed + count])
        sequence.computed += count
    return hidden, batch


def run_batch(
    decoder: Decoder, cache: KVCachePolicy, work: Work, speculator: Speculator | None = None
) -> list[TokenEvent]:
    """Compute the next `count` tokens of each sequence; draw one more for each that is then up to date.

    With a speculator, sequences of which only the last token is to be computed may draw several (see
    `ruvllm_core.generate.speculative`). A sequence for which the cache has no room fails alone: its event carries the
    error.
    """
    events: list[TokenEvent] = []
    running: list[tuple[Sequence, int]] = []
    answering = [s.hidden is not None and count == s.pending == 1 for s, count in work]
    for (sequence, count), ready in zip(work, answering, strict=True):
        name = sequence.request.id
        sequence.draft = speculator.draft(sequence, len(work)) if speculator is not None and ready else NOTHING
        try:
            try:
                cache.extend(name, count + len(sequence.draft.tokens))
            except CacheFull:
                sequence.draft = NOTHING
                cache.extend(name, count)
            sequence.token_ids += sequence.draft.tokens
            running.append((sequence, count + len(sequence.draft.tokens)))
        except CacheFull as error:
            events.append(TokenEvent(name, None, "error", error=error))
    if not running:
        return events
    hidden, batch = advance(decoder, cache, running)
    drawing = [sequence for sequence, _ in running if not sequence.pending]
    if not drawing:
        return events
    logits = decoder.logits(hidden, batch)
    if speculator is not None:
        speculator.computed(len(batch.tokens), all(answering))
    for sequence in drawing:
        rows = 1 + len(sequence.draft.tokens)
        drawn = _draw(sequence, hidden[:rows], logits[:rows])
        hidden, logits = hidden[rows:], logits[rows:]
        if (kept := len(sequence.token_ids) - 1) < sequence.computed:
            cache.truncate(sequence.request.id, kept)
            sequence.computed = kept
        if speculator is not None:
            stats = speculator.learn(sequence, len(running), drawn)
            drawn = [replace(event, speculation=stats) for event in drawn]
        events += drawn
    return events


def make_batch(cache: KVCachePolicy, work: Work) -> Batch:
    """The ragged batch of the next `count` tokens of each sequence.

    Wanted rows are the last of those then up to date, and in a draft also those before every drafted token.
    """
    counts = np.array([count for _, count in work], dtype=np.int32)
    cu_q = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    tokens = np.concatenate([s.token_ids[s.computed : s.computed + count] for s, count in work]).astype(np.int64)
    positions = np.concatenate([np.arange(s.computed, s.computed + count, dtype=np.int64) for s, count in work])
    ends = zip(cu_q[1:].tolist(), work, strict=True)
    rows = [r for end, (s, n) in ends if n == s.pending for r in range(end - 1 - len(s.draft.tokens), end)]
    adapters = tuple(s.request.adapter for s, _ in work)
    return Batch(
        tokens=tokens,
        positions=positions,
        cu_q=cu_q,
        rows=np.array(rows, dtype=np.int64),
        kv=cache.view([s.request.id for s, _ in work]),
        rope_variants=np.array([s.rope_variant for s, _ in work], dtype=np.uint8),
        adapters=adapters if any(adapter is not None for adapter in adapters) else (),
    )


def _draw(sequence: Sequence, hidden: FloatArray, logits: FloatArray) -> list[TokenEvent]:
    """Draw a token from the first of ``[1 + k]`` rows, and from each next one as long as that was the drafted token."""
    request, draft, first = sequence.request, sequence.draft, sequence.generated == 0
    del sequence.token_ids[len(sequence.token_ids) - len(draft.tokens) :]
    events: list[TokenEvent] = []
    for row, drafted in enumerate((*draft.tokens, None)):
        pick = None
        if drafted is not None and draft.probabilities is not None and not request.params.repeatable:
            pick = partial(accept_or_resample, drafted=drafted, drawn_from=draft.probabilities[row])
        try:
            sampled = sequence.sampler.sample(logits[row], pick)
        except GenerationError as error:
            return [*events, TokenEvent(request.id, None, "error", error=error)]
        sequence.hidden = hidden[row].copy()
        event = TokenEvent(
            request_id=request.id,
            token_id=sampled.token,
            finish_reason=sequence.accept(sampled.token),
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            hidden=sequence.hidden if request.keep_hidden else None,
            drawn_from=sampled.drawn_from.head(_KEPT) if request.keep_hidden and sampled.drawn_from else None,
            cached_tokens=sequence.cached if first else 0,
            prefill_s=time.perf_counter() - sequence.started if first else 0.0,
        )
        events.append(event)
        if event.finish_reason is not None or sampled.token != drafted:
            break
    return events
