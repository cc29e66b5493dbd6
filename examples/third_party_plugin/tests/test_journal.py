"""The journal as ruvllm finds it, and what it writes."""

import json
from types import SimpleNamespace

import pytest

from ruvllm_core import Registry, Settings
from ruvllm_core.errors import LearningError


@pytest.fixture
def journal(tmp_path):
    registry = Registry.discover(Settings(plugins={"journal": {"file": "notes.jsonl"}}))
    context = SimpleNamespace(state_dir=tmp_path / "journal", options=registry.options("journal"))
    return registry.load("learning_loops", "journal")(context)


def test_answers_and_ratings_are_lines_of_json(journal):
    journal.observe(SimpleNamespace(request_id="a", prompt_ids=(1, 2), text="Blue.\nVery."))
    journal.feedback("a", 0.5)
    rows = [json.loads(line) for line in (journal.path.parent / "notes.jsonl").read_text().splitlines()]
    assert rows == [{"id": "a", "prompt_ids": [1, 2], "text": "Blue.\nVery."}, {"id": "a", "quality": 0.5}]


def test_an_unknown_answer_cannot_be_rated(journal):
    with pytest.raises(LearningError, match="no answer b"):
        journal.feedback("b", 1.0)
    assert not journal.path.exists()
