"""From settings to running parts: model, decoder, cache, backend, learning loops. Every choice is logged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from ruvllm_core import protocols as p
from ruvllm_core.decode.kv import bytes_per_token
from ruvllm_core.errors import ConfigError, PluginError, RuvLLMError
from ruvllm_core.generate.proposers import DraftModel, NGramProposer
from ruvllm_core.generate.speculative import Speculator
from ruvllm_core.log import get_logger
from ruvllm_core.machine import available_memory, kernels_device
from ruvllm_core.model.hub import resolve
from ruvllm_core.model.loader import ModelFile, open_model, quantize_weights
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.model.tokenizer import Tokenizer
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings

_NGRAM_DEPTH, _DEPTH = 15, 4  # most tokens of a draft: looking one up costs nothing, making it does
_log = get_logger("load")


@dataclass(frozen=True)
class EngineInfo:
    """What was loaded, and which parts were chosen.

    Attributes:
        model: as it was asked for.
        path: the file or folder it came from.
        scheme: the scheme of most of its weights.
        kernels: the provider that computes, and on which device.
        cache: the policy that keeps keys and values.
        learning: names of the loops.
        load_s: seconds from start to ready.
    """

    model: str
    path: Path
    architecture: str
    scheme: str
    backend: str
    kernels: str
    device: str
    cache: str
    max_context: int
    learning: tuple[str, ...]
    load_s: float


@dataclass(frozen=True, eq=False)
class Parts:
    """All that an engine is made of; `new_cache` makes a cache of its own for a number of sequences."""

    info: EngineInfo
    model: ModelFile
    tokenizer: Tokenizer
    decoder: p.Decoder
    new_cache: Callable[[int], p.KVCachePolicy]
    backend: p.Backend
    loops: tuple[p.LearningLoop, ...]
    speculator: Speculator | None = None


def load_parts(settings: Settings, registry: Registry) -> Parts:
    """Load what `settings` ask for. Raises whatever part of `RuvLLMError` says why it cannot be."""
    started = time.perf_counter()
    registry.check_settings()
    # Names first: a misspelt one is found before gigabytes are read.
    make_backend = registry.load("backends", settings.backend)
    make_cache: Callable[[p.CacheContext], p.KVCachePolicy] = registry.load("cache_policies", settings.cache.policy)
    quantizer = registry.load("quantizers", settings.quantization) if settings.quantization else None

    def open_named(name: str) -> tuple[ModelFile, Tokenizer]:
        found = open_model(resolve(name, settings), registry)
        found.check_finite()
        text = found.tokenizer()  # before the work of quantizing, which a broken one would waste
        if quantizer is not None:
            quantize_weights(found, quantizer)
        return found, text

    model, tokenizer = open_named(settings.model)
    max_context = _max_context(model.spec, settings)
    decoder, kernels, device = _choose_decoder(model, settings, registry, max_context)
    loops = _learning_loops(settings, registry, decoder, model, tokenizer)
    depth = settings.draft_tokens or (_NGRAM_DEPTH if settings.speculative == "ngram" else _DEPTH)

    def new_cache(max_sequences: int) -> p.KVCachePolicy:
        own = registry.options(registry.entry("cache_policies", settings.cache.policy).plugin)
        drafting = 0 if settings.speculative == "off" else 1 + depth
        sizes = max_context, max_sequences, max(settings.prefill_chunk, drafting)
        return make_cache(p.CacheContext(model.spec, decoder, settings.cache, *sizes, own))

    def new_proposer() -> p.Proposer:
        kind, _, name = settings.speculative.partition(":")
        if kind == "draft":
            draft, own = open_named(name)
            _check_vocabulary(name, own, settings.model, tokenizer)
            computes, *_ = _choose_decoder(draft, settings, registry, min(max_context, draft.spec.max_context))
            return DraftModel(draft, computes, settings, model.spec.vocab_size)
        if kind == "ngram":
            return NGramProposer()
        for loop in loops.values():
            if (proposer := loop.proposer()) is not None:
                return proposer
        what = f"speculative is learned, but no learning loop offers drafts (running: {', '.join(loops) or 'none'})"
        raise ConfigError(what, hint="have a loop that drafts installed and running, or set speculative to ngram")

    options = registry.options(registry.entry("backends", settings.backend).plugin)
    speculator = None if settings.speculative == "off" else Speculator(new_proposer(), depth)
    chunk = settings.prefill_chunk
    backend = make_backend(p.BackendContext(model.spec, decoder, new_cache, chunk, options, speculator))
    info = EngineInfo(
        model=settings.model,
        path=model.path,
        architecture=model.spec.architecture,
        scheme=model.scheme,
        backend=settings.backend,
        kernels=kernels,
        device=device,
        cache=settings.cache.policy,
        max_context=max_context,
        learning=tuple(loops),
        load_s=time.perf_counter() - started,
    )
    _log.info("loaded", model=info.model, scheme=info.scheme, context=max_context, seconds=round(info.load_s, 2))
    return Parts(info, model, tokenizer, decoder, new_cache, backend, tuple(loops.values()), speculator)


def _check_vocabulary(name: str, draft: Tokenizer, model: str, target: Tokenizer) -> None:
    """Raise `ConfigError` unless both have the same tokens."""
    own, theirs = ([one.token_bytes(token) for token in range(one.vocab_size)] for one in (draft, target))
    for token, (a, b) in enumerate(zip_longest(own, theirs)):
        if a != b:
            sizes, tokens = f"{len(own)} tokens instead of {len(theirs)}", f"token {token} is {a!r} instead of {b!r}"
            what = f"the draft model {name} has another vocabulary than {model}: {sizes}, and {tokens}"
            raise ConfigError(what, hint="a draft model has to be of the same family as the model it drafts for")


def _choose_decoder(
    model: ModelFile, settings: Settings, registry: Registry, max_context: int
) -> tuple[p.Decoder, str, str]:
    """The first kernel provider that can run this model; why others could not is logged, or raised if asked for."""
    device = kernels_device(settings.kernels, settings.device)
    common = p.DecoderOptions(settings.dtype, device, settings.metal_device, settings.threads, max_context)
    names = list(settings.kernels if settings.kernels != "auto" else [e.name for e in registry.entries("kernels")])
    reasons: list[str] = []
    for name in names:
        entry = registry.entry("kernels", name)  # a misspelt name is passed over by nobody
        try:
            options = replace(common, plugin=registry.options(entry.plugin))
            provider = registry.load("kernels", name, device)(options)
            decoder: p.Decoder | None = provider.decoder(model.spec, model.weights, options)
            if decoder is None:
                # PyTorch is imported here, where it is needed, and not where a native decoder needs none.
                from ruvllm_core.decode.decoder import EagerDecoder

                decoder = EagerDecoder(model.spec, model.weights, provider, options)
        except Exception as error:  # a broken provider must not keep the others from running
            if len(names) == 1:
                raise
            reason = str(error) if isinstance(error, RuvLLMError) else f"{type(error).__name__}: {error}"
            report = _log.info if entry.reason(device) else _log.warning  # not being made for this machine is no fault
            report("kernels passed over", name=name, reason=reason)
            reasons.append(f"{name}: {reason}")
            continue
        _log.info("kernels chosen", name=name, device=provider.device)
        return decoder, name, provider.device
    raise PluginError("no kernels can run this model: " + "; ".join(reasons or ["none is installed"]))


def _max_context(spec: ModelSpec, settings: Settings) -> int:
    """The longest sequence: as asked for, else the model's own limit, else what half of the memory can hold."""
    if settings.max_context is not None:
        if settings.max_context > spec.max_context:
            what = f"max_context {settings.max_context} is more than this model's {spec.max_context}"
            raise ConfigError(what, hint="set max_context to the model's limit or less, or leave it out")
        return settings.max_context
    fits = available_memory() // 2 // bytes_per_token(spec, "f32")
    if fits >= spec.max_context:
        return spec.max_context
    _log.warning("context lowered to what half of the memory holds", model=spec.max_context, lowered=fits)
    return max(fits, 1)


def _learning_loops(
    settings: Settings, registry: Registry, decoder: p.Decoder, model: ModelFile, tokenizer: Tokenizer
) -> dict[str, p.LearningLoop]:
    kind, wanted = "learning_loops", settings.learning
    found = registry.load_all(kind) if wanted == "auto" else {name: registry.load(kind, name) for name in wanted}
    loops: dict[str, p.LearningLoop] = {}
    for name, make_loop in found.items():
        options, folder = registry.options(registry.entry(kind, name).plugin), settings.cache_dir / "learning" / name
        given = decoder.spec, decoder, settings.model, folder, options, model.weights, tokenizer
        loops[name] = make_loop(p.LearningContext(*given))
    return loops
