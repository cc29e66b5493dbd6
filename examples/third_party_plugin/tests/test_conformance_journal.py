"""The journal through the suite that every learning loop has to pass."""

from dataclasses import replace

from ruvllm_core.testing import LearningLoopSuite
from ruvllm_journal.hooks import Settings
from ruvllm_journal.journal import Journal


class TestJournal(LearningLoopSuite):
    def make_loop(self, context):
        return Journal(replace(context, options=Settings()))
