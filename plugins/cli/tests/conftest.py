"""Fixtures for the tests of the command line: calls of `ruvllm`, and plugins as pip would install them."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from ruvllm_core.cli.main import main
from ruvllm_core.hookspecs import API_VERSION, ENTRY_POINT_GROUP
from ruvllm_core.log import configure_logging


@dataclass
class Result:
    """How a call ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    def failed(self, code: int, *words: str) -> None:
        """It failed as it should: `words` on stderr, no traceback, and nothing on stdout."""
        assert self.code == code, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        for word in words:
            assert word in " ".join(self.err.split()), self.err


Call = Callable[..., Result]
Install = Callable[..., None]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in list(os.environ):
        if name.upper().startswith("RUVLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RUVLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    yield
    configure_logging("warning")  # or others would log to the stderr of this test, which is closed by then


@pytest.fixture
def ruvllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls the console script in this process: ``ruvllm("run", "smollm2", stdin="Hello")``."""

    def call(*args: str, stdin: str | bytes = "") -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution with one plugin onto the path: ``install("dist-name", "plugin", source_of_hooks)``."""
    before = set(sys.modules)
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def put(distribution: str, plugin: str, source: str) -> None:
        module = distribution.replace("-", "_") + "_hooks"
        head = f"from ruvllm_core.hookspecs import Offer, hookimpl\nRUVLLM_API_VERSION = {API_VERSION}\n"
        (site / f"{module}.py").write_text(head + textwrap.dedent(source), encoding="utf-8")
        write_dist_info(site, distribution, f"{plugin} = {module}")
        importlib.invalidate_caches()

    yield put
    for name in set(sys.modules) - before:
        if name.endswith("_hooks"):
            del sys.modules[name]


def write_dist_info(site: Path, distribution: str, entry_point: str) -> None:
    info = site / f"{distribution.replace('-', '_')}-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{entry_point}\n")


@pytest.fixture
def candle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend `candle`, also where the plugins are on the path without having been installed."""
    if "candle_like" not in entry_points(group=ENTRY_POINT_GROUP).names:
        site = tmp_path / "candle"
        site.mkdir()
        write_dist_info(site, "ruvllm-candle-like", "candle_like = ruvllm_candle_like.hooks")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


@pytest.fixture
def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong must be found before a model is loaded."""
    from ruvllm_core.generate.engine import Engine

    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("a model was loaded"))


CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, byte_llama: Callable[..., None]) -> Path:
    """A tiny random Llama that talks fast and long: one byte is one token, ``<s>`` is 256 and ``</s>`` is 257."""
    folder = tmp_path_factory.mktemp("tiny")
    byte_llama(folder, context=65536)
    facts = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps({**facts, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
