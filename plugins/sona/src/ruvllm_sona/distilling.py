"""What a user's student is distilled from, on which prompts, and where that is kept when it is interrupted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvllm_core.errors import LearningError
from ruvllm_core.generate.request import GenerateParams
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Adapter, LearningContext, Weights
from ruvllm_sona.distill import DistillConfig, DistillProgress, Teacher, distill
from ruvllm_sona.drawing import draw_answers
from ruvllm_sona.files import load_tensors, save_tensors
from ruvllm_sona.fingerprint import Fingerprint
from ruvllm_sona.network import Network
from ruvllm_sona.patterns import SHARED
from ruvllm_sona.sites import Deltas, linear_sites
from ruvllm_sona.tenant import DISTILL, Tenant

if TYPE_CHECKING:
    from ruvllm_core.model.tokenizer import Tokenizer

#: Has work done on a thread that may wait; yields until it is done, and returns what it returned.
Elsewhere = Callable[[Callable[[], Any]], Generator[object, None, Any]]
_ANSWER = 64  # tokens of an answer that the student draws


@dataclass(frozen=True, eq=False)
class LargeTeacher:
    """Another model of the same vocabulary."""

    name: str
    spec: ModelSpec
    weights: Weights
    tokenizer: Tokenizer | None = None


def distilling(
    tenant: Tenant,
    network: Generator[object, None, tuple[Network, object]],
    context: LearningContext,
    large: LargeTeacher | None,
    steps: int,
    elsewhere: Elsewhere,
) -> Generator[object, None, DistillProgress]:
    """Distil into an adapter of `tenant`; yields every progress among other things, and returns the last.

    It starts from the shared pattern's version in force. What has been done is put on the disk, and the next call that
    asks for the same goes on from there.

    Args:
        network: makes the student's, when it is known that there is something to distil.
        large: the teacher; None is the adapters of all patterns.
        elsewhere: has work done by a thread that may wait for the disk.

    Raises `LearningError` if there is nothing to distil.
    """
    prompts = yield from _prompts(tenant)
    config, brain = DistillConfig(steps=steps), tenant.brain(SHARED)
    versions = {pattern: tenant.brain(pattern).number for pattern in sorted(prompts)}
    if large is None:
        _check_patterns(tenant, prompts)
        told = json.dumps(versions)
    else:
        told = _check_model(large, context)
    student, _ = yield from network
    if large is None:
        teachers = [
            Teacher(student, tenant.brain(pattern).versions.load(number) or None, prompts[pattern])
            for pattern, number in versions.items()
        ]
    else:
        taught = yield from elsewhere(partial(Network, large.spec, large.weights))
        yield from taught.load()
        teachers = [Teacher(taught, None, [prompt for one in prompts.values() for prompt in one])]
    key = _key(told, brain.number, steps, sorted(prompts.items()))
    path, last = tenant.folder / DISTILL, None
    resume = yield from elsewhere(partial(load_distilled, path, key))
    begin = brain.versions.load(brain.number)
    draw = partial(_draw, context)
    for found in distill(student, linear_sites(context.spec), teachers, draw, config, begin, resume):
        if found is not None:
            last = found
            if found.state is not None:
                yield from elsewhere(partial(save_distilled, path, found, key))
        yield found
    assert last is not None
    return last


def _prompts(tenant: Tenant) -> Generator[None, None, dict[int, list[tuple[int, ...]]]]:
    """Prompts of rated answers, each once, by the pattern that answers them now; none that the base model answers."""
    found: dict[int, list[tuple[int, ...]]] = {}
    seen: set[tuple[int, ...]] = set()
    for example in tenant.examples():
        if example.prompt_ids not in seen:
            seen.add(example.prompt_ids)
            if (brain := tenant.route(example.prompt_ids)) is not None:
                found.setdefault(tenant.pattern_of(brain), []).append(example.prompt_ids)
        yield
    if not found:
        raise LearningError("distillation needs prompts, and none is logged", hint="rate some answers first")
    return found


def _check_patterns(tenant: Tenant, prompts: dict[int, list[tuple[int, ...]]]) -> None:
    """Raise `LearningError` unless another pattern than the shared one has something to teach."""
    others = [pattern for pattern in prompts if pattern != SHARED and tenant.brain(pattern).number]
    if others:
        return
    what = "no pattern but the shared one has an adapter and prompts"
    if len(tenant.bank.patterns) == 1:
        what = "there is one pattern only, whose adapter is the student"
    raise LearningError(
        f"there is nothing to distil: {what}",
        hint="distil from another model with --teacher, or rate more: contradicting feedback makes patterns",
    )


def _check_model(large: LargeTeacher, context: LearningContext) -> str:
    """The other model's fingerprint. Raises `LearningError` unless it is another model with the same tokens."""
    sizes = large.spec.vocab_size, context.spec.vocab_size
    if sizes[0] != sizes[1]:
        raise _other_vocabulary(large.name, f"{sizes[0]} tokens instead of {sizes[1]}")
    if large.tokenizer is not None and context.tokenizer is not None:
        theirs, own = (
            [one.token_bytes(token) for token in range(one.vocab_size)] for one in (large.tokenizer, context.tokenizer)
        )
        for token, (a, b) in enumerate(zip_longest(theirs, own)):
            if a != b:
                raise _other_vocabulary(large.name, f"token {token} is {a!r} instead of {b!r}")
    found = Fingerprint.of(large.spec, large.weights)
    if found == Fingerprint.of(context.spec, context.weights):
        raise LearningError(
            f"there is nothing to distil: {large.name} is the model itself, without what was learned",
            hint="`ruvllm sona rollback 0` puts it in force",
        )
    return found.text()


def _other_vocabulary(name: str, what: str) -> LearningError:
    return LearningError(
        f"the teacher {name} has another vocabulary: {what}", hint="distil from a model of the same family"
    )


def _draw(
    context: LearningContext, deltas: Deltas, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
) -> Iterator[Sequence[Sequence[int]] | None]:
    """Answers by the model with an adapter, from its whole distribution at temperature 1."""
    ends = context.tokenizer.eos_ids if context.tokenizer is not None else frozenset()
    params = [GenerateParams(max_tokens=_ANSWER, temperature=1.0, top_p=1.0, top_k=0, seed=seed) for seed in seeds]
    return draw_answers(context.decoder, Adapter("distilled", deltas), prompts, params, ends)


def _key(*parts: object) -> str:
    """Stands for what is distilled from what: with another one, nothing can go on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def save_distilled(path: Path, progress: DistillProgress, key: str) -> None:
    """Write where distillation is. Raises `LearningError` if the disk refuses."""
    numbers = {"step": progress.step, "kl": progress.kl, "before": progress.before}
    save_tensors(path, progress.state or {}, {"progress": json.dumps({**numbers, "key": key})})


def load_distilled(path: Path, key: str) -> DistillProgress | None:
    """What was saved; None if there is nothing, or it was of another distillation. Raises `LearningError`."""
    if not path.exists():
        return None
    state, metadata = load_tensors(path)
    numbers = json.loads(metadata["progress"])
    return DistillProgress(state=state, **numbers) if numbers.pop("key") == key else None
