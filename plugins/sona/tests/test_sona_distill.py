"""Distillation: the student comes nearer to its teachers, stops, comes back, and says what it lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ruvllm_core.cli.app import App
from ruvllm_core.errors import LearningError
from ruvllm_core.generate.request import GenerateParams
from ruvllm_core.protocols import Adapter, LowRank
from ruvllm_core.testing import tiny as core
from ruvllm_sona import command_distill
from ruvllm_sona.command_place import Place, open_place
from ruvllm_sona.distill import DistillConfig, DistillProgress, Teacher, distill, divergence
from ruvllm_sona.drawing import draw_answers
from ruvllm_sona.learner import LearnerConfig
from ruvllm_sona.network import Network
from ruvllm_sona.records import Example
from ruvllm_sona.sites import linear_sites

Call = Callable[..., Any]
SPEC = core.tiny_spec()
WEIGHTS = core.tiny_weights(SPEC)
SHAPES = linear_sites(SPEC)
KINDS = (range(16, 24), range(96, 104))  # of prompts: which tokens they are of
_random = np.random.default_rng(0)
PROMPTS = [tuple(_random.choice(KINDS[n % 2], 6).tolist()) for n in range(24)]
CONFIG = DistillConfig(LearnerConfig(rank=2, learning_rate=4e-3), steps=12, batch=3, keep=5)


def some(seed: int, shapes: Mapping[str, tuple[int, int]], size: float, rank: int = 1) -> dict[str, LowRank]:
    rng = np.random.default_rng(seed)
    return {
        name: LowRank(
            rng.normal(0, columns**-0.5, (rank, columns)).astype(np.float32),
            rng.normal(0, size, (rows, rank)).astype(np.float32),
        )
        for name, (rows, columns) in shapes.items()
    }


def network() -> Network:
    return Network(SPEC, WEIGHTS, dtype=torch.float32, resident=True)


def drawer(length: int = 8) -> Callable[..., Any]:
    decoder = core.tiny_decoder(SPEC, WEIGHTS)

    def draw(deltas: Mapping[str, LowRank], prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Any:
        params = [GenerateParams(max_tokens=length, temperature=1.0, top_p=1.0, seed=seed) for seed in seeds]
        return draw_answers(decoder, Adapter("s", deltas), prompts, params, frozenset())

    return draw


def rounds(work: Any) -> list[DistillProgress]:
    return [found for found in work if found is not None]


def whole(delta: LowRank) -> np.ndarray:
    return delta.scale * delta.b.astype(np.float64) @ delta.a.astype(np.float64)


def test_the_divergence_is_that_of_the_decoder() -> None:
    decoder, text = core.tiny_decoder(SPEC, WEIGHTS), core.TEXTS["b"]
    both = [some(seed, SHAPES, 0.2, 2) for seed in (1, 2)]
    logp = []
    for deltas in both:
        logits = core.whole(decoder, text, len(text), Adapter("x", deltas)).astype(np.float64)[8:-1]
        logp.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    expected = (np.exp(logp[0]) * (logp[0] - logp[1])).sum(-1)
    work = divergence((network(), both[0]), (network(), both[1]), text[:9], text[9:])
    while True:
        try:
            next(work)
        except StopIteration as end:
            found = end.value
            break
    assert expected.min() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_student_comes_to_say_what_its_teachers_say_each_where_it_teaches() -> None:
    made = network()
    teachers = [Teacher(made, some(seed, SHAPES, 0.2), PROMPTS[seed::2]) for seed in (0, 1)]
    config = DistillConfig(LearnerConfig(rank=8, learning_rate=2e-3), steps=80, batch=3)
    steps = rounds(distill(made, SHAPES, teachers, drawer(), config))
    assert [one.step for one in steps] == list(range(1, 81))
    assert np.mean([one.kl for one in steps[-20:]]) < 0.9 * np.mean([one.kl for one in steps[:20]])
    last = steps[-1]
    assert last.after is not None and last.after < 0.85 * last.before
    assert last.deltas is not None and steps[0].deltas is None
    assert [one.step for one in steps if one.state is not None] == list(range(10, 81, 10))


def test_what_was_interrupted_ends_as_if_it_had_not_been() -> None:
    made = network()
    teachers = [Teacher(made, some(seed, SHAPES, 0.3), PROMPTS[seed::2]) for seed in (0, 1)]
    begin = some(3, SHAPES, 0.1)
    straight = rounds(distill(made, SHAPES, teachers, drawer(), CONFIG, begin))
    for stop in (5, 10, 12):
        kept = straight[stop - 1]
        assert kept.state is not None
        rest = rounds(distill(made, SHAPES, teachers, drawer(), CONFIG, begin, resume=kept))
        assert [one.kl for one in rest] == ([one.kl for one in straight[stop:]] or [straight[-1].kl])
        last = rest[-1]
        assert (last.before, last.after) == (straight[-1].before, straight[-1].after)
        assert last.deltas is not None and straight[-1].deltas is not None
        for site, delta in straight[-1].deltas.items():
            np.testing.assert_array_equal(delta.a, last.deltas[site].a)
            np.testing.assert_array_equal(delta.b, last.deltas[site].b)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_student_begins_as_what_it_is(rank: int) -> None:
    begin = {site: LowRank(one.a, one.b, 0.5) for site, one in some(3, SHAPES, 0.3, rank).items()}
    made = network()
    config = DistillConfig(LearnerConfig(rank=2, learning_rate=1e-30), steps=1)
    (only,) = rounds(distill(made, SHAPES, [Teacher(made, None, PROMPTS)], drawer(), config, begin))
    assert only.deltas is not None
    for site, delta in begin.items():
        u, values, v = np.linalg.svd(whole(delta), full_matrices=False)
        np.testing.assert_allclose(whole(only.deltas[site]), (u[:, :2] * values[:2]) @ v[:2], atol=1e-6)
        assert len(only.deltas[site].a) == 2 and np.linalg.matrix_rank(only.deltas[site].a) == 2


def test_vocabularies_have_to_agree() -> None:
    other = Network(core.tiny_spec(vocab_size=300), core.tiny_weights(core.tiny_spec(vocab_size=300)))
    with pytest.raises(LearningError, match="300"):
        next(distill(network(), SHAPES, [Teacher(other, None, [(1,)])], drawer(), CONFIG))
    with pytest.raises(LearningError, match="needs prompts"):
        next(distill(network(), SHAPES, [Teacher(network(), None, [])], drawer(), CONFIG))


# From here on it is `ruvllm sona distill`, with a model made by transformers, which is also what judges it.
@pytest.fixture
def ann(two_patterns: Callable[..., Place], tiny: Path) -> Place:
    return two_patterns(tiny)


def reference(place: Place, folder: Path, deltas: Mapping[str, LowRank]) -> Any:
    """The model in float64, with an adapter in its weights, by transformers."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder).double()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for site, delta in deltas.items():
            weights[place.model.sources[site].hf] += torch.from_numpy(whole(delta))
    return model


@torch.no_grad()
def far(student: Any, teacher: Any, prompts: Sequence[Sequence[int]]) -> float:
    """KL(student ‖ teacher) in float64, nats a token, over answers of 16 tokens that the student draws."""
    random, found = torch.Generator().manual_seed(1), []
    for prompt in prompts:
        text = torch.tensor([list(prompt)])
        for _ in range(16):
            own, other = (torch.log_softmax(model(text).logits[0, -1], -1) for model in (student, teacher))
            found.append(float((own.exp() * (own - other)).sum()))
            text = torch.cat([text, torch.multinomial(own.exp(), 1, generator=random)[None]], 1)
    return float(np.mean(found))


def files(place: Place) -> dict[Path, bytes]:
    """What requests run with, and what is learned from."""
    paths = [*(place.folder / "versions").rglob("*"), place.folder / "log.bin"]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def test_the_shared_adapter_comes_to_say_what_all_patterns_say(sona: Call, ann: Place, tiny: Path) -> None:
    who = (ann.name, "--user", "ann")
    shared, other = (ann.deltas(pattern, None) for pattern in (0, 1))
    rng = np.random.default_rng(7)
    unseen = [tuple(rng.choice(KINDS[n % 2], 6).tolist()) for n in range(8)]
    with ann.tenant() as tenant:
        routed = [tenant.pattern_of(tenant.route(prompt)) for prompt in unseen]  # type: ignore[arg-type]
    taught = [[prompt for prompt, one in zip(unseen, routed, strict=True) if one == pattern] for pattern in (0, 1)]
    assert all(taught)
    result = sona("distill", *who, "--steps", 40, "--json")
    found = result.json
    assert found["published"] and found["reason"] == "" and found["after"] < 0.9 * found["before"]
    assert "step 10: " in result.err and "step 40: " in result.err and "on prompts held out" in result.err
    number, student = ann.deltas(0, None)
    assert number == found["version"] == shared[0] + 1
    assert {len(one.a) for one in student.values()} == {8}
    models = [reference(ann, tiny, deltas) for deltas in (shared[1], other[1], student)]
    before = far(models[0], models[1], taught[1])
    now = [far(models[2], models[pattern], taught[pattern]) for pattern in (0, 1)]
    assert (now[1] + now[0]) / 2 < 0.85 * before / 2, (now, before)
    kept = ann.deltas(1, None)  # the other pattern keeps its own
    assert kept[0] == other[0]
    for site, delta in other[1].items():
        np.testing.assert_array_equal(kept[1][site].b, delta.b)
    last = sona("history", *who, "--json").json[-1]
    assert (last["actor"], last["action"], last["after"]) == ("distill", "distill", str(number))
    assert last["predicted"] == {"kl_before": found["before"], "kl_after": found["after"]}
    assert not (ann.folder / "distill.safetensors").exists()
    assert "now " in sona("plot", *who).out.split("KL to the base model")[1]


def test_the_command_goes_on_where_it_was_stopped(
    sona: Call, ann: Place, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = ("distill", ann.name, "--user", "ann", "--steps", 14)
    shutil.copytree(tmp_path / "cache", tmp_path / "again")
    straight = sona(*who, "--json").json
    expected = ann.deltas(0, None)
    monkeypatch.setenv("RUVLLM_CACHE_DIR", str(tmp_path / "again"))
    line = command_distill._line

    def interrupted(found: DistillProgress) -> str:
        monkeypatch.setattr(command_distill, "_line", line)
        raise KeyboardInterrupt

    monkeypatch.setattr(command_distill, "_line", interrupted)
    stopped = sona(*who)
    assert stopped.code == 130 and "step 10 is kept: the next call goes on after it" in stopped.err
    again = open_place(App(), str(tiny), "ann")
    assert (again.folder / "distill.safetensors").exists()
    assert again.deltas(0, None)[0] == expected[0] - 1
    anew = sona(*who[:-1], 3, "--json")  # of other steps it is another one, which begins anew
    assert "goes on" not in anew.err
    monkeypatch.setattr(command_distill, "_line", interrupted)
    shutil.rmtree(tmp_path / "again")
    shutil.copytree(tmp_path / "cache", tmp_path / "again")
    sona("rollback", expected[0] - 1, ann.name, "--user", "ann")
    assert sona(*who).code == 130
    result = sona(*who, "--json")
    assert "a distillation that was stopped goes on at step 11" in result.err
    assert [result.json[name] for name in ("before", "after")] == [straight[name] for name in ("before", "after")]
    for site, delta in open_place(App(), str(tiny), "ann").deltas(0, None)[1].items():
        np.testing.assert_array_equal(delta.a, expected[1][site].a)
        np.testing.assert_array_equal(delta.b, expected[1][site].b)
    sona("forget", ann.name, "--user", "ann", "--all", "--yes")
    assert not (again.folder / "distill.safetensors").exists()


def other(folder: Path, tiny: Path, changed: Mapping[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """Another model with the tokenizer of the tiny one: random weights but for those given, and layers of no effect."""
    import transformers

    torch.manual_seed(11)
    config = transformers.LlamaConfig.from_pretrained(tiny, **changes)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if changed is not None and name in changed:
                weight.copy_(changed[name])
            elif changed is not None and name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    return folder


@pytest.mark.parametrize("layers", [2, 3])
def test_another_model_teaches(sona: Call, ann: Place, tiny: Path, tmp_path: Path, layers: int) -> None:
    import transformers

    tuned = dict(reference(ann, tiny, some(5, linear_sites(ann.model.spec), 0.2)).named_parameters())
    folder = other(tmp_path / "teacher", tiny, tuned, num_hidden_layers=layers)
    number, begin = ann.deltas(0, None)
    found = sona("distill", ann.name, "--user", "ann", "--teacher", folder, "--steps", 40, "--json").json
    assert found["published"] and found["version"] == number + 1 and found["after"] < found["before"]
    teacher = transformers.LlamaForCausalLM.from_pretrained(folder).double()
    rng = np.random.default_rng(8)
    unseen = [rng.choice(KINDS[n % 2], 6).tolist() for n in range(12)]
    before, now = (far(reference(ann, tiny, one), teacher, unseen) for one in (begin, ann.deltas(0, None)[1]))
    assert now < 0.8 * before, (now, before)


def test_what_does_not_pass_the_gate_is_not_published(sona: Call, ann: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUVLLM_PLUGINS__SONA__MAX_KL", "1e-9")
    before = files(ann)
    found = sona("distill", ann.name, "--user", "ann", "--steps", 2, "--json").json
    assert not found["published"] and found["version"] == ann.deltas(0, None)[0] and found["reason"]
    assert files(ann) == before
    assert sona("history", ann.name, "--user", "ann", "--json").json[-1]["action"] == "reject"
    assert "nothing was published" in sona("distill", ann.name, "--user", "ann", "--steps", 2).out


def test_what_comes_no_nearer_is_not_published(sona: Call, ann: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with ann.tenant() as tenant:  # the other pattern has learned nothing that the shared one has not
        deltas = tenant.brain(0).versions.load(tenant.brain(0).number)
        brain = tenant.brain(1)
        brain.adopt(brain.publish(deltas, {}, brain.covers, brain.life), deltas, brain.covers)
        brain.rebase(deltas)
    before = files(ann)
    found = sona("distill", ann.name, "--user", "ann", "--steps", 2, "--json").json
    assert not found["published"] and found["before"] < 1e-4
    assert "no nearer" in found["reason"] and files(ann) == before


def test_where_there_is_nothing_to_distil(sona: Call, ann: Place, tiny: Path, tmp_path: Path) -> None:
    who, before = (ann.name, "--user", "ann"), files(ann)
    sona("distill", *who, "--teacher", tiny).failed(1, "nothing to distil", "is the model itself")
    sizes = other(tmp_path / "sizes", tiny, vocab_size=300)
    sona("distill", *who, "--teacher", sizes).failed(1, "another vocabulary", "300 tokens instead of 259")
    words = other(tmp_path / "words", tiny)
    text = json.loads((words / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (words / "tokenizer.json").write_text(json.dumps(text))
    sona("distill", *who, "--teacher", words).failed(1, "another vocabulary", "instead of b'a'")
    sona("distill", *who, "--teacher", tmp_path / "nowhere").failed(1, "nowhere")
    assert files(ann) == before
    bob = open_place(App(), str(tiny), "bob", new=True)
    with bob.tenant() as tenant:
        tenant.learn_later(tenant.remember(Example("r", (1, 2), (3,), 0.5, time=1.0), None))
    sona("distill", tiny, "--user", "bob").failed(1, "nothing to distil", "one pattern only", "--teacher")
    sona("forget", tiny, "--user", "bob", "--all", "--yes")
    sona("distill", tiny, "--user", "bob", "--teacher", words).failed(1, "needs prompts, and none is logged")
    sona("distill", tiny, "--user", "eve").failed(1, "nothing was ever learned")
    assert not (bob.folder / "distill.safetensors").exists()
