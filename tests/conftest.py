"""Fixtures that several test files share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helper modules beside this file

import realdata


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
