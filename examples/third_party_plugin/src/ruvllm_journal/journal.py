"""A learning loop that only takes notes: it never changes the model."""

import json

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import FeedbackResult


class Journal:
    wants_hidden = False

    def __init__(self, context):
        self.path = context.state_dir / context.options.file
        self.seen = set()

    def adapter(self, request):
        return None

    def observe(self, trajectory):
        self.seen.add(trajectory.request_id)
        self._write(id=trajectory.request_id, prompt_ids=trajectory.prompt_ids, text=trajectory.text)

    def feedback(self, request_id, quality):
        if request_id not in self.seen:
            raise LearningError(f"journal has no answer {request_id}", hint="rate it in the process it came from")
        self._write(id=request_id, quality=quality)
        return FeedbackResult("refused", reason="a journal changes nothing")

    def tick(self, budget_s):
        return False

    def state_dict(self):
        return {"seen": sorted(self.seen)}

    def load_state_dict(self, state):
        self.seen = set(state["seen"])

    def proposer(self):
        return None

    def close(self):
        pass

    def _write(self, **row):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
