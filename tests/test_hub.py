"""Downloads by the real huggingface_hub from a hub on this machine."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from ruvllm_cli.store import list_models, remove_model
from ruvllm_core.errors import ModelError, ModelNotFound
from ruvllm_core.model.hub import resolve, resolve_tokenizer_files
from ruvllm_core.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))  # for the helper module beside this file

from fakehub import BIG, COMMITS, PULL, Hub, environment, files_of, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    yield from serving(monkeypatch)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache")


def test_a_folder_has_the_files_that_are_needed_and_no_pickles(hub: Hub, settings: Settings) -> None:
    folder = resolve("org/folder", settings)
    assert files_of(folder) == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == BIG
    assert settings.cache_dir in folder.parents and folder.name == COMMITS["main"]


def test_what_is_here_is_used_without_the_network_and_refresh_asks(hub: Hub, settings: Settings) -> None:
    first = resolve("org/folder", settings)
    hub.log.clear()
    assert resolve("org/folder", settings) == first
    assert hub.log == []
    assert resolve("org/folder", settings, refresh=True) == first
    assert hub.log and hub.downloads() == []


def test_refresh_follows_a_moved_branch(hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("org/folder", settings)
    hub.repos["org/folder"]["main"] = {**hub.repos["org/folder"]["main"], "config.json": b'{"new": 1}'}
    monkeypatch.setitem(COMMITS, "main", "3" * 40)
    hub.log.clear()
    folder = resolve("org/folder", settings, refresh=True)
    assert (folder / "config.json").read_bytes() == b'{"new": 1}' and folder.name == "3" * 40
    assert resolve("org/folder", settings) == folder


def test_a_revision_by_name_and_by_commit(hub: Hub, settings: Settings) -> None:
    folder = resolve("org/folder@v1", settings)
    assert folder.name == COMMITS["v1"] and (folder / "tokenizer.json").read_bytes() == b"[1]"
    assert resolve(f"org/folder@{COMMITS['v1']}", settings) == folder
    assert resolve("org/folder", settings) != folder


def test_a_named_gguf_is_the_only_download(hub: Hub, settings: Settings) -> None:
    path = resolve("org/ggufs:sub/deep.gguf", settings)
    assert path.read_bytes() == b"GGUFd" and hub.downloads() == ["deep.gguf"]
    assert resolve("org/ggufs", settings) == path


def test_several_ggufs_need_a_name_or_a_quantization(hub: Hub, settings: Settings) -> None:
    with pytest.raises(ModelError, match=r"model-q4_k_m\.gguf, model-q8_0\.gguf, sub/deep\.gguf") as caught:
        resolve("org/ggufs", settings)
    assert caught.value.hint == "name one, as in org/ggufs:model-q4_k_m.gguf"
    assert hub.downloads() == []
    for quantization, expected in (("q8_0", b"GGUF8"), ("Q4_K_M", b"GGUF4")):
        chosen = resolve("org/ggufs", settings.model_copy(update={"quantization": quantization}))
        assert chosen.read_bytes() == expected
    with pytest.raises(ModelError, match="several"):
        resolve("org/ggufs", settings.model_copy(update={"quantization": "q4_k"}))


def test_shards_come_with_their_index_and_a_lost_one_is_fetched_again(hub: Hub, settings: Settings) -> None:
    folder = resolve("org/sharded", settings)
    shard = folder / "model-00002-of-00002.safetensors"
    blob = shard.resolve()
    shard.unlink()
    blob.unlink()
    assert [entry.format for entry in list_models(settings) if entry.name == "org/sharded"] == ["incomplete"]
    with pytest.raises(ModelNotFound, match="not here, and offline mode is on"):
        resolve("org/sharded", settings.model_copy(update={"offline": True}))
    hub.log.clear()
    assert resolve("org/sharded", settings) == folder
    assert shard.read_bytes() == BIG and hub.downloads() == ["model-00002-of-00002.safetensors"]


def test_tokenizer_files_come_without_weights(hub: Hub, settings: Settings) -> None:
    folder = resolve_tokenizer_files("org/folder", settings)
    assert files_of(folder) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    hub.log.clear()
    assert resolve_tokenizer_files("org/folder", settings) == folder and hub.log == []
    assert "model.safetensors" in files_of(resolve("org/folder", settings))
    assert resolve_tokenizer_files("org/ggufs:model-q8_0.gguf", settings).read_bytes() == b"GGUF8"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("org/nothing", "there is no repository org/nothing on the hub, or it is private"),
        ("org/folder@v9", "org/folder has no revision v9"),
        ("org/" + "n" * 120, "n is no hub id that the hub allows"),
        ("org/ggufs:model-q4_k_s.gguf", "has no file model-q4_k_s.gguf\n  did you mean model-q4_k_m.gguf"),
        ("org/pickled", "no safetensors weights with a config.json but pickled ones"),
    ],
)
def test_what_is_not_on_the_hub(hub: Hub, settings: Settings, ref: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(ref, settings)
    assert message in str(caught.value)
    assert hub.downloads() == [] and not any(path.is_file() for path in settings.cache_dir.rglob("*"))


def test_removing_a_revision_keeps_what_another_shares(hub: Hub, settings: Settings) -> None:
    main, other = resolve("org/folder", settings), resolve("org/folder@v1", settings)
    removed, freed = remove_model("org/folder@v1", settings)
    assert [entry.path for entry in removed] == [other] and not other.exists()
    assert freed == len(b"[1]") + len(COMMITS["v1"])  # its tokenizer, and the file that holds the branch's commit
    assert (main / "model.safetensors").read_bytes() == BIG
    _, freed = remove_model("org/folder", settings)
    assert freed > len(BIG) and not list(settings.cache_dir.glob("hub/models*"))
    with pytest.raises(ModelNotFound):
        resolve("org/folder", settings, download=False)


def test_removing_one_gguf_keeps_the_other(hub: Hub, settings: Settings) -> None:
    kept, gone = resolve("org/ggufs:model-q8_0.gguf", settings), resolve("org/ggufs:model-q4_k_m.gguf", settings)
    blob = gone.resolve()
    remove_model("org/ggufs:model-q4_k_m.gguf", settings)
    assert kept.read_bytes() == b"GGUF8" and not gone.exists() and not blob.exists()
    remove_model("org/ggufs:model-q8_0.gguf", settings)
    assert not list(settings.cache_dir.glob("hub/models*"))


def test_huggingface_hub_sees_what_we_list(hub: Hub, settings: Settings) -> None:
    from huggingface_hub import scan_cache_dir

    for ref in ("org/folder", "org/folder@v1", "org/ggufs:model-q8_0.gguf"):
        resolve(ref, settings)
    theirs = {
        (repo.repo_id, revision.commit_hash, revision.size_on_disk)
        for repo in scan_cache_dir(settings.cache_dir / "hub").repos
        for revision in repo.revisions
    }
    ours = {
        (entry.name.partition("@")[0].partition(":")[0], entry.revision, entry.bytes)
        for entry in list_models(settings)
        if entry.name != "smollm2"
    }
    assert ours == theirs


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bars_are_drawn_on_a_terminal_when_wanted(
    hub: Hub, settings: Settings, tmp_path: Path, progress: bool
) -> None:
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", PULL, str(settings.cache_dir), "yes" if progress else ""],
        stdout=subprocess.PIPE,
        stderr=end,
        env=environment(tmp_path),
    )
    os.write(end, b"END")
    shown = b""
    while not shown.endswith(b"END"):
        shown += os.read(terminal, 4096)
    os.close(end)
    os.close(terminal)
    assert done.returncode == 0 and done.stdout == b""
    assert (b"model.safetensors: 100%" in shown) == progress and (progress or shown == b"END")
