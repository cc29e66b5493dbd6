"""A folder's ``tokenizer.json`` as the ``tokenizer.*`` metadata of a GGUF file.

GGUF cannot express everything that ``tokenizer.json`` can: it names a pre-tokenizer instead of describing it. So each
description that could fit is tried on a text full of hard cases, and only one that gives the same tokens is taken.
Source: the GGUF specification for the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm_core.errors import TokenizerError
from ruvllm_core.model.safetensors import read_json
from ruvllm_core.model.sentencepiece import TokenType
from ruvllm_core.model.tokenizer import Tokenizer

_PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "default")
_PROBE = (
    "Hello  World,\tit's I'M don'T 1 12 1234567 3.14e-5 x86_64\n\n\n  def camelCase(self):\r\n\t\treturn [None]*2 ** 3"
    "\n    // \u00fcber na\u00efve cafe\u0301 \ufb01 \u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093 \ud55c\uad6d "
    "\u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940 \u0440\u0443\u0441 \u2167\u00bd\u00b2 "
    "\U0001f600\U0001f469\u200d\U0001f4bb \u00a0\u2003x <|x|> $$ ^^ ~~ ''' \u2581a\x01\x7f//a/b  \n \n end   "
)


def tokenizer_metadata(folder: Path, architecture: str, vocab_size: int) -> dict[str, Any]:
    """The metadata of `folder`'s tokenizer, its vocabulary filled up to `vocab_size` with unused tokens.

    Raises:
        TokenizerError: there is no ``tokenizer.json``, it is of a kind that GGUF does not know, or no description gives
            the same tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{folder} has no tokenizer.json", hint="load it with transformers and save it as a fast tokenizer"
        )
    tokenizer = Tokenizer.load(folder)
    tokenizer.check_vocab(vocab_size)
    metadata = {"general.architecture": architecture, **_pieces(path, vocab_size), **_specials(tokenizer)}
    expected = tokenizer.encode(_PROBE)
    for choice in _choices(metadata["tokenizer.ggml.model"]):
        candidate = {**metadata, **choice}
        if Tokenizer.from_gguf(candidate, str(path)).encode(_PROBE) == expected:
            return candidate
    raise TokenizerError(
        f"{path}: no GGUF tokenizer gives the same tokens", hint="this kind of tokenizer cannot be stored in GGUF"
    )


def _pieces(path: Path, vocab_size: int) -> dict[str, Any]:
    content = read_json(path)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(f"{path}: only BPE tokenizers can be stored in GGUF")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    pieces = [f"[PAD{token}]" for token in range(vocab_size)]
    types = np.full(vocab_size, TokenType.UNUSED, dtype=np.int32)
    for piece, token in model["vocab"].items():
        pieces[token], types[token] = piece, TokenType.NORMAL
    by_bytes = bool(model.get("byte_fallback"))
    if by_bytes:
        for byte in range(256):
            if (token := model["vocab"].get(f"<0x{byte:02X}>")) is not None:
                types[token] = TokenType.BYTE
    for added in content.get("added_tokens", []):
        token = added["id"]
        pieces[token] = added["content"]
        types[token] = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
    if by_bytes and (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
        types[unknown] = TokenType.UNKNOWN
    prefix = "tokenizer.ggml."
    result: dict[str, Any] = {prefix + "tokens": pieces, prefix + "token_type": types}
    if not by_bytes:
        return {prefix + "model": "gpt2", **result, prefix + "merges": merges}
    # SentencePiece joins the pair whose result has the best score: the order of the merges, as numbers.
    scores = np.zeros(vocab_size, dtype=np.float32)
    for rank, merge in reversed(list(enumerate(merges, start=1))):
        token = model["vocab"].get(merge.replace(" ", ""))
        if token is not None:
            scores[token] = -rank
    return {prefix + "model": "llama", **result, prefix + "scores": scores}


def _specials(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = sorted(tokenizer.eos_ids - {tokenizer.eos_id})
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    ids |= dict(zip(("eot", "eom"), ends, strict=False))
    found: dict[str, Any] = {
        f"tokenizer.ggml.{role}_token_id": token for role, token in ids.items() if token is not None
    }
    found["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos
    found["tokenizer.ggml.add_eos_token"] = tokenizer.add_eos
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _choices(model: str) -> Iterator[dict[str, Any]]:
    if model == "gpt2":
        for pre in _PRE_TOKENIZERS:
            yield {"tokenizer.ggml.pre": pre}
    else:
        for prefix in (True, False):
            yield {"tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefix}
