"""What is left when a download fails: no network, no access, a full disk, a process that is killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ruvllm_cli.store import list_models, remove_model
from ruvllm_core.errors import ModelError, ModelNotFound
from ruvllm_core.model.hub import resolve, resolve_tokenizer_files
from ruvllm_core.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))  # for the helper module beside this file

from fakehub import BIG, COMMITS, PULL, Hub, environment, partial_files, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    yield from serving(monkeypatch)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache")


def test_a_gated_repository_wants_a_token(hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("org/folder")
    monkeypatch.setenv("HF_TOKEN", "bad-token")
    with pytest.raises(ModelNotFound, match=r"gated(.|\n)*HF_TOKEN"):
        resolve("org/folder", settings)
    assert not list(settings.cache_dir.glob("hub/models*"))
    monkeypatch.setenv("HF_TOKEN", "good-token")
    assert (resolve("org/folder", settings) / "model.safetensors").is_file()


def test_offline_by_setting_by_variable_and_by_argument(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve("org/folder@v1", settings)
    hub.log.clear()
    offline = settings.model_copy(update={"offline": True})
    for attempt in (lambda: resolve("org/ggufs", offline), lambda: resolve("org/ggufs", settings, download=False)):
        with pytest.raises(ModelNotFound, match="org/folder@v1"):
            attempt()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="offline mode is on"):
        resolve_tokenizer_files("org/ggufs", settings)
    assert resolve("org/folder@v1", settings, refresh=True).name == COMMITS["v1"]
    assert hub.log == []


def test_no_network_says_what_is_here(hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("org/folder", settings)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelNotFound, match=r"cannot be reached(.|\n)*models that are here: org/folder"):
        resolve("org/ggufs", settings)
    with pytest.raises(ModelNotFound, match="cannot be reached"):
        resolve("org/folder", settings, refresh=True)
    assert resolve("org/folder", settings).is_dir()


def test_a_hub_that_is_down(hub: Hub, settings: Settings) -> None:
    hub.status = 500
    with pytest.raises(ModelNotFound, match="500"):
        resolve("org/folder", settings)


def test_a_cut_connection_is_resumed_where_it_broke(hub: Hub, settings: Settings) -> None:
    huge = BIG * 24  # huggingface_hub keeps what it got in pieces of 10 MiB
    hub.repos["org/folder"]["main"]["model.safetensors"] = huge
    hub.cuts["model.safetensors"] = 1
    folder = resolve("org/folder", settings)
    assert (folder / "model.safetensors").read_bytes() == huge
    ranges = [asked for line, asked in hub.log if line.startswith("GET") and line.endswith("/model.safetensors")]
    assert len(ranges) == 2 and ranges[0] is None
    assert len(huge) // 3 < int(str(ranges[1]).removeprefix("bytes=").rstrip("-")) <= len(huge) // 2
    assert not partial_files(settings)


def test_a_reset_connection_is_tried_again(hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.reset = True
    hub.cuts["model.safetensors"] = 2
    folder = resolve("org/folder", settings)
    assert (folder / "model.safetensors").read_bytes() == BIG and not partial_files(settings)
    assert hub.downloads().count("model.safetensors") == 3


def test_a_connection_that_never_holds_leaves_no_model(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cuts["model.safetensors"] = 10**6
    with pytest.raises(ModelNotFound, match="cannot be reached"):
        resolve("org/folder", settings)
    assert not list(settings.cache_dir.rglob("model.safetensors"))
    assert {entry.format for entry in list_models(settings) if entry.name == "org/folder"} <= {"incomplete"}
    with pytest.raises(ModelNotFound):
        resolve("org/folder", settings, download=False)
    hub.cuts.clear()
    assert (resolve("org/folder", settings) / "model.safetensors").read_bytes() == BIG


def test_a_disk_too_small_is_seen_before_the_download(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(Path.cwd())._replace(free=len(BIG) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match=r"no space for org/folder: it needs 1 MB(.|\n)*ruvllm rm"):
        resolve("org/folder", settings)
    assert hub.downloads() == [] and not settings.cache_dir.exists()
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    resolve("org/folder@v1", settings)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert resolve("org/folder", settings).name == COMMITS["main"], "the weights of v1 are the same"


def test_a_disk_that_fills_up_leaves_no_half_file(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import file_download

    class FullDisk:
        """A file that takes half a megabyte."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if self.file.tell() + len(data) > 1 << 19:
                self.file.write(data[: (1 << 19) - self.file.tell()])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    original = file_download.http_get
    monkeypatch.setattr(file_download, "http_get", lambda url, file, **rest: original(url, FullDisk(file), **rest))
    with pytest.raises(ModelError, match="the disk is full"):
        resolve("org/folder", settings)
    assert not partial_files(settings) and not list(settings.cache_dir.rglob("model.safetensors"))
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert (resolve("org/folder", settings) / "model.safetensors").read_bytes() == BIG


@pytest.mark.skipif(
    sys.platform != "linux" or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="needs a mount namespace for a small file system",
)
def test_a_real_full_file_system(hub: Hub, tmp_path: Path) -> None:
    script = tmp_path / "fill.py"
    script.write_text(
        textwrap.dedent("""
            import shutil, sys
            from pathlib import Path
            from ruvllm_core.errors import ModelError
            from ruvllm_core.model.hub import resolve
            from ruvllm_core.settings import Settings
            cache = Path(sys.argv[1])
            # Somebody else fills the disk after it was looked at.
            shutil.disk_usage = lambda _, real=shutil.disk_usage: real(cache)._replace(free=1 << 40)
            try:
                resolve("org/folder", Settings(cache_dir=cache), progress=False)
            except ModelError as error:
                print(error)
            print([path.name for path in cache.rglob("*") if path.name.endswith((".incomplete", ".safetensors"))])
        """)
    )
    small = tmp_path / "small"
    small.mkdir()
    command = 'mount -t tmpfs -o size=512k none "$1" && exec "$2" "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", str(small), sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert "the disk is full" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_leftovers_of_a_failed_download_are_listed_and_can_be_removed(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cuts["model-00002-of-00002.safetensors"] = 10**6
    with pytest.raises(ModelNotFound):
        resolve("org/sharded", settings)
    assert [entry.name for entry in list_models(settings) if entry.format == "incomplete"] == ["org/sharded"]
    remove_model("org/sharded", settings)
    assert not list(settings.cache_dir.glob("hub/models*"))
    hub.cuts["model-q8_0.gguf"] = 10**6
    with pytest.raises(ModelNotFound):
        resolve("org/ggufs:model-q8_0.gguf", settings)
    assert not list(settings.cache_dir.rglob("*.gguf"))
    assert {entry.format for entry in list_models(settings) if entry.name != "smollm2"} <= {"incomplete"}


def test_a_failed_refresh_leaves_the_model_as_it_was(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resolve("org/folder", settings)
    hub.repos["org/folder"]["main"] = {**hub.repos["org/folder"]["main"], "model.safetensors": BIG[::-1]}
    monkeypatch.setitem(COMMITS, "main", "3" * 40)
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cuts["model.safetensors"] = 10**6
    with pytest.raises(ModelNotFound):
        resolve("org/folder", settings, refresh=True)
    assert resolve("org/folder", settings) == before
    assert (before / "model.safetensors").read_bytes() == BIG


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_leaves_nothing_that_looks_whole(
    hub: Hub, settings: Settings, tmp_path: Path, signum: signal.Signals
) -> None:
    hub.stalled = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-c", PULL, str(settings.cache_dir), ""],
        stderr=subprocess.DEVNULL,
        env=environment(tmp_path),
    )
    try:
        assert hub.reached.wait(60)
        process.send_signal(signum)
        assert process.wait(5) != 0
    finally:
        process.kill()
        hub.stalled.set()
    assert not list(settings.cache_dir.rglob("model.safetensors"))
    hub.stalled = None
    assert (resolve("org/folder", settings) / "model.safetensors").read_bytes() == BIG
    remove_model("org/folder", settings)
    assert not partial_files(settings)
