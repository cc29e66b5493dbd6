"""Tokenizers from GGUF metadata: byte-level BPE (``tokenizer.ggml.model = gpt2``) and SentencePiece (``llama``).

Source: the GGUF specification for the keys; llama.cpp for the meaning of ``tokenizer.ggml.pre`` and for defaults of
absent keys; the models' own ``tokenizer.json`` for the patterns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ruvllm_core.errors import TokenizerError
from ruvllm_core.model.codec import Codec, FastCodec
from ruvllm_core.model.sentencepiece import SentencePieceCodec, TokenType
from ruvllm_core.model.tokenizer import Tokenizer

_MARKS = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
_DAMAGED = "the file is damaged or was converted wrongly; convert the model again"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_AND_BLANKS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How byte-level BPE cuts text before merging.

    Attributes:
        patterns: regular expressions, each cutting the pieces that the one before it left.
        ignore_merges: a piece that is in the vocabulary is taken whole.
        add_bos: whether texts begin with the BOS token if the file does not say.
        nfc: text is brought into Unicode's composed form first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_LLAMA3 = PreTokenizer((f"{_CONTRACTIONS}|{_WORDS_AND_BLANKS % '{1,3}'}",), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((f"{_CONTRACTIONS}|{_WORDS_AND_BLANKS % ''}",), nfc=True)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """The tokenizer that GGUF metadata describes.

    Args:
        metadata: keys of the file; arrays as lists or numpy arrays.
        name: the file, for error messages.

    Raises:
        TokenizerError: a key is missing or does not fit the others, or the kind of tokenizer is not supported.
    """
    model = metadata.get("tokenizer.ggml.model")
    pieces: list[str] = _array(metadata, "tokens", name, kind=str)
    types = _array(metadata, "token_type", name, len(pieces), default=[TokenType.NORMAL] * len(pieces))
    codec: Codec
    if model == "gpt2":
        pre = metadata.get("tokenizer.ggml.pre", "default")
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            what = f"{name}: unknown pre-tokenizer {pre!r} (tokenizer.ggml.pre)"
            raise TokenizerError(what, hint=f"supported are {', '.join(PRE_TOKENIZERS)}")
        codec = _byte_level(pieces, _array(metadata, "merges", name, kind=str), types, PRE_TOKENIZERS[pre], name)
        defaults: dict[str, int] = {}
        add_bos = PRE_TOKENIZERS[pre].add_bos
    elif model == "llama":
        scores = _array(metadata, "scores", name, len(pieces))
        spaced = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        greedy = _phi3_marks(pieces, types) if metadata.get("general.architecture") == "phi3" else frozenset()
        codec = SentencePieceCodec(name, pieces, scores, types, add_space_prefix=spaced, swallows_blanks=greedy)
        defaults = {"bos": 1, "eos": 2}
        add_bos = True
    else:
        what = f"{name}: unsupported tokenizer model {model!r} (tokenizer.ggml.model)"
        raise TokenizerError(what, hint="supported are gpt2 (byte-level BPE) and llama (SentencePiece BPE)")

    def special(role: str) -> int | None:
        key = f"tokenizer.ggml.{role}_token_id"
        token = metadata.get(key, defaults.get(role))
        if token is None:
            return None
        if not isinstance(token, Integral) or not 0 <= int(token) < len(pieces):
            raise TokenizerError(f"{name}: {key} is {token!r}, but there are {len(pieces)} tokens", hint=_DAMAGED)
        return int(token)

    bos, eos = special("bos"), special("eos")
    return Tokenizer(
        codec,
        name=name,
        bos=bos,
        eos=eos,
        pad=special("padding"),
        ends=[token for role in ("eot", "eom") if (token := special(role)) is not None],
        prefix=[bos] if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", add_bos) else [],
        suffix=[eos] if eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False) else [],
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _byte_level(pieces: list[str], merges: list[str], types: Sequence[int], pre: PreTokenizer, name: str) -> FastCodec:
    from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE

    vocab = {piece: token for token, piece in enumerate(pieces) if piece}  # an empty piece makes the library panic
    try:
        pairs: Any = [tuple(merge.split(" ")) for merge in merges]
        fast: FastTokenizer = FastTokenizer(BPE(vocab, pairs, ignore_merges=pre.ignore_merges))
    except BaseException as error:  # the library raises plain Exception, and a BaseException where Rust panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise TokenizerError(f"{name}: {_bad_merge(merges, vocab) or error}", hint=_DAMAGED) from error
    marks = [(p, t) for p, t in zip(pieces, types, strict=True) if t in _MARKS]
    fast.add_tokens([AddedToken(p, special=t != TokenType.USER_DEFINED, normalized=False) for p, t in marks])
    if pre.nfc:
        fast.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    fast.decoder = decoders.ByteLevel()
    return FastCodec(fast, name, vocab_size=len(pieces))


def _bad_merge(merges: list[str], vocab: dict[str, int]) -> str | None:
    for index, merge in enumerate(merges):
        pair = merge.split(" ")
        if len(pair) != 2:
            return f"tokenizer.ggml.merges[{index}] is {merge!r}, not a pair of tokens"
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                return f"tokenizer.ggml.merges[{index}] is {merge!r}, but {piece!r} is not in the vocabulary"
    return None


def _phi3_marks(pieces: list[str], types: Sequence[int]) -> frozenset[int]:
    """Phi-3's added tokens swallow the white space after them; GGUF has no key for that, its family is the sign."""
    keeps = {"<unk>", "<s>", "<|endoftext|>"}
    return frozenset(t for t, kind in enumerate(types) if kind in _MARKS and pieces[t] not in keeps)


def _array(
    metadata: Mapping[str, Any], field: str, name: str, length: int = 0, default: Any = None, kind: Any = (int, float)
) -> Any:
    """The array ``tokenizer.ggml.<field>`` as a list of `kind`, with `length` entries where that is given."""
    key = f"tokenizer.ggml.{field}"
    values = metadata.get(key, default)
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or not values:
        raise TokenizerError(f"{name}: {key} is missing or empty", hint=_DAMAGED)
    if length and len(values) != length:
        raise TokenizerError(f"{name}: {key} has {len(values)} entries for {length} tokens", hint=_DAMAGED)
    if not isinstance(values[0], kind):
        raise TokenizerError(f"{name}: {key} holds {type(values[0]).__name__} values", hint=_DAMAGED)
    return values
