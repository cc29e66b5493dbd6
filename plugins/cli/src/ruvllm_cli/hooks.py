"""What this plugin registers: the everyday commands of ``ruvllm``."""

from __future__ import annotations

from ruvllm_core.hookspecs import Offer, hookimpl

RUVLLM_API_VERSION = 1

_COMMANDS = {
    "run": "answer a prompt, or a file of prompts",
    "chat": "talk with a model",
    "pull": "download a model",
    "list": "models that are here",
    "rm": "delete a downloaded model",
    "plugins": "what is installed, and whether it works",
    "doctor": "this machine, and what would be selected on it",
    "bench": "measure speed and memory",
    "perplexity": "how well a model predicts a text",
    "tokenize": "a text as token ids",
    "completion": "a shell's completion script",
}


@hookimpl
def commands() -> list[Offer]:
    return [Offer(name, f"ruvllm_cli.{name}_command:command", summary) for name, summary in _COMMANDS.items()]
