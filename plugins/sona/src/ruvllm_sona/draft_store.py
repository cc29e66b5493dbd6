"""`DraftStore`: the answers of one user that a draft head is trained on, within a bound of bytes."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError
from ruvllm_core.generate.request import Trajectory

TEACHER = 16  # tokens of a distribution that are kept
_FEW = 3  # an answer of fewer tokens has nothing to learn from
_FIELDS = ("tokens", "hidden", "ids", "probabilities")


@dataclass(frozen=True, eq=False)
class Answer:
    """What was said in one answer, and what else could have been.

    Attributes:
        tokens: int32 ``[1 + n]``, the last of the prompt and the n of the answer.
        hidden: float16 ``[n, C]``, the state that each was drawn from.
        ids, probabilities: int32 and float16 ``[n, 16]``, the likeliest of what each was drawn from, filled up with
            probability 0; what was drawn itself, with probability 1, where that is not known or the answer greedy.
    """

    tokens: npt.NDArray[np.int32]
    hidden: npt.NDArray[np.float16]
    ids: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float16]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.hidden.nbytes + self.ids.nbytes + self.probabilities.nbytes


def from_trajectory(trajectory: Trajectory) -> Answer | None:
    """What a finished request has to teach; None if its states were not recorded, or if there is too little of it."""
    hidden, output = trajectory.hidden, trajectory.output_ids
    if hidden is None or len(output) < _FEW or not trajectory.prompt_ids or len(hidden) != len(output):
        return None
    with np.errstate(over="ignore"):
        short = hidden.astype(np.float16)
    if not np.isfinite(short).all():
        return None
    ids = np.zeros((len(output), TEACHER), np.int32)
    probabilities = np.zeros((len(output), TEACHER), np.float16)
    ids[:, 0], probabilities[:, 0] = output, 1.0
    for row, known in enumerate(trajectory.drawn_from[: len(output)]):
        best = known.head(TEACHER)
        ids[row, : len(best.ids)], probabilities[row, : len(best.ids)] = best.ids, best.probabilities
    tokens = np.array([trajectory.prompt_ids[-1], *output], dtype=np.int32)
    return Answer(tokens, short, ids, probabilities)


class DraftStore:
    """The newest answers, by request; the oldest go when they take more than `max_bytes`. Of one user alone."""

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._max_bytes = max_bytes
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, trajectory: Trajectory) -> bool:
        """Keep what a finished request has to teach; False if that is nothing."""
        answer = from_trajectory(trajectory)
        if answer is None or answer.nbytes > self._max_bytes:
            return False
        self._put(trajectory.request_id, answer)
        return True

    def forget(self, request_id: str) -> bool:
        """Drop an answer; heads trained on it know it still. False if it is not here."""
        answer = self._answers.pop(request_id, None)
        self.nbytes -= answer.nbytes if answer is not None else 0
        return answer is not None

    def answers(self) -> tuple[Answer, ...]:
        """All of them, the oldest first. They do not change, so training may go on while others are added."""
        return tuple(self._answers.values())

    def save(self, path: Path) -> None:
        """Write a safetensors file in one piece. Raises `OSError`."""
        from safetensors.numpy import save_file

        arrays = {
            f"{number}/{request_id}/{name}": getattr(answer, name)
            for number, (request_id, answer) in enumerate(self._answers.items())
            for name in _FIELDS
        }
        written = path.with_name(f"{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, written)
        with written.open("rb") as file:
            os.fsync(file.fileno())
        written.replace(path)

    def load(self, path: Path) -> None:
        """Add what `save` wrote. Raises `LearningError`."""
        from safetensors import SafetensorError, safe_open

        found: dict[tuple[int, str], dict[str, npt.NDArray[np.generic]]] = {}
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    number, _, rest = key.partition("/")
                    request_id, _, name = rest.rpartition("/")
                    found.setdefault((int(number), request_id), {})[name] = file.get_tensor(key)
            answers = [(request_id, Answer(**parts)) for (_, request_id), parts in sorted(found.items())]  # type: ignore[arg-type]
            _check(answer for _, answer in answers)
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            what = f"the answers in {path} cannot be read: {type(error).__name__}: {error}"
            raise LearningError(what, hint="delete the file: answers to come take their place") from error
        for request_id, answer in answers:
            self._put(request_id, answer)

    def _put(self, request_id: str, answer: Answer) -> None:
        self.forget(request_id)
        self._answers[request_id] = answer
        self.nbytes += answer.nbytes
        while self.nbytes > self._max_bytes:
            self.forget(next(iter(self._answers)))


def _check(answers: Iterable[Answer]) -> None:
    """Raise `ValueError` for arrays that do not fit together."""
    for answer in answers:
        n = len(answer.tokens) - 1
        shapes = answer.hidden.shape[:1], answer.ids.shape, answer.probabilities.shape
        types = [str(getattr(answer, name).dtype) for name in _FIELDS]
        if shapes != ((n,), (n, TEACHER), (n, TEACHER)) or types != ["int32", "float16", "int32", "float16"]:
            raise ValueError(f"an answer of {n} tokens has arrays {shapes} of {types}")
