"""A tiny engine that learns, for the tests of the loop's parts together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ruvllm_candle_like.backend import CandleBackend
from ruvllm_core.generate.engine import Engine
from ruvllm_core.generate.request import GenerateParams, Generation
from ruvllm_core.protocols import Adapter, FeedbackResult, FloatArray, LearningContext
from ruvllm_core.settings import Settings
from ruvllm_core.testing import tiny
from ruvllm_sona.audit import Entry, read_audit
from ruvllm_sona.loop import SonaLoop
from ruvllm_sona.settings import SonaSettings

T = TypeVar("T")
PROMPT = tuple(tiny.TEXTS["c"][:8])
#: Limits of the gate for a model of random weights, whose anchors mean nothing to it.
WIDE = {"max_loss": 5.0, "max_kl": 5.0, "drafts": False}


class Rig:
    """A tiny engine and its loop; learning is done in `idle`, and in the engine's own idle time."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        spec = tiny.tiny_spec()
        weights = tiny.tiny_weights(spec)
        self.decoder = tiny.tiny_decoder(spec, weights)
        options = SonaSettings(**{**WIDE, **settings})
        self.loop = SonaLoop(LearningContext(spec, self.decoder, "tiny", folder, options, weights))
        model = tiny.tiny_engine(CandleBackend, self.decoder)
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
        return self.on(lambda: self.loop.adapter(tiny.tiny_request(prompt, user=user)))

    def logits(self, user: str = "") -> FloatArray:
        adapter = self.adapter(user)
        return self.on(lambda: tiny.whole(self.decoder, tiny.TEXTS["b"], adapter=adapter))

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
