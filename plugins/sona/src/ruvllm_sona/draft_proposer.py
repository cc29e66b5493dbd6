"""`SonaProposer`: drafts for speculative decoding from what was learned of a user, and from the text itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ruvllm_core.errors import LearningError
from ruvllm_core.generate.request import Request
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import Draft, FloatArray
from ruvllm_sona.draft import DraftHead, DraftNetwork
from ruvllm_sona.draft_ngrams import ORDERS, Text

_TRUST = (0.7, 0.5, 0.3)  # share of n-grams of each of `ORDERS` in what is drafted, were they seen ever so often
_HERE = 2  # what followed in this very text counts so many times
_USERS = 16  # whose networks are kept ready
_log = get_logger("sona")


class DraftHeads:
    """The head in use of each user. To publish one is a single swap: the next draft is made with it."""

    def __init__(self) -> None:
        self._heads: dict[str, DraftHead] = {}

    def __call__(self, user: str) -> DraftHead | None:
        return self._heads.get(user)

    def publish(self, user: str, head: DraftHead | None) -> None:
        """Draft with `head` from now on; None is with no head."""
        if head is None:
            self._heads.pop(user, None)
        else:
            self._heads[user] = head


class SonaProposer:
    """Drafts the tokens that a user's head expects and n-grams confirm, as long as they are likely enough.

    With a request that is repeatable the likeliest token is drafted as certain. With others it is drawn, and the draft
    says from what: with a head that is unsure this is right more often than the likeliest token would be. How long a
    draft gets never depends on what was drawn for its last token, so what comes out stays distributed as without.

    Args:
        heads: a user's head, or None; asked at every draft.
        hidden_size, vocab_size: C and V of the model.
        least: a token is drafted if it, and all before it in the draft, are this likely to be right.
        further: one more is looked for if all so far are this likely to be right.
    """

    def __init__(
        self,
        heads: Callable[[str], DraftHead | None],
        hidden_size: int,
        vocab_size: int,
        least: float = 0.25,
        further: float = 0.3,
    ) -> None:
        self._heads, self._hidden_size, self._vocab_size = heads, hidden_size, vocab_size
        self._least, self._further = least, further
        self._networks: dict[str, tuple[DraftHead, DraftNetwork | None]] = {}
        self._texts: dict[str, Text] = {}
        # Not of the requests' seeds: what is drafted must not depend on the numbers that it is judged by.
        self._random = np.random.default_rng()

    def propose(self, request: Request, token_ids: Sequence[int], k: int, hidden: FloatArray) -> Draft:
        text = self._texts.setdefault(request.id, Text())
        text.update(token_ids)
        network = self._network(request.params.user)
        certain = request.params.repeatable or network is None
        recent, sure = list(token_ids[-max(ORDERS) :]), 1.0
        tokens: list[int] = []
        chances: list[float] = []
        rows: FloatArray | None = None
        s: FloatArray | None = None
        with np.errstate(all="ignore"):  # looked for in every guess
            while len(tokens) < k and sure >= self._further:
                guess = _Guess()
                if network is not None:
                    newest, previous = recent[-1], recent[-2:][0]
                    s = network.first(hidden, newest, previous) if s is None else network.next(s, newest, previous)
                    guess = _Guess(network, network.logits(s), certain)
                    if not guess.finite:
                        self._give_up(request.params.user, network.head)
                        break
                for order, trust in zip(ORDERS, _TRUST, strict=True):
                    if len(recent) >= order and guess.add(text, recent[-order:], trust):
                        break
                token, likely = guess.likeliest()
                if not likely or (sure := sure * likely) < self._least:
                    break
                if not certain:
                    token = guess.draw(self._random)
                    rows = np.zeros((k, self._vocab_size), np.float32) if rows is None else rows
                    guess.fill(rows[len(tokens)])
                tokens.append(token)
                chances.append(likely)
                recent.append(token)
        # A drawn token is right less often than the likeliest: of how often, the engine's own count knows more.
        return Draft(tokens, None if rows is None else rows[: len(tokens)], chances if certain else None)

    def forget(self, request_id: str) -> None:
        self._texts.pop(request_id, None)

    def close(self) -> None:
        self._texts.clear()
        self._networks.clear()

    def _network(self, user: str) -> DraftNetwork | None:
        """Of the user's present head; None without one, or with one that does not work."""
        head = self._heads(user)
        if head is None:
            return None
        known = self._networks.pop(user, None)
        if known is None or known[0] is not head:
            try:
                head.check(self._hidden_size, self._vocab_size)
                known = head, DraftNetwork(head)
            except LearningError as error:
                known = head, None
                _log.warning("this user's draft head is not used", error=error.message)
            if len(self._networks) >= _USERS:
                del self._networks[next(iter(self._networks))]
        self._networks[user] = known
        return known[1]

    def _give_up(self, user: str, head: DraftHead) -> None:
        _log.warning("this user's draft head is not used any more: it computes what are no numbers")
        self._networks[user] = head, None


class _Guess:
    """A distribution of the next token: the network's, and n-grams' in the share that they are trusted with.

    Attributes:
        shares: of tokens, beside the network's part, which the head's vocabulary need not have.
        finite: whether the network computed numbers.
    """

    def __init__(
        self, network: DraftNetwork | None = None, logits: FloatArray | None = None, certain: bool = True
    ) -> None:
        self._network, self.shares, self.finite = network, dict[int, float](), True
        self._best, self._unit = 0, 0.0  # the network's likeliest place, and what makes probabilities of its weights
        if network is None or logits is None:
            return
        if not certain:
            logits *= np.float32(network.head.sharpness)
        self._best = int(logits.argmax())
        logits -= logits[self._best]
        self._weights: FloatArray = np.exp(logits, out=logits)
        total = float(logits.sum())
        self._unit, self.finite = 1.0 / total, math.isfinite(total)

    def add(self, text: Text, run: Sequence[int], trust: float) -> bool:
        """Mix in what followed `run` before; False if it is new. To be called with success at most once."""
        counts: dict[int, float] = {}
        for token in text.after(run):
            counts[token] = counts.get(token, 0) + _HERE
        for token in self._network.head.ngrams.after(run) if self._network is not None else ():
            counts[token] = counts.get(token, 0) + 1
        if not counts:
            return False
        total = sum(counts.values())
        trust *= total / (total + 1)
        self.shares = {token: trust * count / total for token, count in counts.items()}
        self._unit *= 1.0 - trust
        return True

    def likeliest(self) -> tuple[int, float]:
        """The likeliest token and its probability; 0 if there is none."""
        best, most = 0, 0.0
        if self._network is not None:
            best, most = int(self._network.head.vocabulary[self._best]), self._unit
        for token, share in self.shares.items():
            if (likely := share + self._of(token)) > most:
                best, most = token, likely
        return best, most

    def draw(self, random: np.random.Generator) -> int:
        """A token with its probability. Needs a network."""
        assert self._network is not None
        total = np.cumsum(self._weights, dtype=np.float64)
        where = random.random() * (sum(self.shares.values()) + self._unit * float(total[-1]))
        for token, share in self.shares.items():
            if where < share:
                return token
            where -= share
        place = int(total.searchsorted(where / self._unit, side="right"))
        return int(self._network.head.vocabulary[min(place, len(total) - 1)])

    def fill(self, row: FloatArray) -> None:
        """Put all of it into zeros ``[V]``. Needs a network."""
        assert self._network is not None
        row[self._network.head.vocabulary] = self._weights * np.float32(self._unit)
        for token, share in self.shares.items():
            row[token] += share

    def _of(self, token: int) -> float:
        """The network's part of a token's probability."""
        place = -1 if self._network is None else self._network.place(token)
        return self._unit * float(self._weights[place]) if place >= 0 else 0.0
