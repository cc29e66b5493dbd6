"""The deep loop: an adapter of higher rank, trained on all that was ever rated.

The loss is that of `objective` with the weights of KTO (arXiv 2402.01306): good and bad answers count the same in all,
however many there are of each, and what has moved far with its verdict is slowed. Texts that nobody rated are on the
leash too. Some rated answers are held out, and the epoch that suits them best is the one that is kept, since deep
training learns from few answers and then goes on to learn them by heart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import FloatArray, LowRank
from ruvllm_sona.learner import Learner, LearnerConfig
from ruvllm_sona.leash_texts import leash_piece
from ruvllm_sona.network import Network
from ruvllm_sona.objective import ObjectiveConfig
from ruvllm_sona.records import Example
from ruvllm_sona.score import answer_logprobs


@dataclass(frozen=True)
class DeepConfig:
    """How long, and how far.

    Attributes:
        learner: rank, learning rate and loss.
        epochs: most rounds over the answers.
        batch: answers to one step of Adam.
        held_out: share of the answers that decide when to stop.
        patience: rounds without a better one, after which it ends.
        seed: of the order, and of who is held out.
    """

    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(
            rank=8, learning_rate=1e-3, objective=ObjectiveConfig(leash=0.045, text_leash=0.5), average=40
        )
    )
    epochs: int = 3
    batch: int = 4
    held_out: float = 0.15
    patience: int = 1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class DeepProgress:
    """Where deep training is.

    Attributes:
        epoch: rounds done.
        margin: nats by which held-out good answers have become likelier than the bad ones, a token.
        best: the margin of what would be kept now.
        deltas: what would be kept now; None if nothing is better than before.
        state: for `resume`.
    """

    epoch: int
    margin: float
    best: float
    deltas: Mapping[str, LowRank] | None
    state: Mapping[str, FloatArray]


def deep(
    network: Network,
    shapes: Mapping[str, tuple[int, int]],
    examples: Sequence[Example],
    texts: Sequence[Sequence[int]],
    config: DeepConfig,
    resume: DeepProgress | None = None,
) -> Iterator[DeepProgress | None]:
    """Train; yields None between slices and a `DeepProgress` after every round, from which it can be resumed.

    `texts` are those that nobody rated (see `leash_texts`), a piece of one on the leash in every step.

    Raises `LearningError` if there is nothing to tell good from bad by.
    """
    good = [one.quality > 0.5 for one in examples]
    if not 0 < sum(good) < len(good):
        raise LearningError(
            f"deep training needs good and bad answers, there are {sum(good)} good of {len(good)}",
            hint="rate more answers",
        )
    train, held = split(examples, config)
    learner = Learner(shapes, config.learner, device=str(network.device))
    best, kept, done = 0.0, None, 0
    if resume is not None:
        learner.restore(resume.state)
        best, kept, done = resume.best, resume.deltas, resume.epoch
    since = 0
    for epoch in range(done, config.epochs):
        for batch, weights in batches(train, config, epoch):
            pieces = [leash_piece(texts, learner.steps)] if texts else []
            for _ in learner.step(network, batch, weights, texts=pieces):
                yield None
        deltas, margin = learner.deltas(), 0.0
        for found in _margin(network, deltas, held):
            margin = found if found is not None else margin
            yield None
        since = 0 if margin > best else since + 1
        if margin > best:
            best, kept = margin, deltas
        yield DeepProgress(epoch + 1, margin, best, kept, learner.state())
        if since > config.patience:
            return


def batches(train: Sequence[Example], config: DeepConfig, epoch: int) -> Iterator[tuple[list[Example], list[float]]]:
    """Examples of each step of a round, and what each counts."""
    share = sum(one.quality > 0.5 for one in train) / len(train)
    random = np.random.default_rng((config.seed, epoch))
    order = random.permutation(len(train)).tolist()
    for at in range(0, len(order), config.batch):
        batch = [train[i] for i in order[at : at + config.batch]]
        yield batch, [_weight(one.quality, share) / len(batch) for one in batch]


def _weight(quality: float, share: float) -> float:
    """How much an answer counts: those above the middle half of all, those below it the other half."""
    share = min(max(share, 1e-3), 1.0 - 1e-3)
    return (quality - 0.5) / share if quality > 0.5 else (quality - 0.5) / (1.0 - share)


def split(examples: Sequence[Example], config: DeepConfig) -> tuple[list[Example], list[Example]]:
    """Answers to learn from, and others to judge by, in which both kinds are; with too few of a kind, all are both."""
    random = np.random.default_rng(config.seed)
    train: list[Example] = []
    held: list[Example] = []
    for kind in (True, False):
        of_kind = [one for one in examples if (one.quality > 0.5) == kind]
        order = random.permutation(len(of_kind)).tolist()
        count = round(config.held_out * len(of_kind))
        held += [of_kind[i] for i in order[:count]]
        train += [of_kind[i] for i in order[count:]]
    kinds = {one.quality > 0.5 for one in held}
    return (train, held) if len(kinds) == 2 else (list(examples), list(examples))


def _margin(network: Network, deltas: Mapping[str, LowRank], held: Sequence[Example]) -> Iterator[float | None]:
    moved: dict[bool, list[float]] = {True: [], False: []}
    for one in held:
        gained = 0.0
        for sign, adapters in ((1.0, deltas), (-1.0, None)):
            for found in answer_logprobs(network, adapters, one.prompt_ids, one.output_ids):
                if found is not None:
                    gained += sign * float(found.mean())
                yield None
        moved[one.quality > 0.5].append(gained)
    yield float(np.mean(moved[True]) - np.mean(moved[False]))
