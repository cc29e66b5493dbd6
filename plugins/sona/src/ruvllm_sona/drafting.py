"""`Drafting`: answers are collected while the engine drafts from what it learned, and better heads made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ruvllm_core.errors import LearningError
from ruvllm_core.generate.request import Trajectory
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import LearningContext
from ruvllm_sona.acceptance import Acceptance
from ruvllm_sona.draft import DraftHead, Embeddings
from ruvllm_sona.draft_proposer import DraftHeads, SonaProposer
from ruvllm_sona.draft_store import DraftStore
from ruvllm_sona.files import folder_name
from ruvllm_sona.schedule import Schedule

#: Of a user's folder, what drafts are made of. Nothing else knows it.
HEAD, ANSWERS, ACCEPTANCE = "draft.safetensors", "answers.safetensors", "acceptance.jsonl"
_EVERY = 25  # new answers from one training to the next, at least, and a quarter of those there are
_log = get_logger("sona")


class Drafting:
    """The draft heads of a model's users. Only an engine that asks for learned drafts has one, and collects answers.

    Args:
        folder: of the model; each user has a folder in it.
        schedule: where training is queued.
    """

    def __init__(self, folder: Path, context: LearningContext, schedule: Schedule) -> None:
        self._folder, self._schedule = folder, schedule
        self._spec, self._embeddings = context.spec, Embeddings(context.weights)
        self._heads = DraftHeads()
        self._stores: dict[str, DraftStore] = {}
        self._fresh: dict[str, int] = {}
        self._right: dict[str, Acceptance] = {}

    def proposer(self) -> SonaProposer:
        """Drafts with each user's newest head."""
        return SonaProposer(self._heads, self._spec.hidden_size, self._spec.vocab_size)

    def know(self, user: str) -> None:
        """Read what was kept of a user, once."""
        if user in self._stores:
            return
        self._stores[user], self._fresh[user] = DraftStore(), 0
        path = self._folder / folder_name(user)
        try:
            if (path / HEAD).exists():
                head = DraftHead.load(path / HEAD)
                head.check(self._spec.hidden_size, self._spec.vocab_size)
                self._heads.publish(user, head)
            if (path / ANSWERS).exists():
                self._stores[user].load(path / ANSWERS)
        except LearningError as error:
            _log.warning("drafts start anew", user=user, reason=str(error))

    def observe(self, trajectory: Trajectory) -> None:
        """Keep an answer; queue training when enough are new."""
        user = trajectory.params.user
        self.know(user)
        right = self._right.setdefault(user, Acceptance(self._folder / folder_name(user) / ACCEPTANCE))
        with _reported(user):
            right.add(trajectory.speculation)
        store = self._stores[user]
        if not store.add(trajectory):
            return
        self._fresh[user] += 1
        name = f"drafts {folder_name(user)}"
        if self._fresh[user] >= max(_EVERY, len(store) // 4) and not self._schedule.has(name):
            self._fresh[user] = 0
            self._schedule.add(name, self._train(user), rank=4)

    def forget(self, user: str) -> None:
        """Draft for this user as if nothing had been said."""
        self._schedule.drop(f"drafts {folder_name(user)}")
        self._heads.publish(user, None)
        self._stores.pop(user, None)
        self._fresh.pop(user, None)
        self._right.pop(user, None)

    def close(self) -> None:
        """Keep answers, and how often drafts were right, for the next time."""
        for user, right in self._right.items():
            with _reported(user):
                right.write()
        for user, store in self._stores.items():
            if len(store):
                store.save(self._folder / folder_name(user) / ANSWERS)

    def _train(self, user: str) -> Iterator[None]:
        from ruvllm_sona.draft_train import TrainConfig, train

        usual, narrow = TrainConfig(), self._spec.hidden_size
        config = TrainConfig(width=min(usual.width, narrow), gates=min(usual.gates, narrow))
        answers = self._stores[user].answers()
        if len(answers) < max(config.least, config.held_out):
            return
        for progress in train(self._heads(user), answers, self._embeddings, config):
            if progress.head is not None:
                progress.head.save(self._folder / folder_name(user) / HEAD)
                self._heads.publish(user, progress.head)
            if progress.phase == "done" and progress.score is not None and progress.before is not None:
                before, after = round(progress.before.first, 3), round(progress.score.first, 3)
                _log.info("draft head", user=user, before=before, after=after, used=progress.head is not None)
            yield None


@contextmanager
def _reported(user: str) -> Iterator[None]:
    """No answer and no training depends on the record of acceptance."""
    try:
        yield
    except LearningError as error:
        _log.warning("how often drafts were right is not recorded", user=user, reason=str(error))
