"""What turns text into token ids and back; `Tokenizer` adds beginnings, ends, and loading on top.

Two codecs exist: `FastCodec` here, over the Rust `tokenizers` library, and `SentencePieceCodec` in
`ruvllm_core.model.sentencepiece`.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from typing import TYPE_CHECKING, Any, Protocol

from ruvllm_core.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: Latin-1's visible characters are themselves, the rest start at U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(visible)]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


BYTE_OF_CHAR = _byte_of_char()


def byte_level_bytes(piece: str) -> bytes:
    """Bytes of a piece written in GPT-2's byte alphabet; a piece outside that alphabet stands for itself."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in piece])
    except KeyError:
        return piece.encode()


def sentencepiece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: ``▁`` is a space, ``<0x0A>`` one byte."""
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


# SentencePiece writes one U+FFFD per invalid byte, Python's own "replace" one per truncated character.
codecs.register_error("ruvllm-each-byte", _replace_each_byte)


class Codec(Protocol):
    """Text to ids and back, with no thought for beginnings and ends.

    Attributes:
        vocab_size: one more than the highest id.
        special_ids: ids that are markup, not text.
        byte_errors: `codecs` error handler for bytes that are not UTF-8.
        strips_space: encoding puts a space in front of the text, so decoding takes one away.
    """

    vocab_size: int
    special_ids: frozenset[int]
    byte_errors: str
    strips_space: bool

    def encode(self, text: str, parse_special: bool) -> list[int]: ...
    def token_bytes(self, token: int) -> bytes: ...
    def token_id(self, piece: str) -> int | None: ...


class FastCodec:
    """A codec over a Rust tokenizer whose decoder is byte-level (GPT-2) or SentencePiece-like.

    Args:
        fast: the tokenizer; truncation and padding are switched off in it.
        name: what error messages call it.
        vocab_size: one more than the highest id, where the caller knows it (finding out copies the vocabulary).
    """

    def __init__(self, fast: FastTokenizer, name: str, vocab_size: int | None = None) -> None:
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self._lock = threading.Lock()
        added = fast.get_added_tokens_decoder()
        self._added = {token: entry.content for token, entry in added.items()}
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.vocab_size = vocab_size or max(fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        state = json.loads(fast.decoder.__getstate__()) if fast.decoder is not None else {"decoders": []}
        steps: list[dict[str, Any]] = state.get("decoders", [state])
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            self._bytes_of, self.byte_errors, self.strips_space = byte_level_bytes, "replace", False
        elif kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
            self._bytes_of, self.byte_errors = sentencepiece_bytes, "ruvllm-each-byte"
            self.strips_space = kinds[-1] == "Strip" and steps[-1]["start"] > 0
        else:
            raise TokenizerError(
                f"{name}: cannot decode tokens that need {' + '.join(kinds) or 'no decoder'}",
                hint="supported are byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece BPE (Llama 2, Mistral)",
            )

    def encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:  # the switch lives in the shared Rust object
            self._fast.encode_special_tokens = not parse_special
            return list(self._fast.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._fast.id_to_token(token) if token >= 0 else None
        return b"" if piece is None else self._bytes_of(piece)

    def token_id(self, piece: str) -> int | None:
        token: int | None = self._fast.token_to_id(piece)
        return token
