"""What followed the last tokens before: in the answers learned from, and in the text of a request so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError

ORDERS = (4, 3, 2)  # tokens that must be found again, the most telling first
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no token is lost in the product modulo 2⁶⁴ (golden ratio, Knuth 6.4)
_MOST = 32  # followers that are counted

Keys = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.int64]
Tables = tuple[tuple[Keys, Tokens], ...]


def _empty() -> Tables:
    return tuple((np.empty(0, np.uint64), np.empty(0, np.int64)) for _ in ORDERS)


@dataclass(frozen=True, eq=False)
class NGrams:
    """Every run of `ORDERS` tokens of some answers with the token after it.

    Attributes:
        tables: for each order the hashes of runs, ascending, and the token after each. Two runs of the same hash would
            share their followers, which makes a draft worse and nothing wrong.
    """

    tables: Tables = field(default_factory=_empty)

    @classmethod
    def of(cls, answers: Sequence[tuple[Sequence[int], int]]) -> NGrams:
        """Of texts, each given with the place where its answer starts: what comes before it is only looked back to."""
        tables = []
        for order in ORDERS:
            keys, followers = [], []
            for tokens, start in answers:
                first = max(start, order)
                if len(tokens) > first:
                    text = np.asarray(tokens, dtype=np.int64)
                    keys.append(_hashes(text[first - order : -1], order))
                    followers.append(text[first:])
            found = np.concatenate([*keys, np.empty(0, np.uint64)])
            rank = np.argsort(found, kind="stable")
            tables.append((found[rank], np.concatenate([*followers, np.empty(0, np.int64)])[rank]))
        return cls(tuple(tables))

    def after(self, run: Sequence[int]) -> list[int]:
        """The tokens that followed `run`, whose length is one of `ORDERS`, the newest last."""
        keys, followers = self.tables[ORDERS.index(len(run))]
        if not len(keys):
            return []
        key = np.uint64(_hash(run))
        low = int(keys.searchsorted(key))
        if low == len(keys) or keys[low] != key:
            return []
        high = int(keys.searchsorted(key, side="right"))
        found: list[int] = followers[max(low, high - _MOST) : high].tolist()
        return found

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """For a file; see `from_arrays`."""
        pairs = zip(ORDERS, self.tables, strict=True)
        return {f"{order}.{name}": array for order, table in pairs for name, array in zip("kf", table, strict=True)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> NGrams:
        """Raises `LearningError` or `KeyError` for arrays that are none of these."""
        tables = []
        for order in ORDERS:
            keys, followers = arrays[f"{order}.k"], arrays[f"{order}.f"]
            right = keys.dtype == np.uint64 and followers.dtype == np.int64 and keys.shape == followers.shape
            if not right or keys.ndim != 1 or (keys[1:] < keys[:-1]).any():
                raise LearningError("draft head: its n-grams make no sense")
            tables.append((keys.astype(np.uint64), followers.astype(np.int64)))
        return cls(tuple(tables))


class Text:
    """What followed what in one request so far; it grows with it."""

    def __init__(self) -> None:
        self._seen = 0
        self._tables: tuple[dict[tuple[int, ...], list[int]], ...] = tuple({} for _ in ORDERS)

    def update(self, token_ids: Sequence[int]) -> None:
        """Take in what has come since the last call."""
        length = len(token_ids)
        for order, table in zip(ORDERS, self._tables, strict=True):
            for end in range(max(self._seen, order), length):
                table.setdefault(tuple(token_ids[end - order : end]), []).append(token_ids[end])
        self._seen = length

    def after(self, run: Sequence[int]) -> list[int]:
        """As `NGrams.after`."""
        return self._tables[ORDERS.index(len(run))].get(tuple(run), [])[-_MOST:]


def _hash(run: Sequence[int]) -> int:
    key = 0
    for token in run:
        key = (key * _FACTOR + token + 1) & 0xFFFFFFFFFFFFFFFF
    return key


def _hashes(tokens: Tokens, order: int) -> Keys:
    """Of each run of `order` tokens."""
    count, keys = len(tokens) - order + 1, np.zeros(max(len(tokens) - order + 1, 0), np.uint64)
    for place in range(order):
        keys = keys * np.uint64(_FACTOR) + tokens[place : place + count].astype(np.uint64) + np.uint64(1)
    return keys
