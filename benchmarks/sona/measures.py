"""What learning did: to held-out answers, and to what it should have left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.network import padded
from sona.cells import Cell
from sona.lockstep import TEMPERATURE
from sona.sampling import Sampler, Shared
from sona.subject import Subject
from sona.tasks import Prompt, on_topic
from sona.texts import UNRELATED, uniforms

_HELD_OUT_LUCK, _CHAT_LUCK = 2, 3
_TOKENS = 2048  # rows of logits in memory at a time


@dataclass(frozen=True)
class Measured:
    """One cell, after so many feedbacks.

    Attributes:
        score, on_topic: means over held-out answers.
        perplexity: on other text, over the base model's.
        kl: nats a token, of the base model from this one, on chats about other things that the base model answered.
        refused: steps that the gate did not let pass.
    """

    cell: Cell
    feedback: int
    score: float
    on_topic: float
    perplexity: float = 1.0
    kl: float = 0.0
    refused: int = 0


def held_out_luck(seed: int, count: int, max_tokens: int, draw: int = 0) -> np.ndarray:
    """The draws of held-out answers, the same for every arm: differences are then what was learned."""
    return uniforms(count, max_tokens, _HELD_OUT_LUCK, seed, draw)


def judged(cell: Cell, asked: Sequence[Prompt], texts: Sequence[str]) -> tuple[float, float]:
    """Mean score and share on topic."""
    scores = [cell.task.score(text) for text in texts]
    return float(np.mean(scores)), float(np.mean([on_topic(one, text) for one, text in zip(asked, texts, strict=True)]))


class HeldOut:
    """Answers cells' held-out prompts, so many cells at once, each with its own adapter."""

    def __init__(self, subject: Subject, count: int, max_tokens: int, at_once: int) -> None:
        self.subject, self._count, self._max_tokens, self._at_once = subject, count, max_tokens, at_once

    def texts(
        self, prompts: Sequence[Sequence[str]], luck: Sequence[np.ndarray], stack: AdapterStack | None
    ) -> list[list[str]]:
        """`answers` as texts."""
        return [[self.subject.text(ids) for ids in group] for group in self.answers(prompts, luck, stack)]

    def answers(
        self, prompts: Sequence[Sequence[str]], luck: Sequence[np.ndarray], stack: AdapterStack | None
    ) -> list[list[tuple[int, ...]]]:
        """The answers to each group's prompts; group n uses row n of `stack`, or the base model."""
        subject, count = self.subject, self._count
        asked = [[subject.chat(text) for text in group] for group in prompts]
        room = max(len(prompt) for group in asked for prompt in group) + self._max_tokens
        cells = min(len(asked), max(1, self._at_once // count))
        held = _rows(stack, 0, cells) if stack is not None else AdapterStack({}, {})
        sampler = Sampler(subject, cells * count, room, Shared(held, count), TEMPERATURE, self._max_tokens)
        found: list[list[tuple[int, ...]]] = []
        for first in range(0, len(asked), cells):
            # The last batch is filled up by going back: batches of one size keep one recorded graph.
            begin = min(first, len(asked) - cells)
            if stack is not None:
                _overwrite(held, stack, begin)
            batch = [prompt for group in asked[begin : begin + cells] for prompt in group]
            drawn = sampler.sample(batch, np.concatenate(luck[begin : begin + cells]))
            found += [drawn[n * count : (n + 1) * count] for n in range(first - begin, cells)]
        return found


class Elsewhere:
    """Perplexity on other text, and divergence on unrelated chats that the base model answered."""

    def __init__(self, subject: Subject, windows: Sequence[Sequence[int]], chats: int, max_tokens: int) -> None:
        self._subject, self._windows = subject, padded(windows, subject.network.device)
        asked = [subject.chat(text) for text in UNRELATED[:chats]]
        room = max(map(len, asked)) + max_tokens
        sampler = Sampler(subject, len(asked), room, AdapterStack({}, {}), TEMPERATURE, max_tokens)
        answers = sampler.sample(asked, uniforms(len(asked), max_tokens, _CHAT_LUCK))
        device = subject.network.device
        self._chats = padded([[*prompt, *answer] for prompt, answer in zip(asked, answers, strict=True)], device)
        owner = [n for n, answer in enumerate(answers) for _ in answer]
        places = [len(p) - 1 + n for p, answer in zip(asked, answers, strict=True) for n in range(len(answer))]
        self._owner, self._places = torch.tensor(owner, device=device), torch.tensor(places, device=device)
        nothing = AdapterStack({}, {})
        with torch.no_grad():
            self._base_hidden = subject.exact.hidden(self._chats, nothing)[self._owner, self._places]
            self._base_nll = float(self._nll(nothing))

    @torch.no_grad()
    def measure(self, stack: AdapterStack, cell: int) -> tuple[float, float]:
        """Perplexity over the base model's, and nats a token, of one cell of `stack`."""
        own = _rows(stack, cell, 1)
        ratio = float(np.exp(float(self._nll(own)) - self._base_nll))
        hidden = self._subject.exact.hidden(self._chats, own)[self._owner, self._places]
        total = 0.0
        for first in range(0, len(hidden), _TOKENS):
            part = slice(first, first + _TOKENS)
            base, now = (self._subject.exact.logits(rows[part]) for rows in (self._base_hidden, hidden))
            base, now = torch.log_softmax(base, -1), torch.log_softmax(now, -1)
            total += float((base.exp() * (base - now)).sum())
        return ratio, total / len(hidden)

    def _nll(self, stack: AdapterStack) -> Tensor:
        """Mean over every token but the first of each window."""
        network = self._subject.exact
        hidden = network.hidden(self._windows, stack)[:, :-1].flatten(0, 1)
        targets = self._windows[:, 1:].flatten()
        sums = [
            torch.nn.functional.cross_entropy(network.logits(rows), wanted, reduction="sum")
            for rows, wanted in zip(torch.split(hidden, _TOKENS), torch.split(targets, _TOKENS), strict=True)
        ]
        return torch.stack(sums).sum() / len(targets)


def _rows(stack: AdapterStack, first: int, count: int) -> AdapterStack:
    part = slice(first, first + count)
    sites = {name: (a[part].detach().clone(), b[part].detach().clone()) for name, (a, b) in stack.sites.items()}
    return AdapterStack(sites, stack.scales)


@torch.no_grad()
def _overwrite(held: AdapterStack, stack: AdapterStack, first: int) -> None:
    for name, (a, b) in held.sites.items():
        from_a, from_b = stack.sites[name]
        a.copy_(from_a[first : first + len(a)])
        b.copy_(from_b[first : first + len(b)])
