"""What `import ruvllm_core` promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ruvllm_core

PUBLIC = {
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
}


def test_the_public_names_are_these() -> None:
    assert set(ruvllm_core.__all__) == PUBLIC
    assert ruvllm_core.__all__ == sorted(ruvllm_core.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(ruvllm_core, name)
    assert value.__module__.startswith("ruvllm_core.")
    assert value.__doc__


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'engine_of_the_future'"):
        _ = ruvllm_core.engine_of_the_future


def test_public_names_import_no_torch() -> None:
    program = (
        "import sys, ruvllm_core\n"
        "for name in ruvllm_core.__all__: getattr(ruvllm_core, name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
