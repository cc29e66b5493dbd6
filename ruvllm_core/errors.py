"""Every error that ruvllm raises on purpose, in one tree.

    RuvLLMError
    ├── ConfigError               settings, flags, configuration files
    ├── PluginError               a plugin is missing, broken, or cannot run here
    │   └── PluginConflict        two plugins claim one name
    ├── ModelError                a model cannot be found, read, or understood
    │   ├── ModelNotFound         no such file, folder, or repository
    │   ├── FormatError           a file breaks the rules of its format
    │   ├── TokenizerError        a tokenizer is missing or does not fit its model
    │   └── QuantizationError     a tensor cannot be quantized as asked
    ├── OutOfMemoryError          weights or cache need more memory than there is
    ├── CacheFull                 the key/value cache has no room for a sequence
    ├── GenerationError           a request failed while it ran
    │   └── PromptTooLong         a prompt and its answer exceed the context
    ├── RequestError              a request asks for something that makes no sense
    ├── TemplateError             a chat template cannot be rendered
    └── LearningError             feedback or learned state cannot be used

A message says what was wrong, where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RuvLLMError(Exception):
    """Base of all errors that ruvllm raises on purpose.

    Args:
        message: what was wrong and where.
        hint: what the user can do about it; shown on a line of its own.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class ConfigError(RuvLLMError):
    """A setting, flag, or configuration file is wrong."""


class PluginError(RuvLLMError):
    """A plugin is missing, broken, blocked, or cannot run on this machine."""


class PluginConflict(PluginError):
    """Two plugins claim one name of one kind."""


class ModelError(RuvLLMError):
    """A model cannot be read or understood."""


class ModelNotFound(ModelError):
    """No model under that name: no file, no folder, no repository, nothing cached."""


class FormatError(ModelError):
    """A file breaks the rules of its format."""


class TokenizerError(ModelError):
    """A tokenizer is missing, broken, or does not fit the model's vocabulary."""


class QuantizationError(ModelError):
    """A tensor or file cannot be quantized or dequantized as asked."""


class OutOfMemoryError(RuvLLMError):
    """Weights or cache need more memory than there is; the message says how much."""


class CacheFull(RuvLLMError):
    """The key/value cache has no room; every other sequence is untouched."""


class GenerationError(RuvLLMError):
    """A request failed while it ran."""


class PromptTooLong(GenerationError):
    """The prompt does not fit into the context."""


class RequestError(RuvLLMError):
    """A request asks for something that makes no sense."""


class TemplateError(RuvLLMError):
    """A chat template cannot be rendered."""


class LearningError(RuvLLMError):
    """Feedback or learned state cannot be used."""


def near(name: str, known: Iterable[str]) -> str:
    """A hint with the known names nearest to `name`, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + ", ".join(names) if names else "there are none"
