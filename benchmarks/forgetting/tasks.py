"""Texts to classify, as prompts: the answer is one letter, and what it stands for differs from task to task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ruvllm_core.model.tokenizer import Tokenizer

LETTERS = "ABCD"
_BEFORE, _AFTER = "Text: ", "\nLabel:"


@dataclass(frozen=True, eq=False)
class Texts:
    """Prompts of one task, padded on the right.

    Attributes:
        tokens: int64 ``[N, T]``.
        lengths: int64 ``[N]``.
        labels: which of the task's letters is right, int64 ``[N]``.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def prompt(self, n: int) -> tuple[int, ...]:
        return tuple(self.tokens[n, : int(self.lengths[n])].tolist())


@dataclass(frozen=True, eq=False)
class Task:
    """Attributes: what it is called, the tokens of its letters, texts to learn from and texts to be tested on."""

    name: str
    answers: tuple[int, ...]
    train: Texts
    test: Texts


def load(path: Path, tokenizer: Tokenizer, *, tasks: int, each: int, longest: int) -> list[Task]:
    """The first `tasks` tasks of a file of `forgetting_data.py`, each with at most `each` texts of `longest` tokens.

    Raises `SystemExit` if a letter is not one token, or if there is too little.
    """
    letters = [tokenizer.encode(f" {letter}", add_special=False) for letter in LETTERS]
    if any(len(ids) != 1 for ids in letters):
        raise SystemExit("this model's tokenizer has no tokens for ' A', ' B', ' C' and ' D'")
    data = json.loads(path.read_text(encoding="utf-8"))
    if len(data) < tasks:
        raise SystemExit(f"{path} has {len(data)} tasks, {tasks} are wanted")
    fewest = min(len(one[part]) for one in data.values() for part in ("train", "test"))
    if fewest < each:
        raise SystemExit(f"a task of {path} has only {fewest} texts, {each} are wanted")
    before, after = (tokenizer.encode(part, add_special=False) for part in (_BEFORE, _AFTER))
    start = tokenizer.encode("", add_special=True)

    def texts(rows: Sequence[tuple[str, int]]) -> Texts:
        found = [
            [*start, *before, *tokenizer.encode(text, add_special=False)[:longest], *after] for text, _ in rows[:each]
        ]
        lengths = torch.tensor([len(ids) for ids in found])
        tokens = torch.tensor([ids + [0] * (int(lengths.max()) - len(ids)) for ids in found])
        return Texts(tokens, lengths, torch.tensor([label for _, label in rows[:each]]))

    return [
        Task(name, tuple(ids[0] for ids in letters[: len(one["kinds"])]), texts(one["train"]), texts(one["test"]))
        for name, one in list(data.items())[:tasks]
    ]
