"""What a model's name means, and what is said about names that mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ruvllm_core.errors import ModelError, ModelNotFound
from ruvllm_core.model.hub import resolve, resolve_tokenizer_files
from ruvllm_core.model.ref import ModelRef, choose_gguf
from ruvllm_core.model.tokenizer import Tokenizer
from ruvllm_core.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", offline=True)


@pytest.mark.parametrize(
    ("text", "repo", "revision", "file"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", None, None),
        ("org/name@v1.0", "org/name", "v1.0", None),
        ("org/name@refs/pr/1:a.gguf", "org/name", "refs/pr/1", "a.gguf"),
        ("org/name:sub/a b.GGUF", "org/name", None, "sub/a b.GGUF"),
        ("o/n_1.x-y", "o/n_1.x-y", None, None),
    ],
)
def test_hub_ids(text: str, repo: str, revision: str | None, file: str | None) -> None:
    ref = ModelRef.parse(text)
    assert (ref.kind, ref.repo, ref.revision, ref.file, ref.path) == ("hub", repo, revision, file, None)
    assert ModelRef.parse(ref) is ref


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' names no model"),
        ("  ", "names no model"),
        ("a\0b", "names no model"),
        ("smolm2", "did you mean smollm2?"),
        ("name", "a model is named org/name[@revision][:file.gguf]"),
        ("./org/name", "there is no file or folder org/name"),
        ("/no/such/model.gguf", "there is no file or folder /no/such/model.gguf"),
        ("folder/model.gguf", "there is no file or folder folder/model.gguf"),
        ("org/name/model-q8_0.gguf", "a file on the hub is named org/name:model-q8_0.gguf"),
        ("org/name:", "there is no file or folder org/name:"),
        ("org/name:model.bin", "model.bin in org/name:model.bin is no .gguf file"),
        ("org/name:../a.gguf", "../a.gguf cannot be the name of a file"),
        ("org/name:/a.gguf", "/a.gguf cannot be the name of a file"),
        ("org/name@../../x", "cannot be a revision"),
        ("org/name@/etc", "cannot be a revision"),
        ("org/a--b", "org/a--b cannot be a hub id"),
        ("org/a..b", "org/a..b cannot be a hub id"),
        ("x" * 300, "names no model: [Errno"),
        ("~nobody-of-that-name/model.gguf", "names no model"),
    ],
)
def test_names_that_name_nothing(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        ModelRef.parse(text)
    assert message in str(caught.value)


def test_what_is_on_this_disk_wins_over_a_hub_id_and_a_path_is_always_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound):
        ModelRef.parse(Path("org/name"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert ModelRef.parse("org/name").kind == "local"
    (tmp_path / "smollm2").mkdir()
    assert ModelRef.parse("smollm2").kind == "short"
    assert ModelRef.parse("./smollm2").kind == ModelRef.parse(Path("smollm2")).kind == "local"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ModelRef.parse("~/org/name").path == tmp_path / "org" / "name"


def test_a_missing_file_is_answered_with_its_nearest_neighbour(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "model-q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"did you mean model-q4_0\.gguf"):
        resolve(str(tmp_path / "model-q4_k.gguf"), settings)


def _folder(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json", "model.safetensors"], "."),
        (["config.json", "model.safetensors", "model.gguf"], "."),
        (["config.json", "model.gguf"], "model.gguf"),
        (["model.gguf", "mmproj-f16.gguf", "model.imatrix.gguf"], "model.gguf"),
    ],
)
def test_local_folders(names: list[str], expected: str, tmp_path: Path, settings: Settings) -> None:
    folder = _folder(tmp_path, *names)
    assert resolve(folder, settings) == folder / expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "it has: nothing"),
        (["README.md"], "it has no config.json and no .gguf file\n  it has: README.md"),
        (["model.safetensors"], "it has no config.json"),
        (["config.json"], "it has no *.safetensors"),
        (["config.json", "pytorch_model.bin"], "only pickled weights (pytorch_model.bin)"),
        (["a-q8_0.gguf", "b-q4_0.gguf"], "has several GGUF files: a-q8_0.gguf, b-q4_0.gguf"),
        (["m-00001-of-00002.gguf"], "one part of a split GGUF file"),
    ],
)
def test_local_folders_without_a_model(names: list[str], message: str, tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(_folder(tmp_path, *names), settings)
    assert message in str(caught.value)


def test_a_quantization_chooses_in_a_folder_and_the_hint_for_the_others_works(
    tmp_path: Path, settings: Settings
) -> None:
    folder = _folder(tmp_path, "m-Q4_K_M.gguf", "m-Q8_0.gguf")
    chosen = resolve(folder, settings.model_copy(update={"quantization": "q8_0"}))
    assert chosen == folder / "m-Q8_0.gguf"
    with pytest.raises(ModelError) as caught:
        resolve(folder, settings)
    hint = str(caught.value.hint)
    assert resolve(hint.removeprefix("name one, as in "), settings) == folder / "m-Q4_K_M.gguf"


def test_local_files(tmp_path: Path, settings: Settings) -> None:
    blob = tmp_path / "sha256-1234"
    blob.write_bytes(b"GGUF....")
    assert resolve(blob, settings) == blob
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"....")
    with pytest.raises(ModelError, match=r"a GGUF file starts with .*\n.*the folder that holds config\.json"):
        Tokenizer.load(resolve(other, settings))


def test_tokenizer_files_of_a_folder_need_no_weights(tmp_path: Path, settings: Settings) -> None:
    folder = _folder(tmp_path, "config.json", "tokenizer.json")
    assert resolve_tokenizer_files(folder, settings) == folder
    with pytest.raises(ModelNotFound):
        resolve(folder, settings)


def test_a_quantization_is_matched_as_a_whole() -> None:
    files = ["m.Q4_K_S.gguf", "m.Q4_K_M.gguf", "m.IQ4_K.gguf", "m-Q5_K.gguf"]
    assert choose_gguf(files, None, "q4_k_m", "x") == "m.Q4_K_M.gguf"
    assert choose_gguf(files, None, "q5_k", "x") == "m-Q5_K.gguf"
    with pytest.raises(ModelError, match="several"):
        choose_gguf(files, None, "q4_k", "x")
