"""Token ids to text, one at a time, never in the middle of a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ruvllm_core.model.codec import Codec

_TAIL = 8  # a character is at most four bytes, hence four tokens; special tokens may stand between


class Detokenizer:
    """Incremental decoding of one sequence.

    The pieces returned by `push` and `flush`, joined, are what decoding all ids at once gives. After a prompt they
    are the text that the new ids add: SentencePiece's leading space is dropped at the start of a text and after a
    special token (where encoding puts one), and kept where the prompt's text goes on.

    Args:
        codec: the tokenizer's codec.
        prompt_ids: ids before the first pushed one; their text is not repeated.
        skip_special: leave special tokens out of the text.
    """

    def __init__(self, codec: Codec, prompt_ids: Sequence[int] = (), skip_special: bool = True) -> None:
        self._codec = codec
        self._skipped = codec.special_ids if skip_special else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(codec.byte_errors)
        tail = prompt_ids[-_TAIL:]
        for token in tail:
            self._decode(token)
        self._drop_space = codec.strips_space and (not tail or tail[-1] in codec.special_ids)

    def push(self, token: int) -> str:
        """The characters completed by `token`; often all of it, sometimes none."""
        return self._without_prefix(self._decode(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, or nothing."""
        return self._without_prefix(self._decoder.decode(b"", final=True))

    def _decode(self, token: int) -> str:
        return "" if token in self._skipped else self._decoder.decode(self._codec.token_bytes(token))

    def _without_prefix(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text
