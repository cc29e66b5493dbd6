"""What this plugin registers: the learning loop ``sona``, and ``ruvllm sona``."""

from __future__ import annotations

from ruvllm_core.hookspecs import Offer, hookimpl
from ruvllm_sona.settings import SonaSettings

RUVLLM_API_VERSION = 1
Settings = SonaSettings


@hookimpl
def learning_loops() -> list[Offer]:
    return [Offer("sona", "ruvllm_sona.loop:SonaLoop", "adapters that learn from feedback")]


@hookimpl
def commands() -> list[Offer]:
    return [Offer("sona", "ruvllm_sona.command:command", "look at what was learned, and change it")]
