"""SONA as any learning loop."""

from __future__ import annotations

from ruvllm_core.testing import LearningLoopSuite
from ruvllm_sona.loop import SonaLoop


class TestSona(LearningLoopSuite):
    def make_loop(self, context):
        return SonaLoop(context)
