"""SentencePiece BPE, exactly: Llama 2, Mistral, Phi-3.

The algorithm is that of SentencePiece's BPE model: join the adjacent pair whose union has the highest score, the
leftmost on a tie, until no union is in the vocabulary. A ranked list of merges (as `tokenizers` uses) cannot say
"leftmost" across two different pairs that make one piece, hence this code.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Sequence
from enum import IntEnum

from ruvllm_core.errors import TokenizerError
from ruvllm_core.model.codec import sentencepiece_bytes

SPACE = "▁"
_WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
# Unicode White_Space; Python's own \s also takes U+001C to U+001F.
_BLANKS = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*")
_DAMAGED = "the file is damaged or was converted wrongly; convert the model again"
_CACHE_WORDS, _CACHE_LENGTH = 1 << 16, 64


class TokenType(IntEnum):
    """Kinds of vocabulary entries, numbered alike in SentencePiece models and in ``tokenizer.ggml.token_type``."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class SentencePieceCodec:
    """A codec over SentencePiece's pieces and scores.

    Spaces become ``▁``; characters outside the vocabulary become byte pieces, or the unknown piece where there are
    none. With `add_space_prefix`, every run of text gets one ``▁`` in front: at the start and after each special
    token, as in llama.cpp and in `transformers` with ``legacy=True``. In decoded text each byte that is not part of a
    UTF-8 character is one U+FFFD, as in SentencePiece (`tokenizers` also gives up the valid bytes next to it).

    Args:
        name: what error messages call it.
        pieces: the vocabulary, by id.
        scores: one float per piece; higher joins earlier.
        types: one `TokenType` number per piece.
        add_space_prefix: whether text begins with a ``▁`` that is not in it.
        swallows_blanks: ids of special tokens that swallow the white space after them in text (Phi-3).
    """

    byte_errors = "ruvllm-each-byte"

    def __init__(
        self,
        name: str,
        pieces: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        add_space_prefix: bool = True,
        swallows_blanks: frozenset[int] = frozenset(),
    ) -> None:
        self._pieces, self.strips_space, self._swallows_blanks = pieces, add_space_prefix, swallows_blanks
        self.vocab_size = len(pieces)
        of_kind = {kind: [token for token, k in enumerate(types) if k == kind] for kind in TokenType}
        marks, special = of_kind[TokenType.USER_DEFINED], of_kind[TokenType.CONTROL] + of_kind[TokenType.UNKNOWN]
        self._unknown = next(iter(of_kind[TokenType.UNKNOWN]), -1)
        self._bytes: dict[int, int] = {}
        for token in of_kind[TokenType.BYTE]:
            if len(byte := sentencepiece_bytes(pieces[token])) != 1:
                raise TokenizerError(f"{name}: token {token}, {pieces[token]!r}, is no byte token", hint=_DAMAGED)
            self._bytes[byte[0]] = token
        if self._unknown < 0 and len(self._bytes) < 256:
            raise TokenizerError(
                f"{name}: the vocabulary has neither an unknown token nor a byte token for each of the 256 bytes",
                hint=_DAMAGED,
            )
        self.special_ids = frozenset(special)
        self._ids = {pieces[token]: token for token in of_kind[TokenType.NORMAL]}
        self._scores = {piece: scores[token] for piece, token in self._ids.items()}
        self._mark_ids = {pieces[token]: token for token in (*special, *marks) if pieces[token]}
        self._any_mark = _alternatives(self._mark_ids)
        self._user_mark = _alternatives([pieces[token] for token in marks if pieces[token]])
        # Where no piece has a space after a letter, no merge crosses that border: words can be encoded one by one.
        self._by_word = not any(SPACE in piece.lstrip(SPACE) for piece in self._ids)
        self._cached = functools.lru_cache(_CACHE_WORDS)(self._merge)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        mark = self._any_mark if parse_special else self._user_mark
        tokens: list[int] = []
        start = 0
        while mark and (match := mark.search(text, start)):
            tokens += self._encode_run(text[start : match.start()])
            token = self._mark_ids[match[0]]
            tokens.append(token)
            start = match.end()
            if token in self._swallows_blanks and (blanks := _BLANKS.match(text, start)):
                start = blanks.end()
        return tokens + self._encode_run(text[start:])

    def token_bytes(self, token: int) -> bytes:
        return sentencepiece_bytes(self._pieces[token]) if 0 <= token < self.vocab_size else b""

    def token_id(self, piece: str) -> int | None:
        return self._mark_ids.get(piece, self._ids.get(piece))

    def _encode_run(self, text: str) -> list[int]:
        if not text:
            return []
        text = (SPACE + text if self.strips_space else text).replace(" ", SPACE)
        tokens: list[int] = []
        for word in _WORD.findall(text) if self._by_word else [text]:
            tokens += self._cached(word) if len(word) <= _CACHE_LENGTH else self._merge(word)
        if len(self._bytes) < 256:  # SentencePiece writes one unknown token for a run of them
            return [t for t, last in zip(tokens, [None, *tokens], strict=False) if t != self._unknown or t != last]
        return tokens

    def _merge(self, word: str) -> list[int]:
        scores, symbols = self._scores, list(word)
        after = [*range(1, len(symbols)), -1]
        before = [*range(-1, len(symbols) - 1)]
        heap: list[tuple[float, int, int, str]] = []

        def propose(left: int, right: int) -> None:
            union = symbols[left] + symbols[right]
            if (score := scores.get(union)) is not None:
                heapq.heappush(heap, (-score, left, right, union))

        for left in range(len(symbols) - 1):
            propose(left, left + 1)
        while heap:
            _, left, right, union = heapq.heappop(heap)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != len(union):
                continue  # one of the two has been joined to another since
            symbols[left], symbols[right] = union, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
                propose(left, after[left])
            if before[left] >= 0:
                propose(before[left], left)
        return [token for symbol in symbols if symbol for token in self._symbol_ids(symbol)]

    def _symbol_ids(self, symbol: str) -> list[int]:
        token = self._ids.get(symbol)
        if token is not None:
            return [token]
        return [self._bytes[byte] for byte in symbol.encode()] if len(self._bytes) == 256 else [self._unknown]


def _alternatives(pieces: Sequence[str] | dict[str, int]) -> re.Pattern[str] | None:
    longest_first = sorted(pieces, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
