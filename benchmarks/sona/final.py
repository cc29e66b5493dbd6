"""Cells that learn at the final site alone: the plugin's instant step, and the rule that its predecessor had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.gate import PARTS
from ruvllm_sona.learner import LearnerConfig
from ruvllm_sona.micro import MicroLoRA, MicroLoRAConfig
from ruvllm_sona.network import Network, padded
from ruvllm_sona.records import Example
from ruvllm_sona.sites import final_site
from ruvllm_sona.trace import Trace
from sona.cells import Cell
from sona.controls import ORIGINAL
from sona.gating import Gatekeeper
from sona.lockstep import Fleet, picked
from sona.subject import Subject

#: The original's example: `lora.apply_updates(0.01)`.
_ORIGINAL_RATE = 0.01


class FinalFleet(Fleet):
    """One `MicroLoRA` a cell, told each verdict at once; what does not pass the gate is made smaller or taken back.

    Nothing gates the original's rule. Raises ValueError for a model that caps its logits.
    """

    def __init__(
        self, subject: Subject, cells: Sequence[Cell], config: MicroLoRAConfig,
        feedback: int, max_tokens: int, at_once: int, keeper: Gatekeeper | None = None, preview_kl: float = math.inf,
    ) -> None:  # fmt: skip
        if subject.exact.spec.logit_softcap is not None:
            raise ValueError("the curvature of a trace is worked out for logits without a cap only")
        shapes = final_site(subject.exact.spec)
        starts = LearnerConfig(rank=config.rank)
        super().__init__(subject, cells, shapes, starts, feedback, max_tokens, at_once, keeper)
        self.stack.scales[FINAL_SITE] = config.scale
        self._micros = [MicroLoRA(replace(config, seed=cell.seed)) for cell in self.cells]
        self._accepted, self._preview_kl = [micro.version for micro in self._micros], preview_kl

    @torch.no_grad()
    def _learn(self, examples: Sequence[Example]) -> None:
        a, b = self.stack.sites[FINAL_SITE]
        traced = self._traces(examples)
        for n, (cell, micro) in enumerate(zip(self.cells, self._micros, strict=True)):
            quality = examples[n].quality
            if cell.arm == ORIGINAL:
                prompt = torch.tensor(examples[n].prompt_ids, device=b.device)
                b[n] += original_step(self.subject.embed[prompt].mean(0), a[n], quality)
            elif micro.learn(traced[n], quality).applied:
                a[n].copy_(torch.from_numpy(micro.current.a))
                b[n].copy_(torch.from_numpy(micro.current.b))
        if self._keeper is None:
            return
        moved = [n for n, micro in enumerate(self._micros) if micro.version != self._accepted[n]]
        for part in PARTS:
            if not moved:
                break
            left = []
            for n, verdict in zip(
                moved, self._keeper.verdicts(picked(self.stack, moved), [(part,)] * len(moved)), strict=True
            ):
                if not verdict.passed or (verdict.figures.text_kl or 0.0) > self._preview_kl:
                    left.append(n)
                    continue
                if part != 1.0:
                    self._micros[n].shrink(part)
                self._accepted[n] = self._micros[n].version
            moved = left
        for n in moved:
            self._micros[n].rollback(self._accepted[n])
            self.refused[n] += 1
        for n, micro in enumerate(self._micros):
            if self.cells[n].arm != ORIGINAL:
                a[n].copy_(torch.from_numpy(micro.current.a))
                b[n].copy_(torch.from_numpy(micro.current.b))

    def _traces(self, examples: Sequence[Example]) -> list[Trace]:
        found: list[Trace] = []
        for first in range(0, len(examples), self._at_once):
            part = slice(first, first + self._at_once)
            a, b = self.stack.sites[FINAL_SITE]
            rows = AdapterStack({FINAL_SITE: (a[part].detach(), b[part].detach())}, self.stack.scales)
            versions = [micro.version for micro in self._micros[part]]
            found += traces(self.subject.exact, examples[part], rows, versions)
        return found


def original_step(embedding: Tensor, a: Tensor, quality: float) -> Tensor:
    """What its predecessor adds to B ``[C, r]``: quality times the outer product of the prompt's embedding with itself.

    The answer has no part in it, and neither has the model: what was good about an answer cannot be in the step. Its
    embedding is a hash of the text; the mean of the model's own input embeddings is kinder.
    """
    unit = embedding / embedding.norm()
    return _ORIGINAL_RATE * quality * torch.outer(unit, a @ unit)


@torch.no_grad()
def traces(
    network: Network, examples: Sequence[Example], adapters: AdapterStack, versions: Sequence[str]
) -> list[Trace]:
    """Exact traces (see `ruvllm_sona.trace`) of answers drawn from the whole tempered distribution, many at once."""
    device, scale = network.device, adapters.scales[FINAL_SITE]
    a, b = adapters.sites[FINAL_SITE]
    texts = padded([[*one.prompt_ids, *one.output_ids] for one in examples], device)
    counts = torch.tensor([len(one.output_ids) for one in examples], device=device)
    begins = torch.tensor([len(one.prompt_ids) - 1 for one in examples], device=device)
    steps = torch.arange(int(counts.max()), device=device)
    places = (begins[:, None] + steps).clamp_(max=texts.shape[1] - 2)
    there = (steps < counts[:, None])[..., None]  # [G, n, 1]
    rows = torch.arange(len(examples), device=device)[:, None]
    hidden = network.hidden(texts, AdapterStack({}, {}))[rows, places] * there
    targets = texts[rows, places + 1]
    warm = torch.tensor([one.temperature for one in examples], device=device)[:, None, None]

    inner = hidden @ a.transpose(1, 2)
    adapted = (hidden + scale * inner @ b.transpose(1, 2)).requires_grad_(True)
    with torch.enable_grad():
        logp = torch.log_softmax(network.logits(adapted) / warm, -1)
        total = (logp.gather(2, targets[..., None]) * there).sum()
    (pull,) = torch.autograd.grad(total, adapted)
    grad_b = scale * pull.transpose(1, 2) @ inner
    grad_a = scale * (pull @ b).transpose(1, 2) @ hidden
    along = scale * (inner @ grad_b.transpose(1, 2) + hidden @ grad_a.transpose(1, 2) @ b.transpose(1, 2))
    change, share = network.logits(along) / warm, logp.detach().exp()
    mean = (share * change).sum(-1, keepdim=True)
    curvature = ((share * (change - mean) ** 2).sum(-1, keepdim=True) * there).sum((1, 2))
    return [
        Trace(grad_a[n].cpu().numpy(), grad_b[n].cpu().numpy(), len(one.output_ids), versions[n], float(curvature[n]))
        for n, one in enumerate(examples)
    ]
