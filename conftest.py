"""What holds for every test, of core and of plugins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
