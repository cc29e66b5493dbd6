"""One run of the benchmark: every arm, one kind after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.anchors import CHATS, anchor_tokens
from ruvllm_sona.deep import DeepConfig
from ruvllm_sona.gate import PARTS, GateConfig
from ruvllm_sona.learner import LearnerConfig
from ruvllm_sona.leash_texts import leash_tokens
from ruvllm_sona.measure import weight_norms
from ruvllm_sona.micro_config import MicroLoRAConfig
from ruvllm_sona.objective import ObjectiveConfig
from ruvllm_sona.records import Example
from ruvllm_sona.settings import SonaSettings
from ruvllm_sona.sites import linear_sites
from sona import asking, controls
from sona.cells import Cell, random_direction
from sona.deep_arm import stored, train
from sona.final import FinalFleet
from sona.gating import Gatekeeper, finished
from sona.lockstep import Fleet, copied
from sona.measures import Elsewhere, HeldOut, Measured, held_out_luck, judged
from sona.report import print_tables, summary
from sona.subject import Subject
from sona.texts import other_text, windows

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run; the names are those of the options."""

    model: str
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: int
    checkpoints: tuple[int, ...]
    held_out: int
    max_tokens: int
    text: Path | None
    windows: int
    window: int
    chats: int
    device: str
    dtype: str
    at_once: int
    train_at_once: int
    learner: Mapping[str, float] = field(default_factory=dict)

    def with_arm(self, arm: str) -> list[Cell]:
        return [Cell(arm, task, seed) for task in self.tasks for seed in range(self.seeds)]

    def cells(self, *arms: str) -> list[Cell]:
        """Those of the arms that are to be run."""
        return [cell for arm in arms if arm in self.arms for cell in self.with_arm(arm)]

    def settings(self) -> SonaSettings:
        """The plugin's own settings, but for what was asked for."""
        return SonaSettings.model_validate(dict(self.learner))


def run(plan: Plan, say: Say, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run it, print the tables, return the report; `save` gets what there is of it whenever a kind of arms is done."""
    subject = Subject.load(plan.model, plan.device, plan.dtype)
    say(f"loaded {plan.model}, products in {subject.network.dtype}")
    held_out = HeldOut(subject, plan.held_out, plan.max_tokens, plan.at_once)
    base_texts = asking.base_texts(plan, held_out)
    rows = asking.base(plan, base_texts)
    say("base model answered")
    if controls.INSTRUCTION in plan.arms:
        rows += asking.instruction(plan, held_out)
    if controls.BEST_OF in plan.arms:
        rows += asking.best_of(plan, held_out, base_texts)
    elsewhere = Elsewhere(
        subject, windows(subject, other_text(plan.text), plan.windows, plan.window), plan.chats, plan.max_tokens
    )
    own, shapes = plan.settings(), linear_sites(subject.network.spec)
    objective = ObjectiveConfig(own.leash, own.saturation, own.budget, own.text_leash)
    config = LearnerConfig(own.rank, own.learning_rate, objective, average=own.average)
    texts = leash_tokens(subject.tokenizer)
    free = replace(config, objective=replace(objective, leash=0.0, text_leash=0.0))
    leashed, keeper = (controls.LEASHED, controls.SHUFFLED, controls.CONSTANT), _keeper(subject, own)
    for arms, chosen, gate in ((leashed, config, keeper), ((controls.FREE,), free, None)):
        if cells := plan.cells(*arms):
            last, at_once = plan.checkpoints[-1], plan.train_at_once
            fleet = Fleet(subject, cells, shapes, chosen, last, plan.max_tokens, at_once, gate, texts)
            rows += _learn(plan, fleet, held_out, elsewhere, say)
            save(_report(plan, subject, own, rows))
            if controls.DEEP_LOG in plan.arms and fleet.cells[0].arm == controls.LEASHED:
                heard = [[told[n] for told in fleet.log] for n in range(len(plan.with_arm(controls.LEASHED)))]
                rows += _deep(plan, plan.with_arm(controls.DEEP_LOG), heard, held_out, elsewhere, keeper, say)
            del fleet  # it holds memory
    if cells := plan.cells(controls.FINAL, controls.ORIGINAL):
        width = subject.exact.spec.hidden_size
        micro = MicroLoRAConfig(width, own.instant_rank, learning_rate=own.instant_rate, trust_nats=own.trust_nats)
        last, at_once = plan.checkpoints[-1], plan.train_at_once
        final = FinalFleet(subject, cells, micro, last, plan.max_tokens, at_once, keeper, own.preview_kl)
        rows += _learn(plan, final, held_out, elsewhere, say)
        save(_report(plan, subject, own, rows))
    if cells := plan.cells(controls.DEEP):
        told = stored(subject, cells, plan.checkpoints[-1], plan.max_tokens, plan.at_once)
        rows += _deep(plan, cells, told, held_out, elsewhere, keeper, say)
    print_tables(rows)
    return _report(plan, subject, own, rows)


def _report(plan: Plan, subject: Subject, own: SonaSettings, rows: Sequence[Measured]) -> dict[str, Any]:
    return {
        "benchmark": "sona",
        "device": torch.cuda.get_device_name() if plan.device.startswith("cuda") else plan.device,
        "dtype": str(subject.network.dtype).removeprefix("torch."),
        "plan": {**asdict(plan), "text": plan.text.name if plan.text else "Python's language reference"},
        "settings": own.model_dump(mode="json"),
        "summary": summary(rows),
        "rows": [asdict(row) for row in rows],
    }


def _keeper(subject: Subject, own: SonaSettings) -> Gatekeeper:
    spec = subject.exact.spec
    norms = finished(weight_norms(subject.file.weights, list(linear_sites(spec)), spec.hidden_size))
    limits = GateConfig(max_mean_loss=own.max_loss, max_kl=own.max_kl)
    return Gatekeeper(subject.exact, anchor_tokens(subject.tokenizer, own.anchors), norms, limits, len(CHATS))


def _learn(plan: Plan, fleet: Fleet, held_out: HeldOut, elsewhere: Elsewhere, say: Say) -> list[Measured]:
    rows = []
    for number in range(1, plan.checkpoints[-1] + 1):
        scores = fleet.round()
        if number % 10 == 0:
            arms = dict.fromkeys(cell.arm for cell in fleet.cells)
            own = {arm: [s for cell, s in zip(fleet.cells, scores, strict=True) if cell.arm == arm] for arm in arms}
            say(f"feedback {number}: " + ", ".join(f"{arm} {sum(s) / len(s):.2f}" for arm, s in own.items()))
        if number in plan.checkpoints:
            found = measured(plan, fleet.cells, fleet.stack, number, held_out, elsewhere)
            rows += [replace(row, refused=count) for row, count in zip(found, fleet.refused, strict=True)]
            if controls.RANDOM in plan.arms and fleet.cells[0].arm == controls.LEASHED:
                rows += _random(plan, fleet, number, held_out, elsewhere)
            say(f"measured {len(fleet.cells)} cells after {number}; {sum(fleet.refused)} steps were refused")
    return rows


def _deep(
    plan: Plan, cells: Sequence[Cell], told: Sequence[Sequence[Example]],
    held_out: HeldOut, elsewhere: Elsewhere, keeper: Gatekeeper, say: Say,
) -> list[Measured]:  # fmt: skip
    subject, config = held_out.subject, DeepConfig()
    texts = leash_tokens(subject.tokenizer)
    stack, trained = train(subject.network, cells, told, texts, config, plan.train_at_once)
    verdicts = keeper.verdicts(stack, [PARTS] * len(cells))
    passed = [n for n in trained if verdicts[n].passed]
    with torch.no_grad():
        for n, verdict in enumerate(verdicts):
            for _, b in stack.sites.values():
                b[n] *= verdict.scale if n in passed else 0.0
    whole = sum(verdicts[n].scale == 1.0 for n in passed)
    say(f"deep training: {len(trained)} of {len(cells)} cells learned, {len(passed)} passed the gate, {whole} whole")
    return measured(plan, cells, stack, plan.checkpoints[-1], held_out, elsewhere)


def _random(plan: Plan, fleet: Fleet, number: int, held_out: HeldOut, elsewhere: Elsewhere) -> list[Measured]:
    """The leashed cells again, moved as far from where they began, blindly."""
    cells = plan.cells(controls.RANDOM)
    generator, now = torch.Generator().manual_seed(number), copied(fleet.stack)
    sites = {}
    for name, begun in fleet.begun.sites.items():
        both = [
            random_direction(was[: len(cells)], at[: len(cells)], generator)
            for was, at in zip(begun, now.sites[name], strict=True)
        ]
        sites[name] = both[0], both[1]
    return measured(plan, cells, AdapterStack(sites, now.scales), number, held_out, elsewhere)


def measured(
    plan: Plan, cells: Sequence[Cell], stack: AdapterStack, feedback: int, held_out: HeldOut, elsewhere: Elsewhere
) -> list[Measured]:
    """Everything about each cell, whose adapter is its row of `stack`."""
    asked = [cell.held_out_prompts(plan.held_out) for cell in cells]
    luck = [held_out_luck(cell.seed, plan.held_out, plan.max_tokens) for cell in cells]
    texts = held_out.texts([[one.text for one in own] for own in asked], luck, stack)
    return [
        Measured(cell, feedback, *judged(cell, own, answers), *elsewhere.measure(stack, n))
        for n, (cell, own, answers) in enumerate(zip(cells, asked, texts, strict=True))
    ]
