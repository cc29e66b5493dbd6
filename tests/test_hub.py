"""Downloads by the real huggingface_hub from a hub on this machine that misbehaves when told to."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from ruvllm_core.errors import ModelError, ModelNotFound
from ruvllm_core.model.hub import resolve, resolve_tokenizer_files
from ruvllm_core.model.store import list_models, remove_model
from ruvllm_core.settings import Settings

COMMITS = {"main": "1" * 40, "v1": "2" * 40}
PULL = """
import sys
from pathlib import Path
from ruvllm_core.model.hub import resolve
from ruvllm_core.settings import Settings
resolve("org/folder", Settings(cache_dir=Path(sys.argv[1])), progress=bool(sys.argv[2]))
"""
BIG = bytes(range(256)) * 4096


@dataclass
class Hub:
    """What the fake hub serves and how it fails.

    Attributes:
        repos: repository → revision → file → contents.
        gated: repositories that want a token.
        cuts: file → how many more times its connection is cut after half of what was asked for.
        status: an HTTP status that answers everything.
    stalled: half-way through model.safetensors the hub waits for it, after setting `reached`.
        log: ``METHOD path`` and the Range of each request.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cuts: dict[str, int] = field(default_factory=dict)
    status: int | None = None
    stalled: threading.Event | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    log: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> list[str]:
        """Files whose contents were asked for, in order."""
        return [line.rpartition("/")[2] for line, _ in self.log if line.startswith("GET") and "/resolve/" in line]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.log.append((f"{self.command} {path}", self.headers.get("Range")))
            if hub.status is not None:
                return self._send(hub.status, b"", {})
            parts = path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            parts = parts[2:] if api else parts
            repo, rest = "/".join(parts[:2]), parts[2:]
            if repo not in hub.repos:
                return self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            revisions = hub.repos[repo]
            revision = rest[1] if len(rest) > 1 else "main"
            revision = {commit: name for name, commit in COMMITS.items()}.get(revision, revision)
            if revision not in revisions:
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            files, commit = revisions[revision], COMMITS[revision]
            if api:
                siblings = [self._sibling(name, data) for name, data in files.items()]
                return self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings})
            if repo in hub.gated and not self.headers.get("Authorization", "").endswith("good-token"):
                return self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            name = "/".join(rest[2:])
            if name not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return self._file(name, files[name], commit)

        def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if name.endswith(".safetensors"):
                sibling["lfs"] = {"sha256": _etag(name, data), "size": len(data), "pointerSize": 130}
            return sibling

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _file(self, name: str, data: bytes, commit: str) -> None:
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            headers = {"ETag": f'"{_etag(name, data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if asked:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = None
            if self.command == "GET" and hub.cuts.get(name, 0) > 0:
                hub.cuts[name] -= 1
                cut = (len(data) - start) // 2
            if self.command == "GET" and name == "model.safetensors" and hub.stalled is not None:
                self._stall(hub.stalled, data, headers)
            else:
                self._send(206 if asked else 200, data[start:], headers, cut)

        def _stall(self, until: threading.Event, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            hub.reached.set()
            until.wait(60)
            self.close_connection = True

        def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True

    return Handler


def _etag(name: str, data: bytes) -> str:
    """What the hub calls the contents of a file: SHA-256 of large files, SHA-1 of others."""
    return (hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1)(data).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    state.repos["org/folder"] = {
        "main": {
            "config.json": b"{}",
            "tokenizer.json": b"[]",
            "tokenizer_config.json": b"{ }",
            "model.safetensors": BIG,
            "pytorch_model.bin": b"pickle",
            "consolidated.safetensors": b"again",
            "README.md": b"#",
        },
        "v1": {"config.json": b"{}", "tokenizer.json": b"[1]", "model.safetensors": BIG},
    }
    state.repos["org/ggufs"] = {
        "main": {
            "model-q4_k_m.gguf": b"GGUF4",
            "model-q8_0.gguf": b"GGUF8",
            "mmproj-f16.gguf": b"GGUFv",
            "sub/deep.gguf": b"GGUFd",
        }
    }
    state.repos["org/sharded"] = {
        "main": {
            "config.json": b"{}",
            "tokenizer.json": b"[]",
            "model.safetensors.index.json": json.dumps(
                {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
            ).encode(),
            "model-00001-of-00002.safetensors": b"first",
            "model-00002-of-00002.safetensors": BIG,
        }
    }
    state.repos["org/pickled"] = {"main": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}}
    for name, value in {"HF_ENDPOINT": state.url, "HF_TOKEN": "good-token", "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache")


def _environment(tmp_path: Path) -> dict[str, str]:
    """Of a process that imports what this one does, and does not see the user's own Hugging Face login."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": path}


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _partial(settings: Settings) -> list[Path]:
    return list(settings.cache_dir.rglob("*.incomplete"))


def test_a_folder_has_the_files_that_are_needed_and_no_pickles(hub: Hub, settings: Settings) -> None:
    folder = resolve("org/folder", settings)
    assert _files(folder) == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
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
    assert _files(folder) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    hub.log.clear()
    assert resolve_tokenizer_files("org/folder", settings) == folder and hub.log == []
    assert "model.safetensors" in _files(resolve("org/folder", settings))
    assert resolve_tokenizer_files("org/ggufs:model-q8_0.gguf", settings).read_bytes() == b"GGUF8"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("org/nothing", "there is no repository org/nothing on the hub, or it is private"),
        ("org/folder@v9", "org/folder has no revision v9"),
        ("org/ggufs:model-q4_k_s.gguf", "has no file model-q4_k_s.gguf\n  did you mean model-q4_k_m.gguf"),
        ("org/pickled", "no safetensors weights with a config.json but pickled ones"),
    ],
)
def test_what_is_not_on_the_hub(hub: Hub, settings: Settings, ref: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(ref, settings)
    assert message in str(caught.value)
    assert hub.downloads() == [] and not any(path.is_file() for path in settings.cache_dir.rglob("*"))


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
    assert not _partial(settings)


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
    assert not _partial(settings) and not list(settings.cache_dir.rglob("model.safetensors"))
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
        env=_environment(tmp_path),
    )
    assert "the disk is full" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


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
        env=_environment(tmp_path),
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
    assert not _partial(settings)


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
        env=_environment(tmp_path),
    )
    os.write(end, b"END")
    shown = b""
    while not shown.endswith(b"END"):
        shown += os.read(terminal, 4096)
    os.close(end)
    os.close(terminal)
    assert done.returncode == 0 and done.stdout == b""
    assert (b"model.safetensors: 100%" in shown) == progress and (progress or shown == b"END")
