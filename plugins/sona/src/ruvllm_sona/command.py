"""``ruvllm sona``: look at what was learned from a user's feedback, and change it."""

from __future__ import annotations

import click

from ruvllm_sona.command_change import forget, import_, rollback
from ruvllm_sona.command_deep import deep
from ruvllm_sona.command_distill import distill
from ruvllm_sona.command_files import export, merge
from ruvllm_sona.command_plot import plot
from ruvllm_sona.command_report import history, status


@click.group("sona")
def command() -> None:
    """Look at what was learned from feedback, and change it.

    Everything is kept for each model and each user apart; without MODEL it is the model of the settings, which is
    smollm2 unless they say otherwise. status, history, export, merge and plot also work while an engine is learning;
    the others need the user's folder for themselves.
    """


for _one in (status, history, rollback, forget, export, import_, merge, deep, distill, plot):
    command.add_command(_one)
