"""Drafts are learned from what an engine answers, kept, used by the next one, and forgotten on request."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ruvllm_core.generate.request import GenerateParams, SpeculationStats, Trajectory
from ruvllm_core.protocols import LearningContext
from ruvllm_core.testing import tiny
from ruvllm_sona.acceptance import read_acceptance
from ruvllm_sona.drafting import ACCEPTANCE, ANSWERS, HEAD
from ruvllm_sona.files import LOG, folder_name
from ruvllm_sona.loop import SonaLoop

SPEC = tiny.tiny_spec()


def loop(folder) -> SonaLoop:
    weights = tiny.tiny_weights(SPEC)
    return SonaLoop(LearningContext(SPEC, tiny.tiny_decoder(SPEC, weights), "tiny", folder, weights=weights))


def answer(number: int, user: str, speculation: SpeculationStats | None = None) -> Trajectory:
    """An answer in which every token follows from the one before, and from its state."""
    rng = np.random.default_rng(number)
    ids = [(number * 7 + 5 * n) % 40 for n in range(24)]
    hidden = np.zeros((24, SPEC.hidden_size), np.float32)
    hidden[np.arange(24), np.array(ids) % SPEC.hidden_size] = 8.0
    hidden += rng.normal(0, 0.1, hidden.shape).astype(np.float32)
    params = GenerateParams(temperature=0.0, user=user)
    return Trajectory(
        f"{user}-{number}", (1, 2, ids[0]), tuple(ids), "", "length", params, hidden=hidden, speculation=speculation
    )


def test_nothing_is_collected_unless_drafts_are_asked_for(tmp_path) -> None:
    own = loop(tmp_path)
    for n in range(30):
        own.observe(answer(n, "ann"))
    own.close()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_drafts_are_learned_and_kept_and_forgotten(tmp_path) -> None:
    own = loop(tmp_path)
    proposer = own.proposer()
    assert proposer is not None and own.wants_hidden
    for n in range(60):
        own.observe(answer(n, "ann"))
    for _ in range(20_000):
        if not own.tick(0.05):
            break
    folder = own.folder / folder_name("ann")
    assert (folder / HEAD).exists()
    own.close()
    assert (folder / ANSWERS).exists()

    assert not (folder / LOG).exists(), "no feedback was given"
    again = loop(tmp_path)
    assert again.adapter(tiny.tiny_request((1, 2, 3), user="ann")) is None
    assert not (folder / LOG).exists(), "and asking makes no memory of it"
    drafts = again.proposer()
    assert drafts is not None
    asked = tiny.tiny_request((1, 2, 3), user="ann")
    again.adapter(asked)
    seen = answer(77, "ann")
    assert seen.hidden is not None
    found = drafts.propose(asked, [1, 2, *seen.output_ids[:9]], 3, seen.hidden[8])
    assert found.tokens, "a head that has learned a plain rule drafts"
    assert list(found.tokens) == list(seen.output_ids[9 : 9 + len(found.tokens)])
    stranger = tiny.tiny_request((1, 2, 3), user="bob")
    again.adapter(stranger)
    assert not drafts.propose(stranger, [1, 2, 3, 4, 5], 3, seen.hidden[8]).tokens
    again.forget("ann")
    assert not (folder / HEAD).exists() and not (folder / ANSWERS).exists()
    again.close()


def test_switched_off(tmp_path) -> None:
    weights = tiny.tiny_weights(SPEC)
    from ruvllm_sona.settings import SonaSettings

    context = LearningContext(SPEC, SimpleNamespace(), "tiny", tmp_path, SonaSettings(drafts=False), weights)  # type: ignore[arg-type]
    assert SonaLoop(context).proposer() is None


@pytest.mark.parametrize("name", [HEAD, ANSWERS])
def test_damaged_files_are_no_reason_to_stop(tmp_path, name: str) -> None:
    own = loop(tmp_path)
    folder = own.folder / folder_name("ann")
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"nonsense")
    assert own.proposer() is not None
    own.observe(answer(1, "ann"))
    own.close()


def test_how_often_drafts_were_right_is_kept(tmp_path) -> None:
    rng = np.random.default_rng(0)
    seen = [(int(n), int(rng.integers(0, n + 1))) for n in rng.integers(0, 9, 70)]
    drafted = [one for one in seen if one[0]]
    own = loop(tmp_path)
    assert own.proposer() is not None
    path = own.folder / folder_name("ann") / ACCEPTANCE
    for n, (proposed, accepted) in enumerate(seen):
        own.observe(answer(n, "ann", SpeculationStats(proposed, accepted, 1.0, None)))
        own.observe(answer(n, "bob"))
    own.close()
    parts = [drafted[at : at + 25] for at in range(0, len(drafted), 25)]
    expected = [(len(part), sum(p for p, _ in part), sum(a for _, a in part)) for part in parts]
    assert [(one.answers, one.proposed, one.accepted) for one in read_acceptance(path)] == expected
    assert not (own.folder / folder_name("bob") / ACCEPTANCE).exists(), "nothing was drafted"
    with path.open("ab") as file:
        file.write(b'\n{"time": 12')  # killed in the middle of it
    again = loop(tmp_path)
    assert again.proposer() is not None
    again.observe(answer(1, "ann", SpeculationStats(4, 3, 1.0, None)))
    again.close()
    found = read_acceptance(path)
    assert [(one.answers, one.proposed, one.accepted) for one in found] == [*expected, (1, 4, 3)]
    assert [one.time for one in found] == sorted(one.time for one in found)
    last = loop(tmp_path)
    assert last.proposer() is not None
    last.observe(answer(1, "ann", SpeculationStats(4, 3, 1.0, None)))
    last.forget("ann")
    last.close()
    assert not path.exists()


def test_an_acceptance_that_cannot_be_written_is_no_reason_to_stop(tmp_path) -> None:
    own = loop(tmp_path)
    (own.folder / folder_name("ann") / ACCEPTANCE).mkdir(parents=True)
    assert own.proposer() is not None
    for n in range(26):
        own.observe(answer(n, "ann", SpeculationStats(4, 3, 1.0, None)))
    own.close()
