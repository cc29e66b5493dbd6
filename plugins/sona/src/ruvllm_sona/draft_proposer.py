"""`SonaProposer`: drafts for speculative decoding from what was learned of a user, and from the text itself."""

from __future__ import annotations

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
        further: float = 0.4,
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
        rows: list[FloatArray] = []
        s: FloatArray | None = None
        while len(tokens) < k and sure >= self._further:
            logits: FloatArray | None = None
            if network is not None:
                newest, previous = recent[-1], recent[-2:][0]
                with np.errstate(all="ignore"):  # looked for below
                    s = network.first(hidden, newest, previous) if s is None else network.next(s, newest, previous)
                    logits = network.logits(s)
                if not np.isfinite(logits).all():
                    self._give_up(request.params.user, network.head)
                    break
            guess = _Guess(None if network is None else network.head, logits, certain)
            for order, trust in zip(ORDERS, _TRUST, strict=True):
                if len(recent) >= order and guess.add(text, recent[-order:], trust):
                    break
            token, likely = guess.likeliest()
            if not likely or (sure := sure * likely) < self._least:
                break
            if not certain:
                token = guess.draw(self._random)
                rows.append(guess.row(self._vocab_size))
            tokens.append(token)
            recent.append(token)
        return Draft(tokens, np.stack(rows) if rows else None)

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
    """

    def __init__(self, head: DraftHead | None, logits: FloatArray | None, certain: bool) -> None:
        self._head, self.shares = head, dict[int, float]()
        self._q: FloatArray | None = None
        if head is not None and logits is not None:
            scaled = logits if certain else logits * np.float32(head.sharpness)
            weights = np.exp(scaled - scaled.max())
            self._q = weights / weights.sum()

    def add(self, text: Text, run: Sequence[int], trust: float) -> bool:
        """Mix in what followed `run` before; False if it is new. To be called with success at most once."""
        counts: dict[int, float] = {}
        for token in text.after(run):
            counts[token] = counts.get(token, 0) + _HERE
        for token in self._head.ngrams.after(run) if self._head is not None else ():
            counts[token] = counts.get(token, 0) + 1
        if not counts:
            return False
        total = sum(counts.values())
        trust *= total / (total + 1)
        self.shares = {token: trust * count / total for token, count in counts.items()}
        if self._q is not None:
            self._q *= np.float32(1 - trust)
        return True

    def likeliest(self) -> tuple[int, float]:
        """The likeliest token and its probability; 0 if there is none."""
        best, most = 0, 0.0
        if self._head is not None and self._q is not None:
            place = int(self._q.argmax())
            best, most = int(self._head.vocabulary[place]), float(self._q[place])
        for token, share in self.shares.items():
            if (likely := share + self._of(token)) > most:
                best, most = token, likely
        return best, most

    def draw(self, random: np.random.Generator) -> int:
        """A token with its probability. Needs a network."""
        assert self._head is not None and self._q is not None
        where = random.random() * (sum(self.shares.values()) + float(self._q.sum()))
        for token, share in self.shares.items():
            if where < share:
                return token
            where -= share
        total = np.cumsum(self._q, dtype=np.float64)
        return int(self._head.vocabulary[min(int(total.searchsorted(where, side="right")), len(total) - 1)])

    def row(self, vocab_size: int) -> FloatArray:
        """All of it, float32 ``[V]``."""
        assert self._head is not None and self._q is not None
        row = np.zeros(vocab_size, dtype=np.float32)
        row[self._head.vocabulary] = self._q
        for token, share in self.shares.items():
            row[token] += share
        return row

    def _of(self, token: int) -> float:
        """The network's part of a token's probability."""
        if self._head is None or self._q is None:
            return 0.0
        place = int(self._head.vocabulary.searchsorted(token))
        known = place < len(self._q) and self._head.vocabulary[place] == token
        return float(self._q[place]) if known else 0.0
