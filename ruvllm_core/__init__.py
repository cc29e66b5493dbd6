"""RuvLLM: a local LLM engine made of plugins.

>>> from ruvllm_core import Engine, GenerateParams
>>> with Engine.load("smollm2") as engine:
...     print(engine.generate("Why is the sky blue?", GenerateParams(max_tokens=64)).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ruvllm_core.generate.engine import Engine
    from ruvllm_core.generate.request import GenerateParams, Generation, StreamEvent, Trajectory
    from ruvllm_core.model.tokenizer import Tokenizer
    from ruvllm_core.registry import Registry
    from ruvllm_core.settings import CacheConfig, ModelConfig, Settings, load_settings

# Resolved on first use, so that a plugin's discovery or `ruvllm --help` imports no more than it needs.
_HOMES = {
    "generate.engine": ("Engine",),
    "generate.request": ("GenerateParams", "Generation", "StreamEvent", "Trajectory"),
    "model.tokenizer": ("Tokenizer",),
    "registry": ("Registry",),
    "settings": ("CacheConfig", "ModelConfig", "Settings", "load_settings"),
}

__all__ = [
    "CacheConfig",
    "Engine",
    "GenerateParams",
    "Generation",
    "ModelConfig",
    "Registry",
    "Settings",
    "StreamEvent",
    "Tokenizer",
    "Trajectory",
    "__version__",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"ruvllm_core.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
