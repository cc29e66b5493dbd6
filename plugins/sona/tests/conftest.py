"""A tiny engine that learns, for the tests of the loop's parts together; and commands called in this process."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from ruvllm_candle_like.backend import CandleBackend
from ruvllm_core.cli.app import App
from ruvllm_core.cli.main import main
from ruvllm_core.generate.engine import Engine
from ruvllm_core.generate.request import GenerateParams, Generation
from ruvllm_core.log import configure_logging
from ruvllm_core.protocols import Adapter, FeedbackResult, FloatArray, LearningContext, LowRank
from ruvllm_core.settings import Settings
from ruvllm_core.testing import tiny as core
from ruvllm_sona.audit import Entry, read_audit
from ruvllm_sona.command_place import Place, open_place
from ruvllm_sona.loop import SonaLoop
from ruvllm_sona.records import Example
from ruvllm_sona.settings import SonaSettings
from ruvllm_sona.sites import linear_sites
from ruvllm_sona.study import Study

T = TypeVar("T")
PROMPT = tuple(core.TEXTS["c"][:8])
#: Limits of the gate for a model of random weights, whose anchors mean nothing to it.
WIDE = {"max_loss": 5.0, "max_kl": 5.0, "drafts": False}


class Rig:
    """A tiny engine and its loop; learning is done in `idle`, and in the engine's own idle time."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        spec = core.tiny_spec()
        weights = core.tiny_weights(spec)
        self.decoder = core.tiny_decoder(spec, weights)
        options = SonaSettings(**{**WIDE, **settings})
        self.loop = SonaLoop(LearningContext(spec, self.decoder, "tiny", folder, options, weights))
        model = core.tiny_engine(CandleBackend, self.decoder)
        model._worker.close()  # so that it does not close the decoder when it goes
        parts = model._parts
        self.engine = Engine(
            replace(parts, loops=(self.loop,), info=replace(parts.info, learning=("sona",))), Settings()
        )

    def on(self, function: Callable[[], T]) -> T:
        """Run on the engine's thread."""
        return self.engine._worker.call(function)

    def answer(self, prompt: Sequence[int] = PROMPT, **params: Any) -> Generation:
        given = {"max_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": 1, "ignore_eos": True, **params}
        return self.engine.generate(list(prompt), GenerateParams(**given))

    def rate(self, quality: float, prompt: Sequence[int] = PROMPT, **params: Any) -> FeedbackResult:
        """An answer and a verdict."""
        done = self.answer(prompt, **params)
        return self.engine.feedback(done.request_id, quality)["sona"]

    def idle(self) -> None:
        """Let it learn all there is."""

        def work() -> None:
            for _ in range(100_000):
                if not self.loop.tick(0.1):
                    return
            raise AssertionError("there is always more to do")

        self.on(work)

    def adapter(self, user: str = "", prompt: Sequence[int] = PROMPT) -> Adapter | None:
        """What a request would run with now."""
        return self.on(lambda: self.loop.adapter(core.tiny_request(prompt, user=user)))

    def logits(self, user: str = "") -> FloatArray:
        adapter = self.adapter(user)
        return self.on(lambda: core.whole(self.decoder, core.TEXTS["b"], adapter=adapter))

    def number(self, user: str = "") -> int:
        return self.on(lambda: self.loop.tenant(user).brain(0).number)

    def folder(self, user: str = "") -> Path:
        return self.on(lambda: self.loop.tenant(user).folder)

    def audit(self, user: str = "") -> list[Entry]:
        return list(read_audit(self.folder(user) / "audit.jsonl"))


@pytest.fixture
def rigs(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Makes rigs, in one folder unless told otherwise, and closes what is left open."""
    made: list[Rig] = []

    def make(folder: Path | None = None, **settings: Any) -> Rig:
        made.append(Rig(folder or tmp_path / "learned", **settings))
        return made[-1]

    yield make
    for rig in made:
        rig.engine.close()


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    def failed(self, code: int, *words: str) -> None:
        assert (self.code, self.out) == (code, ""), self.err
        assert "Traceback" not in self.err
        for word in words:
            assert word in " ".join(self.err.split()), self.err


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in list(os.environ):
        if name.upper().startswith("RUVLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RUVLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RUVLLM_LOG_LEVEL", "error")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(os, "nice", lambda _: 0)  # it would last for all tests to come
    yield
    configure_logging("warning")


@pytest.fixture
def sona(
    clean_environment: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Calls ``ruvllm sona`` in this process."""

    def call(*args: object, stdin: str = "", group: str = "sona") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([group, *map(str, args)])
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, byte_llama: Callable[..., None]) -> Path:
    """A tiny random Llama whose tokens are bytes, and "ab"."""
    folder = tmp_path_factory.mktemp("tiny")
    byte_llama(folder, pairs=[("a", "b")], context=512)
    facts = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def two_patterns(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    """Makes a user of a model, ann, with two patterns of prompts, an adapter for each, and wide limits of the gate."""
    for name, value in (("SPECIALISE", "always"), ("MAX_PATTERNS", "2"), ("MAX_LOSS", "5"), ("MAX_KL", "5")):
        monkeypatch.setenv(f"RUVLLM_PLUGINS__SONA__{name}", value)

    def make(model: Path, rank: int = 1) -> Place:
        place = open_place(App(), str(model), "ann", new=True)
        rng, decoder, kinds = np.random.default_rng(0), None, (range(16, 24), range(96, 104))
        given: Any = (place.model.spec, decoder, place.name, place.state_dir, place.settings, place.model.weights)
        study = Study(LearningContext(*given, place.tokenizer), place.settings)
        with place.tenant() as tenant:
            for n in range(24):
                prompt = tuple(rng.choice(kinds[n % 3 == 0], 6).tolist())
                tenant.learn_later(tenant.remember(Example(f"r{n}", prompt, (1, 2), 0.5, time=1000.0 + n), None))
            deque(tenant.maintain(study.elsewhere, study.judge), maxlen=0)
            assert {one.count for one in tenant.bank.patterns.values()} == {16, 24}  # the first had all of them
            for pattern in (0, 1):
                brain, found = tenant.brain(pattern), {}
                brain.pending.clear()
                for site, (rows, columns) in linear_sites(place.model.spec).items():
                    a, b = rng.normal(0, columns**-0.5, (rank, columns)), rng.normal(0, 0.2, (rows, rank))
                    found[site] = LowRank(a.astype(np.float32), b.astype(np.float32))
                brain.adopt(brain.publish(found, {}, tenant.log.last, brain.life), found, tenant.log.last)
                brain.rebase(found)
        study.close()
        return place

    return make
