"""The journal as any learning loop, and what it writes."""

import json
from dataclasses import replace
from types import SimpleNamespace

from ruvllm_core import Registry
from ruvllm_core.testing import LearningLoopSuite
from ruvllm_journal.hooks import Settings
from ruvllm_journal.journal import Journal


class TestJournal(LearningLoopSuite):
    def make_loop(self, context):
        return Journal(replace(context, options=Settings()))


def test_answers_and_ratings_are_lines_of_json(tmp_path):
    journal = Journal(SimpleNamespace(state_dir=tmp_path / "journal", options=Settings(file="notes.jsonl")))
    journal.observe(SimpleNamespace(request_id="a", prompt_ids=(1, 2), text="Blue.\nVery."))
    journal.feedback("a", 0.5)
    rows = [json.loads(line) for line in (tmp_path / "journal" / "notes.jsonl").read_text().splitlines()]
    assert rows == [{"id": "a", "prompt_ids": [1, 2], "text": "Blue.\nVery."}, {"id": "a", "quality": 0.5}]


def test_ruvllm_finds_it():
    assert Registry.discover().load("learning_loops", "journal") is Journal
