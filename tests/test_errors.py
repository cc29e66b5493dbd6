"""The error tree is part of the public surface."""

from __future__ import annotations

import inspect
import re

import pytest

from ruvllm_core import errors
from ruvllm_core.errors import RuvLLMError, near

TREE = {
    "RuvLLMError": "Exception",
    "ConfigError": "RuvLLMError",
    "PluginError": "RuvLLMError",
    "PluginConflict": "PluginError",
    "ModelError": "RuvLLMError",
    "ModelNotFound": "ModelError",
    "FormatError": "ModelError",
    "TokenizerError": "ModelError",
    "QuantizationError": "ModelError",
    "OutOfMemoryError": "RuvLLMError",
    "CacheFull": "RuvLLMError",
    "GenerationError": "RuvLLMError",
    "PromptTooLong": "GenerationError",
    "RequestError": "RuvLLMError",
    "TemplateError": "RuvLLMError",
    "LearningError": "RuvLLMError",
}


def drawn() -> dict[str, str]:
    """The tree in the module's docstring, as child to parent."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│├└─ ]*)(\w+)(  |$)", line):
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_tree() -> None:
    classes = {
        name: value.__bases__[0].__name__
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert classes == TREE
    assert drawn() == TREE


@pytest.mark.parametrize("name", sorted(TREE))
def test_every_error_says_what_it_means_and_takes_a_hint(name: str) -> None:
    kind = getattr(errors, name)
    assert kind.__doc__
    error = kind("it broke", hint="mend it")
    assert isinstance(error, RuvLLMError)
    assert (error.message, error.hint, str(error)) == ("it broke", "mend it", "it broke\n  mend it")
    assert str(kind("it broke")) == "it broke"


def test_near_names_the_nearest_or_all() -> None:
    assert near("tempature", ["temperature", "top_k"]) == "did you mean temperature?"
    assert near("zzz", ["b", "a"]) == "known: a, b"
    assert near("zzz", []) == "there are none"
