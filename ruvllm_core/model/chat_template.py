"""Chat templates: messages to a prompt, with the Jinja dialect of Hugging Face models, safely.

Templates are rendered as `transformers` renders them (same whitespace rules, functions, and filters), in Jinja's
sandbox and within the bounds of `ruvllm_core.model.template_budget`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ruvllm_core.errors import RequestError, TemplateError
from ruvllm_core.model.template_budget import Budget

_MAX_SOURCE = 100_000  # characters; compiling so many takes about a second. Real templates have up to 30,000


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source, as in ``tokenizer.chat_template`` or ``tokenizer_config.json``.
        bos_token, eos_token: text of the special tokens; None leaves the variable undefined.
        variables: further variables for every rendering, such as ``pad_token``.

    Raises:
        TemplateError: `source` is empty, too long, or not a Jinja template.
    """

    def __init__(
        self, source: str | None, *, bos_token: str | None = None, eos_token: str | None = None, **variables: Any
    ) -> None:
        if not source:
            raise TemplateError(
                "the model has no chat template",
                hint="give one with chat_template=, use an instruct model, or send a raw prompt instead of messages",
            )
        if len(source) > _MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, more than {_MAX_SOURCE}")
        self._variables = {"bos_token": bos_token, "eos_token": eos_token, **variables}
        self._variables = {name: value for name, value in self._variables.items() if value is not None}
        self._lock = threading.Lock()
        from ruvllm_core.model.template_sandbox import BudgetedEnvironment

        self._environment = BudgetedEnvironment(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = self._environment.template(source)
        except Exception as error:
            line = getattr(error, "lineno", None)
            where = f" at line {line}" if line else ""
            raise TemplateError(
                f"the chat template is not valid Jinja{where}: {str(error)[:500] or type(error).__name__}",
                hint="give another template, or send a raw prompt instead of messages",
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for `messages`. It has its special tokens: encode it with ``add_special=False``.

        Args:
            messages: dictionaries with ``role`` and ``content``, and whatever else the template knows.
            add_generation_prompt: end with the beginning of the assistant's answer.
            tools: JSON schemas of functions that the model may call.
            extra: further variables, such as ``enable_thinking``.

        Raises:
            RequestError: a message holds something that is not JSON.
            TemplateError: the template refuses the messages, has an error, or computes too much.
        """
        given = _plain({"messages": messages, "tools": tools, "documents": None, **extra}, "chat")
        variables = {**self._variables, **given, "add_generation_prompt": add_generation_prompt}
        with self._lock:  # the environment holds the budget of one rendering
            self._environment.budget = Budget(variables)
            try:
                return self._template.render(variables)
            except TemplateError:
                raise
            except Exception as error:
                raise TemplateError(
                    f"the chat template failed: {str(error)[:500] or type(error).__name__}",
                    hint="check roles and order of the messages, or give another template",
                ) from error


def _raise_exception(message: Any) -> None:
    raise TemplateError(f"the chat template refuses the messages: {str(message)[:500]}")


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100:
        raise TemplateError("the chat template asks for a date of more than 100 characters")
    return datetime.now().strftime(pattern)


def _plain(value: Any, where: str) -> Any:
    """A copy of `value` in plain JSON types, whose methods the sandbox knows."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, (str, int)):
        return str.__str__(value) if isinstance(value, str) else int(value)  # an enumeration's member is its value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise RequestError(
        f"{where} is a {type(value).__name__}; a chat template takes text, numbers, lists, and dictionaries",
        hint="convert it before sending",
    )
