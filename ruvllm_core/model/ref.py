"""`ModelRef`: what a user names when naming a model, and the rules for models on this disk."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ruvllm_core.errors import ModelError, ModelNotFound, near

SHORT_NAMES = ("smollm2",)
PICKLES = (".bin", ".pt", ".pth")
_FORMS = "a model is named org/name[@revision][:file.gguf], a folder, a .gguf file, or smollm2"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[^@:\s]+))?(:(?P<file>.+))?")
_SPLIT_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class ModelRef:
    """A model by name.

    Attributes:
        kind: ``local`` (`path` is set), ``hub`` (`repo` is set) or ``short`` (`text` is one of `SHORT_NAMES`).
        text: as the user wrote it.
        path: an existing file or folder.
        repo: ``org/name`` on the Hugging Face hub.
        revision: branch, tag or commit; None is the default branch.
        file: one GGUF file of the repository, in POSIX notation.
    """

    kind: Literal["local", "hub", "short"]
    text: str
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, ref: str | Path | ModelRef) -> ModelRef:
        """Decide what `ref` names: a short name, else whatever exists on this disk, else a hub id.

        A `Path` is always local. Raises `ModelNotFound` for a path that does not exist and for what is no name at all.
        """
        if isinstance(ref, ModelRef):
            return ref
        text = str(ref)
        if isinstance(ref, str):
            if not text.strip() or "\0" in text:
                raise ModelNotFound(f"{text!r} names no model", hint=_FORMS)
            if text in SHORT_NAMES:
                return cls("short", text)
        try:
            path = Path(ref).expanduser()
            exists = path.exists()
        except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be entered, an unknown ~user
            raise ModelNotFound(f"{text} names no model: {error}", hint=_FORMS) from None
        if exists:
            return cls("local", text, path=path)
        match = _HUB_ID.fullmatch(text)
        if isinstance(ref, Path) or match is None or (match["file"] is None and _is_path_like(text)):
            raise _missing(text, path)
        repo, revision, file = match["repo"], match["revision"], match["file"]
        if file is not None and ("\\" in file or any(part in ("", ".", "..") for part in file.split("/"))):
            raise ModelNotFound(f"{file} cannot be the name of a file in {text}")
        if file is not None and not file.lower().endswith(".gguf"):
            raise ModelNotFound(f"{file} in {text} is no .gguf file", hint=_FORMS)
        if ".." in repo or "--" in repo or repo.endswith((".git", "-", ".")):
            raise ModelNotFound(f"{repo} cannot be a hub id: it has '..' or '--', or ends in '.', '-' or .git")
        if revision is not None and (".." in revision or revision.startswith("/")):
            raise ModelNotFound(f"{revision} cannot be a revision in {text}")
        return cls("hub", text, repo=repo, revision=revision, file=file)


def choose_gguf(files: Sequence[str], wanted: str | None, quantization: str | None, where: str) -> str | None:
    """The one GGUF file among `files` that is meant, or None if there is none.

    `wanted` is its exact name. Otherwise it is the only one there is, or the only one with `quantization` in its name.
    Projectors and importance matrices, which travel with some models, are passed over. Raises `ModelNotFound` if
    `wanted` is not there, and `ModelError` if the choice is open or falls on a part of a split file.
    """
    ggufs = sorted(
        name for name in files if name.lower().endswith(".gguf") and not re.search("mmproj|imatrix", name.lower())
    )
    if wanted is not None and wanted not in files:
        raise ModelNotFound(f"{where} has no file {wanted}", hint=near(wanted, ggufs))
    named = [name for name in ggufs if quantization and names_quantization(name, quantization)]
    candidates = [wanted] if wanted is not None else named or ggufs
    if not candidates:
        return None
    if len(candidates) > 1:
        hint = f"name one, as in {where}{'/' if Path(where).is_dir() else ':'}{ggufs[0]}"
        raise ModelError(f"{where} has several GGUF files: {', '.join(ggufs)}", hint=hint)
    chosen = candidates[0]
    if _SPLIT_PART.search(chosen):
        what = f"{chosen} of {where} is one part of a split GGUF file, which cannot be read"
        raise ModelError(what, hint="name a file that is not split, or join the parts with llama-gguf-split --merge")
    return chosen


def resolve_local(path: Path, quantization: str | None, *, tokenizer_only: bool = False) -> Path:
    """A local file or Hugging Face folder. Raises `ModelNotFound` or `ModelError` saying what is missing.

    A folder with several GGUF files needs `quantization` to name one. With `tokenizer_only` a folder needs no weights.
    """
    if path.is_file():
        return path
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise ModelError(f"cannot read the folder {path}: {error.strerror}") from None
    has_config = "config.json" in names
    if has_config and (tokenizer_only or any(name.endswith(".safetensors") for name in names)):
        return path
    gguf = choose_gguf(names, None, quantization, str(path))
    if gguf is not None:
        return path / gguf
    pickles = [name for name in names if name.endswith(PICKLES)]
    if has_config and pickles:
        what = f"{path} has only pickled weights ({pickles[0]}), which can run code when they are read"
        raise ModelError(what, hint="convert them to safetensors or GGUF")
    lacks = "no *.safetensors" if has_config else "no config.json"
    what = f"the folder {path} holds no model: it has {lacks} and no .gguf file"
    raise ModelNotFound(what, hint="it has: " + (", ".join(names[:8]) or "nothing") + (" …" if len(names) > 8 else ""))


def names_quantization(name: str, quantization: str) -> bool:
    """Whether a file name carries a quantization: ``model-Q4_K_M.gguf`` carries q4_k_m, and not q4_k."""
    return re.search(rf"(?<![a-z0-9]){re.escape(quantization.lower())}(?![a-z0-9_])", name.lower()) is not None


def _is_path_like(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "\\" in text or text.lower().endswith((".gguf", ".safetensors"))


def _missing(text: str, path: Path) -> ModelNotFound:
    hint = _FORMS
    parts = text.split("/")
    if len(parts) > 2 and parts[0] not in ("", ".", "..", "~") and text.lower().endswith(".gguf"):
        hint = f"a file on the hub is named {'/'.join(parts[:2])}:{'/'.join(parts[2:])}"
    names = [] if "/" in text else list(SHORT_NAMES)
    if os.access(path.parent, os.R_OK | os.X_OK):
        names += [entry.name for entry in path.parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    close = near(path.name, names)
    if close.startswith("did you mean"):
        hint = close
    return ModelNotFound(f"there is no file or folder {path}", hint=hint)
