"""Fixtures that several test files share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helper modules beside this file

import realdata

from ruvllm_core.settings import Settings


@pytest.fixture(autouse=True, scope="module")
def nothing_is_learned_yet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What somebody has taught the models of this machine must not change what tests see, nor the other way round."""
    field = Settings.model_fields["cache_dir"]
    usual = field.default
    if not request.module.__name__.endswith(("test_docs", "test_settings")):  # which are about the default
        field.default = tmp_path_factory.mktemp("cache")
        Settings.model_rebuild(force=True)
    yield
    if field.default != usual:
        field.default = usual
        Settings.model_rebuild(force=True)


@pytest.fixture(scope="session")
def qwen2_folder() -> Path:
    return realdata.npm_tokenizer("qwen2_5")


@pytest.fixture(scope="session")
def llama3_folder() -> Path:
    return realdata.npm_tokenizer("llama3")


@pytest.fixture(scope="session")
def mistral7b_folder() -> Path:
    return realdata.npm_tokenizer("llama2")  # so named, but it is Mistral 7B v0.1's


@pytest.fixture(scope="session")
def mistral_data() -> Path:
    return realdata.mistral_data()


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    return realdata.gguf_metadata(realdata.smollm2_gguf())
