"""`SonaLLM` with a real model: nothing is said to have changed unless it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ruvllm_core import GenerateParams, load_settings
from ruvllm_core.errors import LearningError
from ruvllm_sona.llm import SonaConfig, SonaLLM
from ruvllm_sona.settings import SonaSettings

QUERY = "Name a colour."
PARAMS = GenerateParams(max_tokens=6, temperature=1.0, top_p=1.0, seed=3)


def load(folder: Path, **learning: object) -> SonaLLM:
    settings = load_settings().model_copy(update={"max_context": 256})
    return SonaLLM(SonaConfig(user="anna", data_dir=folder, settings=settings, learning=SonaSettings(**learning)))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SonaLLM]:
    with load(tmp_path_factory.mktemp("quick"), background=False) as found:
        yield found


def test_its_own_answer_is_applied_and_the_version_differs(llm: SonaLLM) -> None:
    done = llm.generate(QUERY, PARAMS)
    before = llm.stats()
    result = llm.instant_adapt(QUERY, done.text, 1.0)
    assert (result.status, result.generated) == ("applied", True)
    assert result.before == before.version != result.after == llm.stats().version
    assert llm.stats().feedback == before.feedback + 1


def test_a_foreign_answer_is_refused_where_nothing_can_learn_it(llm: SonaLLM) -> None:
    result = llm.instant_adapt(QUERY, "Blue.", 1.0)
    assert (result.status, result.generated) == ("refused", False)
    assert result.before == result.after == llm.stats().version
    assert llm.maybe_background() is None


def test_nonsense_is_refused_clearly(llm: SonaLLM) -> None:
    with pytest.raises(LearningError, match="quality is 2"):
        llm.instant_adapt(QUERY, "Blue.", 2.0)
    with pytest.raises(LearningError, match="empty"):
        llm.instant_adapt(QUERY, "", 1.0)
    with pytest.raises(LearningError, match="needs good and bad"):
        llm.deep()


@pytest.mark.slow
def test_a_foreign_answer_is_learned_in_the_background(tmp_path: Path) -> None:
    with load(tmp_path) as llm:
        assert llm.maybe_background() is None
        result = llm.instant_adapt(QUERY, "Blue.", 1.0)
        assert (result.status, result.before, result.after) == ("deferred", "", "")
        found = []
        for _ in range(600):
            found += [one] if (one := llm.maybe_background(0.2)) is not None else []
            if found and not llm.stats().waiting:
                break
        assert len(found) == 1
        assert (found[0].samples_used, found[0].before, found[0].after, found[0].rejected) == (1, 0, 1, 0)
        assert llm.stats().version != "" and llm.stats().waiting == 0
    with load(tmp_path) as again:
        assert again.stats().published == 1
    with pytest.raises(LearningError, match="closed"):
        again.stats()
