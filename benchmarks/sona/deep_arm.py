"""The deep loop on stored feedback, by the plugin's own training, several cells side by side."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import LowRank
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.deep import DeepConfig, DeepProgress, deep
from ruvllm_sona.network import Network
from ruvllm_sona.records import Example
from ruvllm_sona.sites import linear_sites, start
from sona.cells import Cell
from sona.lockstep import TEMPERATURE
from sona.measures import HeldOut
from sona.subject import Subject, load_network, open_file
from sona.texts import FEEDBACK_LUCK, uniforms

_worker: Network | None = None


def stored(
    subject: Subject, cells: Sequence[Cell], feedback: int, max_tokens: int, at_once: int
) -> list[list[Example]]:
    """What each cell's user thought of the base model's answers to its prompts."""
    seeds = sorted({cell.seed for cell in cells})
    prompts = {seed: _of(cells, seed).feedback_prompts(feedback) for seed in seeds}
    luck = [uniforms(feedback, max_tokens, FEEDBACK_LUCK, seed) for seed in seeds]
    answered = HeldOut(subject, feedback, max_tokens, at_once).answers(
        [[one.text for one in prompts[seed]] for seed in seeds], luck, None
    )
    answers = dict(zip(seeds, answered, strict=True))
    return [
        [
            Example("", subject.chat(asked.text), answer, float(cell.task.score(subject.text(answer))), TEMPERATURE)
            for asked, answer in zip(prompts[cell.seed], answers[cell.seed], strict=True)
        ]
        for cell in cells
    ]


def train(
    subject: Subject,
    model: str,
    dtype: str,
    cells: Sequence[Cell],
    examples: Sequence[Sequence[Example]],
    texts: Sequence[Sequence[int]],
    workers: int,
) -> tuple[AdapterStack, list[str]]:
    """An adapter for each cell, and why some have none; those are the base model's."""
    device = str(subject.network.device)
    jobs = [(own, texts, replace(DeepConfig(), seed=cell.seed)) for cell, own in zip(cells, examples, strict=True)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _load, (model, device, dtype)) as pool:
        found = list(pool.map(_train, jobs))
    learner, shapes = DeepConfig().learner, linear_sites(subject.network.spec)
    rows = [deltas if deltas is not None else start(shapes, learner.rank, 0) for deltas, _ in found]
    return AdapterStack.of(rows, device), [why for _, why in found if why]


def _load(model: str, device: str, dtype: str) -> None:
    global _worker
    _worker = load_network(open_file(model), device, dtype)


def _train(job: tuple[Sequence[Example], Sequence[Sequence[int]], DeepConfig]) -> tuple[dict[str, LowRank] | None, str]:
    examples, texts, config = job
    assert _worker is not None
    last: DeepProgress | None = None
    try:
        for progress in deep(_worker, linear_sites(_worker.spec), examples, texts, config):
            last = progress or last
    except LearningError as error:
        return None, str(error)
    if last is None or last.deltas is None:
        return None, "no round was better than the base model on the answers held out"
    return dict(last.deltas), ""


def _of(cells: Sequence[Cell], seed: int) -> Cell:
    return next(cell for cell in cells if cell.seed == seed)
