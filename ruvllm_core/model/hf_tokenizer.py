"""Tokenizers from a folder in the layout of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvllm_core.errors import TokenizerError
from ruvllm_core.model.codec import FastCodec
from ruvllm_core.model.safetensors import read_json
from ruvllm_core.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of `folder`: ``tokenizer.json``, with the settings beside it.

    What is added to a text is decided by the post-processor of ``tokenizer.json`` alone, as in `transformers`.

    Raises:
        TokenizerError: the file is not there, damaged, or of a kind that cannot be read.
        FormatError: another file is damaged.
    """
    from tokenizers import Tokenizer as FastTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{folder} has no tokenizer.json",
            hint="download it with the model; where there is only a tokenizer.model, transformers makes one of it: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    try:
        fast: FastTokenizer = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path}: {error}", hint="download the file again; it is damaged or too new") from error
    codec = FastCodec(fast, str(path))
    config = _json(folder / "tokenizer_config.json") or _json(folder / "special_tokens_map.json")
    generation = _json(folder / "config.json") | _json(folder / "generation_config.json")

    def special(role: str) -> int | None:
        entry = config.get(f"{role}_token")
        piece = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(piece, str) and (token := codec.token_id(piece)) is not None:
            return token
        return next(iter(_ids(generation.get(f"{role}_token_id"))), None)

    prefix, suffix = _around(fast, path)
    return Tokenizer(
        codec,
        name=str(path),
        bos=special("bos"),
        eos=special("eos"),
        pad=special("pad"),
        ends=_ids(generation.get("eos_token_id")),
        prefix=prefix,
        suffix=suffix,
        chat_template=_chat_template(folder, config),
    )


def _around(fast: FastTokenizer, path: Path) -> tuple[list[int], list[int]]:
    """The ids that the post-processor of `fast` puts before and after a text."""
    bare, full = (list(fast.encode("a", add_special_tokens=add).ids) for add in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise TokenizerError(
        f"{path}: its post-processor changes the tokens of a text", hint="only adding tokens around it is supported"
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
    return read_json(path) if path.is_file() else {}


def _ids(value: Any) -> list[int]:
    """One id, a list of ids, or nothing, as a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise TokenizerError(f"{value!r} is no token id", hint="correct it in config.json or generation_config.json")
    return ids
