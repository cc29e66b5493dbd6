"""A hub on this machine, which speaks enough of the Hugging Face hub's protocol and misbehaves when told to."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

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
        reset: cut connections by a reset instead of a close.
    status: an HTTP status that answers everything.
    stalled: half-way through model.safetensors the hub waits for it, after setting `reached`.
        log: ``METHOD path`` and the Range of each request.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cuts: dict[str, int] = field(default_factory=dict)
    reset: bool = False
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
                if hub.reset:
                    self.wfile.flush()
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())

    return Handler


def _etag(name: str, data: bytes) -> str:
    """What the hub calls the contents of a file: SHA-256 of large files, SHA-1 of others."""
    return (hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1)(data).hexdigest()


def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a few repositories, and an environment in which huggingface_hub asks it."""
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


def environment(tmp_path: Path) -> dict[str, str]:
    """Of a process that imports what this one does, and does not see the user's own Hugging Face login."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": path}


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def partial_files(settings: Settings) -> list[Path]:
    return list(settings.cache_dir.rglob("*.incomplete"))
