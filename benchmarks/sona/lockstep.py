"""`Fleet`: cells that learn in lockstep, each from its own prompts, its own answers and its own feedback."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.gate import Backoff
from ruvllm_sona.learner import LearnerConfig
from ruvllm_sona.leash_texts import leash_piece
from ruvllm_sona.records import Example
from ruvllm_sona.sites import start
from ruvllm_sona.update import gradients
from sona.cells import Baseline, Cell
from sona.controls import feedback_of
from sona.gating import Gatekeeper, finished
from sona.optimizer import CellAdam
from sona.sampling import Sampler
from sona.subject import Subject
from sona.texts import FEEDBACK_LUCK, uniforms

TEMPERATURE = 0.8


class Fleet:
    """Whole-network adapters, one a cell, changed by the plugin's own loss and by one step of Adam a feedback.

    What the gate does not let pass is taken back, and after several refusals steps get smaller, as in the plugin.

    Args:
        shapes: sites of the adapters, ``(out, in)`` each.
        config: the learner's settings, `ruvllm_sona.learner.LearnerConfig`.
        feedback: how many each cell gets.
        at_once: most cells in one backward pass.
        keeper: the gate; None lets everything pass.
        texts: that nobody rated, a piece of one on the leash in every step.

    Attributes:
        stack: the adapters that answer, which are means of those that learn; `begun` is what they started as.
        log: what each cell was told, round by round.
        refused: steps of each cell that did not pass the gate.
    """

    def __init__(
        self, subject: Subject, cells: Sequence[Cell], shapes: dict[str, tuple[int, int]], config: LearnerConfig,
        feedback: int, max_tokens: int, at_once: int, keeper: Gatekeeper | None = None,
        texts: Sequence[Sequence[int]] = (),
    ) -> None:  # fmt: skip
        self.subject, self.cells, self.config, self._at_once = subject, list(cells), config, at_once
        device = subject.network.device
        self._learning = AdapterStack.of([start(shapes, config.rank, cell.seed) for cell in cells], device).trainable()
        self.stack, self.begun = copied(self._learning), copied(self._learning)
        self._prompts = [[subject.chat(one.text) for one in cell.feedback_prompts(feedback)] for cell in cells]
        self._luck = [uniforms(feedback, max_tokens, FEEDBACK_LUCK, cell.seed) for cell in cells]
        room = max(len(prompt) for own in self._prompts for prompt in own) + max_tokens
        self._sampler = Sampler(subject, len(cells), room, self.stack, TEMPERATURE, max_tokens)
        self._adam = CellAdam(self._learning, self.stack, config.learning_rate, config.average)
        self._keeper, self._backoffs = keeper, [Backoff() for _ in cells]
        self.refused = [0] * len(cells)
        self._baseline, self._texts = Baseline(len(cells)), texts
        self._scores: list[list[int]] = []
        self.log: list[list[Example]] = []

    def round(self) -> list[int]:
        """One feedback for each cell; returns the true scores."""
        number = len(self._scores)
        asked = [own[number] for own in self._prompts]
        answers = self._sampler.sample(asked, np.stack([own[number] for own in self._luck]))
        scores = [cell.task.score(self.subject.text(answer)) for cell, answer in zip(self.cells, answers, strict=True)]
        before = self._scores[-1] if self._scores else None
        given = [feedback_of(cell.arm, scores[n], before[n] if before else None) for n, cell in enumerate(self.cells)]
        examples = [
            Example(f"{n}", prompt, answer, quality, TEMPERATURE, sequence=number + 1)
            for n, (prompt, answer, quality) in enumerate(zip(asked, answers, given, strict=True))
        ]
        self.log.append(examples)
        self._learn(examples)
        self._scores.append(scores)
        return scores

    def _learn(self, examples: Sequence[Example]) -> None:
        advantages = self._baseline.advantages([one.quality for one in examples])
        network, objective = self.subject.network, self.config.objective
        jobs = [(n, one, ahead) for n, (one, ahead) in enumerate(zip(examples, advantages, strict=True))]
        for first in range(0, len(jobs), self._at_once):
            rows, answers, weights = zip(*jobs[first : first + self._at_once], strict=True)
            finished(gradients(network, picked(self._learning, rows), answers, weights, objective))
        pieces = [leash_piece(self._texts, step) for step in self._adam.taken() if self._texts]
        for first in range(0, len(pieces), self._at_once):
            part = slice(first, first + self._at_once)
            stack = picked(self._learning, range(*part.indices(len(pieces))))
            finished(gradients(network, stack, (), (), objective, texts=pieces[part]))
        norms = torch._foreach_norm([factor.grad for factor in self._learning.parameters() if factor.grad is not None])
        if not bool(torch.isfinite(torch.stack(norms)).all()):
            raise ArithmeticError("a gradient is not finite")
        self._adam.step([one.step for one in self._backoffs])
        if self._keeper is None:
            return
        verdicts = self._keeper.verdicts(self.stack, [one.scales for one in self._backoffs])
        self._adam.take_back([n for n, verdict in enumerate(verdicts) if not verdict.passed])
        for n, (verdict, backoff) in enumerate(zip(verdicts, self._backoffs, strict=True)):
            backoff.note(verdict)
            self.refused[n] += not verdict.passed
            if verdict.passed and verdict.scale != 1.0:
                self._adam.begin_anew(n, verdict.scale)


def picked(stack: AdapterStack, rows: Sequence[int]) -> AdapterStack:
    """Those of these rows, in this order; gradients find their way back."""
    at = torch.tensor(rows, device=stack.parameters()[0].device)
    return AdapterStack({name: (a[at], b[at]) for name, (a, b) in stack.sites.items()}, stack.scales)


def copied(stack: AdapterStack) -> AdapterStack:
    """The same numbers, which nothing changes any more."""
    sites = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in stack.sites.items()}
    return AdapterStack(sites, stack.scales)
