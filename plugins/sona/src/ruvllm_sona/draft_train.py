"""Training of a draft head on what the model has said to one user: `train`, a generator of slices of milliseconds.

Distillation: cross entropy against the distributions that the model drew its tokens from (Zhou et al., DistillSpec,
arXiv 2310.08461; Liu et al., Online Speculative Decoding, arXiv 2310.07177), for the next token and, through the head's
own state, for the one after it. Part of the answers is held out; a head that is not better there is not handed out.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError
from ruvllm_sona.draft import DraftHead, DraftNetwork, Embeddings
from ruvllm_sona.draft_ngrams import NGrams
from ruvllm_sona.draft_store import Answer

T = TypeVar("T")
FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]
Checkpoint = Mapping[str, npt.NDArray[np.generic]]
_SHARPNESS = (1.0, 1.2, 1.4, 1.7, 2.0)


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained.

    Attributes:
        width, gates, vocabulary: r, m and R of `DraftHead`.
        epochs: passes over all rows at most; training ends after `patience` of them without a better score.
        batch, half: rows of a step, and how many of them a slice takes.
        rate, decay, dropout: AdamW's learning rate at its highest and weight decay; of the gates' products.
        second: weight of the second token's loss.
        ridge: of the linear guess that training starts from, in rows.
        held_out: every so manieth answer is for the score.
        least: answers without which nothing is trained.
        threads: of PyTorch, within a slice.
    """

    width: int = 160
    gates: int = 160
    vocabulary: int = 1536
    epochs: int = 7
    patience: int = 2
    batch: int = 64
    half: int = 32
    rate: float = 1.5e-3
    decay: float = 0.2
    dropout: float = 0.35
    second: float = 0.5
    ridge: float = 300.0
    held_out: int = 10
    least: int = 20
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """How a head does on answers that it was not trained on; all are expected acceptances.

    Attributes:
        first, second: of the likeliest token, drafted as certain; the second one after a right first one.
        drawn: of a first token drawn with the head's probabilities, and the `sharpness` at which that is highest.
    """

    first: float
    second: float
    drawn: float
    sharpness: float = 1.0

    @property
    def tokens(self) -> float:
        """Right tokens to expect of a draft of two: what training goes by."""
        return self.first * (1.0 + self.second)


NOTHING = Score(0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Progress:
    """Where training stands after a slice.

    Attributes:
        phase: ``start``, ``fit``, ``check``, or ``done``, which comes once and last.
        epoch: passes done.
        loss: mean cross entropy of the latest pass so far, nats.
        score, before: on held-out answers, of the trained head and of the one that training was called with.
        checkpoint: after each pass, arrays from which training can go on (`train`'s `resume`).
        head: with ``done``, the trained head if it is better than the one before it.
    """

    phase: str
    epoch: int = 0
    loss: float = 0.0
    score: Score | None = None
    before: Score | None = None
    checkpoint: Checkpoint | None = None
    head: DraftHead | None = None


def train(
    head: DraftHead | None,
    answers: Sequence[Answer],
    embeddings: Embeddings,
    config: TrainConfig | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[Progress]:
    """Train a head in slices; may be left at any of them. Needs PyTorch.

    Args:
        head: the one in use, which the new one has to beat; None is no drafts at all.
        answers: of one user; the same ones if training goes on.
        embeddings: of the model that gave them.
        resume: a checkpoint of the same training.

    Raises `LearningError` for too few answers, those of another model, or a checkpoint of other training.
    """
    import torch

    config = config or TrainConfig()
    slices = _train(head, answers, embeddings, config, resume)
    while True:
        threads = torch.get_num_threads()
        torch.set_num_threads(config.threads)
        try:
            with torch.enable_grad():
                progress = next(slices, None)
        finally:
            torch.set_num_threads(threads)
        if progress is None:
            return
        yield progress


def _train(
    head: DraftHead | None,
    answers: Sequence[Answer],
    embeddings: Embeddings,
    config: TrainConfig,
    resume: Checkpoint | None,
) -> Iterator[Progress]:
    from ruvllm_sona.draft_model import Model, Rows

    if len(answers) < max(config.least, config.held_out):
        needed = max(config.least, config.held_out)
        raise LearningError(f"a draft head needs {needed} answers to learn from, there are {len(answers)}")
    if any(answer.hidden.shape[1] != embeddings.hidden_size for answer in answers):
        raise LearningError(f"these answers are not of a model of width {embeddings.hidden_size}")
    if head is not None:
        head.check(embeddings.hidden_size, embeddings.vocab_size)
    held = [answer for n, answer in enumerate(answers) if n % config.held_out == config.held_out - 1]
    rest = [answer for n, answer in enumerate(answers) if n % config.held_out != config.held_out - 1]
    vocabulary = frequent(rest, embeddings.vocab_size, config.vocabulary)
    yield Progress("start")
    rows, check = Rows(rest, vocabulary, embeddings), Rows(held, vocabulary, embeddings)
    yield Progress("start")
    model = Model(vocabulary, embeddings.hidden_size, config)
    if resume is not None:
        model.restore(resume, rows)
    else:
        yield from _each(model.start(rows, embeddings), Progress("start"))
    while model.epoch < config.epochs and model.stale < config.patience:
        yield from (Progress("fit", model.epoch, loss) for loss in model.fit(rows))
        tokens = yield from _each(model.score(check), Progress("check", model.epoch, model.loss))
        model.remember(tokens)
        yield Progress("check", model.epoch, model.loss, checkpoint=model.checkpoint(rows))
    checking = Progress("check", model.epoch, model.loss)
    trained = yield from _each(model.head(rows, embeddings), checking)
    after = yield from _each(measure(trained, held), checking)
    before = NOTHING if head is None else (yield from _each(measure(head, held), checking))
    if after.tokens <= before.tokens:
        yield Progress("done", model.epoch, model.loss, after, before)
        return
    ngrams = NGrams.of([(answer.tokens.tolist(), 1) for answer in answers])
    best = replace(trained, ngrams=ngrams, sharpness=after.sharpness)
    yield Progress("done", model.epoch, model.loss, after, before, head=best)


def measure(head: DraftHead, answers: Sequence[Answer], slice_rows: int = 32) -> Generator[None, None, Score]:
    """How `head` does on `answers` by itself, without n-grams, as it would be run; in slices."""
    network, found = DraftNetwork(head), Counts()
    for answer in answers:
        tokens = answer.tokens.tolist()
        for row in range(len(answer.hidden) - 1):
            s = network.first(answer.hidden[row].astype(np.float32), tokens[row + 1], tokens[row])
            logits = network.logits(s)
            found.first(head.vocabulary, logits, answer.ids[row + 1], answer.probabilities[row + 1])
            if row + 2 < len(answer.hidden) and head.vocabulary[int(logits.argmax())] == tokens[row + 2]:
                likeliest = head.vocabulary[
                    int(network.logits(network.next(s, tokens[row + 2], tokens[row + 1])).argmax())
                ]
                p = answer.probabilities[row + 2][answer.ids[row + 2] == likeliest].sum()
                found.second.append(float(p))
            if row % slice_rows == slice_rows - 1:
                yield
    return found.score()


class Counts:
    """Collects what a `Score` is made of."""

    def __init__(self) -> None:
        self.certain: list[float] = []
        self.second: list[float] = []
        self.drawn: list[FloatArray] = []

    def first(self, vocabulary: IntArray, logits: FloatArray, ids: IntArray, probabilities: FloatArray) -> None:
        """A first token, drafted by `logits` ``[R]`` where the model drew from `ids` with their `probabilities`."""
        p = probabilities.astype(np.float32)
        places = np.minimum(np.searchsorted(vocabulary, ids), len(vocabulary) - 1)
        known = vocabulary[places] == ids
        self.certain.append(float(p[ids == vocabulary[int(logits.argmax())]].sum()))
        weights = np.exp(np.outer(_SHARPNESS, logits - logits.max()))
        q = weights[:, places] * known / weights.sum(1, keepdims=True)
        self.drawn.append(np.minimum(q, p).sum(1))

    def score(self) -> Score:
        if not self.certain:
            return NOTHING
        drawn = np.mean(self.drawn, axis=0)
        best = int(drawn.argmax())
        second = float(np.mean(self.second)) if self.second else 0.0
        return Score(float(np.mean(self.certain)), second, float(drawn[best]), _SHARPNESS[best])


def frequent(answers: Sequence[Answer], vocab_size: int, most: int) -> IntArray:
    """The tokens, ascending, that the model was likeliest to say in these answers: at most so many, int64 ``[R]``."""
    mass = np.zeros(vocab_size)
    for answer in answers:
        np.add.at(mass, answer.ids, answer.probabilities.astype(np.float64))
    ranked = np.argsort(-mass, kind="stable")[:most]
    return np.sort(ranked[mass[ranked] > 0])


def _each(slices: Generator[None, None, T], progress: Progress) -> Generator[Progress, None, T]:
    """Slices that say nothing themselves."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            found: T = end.value
            return found
        yield progress
