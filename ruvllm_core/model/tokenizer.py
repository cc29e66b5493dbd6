"""`Tokenizer`: text to token ids and back, from a GGUF file or a Hugging Face folder, without reading weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvllm_core.errors import TokenizerError
from ruvllm_core.model.codec import Codec
from ruvllm_core.model.detokenizer import Detokenizer

if TYPE_CHECKING:
    from ruvllm_core.settings import Settings

# Special tokens that end a turn or a text in the models that have them, whatever else the files say.
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        name: where it came from, for messages.
        vocab_size: one more than the highest id.
        bos_id, eos_id, pad_id: special ids, or None.
        eos_ids: every id that ends an answer: end of text, end of turn, and what the model's files list as such.
        add_bos, add_eos: whether `encode` puts them around the text by default.
        chat_template: Jinja source of the model's chat template, or None.

    Args:
        codec: turns plain text into ids and back.
        ends: further ids that end an answer.
        prefix, suffix: ids that `encode` puts around a text.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        name: str,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
        ends: Iterable[int] = (),
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self.name, self.vocab_size, self.chat_template = name, codec.vocab_size, chat_template
        self.bos_id, self.eos_id, self.pad_id = bos, eos, pad
        self.add_bos, self.add_eos = bos in prefix, eos in suffix
        self._codec, self._prefix, self._suffix = codec, prefix, suffix
        well_known = (token for token in map(codec.token_id, _ENDS) if token in codec.special_ids)
        self.eos_ids = frozenset(token for token in (eos, *ends, *well_known) if token is not None)
        for token in {*self.eos_ids, *prefix, *suffix}:
            if not 0 <= token < self.vocab_size:
                raise TokenizerError(
                    f"{name}: special token {token} is outside the vocabulary of {self.vocab_size} tokens",
                    hint="the tokenizer's files do not belong together; download or convert the model again",
                )

    @classmethod
    def load(cls, ref: str | Path, settings: Settings | None = None) -> Tokenizer:
        """The tokenizer of a model; reads no weights.

        Args:
            ref: a ``.gguf`` file, a folder with ``tokenizer.json``, or a name that `ruvllm_core.model.hub` knows.
            settings: where downloads are kept; read from the environment if not given.

        Raises:
            ModelNotFound: there is no such file, folder, or name.
            TokenizerError: the tokenizer is missing, damaged, or of a kind that cannot be read.
            FormatError: another file that is read for it is damaged.
        """
        path = Path(ref)
        if path.is_dir():
            from ruvllm_core.model.hf_tokenizer import tokenizer_from_folder

            return tokenizer_from_folder(path)
        if path.is_file():
            from ruvllm_core.model.gguf import GGUFFile

            return cls.from_gguf(GGUFFile.open(path).metadata, name=str(path))
        from ruvllm_core.model.hub import resolve_tokenizer_files
        from ruvllm_core.settings import load_settings

        return cls.load(resolve_tokenizer_files(ref, settings or load_settings()))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], name: str) -> Tokenizer:
        """From the ``tokenizer.*`` keys of GGUF metadata; raises `TokenizerError`."""
        from ruvllm_core.model.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(metadata, name)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any valid Unicode.
            add_special: put the tokens around it that the model expects at the start (and end) of a text. A rendered
                chat template has them already: pass False.
            parse_special: read ``<|im_end|>`` and its like in the text as special tokens. Pass False for text from
                a stranger, so that it stays plain text; user-defined tokens, which are text, are found either way.

        Raises:
            TokenizerError: the text has half of a surrogate pair and cannot be written as UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}",
                hint="decode the input as UTF-8, with errors='replace' if it is damaged",
            ) from None
        tokens = self._codec.encode(text, parse_special)
        return [*self._prefix, *tokens, *self._suffix] if add_special else tokens

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, and ids beyond the vocabulary (models pad theirs)
        become nothing. SentencePiece's leading space is taken away again."""
        special = self._codec.special_ids if skip_special else frozenset[int]()
        data = b"".join(self.token_bytes(token) for token in ids if token not in special)
        text = data.decode("utf-8", self._codec.byte_errors)
        return text.removeprefix(" ") if self._codec.strips_space else text

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes of one token (a space for SentencePiece's ``▁``); none for ids that have no token."""
        return self._codec.token_bytes(token)

    def detokenizer(self, prompt_ids: Sequence[int] = (), skip_special: bool = True) -> Detokenizer:
        """An incremental decoder for the ids that follow `prompt_ids`."""
        return Detokenizer(self._codec, prompt_ids, skip_special)

    def check_vocab(self, vocab_size: int) -> None:
        """Raise `TokenizerError` if a model with `vocab_size` embeddings has none for some of the tokens."""
        if self.vocab_size > vocab_size:
            what = f"{self.name}: the tokenizer has {self.vocab_size} tokens, the model embeds only {vocab_size}"
            raise TokenizerError(what, hint="the tokenizer belongs to another model; take both from one source")
