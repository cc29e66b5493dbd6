"""`Engine`: load a model, generate, stream, give feedback."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any, cast

from ruvllm_core.errors import LearningError, PromptTooLong, RequestError, TemplateError
from ruvllm_core.generate.answer import Answer, Item, Sink
from ruvllm_core.generate.load import EngineInfo, Parts, load_parts
from ruvllm_core.generate.request import GenerateParams, Generation, Request, StreamEvent, new_request_id
from ruvllm_core.generate.score import token_logprobs
from ruvllm_core.generate.stream import Stream
from ruvllm_core.generate.worker import Worker
from ruvllm_core.log import get_logger
from ruvllm_core.model.chat_template import ChatTemplate
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import CacheStats, FeedbackResult, FloatArray
from ruvllm_core.registry import Registry
from ruvllm_core.settings import ModelConfig, Settings, load_settings

Message = Mapping[str, Any]
#: A text; chat messages with ``role`` and ``content``; or token ids, which are taken as they are.
Prompt = str | Sequence[Message] | Sequence[int]

_PROMPTS = "a prompt is a text, a list of chat messages, or a list of token ids"
_log = get_logger("engine")


class Engine:
    """A loaded model that answers. Any thread may use it; one thread of its own does the work.

    Attributes:
        info: what was loaded, and which parts were chosen.
        spec: the model.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, parts: Parts, settings: Settings) -> None:
        self.info: EngineInfo = parts.info
        self.spec: ModelSpec = parts.model.spec
        self.tokenizer = parts.tokenizer
        self._parts = parts
        self._settings = settings
        self._worker = Worker(parts.backend, parts.loops, parts.speculator)
        self._template: ChatTemplate | None = None

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        backend: str | None = None,
        config: ModelConfig | None = None,
        settings: Settings | None = None,
        registry: Registry | None = None,
    ) -> Engine:
        """Load a model.

        Args:
            model: a hub id ``org/name[@revision][:file.gguf]``, a folder, a ``.gguf`` file, or ``smollm2``.
            backend: name of a registered backend.
            config: how to load; what it sets goes before `settings`.
            settings: everything else; read from the environment if not given.
            registry: plugins; discovered if not given.

        Raises `ConfigError`, `PluginError`, `ModelError` or `OutOfMemoryError`, each saying what to do.
        """
        settings = settings if settings is not None else load_settings()
        chosen = {"model": str(model) if model is not None else None, "backend": backend}
        settings = settings.model_copy(update={name: value for name, value in chosen.items() if value is not None})
        if config is not None:
            settings = settings.with_model_config(config)
        return cls(load_parts(settings, registry or Registry.discover(settings)), settings)

    def generate(self, prompt: Prompt, params: GenerateParams | None = None, *, template: bool = True) -> Generation:
        """Answer `prompt`; blocks until done.

        Args:
            prompt: a text, which the model's chat template wraps as a user's message if it has one; chat messages;
                or token ids.
            params: how to generate; the settings' ``sampling`` if not given.
            template: False passes a text to the model as it is.

        Raises `PromptTooLong`, `RequestError`, `TemplateError`, or `GenerationError`.
        """
        return self.stream(prompt, params, template=template).result()

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: GenerateParams | Sequence[GenerateParams] | None = None,
        *,
        template: bool = True,
    ) -> list[Generation]:
        """Answer many prompts at once, in the order given; `params` for all, or one for each."""
        if isinstance(prompts, str):
            raise RequestError("generate_batch takes a list of prompts, not one text", hint="generate takes one")
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts, but parameters for {len(each)}")
        streams = [self.stream(p, own, template=template) for p, own in zip(prompts, each, strict=True)]
        return [stream.result() for stream in streams]

    def stream(self, prompt: Prompt, params: GenerateParams | None = None, *, template: bool = True) -> Stream:
        """Start answering `prompt` (see `generate`) and return an iterator over the pieces as they come."""
        items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        request = self._submit(prompt, params, template, items.put)
        return Stream(request.id, items, self._worker, self)

    async def astream(
        self, prompt: Prompt, params: GenerateParams | None = None, *, template: bool = True
    ) -> AsyncIterator[StreamEvent]:
        """`stream` for asyncio. Leaving the loop early cancels the request."""
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Item]()

        def sink(item: Item) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(items.put_nowait, item)

        request = self._submit(prompt, params, template, sink)
        try:
            while not isinstance(item := await items.get(), Generation):
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._worker.cancel(request.id)

    def feedback(self, request_id: str, quality: float) -> dict[str, FeedbackResult]:
        """Say how good an answer was, from 0 to 1; what each learning loop, by its name, has made of it.

        Raises `LearningError` if nothing learns here or the request is not remembered.
        """
        if not 0.0 <= quality <= 1.0:
            raise LearningError(f"quality is {quality}, expected a number from 0 (bad) to 1 (good)")
        if not self._parts.loops:
            raise LearningError(
                "no learning loop is running, so this feedback would be lost",
                hint="install a plugin that offers one, and see that the setting `learning` does not leave it out",
            )
        loops = zip(self.info.learning, self._parts.loops, strict=True)
        return self._worker.call(lambda: {name: loop.feedback(request_id, quality) for name, loop in loops})

    def score(self, token_ids: Sequence[int]) -> FloatArray:
        """Natural log-probability of each of ``token_ids[1:]`` given those before, float32 ``[n - 1]``."""
        ids = self._check_ids(token_ids)
        if len(ids) < 2 or len(ids) > self.info.max_context:
            raise RequestError(f"cannot score {len(ids)} tokens: give 2 to {self.info.max_context}")
        parts, chunk = self._parts, self._settings.prefill_chunk
        return self._worker.call(lambda: token_logprobs(parts.decoder, parts.new_cache(1), ids, chunk))

    def encode_prompt(self, prompt: Prompt, *, template: bool = True) -> list[int]:
        """The token ids that `generate` would start from."""
        if isinstance(prompt, str):
            if template and self.tokenizer.chat_template is not None:
                return self._render([{"role": "user", "content": prompt}])
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, bytes) or not hasattr(prompt, "__len__"):
            raise RequestError(f"a prompt cannot be {type(prompt).__name__}", hint=_PROMPTS)
        if len(prompt) and all(isinstance(part, Mapping) for part in prompt):
            return self._render([dict(cast(Message, message)) for message in prompt])
        return self._check_ids(cast(Sequence[int], prompt))

    def cache_stats(self) -> CacheStats:
        """What the key/value cache holds now."""
        return self._worker.call(self._parts.backend.cache_stats)

    def close(self) -> None:
        """Cancel what is running and free everything. May be called again."""
        if self._worker.close():
            for name, loop in zip(self.info.learning, self._parts.loops, strict=True):
                try:
                    loop.close()
                except Exception as error:  # a full disk, say: the rest must be freed all the same
                    _log.error("a learning loop's close failed", loop=name, error=f"{type(error).__name__}: {error}")
            self._parts.backend.close()
            if self._parts.speculator is not None:
                self._parts.speculator.close()
            self._parts.decoder.close()
            self._parts.model.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):  # it lacks one if it could not be made
            self.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, prompt: Prompt, params: GenerateParams | None, template: bool, sink: Sink) -> Request:
        params = params or GenerateParams(**self._settings.sampling.model_dump())
        if not isinstance(params, GenerateParams):
            raise RequestError(f"params is {type(params).__name__}, expected GenerateParams")
        prompt_ids, context = self.encode_prompt(prompt, template=template), self.info.max_context
        if not prompt_ids:
            raise RequestError("the prompt is empty", hint="give it at least one character")
        if len(prompt_ids) >= context:
            raise PromptTooLong(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {context} including the answer",
                hint="shorten the prompt, or raise max_context if the model allows it",
            )
        if any(not 0 <= token < self.spec.vocab_size for token in params.logit_bias):
            raise RequestError(f"logit_bias names a token outside the vocabulary of {self.spec.vocab_size}")
        request = Request(
            id=new_request_id(),
            prompt_ids=tuple(prompt_ids),
            params=params,
            stop_ids=self.tokenizer.eos_ids,
            capacity=min(len(prompt_ids) + params.max_tokens, context),
            keep_hidden=params.hidden_states or any(loop.wants_hidden for loop in self._parts.loops),
        )
        self._worker.submit(Answer(request, self.tokenizer, sink))
        return request

    def _render(self, messages: list[dict[str, Any]]) -> list[int]:
        if self._template is None:
            if self.tokenizer.chat_template is None:
                raise TemplateError(
                    f"{self.info.model} has no chat template, so chat messages cannot be put into a prompt",
                    hint="pass the prompt as a text",
                )
            bos, eos = (
                self.tokenizer.decode([token], skip_special=False) if token is not None else ""
                for token in (self.tokenizer.bos_id, self.tokenizer.eos_id)
            )
            self._template = ChatTemplate(self.tokenizer.chat_template, bos_token=bos, eos_token=eos)
        return self.tokenizer.encode(self._template.render(messages), add_special=False)

    def _check_ids(self, token_ids: Sequence[int]) -> list[int]:
        ids = [index(token) if hasattr(token, "__index__") else -1 for token in token_ids]
        for given, token in zip(token_ids, ids, strict=True):
            if not 0 <= token < self.spec.vocab_size:
                what = f"{given!r} is no token id of this model, which has {self.spec.vocab_size}"
                raise RequestError(what, hint=_PROMPTS)
        return ids
