"""What ruvllm reads at discovery. It names the implementation and does not import it."""

from pydantic import BaseModel

from ruvllm_core.hookspecs import Offer, hookimpl

RUVLLM_API_VERSION = 1


class Settings(BaseModel):
    file: str = "journal.jsonl"  # in [plugins.journal] of a configuration file


@hookimpl
def learning_loops() -> list[Offer]:
    return [Offer("journal", "ruvllm_journal.journal:Journal", "every answer and its rating as lines of JSON")]
