"""The engine on a real model: generate, stream, astream, batches, stopping, cancelling, learning, errors."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ruvllm_core import Engine, GenerateParams, ModelConfig, Settings
from ruvllm_core.errors import (
    ConfigError,
    GenerationError,
    LearningError,
    ModelNotFound,
    PluginError,
    PromptTooLong,
    RequestError,
)
from ruvllm_core.generate.request import Generation, Request, Trajectory
from ruvllm_core.hookspecs import API_VERSION, Offer, hookimpl
from ruvllm_core.protocols import Adapter, FeedbackResult, LearningContext, LowRank
from ruvllm_core.registry import Registry

GREEDY = GenerateParams(max_tokens=24, temperature=0.0)
QUESTION = "Why is the sky blue?"


class RecordingLoop:
    """A learning loop that remembers all it is told, and may hand out an adapter."""

    wants_hidden = False
    latest: RecordingLoop

    def __init__(self, context: LearningContext) -> None:
        self.context = context
        self.seen: list[Trajectory] = []
        self.feedbacks: list[tuple[str, float]] = []
        self.given: Adapter | None = None
        self.ticks = 0
        RecordingLoop.latest = self

    def adapter(self, request: Request) -> Adapter | None:
        return self.given

    def observe(self, trajectory: Trajectory) -> None:
        self.seen.append(trajectory)

    def feedback(self, request_id: str, quality: float) -> FeedbackResult:
        if request_id not in {trajectory.request_id for trajectory in self.seen}:
            raise LearningError(f"request {request_id} is not remembered")
        self.feedbacks.append((request_id, quality))
        return FeedbackResult("applied", "v1")

    def tick(self, budget_s: float) -> bool:
        self.ticks += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def proposer(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True


def _registry() -> Registry:
    hooks = ModuleType("recording_hooks")
    hooks.RUVLLM_API_VERSION = API_VERSION  # type: ignore[attr-defined]
    hooks.make_loop = RecordingLoop  # type: ignore[attr-defined]

    @hookimpl
    def learning_loops() -> list[Offer]:
        return [Offer("recording", f"{__name__}:RecordingLoop"), Offer("broken", "module_that_is_nowhere:Loop")]

    hooks.learning_loops = learning_loops  # type: ignore[attr-defined]
    registry = Registry.discover(Settings(plugin_block=["sona"]))  # which would be one more loop
    registry.register(hooks, "recording", "tests", "0")
    return registry


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    # The offer's target is imported by name, and pytest's import mode leaves this module out of sys.modules.
    sys.modules.setdefault(__name__, sys.modules.get(__name__) or ModuleType(__name__))
    sys.modules[__name__].RecordingLoop = RecordingLoop  # type: ignore[attr-defined]
    with Engine.load(
        "smollm2", settings=Settings(kernels=["torch"]), registry=_registry(), config=ModelConfig(max_context=512)
    ) as made:
        yield made


@pytest.fixture
def loop(engine: Engine) -> Iterator[RecordingLoop]:
    loop = RecordingLoop.latest
    loop.given = None
    yield loop
    loop.given = None


def test_generate_describes_what_it_did(engine: Engine) -> None:
    out = engine.generate(QUESTION, GREEDY)
    assert out.finish_reason == "length"
    assert out.usage.completion_tokens == len(out.token_ids) == 24
    assert out.usage.prompt_tokens == len(engine.encode_prompt(QUESTION))
    assert out.text == engine.tokenizer.decode(out.token_ids)
    assert "sky" in out.text.lower() or "light" in out.text.lower()
    assert 0 < out.timings.ttft_s <= out.timings.total_s
    assert out.timings.decode_tok_s > 0
    assert str(out) == out.text


def test_stream_astream_and_generate_agree(engine: Engine) -> None:
    whole = engine.generate(QUESTION, GREEDY)
    stream = engine.stream(QUESTION, GREEDY)
    events = list(stream)
    assert "".join(event.text for event in events) == whole.text
    assert tuple(event.token_id for event in events) == whole.token_ids
    assert [event.finish_reason for event in events] == [None] * 23 + ["length"]
    assert stream.result().token_ids == whole.token_ids

    async def collect() -> list[int | None]:
        return [event.token_id async for event in engine.astream(QUESTION, GREEDY)]

    assert tuple(asyncio.run(collect())) == whole.token_ids


def test_many_async_requests_at_once(engine: Engine) -> None:
    async def one(prompt: str) -> str:
        return "".join([event.text async for event in engine.astream(prompt, GREEDY)])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(one(prompt) for prompt in (QUESTION, "Name a colour.", QUESTION)))

    first, second, third = asyncio.run(all_of_them())
    assert first == third == engine.generate(QUESTION, GREEDY).text
    assert second == engine.generate("Name a colour.", GREEDY).text


def test_seed_repeats(engine: Engine) -> None:
    params = GenerateParams(max_tokens=12, temperature=1.0, seed=3)
    first = engine.generate(QUESTION, params).token_ids
    assert engine.generate(QUESTION, params).token_ids == first
    assert engine.generate(QUESTION, GenerateParams(max_tokens=12, temperature=1.0, seed=4)).token_ids != first


def test_batch_keeps_order_and_own_parameters(engine: Engine) -> None:
    params = [GREEDY, GenerateParams(max_tokens=3, temperature=0.0)]
    long, short = engine.generate_batch([QUESTION, "Name a colour."], params)
    assert long.token_ids == engine.generate(QUESTION, GREEDY).token_ids
    assert len(short.token_ids) == 3
    with pytest.raises(RequestError, match="2 prompts, but parameters for 1"):
        engine.generate_batch(["a", "b"], [GREEDY])


def test_prompt_forms(engine: Engine) -> None:
    ids = engine.encode_prompt(QUESTION)
    assert engine.encode_prompt([{"role": "user", "content": QUESTION}]) == ids
    assert engine.encode_prompt(ids) == ids
    raw = engine.encode_prompt(QUESTION, template=False)
    assert raw == engine.tokenizer.encode(QUESTION)
    assert len(raw) < len(ids)
    assert engine.generate(ids, GREEDY).token_ids == engine.generate(QUESTION, GREEDY).token_ids


def test_stop_string_spanning_tokens(engine: Engine) -> None:
    text = engine.generate(QUESTION, GREEDY).text
    stop = text[20:31]  # letters in the middle of the text, over several tokens
    out = engine.generate(QUESTION, GenerateParams(max_tokens=24, temperature=0.0, stop=(stop,)))
    assert out.finish_reason == "stop"
    assert out.text == text[: text.index(stop)]
    events = list(engine.stream(QUESTION, GenerateParams(max_tokens=24, temperature=0.0, stop=(stop,))))
    assert "".join(event.text for event in events) == out.text
    assert events[-1].finish_reason == "stop"
    assert engine.cache_stats().sequences == 0


def test_end_of_turn_stops_unless_ignored(engine: Engine) -> None:
    prompt = "Answer with the single word yes."
    out = engine.generate(prompt, GenerateParams(max_tokens=60, temperature=0.0))
    assert out.finish_reason == "stop"
    assert out.token_ids[-1] in engine.tokenizer.eos_ids
    assert "<|im_end|>" not in out.text
    count = len(out.token_ids) + 3
    more = engine.generate(prompt, GenerateParams(max_tokens=count, temperature=0.0, ignore_eos=True))
    assert more.finish_reason == "length"
    assert more.token_ids[: len(out.token_ids)] == out.token_ids


def test_context_ends_generation(engine: Engine) -> None:
    prompt = [5] * 505
    out = engine.generate(prompt, GenerateParams(max_tokens=50, temperature=0.0, ignore_eos=True))
    assert out.finish_reason == "length"
    assert len(out.token_ids) == 512 - 505


def test_cancel_keeps_what_there_is(engine: Engine) -> None:
    stream = engine.stream(QUESTION, GenerateParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    first = [next(stream) for _ in range(3)]
    stream.cancel()
    out = stream.result()
    assert out.finish_reason == "cancelled"
    assert 3 <= len(out.token_ids) < 400
    assert out.text.startswith("".join(event.text for event in first))
    assert engine.cache_stats().sequences == 0


def test_dropped_streams_and_left_loops_cancel(engine: Engine) -> None:
    stream = engine.stream(QUESTION, GenerateParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    next(stream)
    del stream

    async def leave_early() -> None:
        events = engine.astream(QUESTION, GenerateParams(max_tokens=400, temperature=0.0, ignore_eos=True))
        async for _ in events:
            break
        await events.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave_early())
    deadline = time.monotonic() + 5
    while engine.cache_stats().sequences and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.cache_stats().sequences == 0


def test_queued_request_can_be_cancelled(engine: Engine) -> None:
    running = engine.stream(QUESTION, GenerateParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    queued = engine.stream(QUESTION, GREEDY)
    queued.cancel()
    assert queued.result().token_ids == ()
    assert queued.result().finish_reason == "cancelled"
    assert len(running.result().token_ids) == 60


def test_threads_share_an_engine(engine: Engine) -> None:
    expected = engine.generate(QUESTION, GREEDY).token_ids
    found: list[tuple[int, ...]] = []
    threads = [
        threading.Thread(target=lambda: found.append(engine.generate(QUESTION, GREEDY).token_ids)) for _ in "123"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_every_trajectory_reaches_learning(engine: Engine, loop: RecordingLoop) -> None:
    params = GenerateParams(max_tokens=5, temperature=0.0, hidden_states=True, logprobs=0)
    out = engine.generate(QUESTION, params)
    engine.feedback(out.request_id, 0.9)
    assert loop.feedbacks[-1] == (out.request_id, 0.9)
    seen = loop.seen[-1]
    assert (seen.request_id, seen.output_ids, seen.text) == (out.request_id, out.token_ids, out.text)
    assert list(seen.prompt_ids) == engine.encode_prompt(QUESTION)
    assert seen.hidden is not None
    assert seen.hidden.shape == (5, engine.spec.hidden_size)
    # The states are those the tokens were drawn from: projecting them gives the tokens and their log-probabilities.
    logits = engine._parts.decoder.logits(seen.hidden).astype(np.float64)
    assert tuple(logits.argmax(-1)) == out.token_ids
    logprobs = logits.max(-1) - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) - logits.max(-1)
    np.testing.assert_allclose(seen.logprobs, logprobs, atol=1e-4)
    assert seen.adapter_version is None
    assert engine.generate(QUESTION, GREEDY).request_id == loop.seen[-1].request_id
    assert loop.seen[-1].hidden is None
    assert loop.ticks > 0


def test_feedback_must_make_sense(engine: Engine) -> None:
    with pytest.raises(LearningError, match="not remembered"):
        engine.feedback("nobody", 0.5)
    for quality in (-0.1, 1.1, float("nan")):
        with pytest.raises(LearningError, match="from 0"):
            engine.feedback("nobody", quality)
    with (
        pytest.raises(LearningError, match="no learning loop"),
        Engine.load(settings=Settings(learning=[]), config=ModelConfig(max_context=64)) as quiet,
    ):
        quiet.feedback("nobody", 0.5)


def test_a_loop_that_cannot_be_imported_is_left_out_unless_asked_for(engine: Engine) -> None:
    assert engine.info.learning == ("recording",)
    with pytest.raises(PluginError, match="'broken' of tests 0 cannot be loaded from module_that_is_nowhere:Loop"):
        Engine.load(settings=Settings(learning=["broken"]), registry=_registry(), config=ModelConfig(max_context=64))


def test_adapters_of_a_loop_change_the_answer(engine: Engine, loop: RecordingLoop) -> None:
    base = engine.generate(QUESTION, GREEDY)
    width = engine.spec.hidden_size
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((2, width), (width, 2)))
    loop.given = Adapter("v1", {"final": LowRank(a, b * 0.0)})
    assert engine.generate(QUESTION, GREEDY).token_ids == base.token_ids
    loop.given = Adapter("v2", {"final": LowRank(a, b)})
    assert engine.generate(QUESTION, GREEDY).token_ids != base.token_ids
    assert loop.seen[-1].adapter_version == "v2"
    loop.given = None
    assert engine.generate(QUESTION, GREEDY).token_ids == base.token_ids


def test_a_loop_that_cannot_close_keeps_nothing_from_being_freed(engine: Engine, capsys: Any) -> None:
    def refuse() -> None:
        raise OSError("no space left")

    freed: list[str] = []
    parts = engine._parts
    fakes = {name: SimpleNamespace(close=lambda name=name: freed.append(name)) for name in ("backend", "decoder")}
    own = SimpleNamespace(submit=print, cancel=print, busy=False, **vars(fakes["backend"]))
    loop = SimpleNamespace(close=refuse, tick=lambda budget_s: False)
    model = SimpleNamespace(spec=engine.spec, close=lambda: freed.append("model"))
    made = Engine(
        replace(parts, loops=(loop,), backend=own, decoder=fakes["decoder"], model=model),  # type: ignore[arg-type]
        Settings(),
    )
    made.close()
    assert freed == ["backend", "decoder", "model"]
    assert "no space left" in capsys.readouterr().err


def test_score_is_the_log_softmax(engine: Engine) -> None:
    out = engine.generate(QUESTION, GenerateParams(max_tokens=8, temperature=0.0, logprobs=0))
    ids = [*engine.encode_prompt(QUESTION), *out.token_ids]
    scores = engine.score(ids)
    assert scores.shape == (len(ids) - 1,)
    np.testing.assert_allclose(scores[-8:], out.logprobs, atol=1e-4)
    with pytest.raises(RequestError, match="cannot score"):
        engine.score([1])


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([5] * 512, PromptTooLong, "512 tokens, the context holds 512"),
        ([], RequestError, "empty"),
        ([1, 10**9], RequestError, "no token id"),
        ([1, -1], RequestError, "no token id"),
        ([1.5], RequestError, "no token id"),
    ],
)
def test_bad_prompts(engine: Engine, prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        engine.generate(prompt, GREEDY)


def test_bad_requests(engine: Engine) -> None:
    with pytest.raises(RequestError, match="vocabulary of 49152"):
        engine.generate(QUESTION, GenerateParams(logit_bias={49152: 1.0}))


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        ({"backend": "candel"}, PluginError, "candle"),
        ({"config": ModelConfig(kernels=["troch"])}, PluginError, "torch"),
        ({"config": ModelConfig(cache={"policy": "paged0"})}, PluginError, "there is no 'paged0'"),
        ({"config": ModelConfig(max_context=10**6)}, ConfigError, "this model's 8192"),
        ({"config": ModelConfig(quantization="q9")}, PluginError, "q9"),
        ({"config": ModelConfig(device="cuda:7")}, PluginError, "CUDA"),
        ({"model": "/nowhere/model.gguf"}, ModelNotFound, "/nowhere/model.gguf"),
    ],
)
def test_loading_what_is_not_there(load: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Engine.load(settings=Settings(), **load)


def test_closed_engine_says_so() -> None:
    engine = Engine.load(settings=Settings(), config=ModelConfig(max_context=64))
    stream = engine.stream(QUESTION, GenerateParams(max_tokens=20))
    engine.close()
    engine.close()
    assert isinstance(stream.result(), Generation)
    with pytest.raises(GenerationError, match="closed"):
        engine.generate(QUESTION)


def test_more_sequences_share_steps() -> None:
    settings = Settings(plugins={"candle_like": {"max_sequences": 3}}, max_context=128)
    prompts = [QUESTION, "Name a colour.", "Count to three."]
    with Engine.load(settings=settings) as engine:
        together = [out.token_ids for out in engine.generate_batch(prompts, GREEDY)]
        alone = [engine.generate(prompt, GREEDY).token_ids for prompt in prompts]
    assert together == alone


def test_kernels_that_fail_are_passed_over_unless_asked_for() -> None:
    hooks = ModuleType("failing_hooks")
    hooks.RUVLLM_API_VERSION = API_VERSION  # type: ignore[attr-defined]

    @hookimpl
    def kernels() -> list[Offer]:
        # Called with the options like any provider: `int` raises a TypeError of its own.
        return [Offer("failing", "builtins:int", priority=99), Offer("absent", "builtins:int", probe=lambda: "no")]

    hooks.kernels = kernels  # type: ignore[attr-defined]
    registry = Registry.discover(Settings())
    registry.register(hooks, "failing", "tests", "0")
    settings = Settings(max_context=64)
    with Engine.load(settings=settings, registry=registry) as engine:
        assert engine.info.kernels not in ("failing", "absent")
    with pytest.raises(PluginError, match=r"(?s)failing: TypeError.*absent: .*cannot run here: no"):
        Engine.load(settings=settings, registry=registry, config=ModelConfig(kernels=["failing", "absent"]))
    with pytest.raises(TypeError):
        Engine.load(settings=settings, registry=registry, config=ModelConfig(kernels=["failing"]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine: engine.generate_batch("hello"), "not one text"),
        (lambda engine: engine.generate(b"hello"), "cannot be bytes"),
        (lambda engine: engine.generate(None), "cannot be NoneType"),
        (lambda engine: engine.generate("hello", {"max_tokens": 3}), "expected GenerateParams"),
    ],
)
def test_what_is_no_request(engine: Engine, call: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call(engine)


def test_numpy_ids_are_ids(engine: Engine) -> None:
    ids = np.array(engine.encode_prompt(QUESTION))
    assert engine.encode_prompt(ids) == engine.encode_prompt(list(ids)) == ids.tolist()


def test_a_cancelled_stream_says_so(engine: Engine) -> None:
    stream = engine.stream(QUESTION, GenerateParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    next(stream)
    stream.cancel()
    assert list(stream)[-1].finish_reason == "cancelled"


def test_a_backend_that_dies_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request_id: str) -> None:
        raise RuntimeError("no way back")

    with Engine.load(settings=Settings(), config=ModelConfig(max_context=64)) as engine:
        monkeypatch.setattr(engine._parts.backend, "cancel", broken)
        stream = engine.stream(QUESTION, GenerateParams(max_tokens=20, ignore_eos=True))
        next(stream)
        stream.cancel()
        with pytest.raises(GenerationError, match="no way back"):
            stream.result()
        with pytest.raises(GenerationError):
            engine.generate(QUESTION)


def test_a_dropped_engine_is_freed() -> None:
    engine = Engine.load(settings=Settings(), config=ModelConfig(max_context=64))
    stream = engine.stream(QUESTION, GenerateParams(max_tokens=4, ignore_eos=True))
    worker = engine._worker
    del engine
    assert len(stream.result().token_ids) == 4  # a stream keeps its engine
    del stream
    gc.collect()
    worker._thread.join(timeout=10)
    assert not worker._thread.is_alive()


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)"])
def test_a_program_may_end_in_the_middle_of_an_answer(ending: str, tmp_path: Path) -> None:
    program = f"""
from ruvllm_core import Engine, GenerateParams, ModelConfig
engine = Engine.load("smollm2", config=ModelConfig(max_context=512))
stream = engine.stream("Count to a thousand.", GenerateParams(max_tokens=400, ignore_eos=True))
next(stream)
{ending}
"""
    environment = {**os.environ, "RUVLLM_CACHE_DIR": str(tmp_path)}  # not what somebody has taught the model here
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment
    )
    assert (ended.returncode, ended.stderr) == (3 if ending else 0, "")
