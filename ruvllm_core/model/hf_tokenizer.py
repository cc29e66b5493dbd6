"""Tokenizers from a folder in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruvllm_core.errors import TokenizerError
from ruvllm_core.model.codec import FastCodec
from ruvllm_core.model.sentencepiece import SentencePieceCodec, TokenType
from ruvllm_core.model.sentencepiece_file import SentencePieceFile
from ruvllm_core.model.tokenizer import SpecialTokens, Tokenizer

_Ids = tuple[int, ...]


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of `folder`: ``tokenizer.json``, or else ``tokenizer.model``, with the settings beside it.

    What is added to a text is decided by the post-processor of ``tokenizer.json`` alone, as in `transformers`; with
    ``tokenizer.model``, by ``add_bos_token`` and ``add_eos_token`` in ``tokenizer_config.json``.

    Raises:
        TokenizerError: neither file is there, or one of them is damaged or of a kind that cannot be read.
    """
    config = _json(folder / "tokenizer_config.json") or _json(folder / "special_tokens_map.json")
    generation = _json(folder / "config.json") | _json(folder / "generation_config.json")
    codec: FastCodec | SentencePieceCodec
    defaults: dict[str, int] = {}
    prefix: _Ids = ()
    suffix: _Ids = ()
    if (path := folder / "tokenizer.json").is_file():
        codec, prefix, suffix = _from_json(path)
    elif (path := folder / "tokenizer.model").is_file():
        model = SentencePieceFile.read(path)
        codec = _from_model(model, config, str(path))
        defaults = {"bos": model.bos, "eos": model.eos, "pad": model.pad}
    else:
        raise TokenizerError(
            f"{folder}: neither tokenizer.json nor tokenizer.model is there",
            hint="download the model with its tokenizer files",
        )

    def special(role: str) -> int | None:
        entry = config.get(f"{role}_token")
        piece = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(piece, str) and (token := codec.token_id(piece)) is not None:
            return token
        listed = _ids(generation.get(f"{role}_token_id"))
        token = listed[0] if listed else defaults.get(role, -1)
        return token if token >= 0 else None

    bos, eos = special("bos"), special("eos")
    if isinstance(codec, SentencePieceCodec):
        prefix = _ids(bos) if config.get("add_bos_token", True) else ()
        suffix = _ids(eos) if config.get("add_eos_token", False) else ()
    ends = _ids(generation.get("eos_token_id"))
    return Tokenizer(
        codec,
        SpecialTokens(bos=bos, eos=eos, pad=special("pad"), prefix=prefix, suffix=suffix, ends=ends),
        name=str(path),
        chat_template=_chat_template(folder, config),
    )


def _from_json(path: Path) -> tuple[FastCodec, _Ids, _Ids]:
    """The codec, and the ids that the file's post-processor puts before and after a text."""
    from tokenizers import Tokenizer as FastTokenizer

    try:
        fast: FastTokenizer = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path}: {error}", hint="download the file again; it is damaged or too new") from error
    codec = FastCodec(fast, str(path))
    probe = "a"
    bare, full = (list(fast.encode(probe, add_special_tokens=add).ids) for add in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return codec, tuple(full[:start]), tuple(full[start + len(bare) :])
    raise TokenizerError(
        f"{path}: its post-processor changes the tokens of a text", hint="only adding tokens around it is supported"
    )


def _from_model(model: SentencePieceFile, config: dict[str, Any], name: str) -> SentencePieceCodec:
    """The codec of a ``tokenizer.model`` with the tokens that ``tokenizer_config.json`` adds to it."""
    swallows_blanks = set()
    for key, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        token = int(key)
        if token == len(model.pieces):
            model.pieces.append(entry["content"])
            model.scores.append(0.0)
            model.types.append(TokenType.NORMAL)
        if token >= len(model.pieces) or model.pieces[token] != entry["content"]:
            raise TokenizerError(
                f"{name}: tokenizer_config.json adds {entry['content']!r} as {token}, which does not fit",
                hint="the two files do not belong together; download the model again",
            )
        if model.types[token] in (TokenType.NORMAL, TokenType.USER_DEFINED):
            model.types[token] = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        if entry.get("rstrip"):
            swallows_blanks.add(token)
    return SentencePieceCodec(
        name,
        model.pieces,
        model.scores,
        model.types,
        add_space_prefix=model.add_space_prefix,
        swallows_blanks=frozenset(swallows_blanks),
    )


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _json(path: Path) -> dict[str, Any]:
    """The object in `path`, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}", hint="the file is damaged; download it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected an object, found {type(value).__name__}", hint="download it again")
    return value


def _ids(value: Any) -> _Ids:
    """One id, a list of ids, or nothing, as a tuple."""
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if not all(isinstance(token, int) for token in ids):
        raise TokenizerError(f"{value!r} is no token id", hint="correct it in config.json or generation_config.json")
    return ids
