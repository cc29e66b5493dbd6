"""``ruvllm sona``: what it shows is what was learned, what it changes is changed, and it keeps out of others' way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from ruvllm_core.cli.app import App
from ruvllm_core.model.gguf import GGUFFile
from ruvllm_core.protocols import LearningContext, LowRank
from ruvllm_sona import command_deep
from ruvllm_sona.acceptance import Tally
from ruvllm_sona.chain import entry_after
from ruvllm_sona.command_place import Place, open_place
from ruvllm_sona.frames import Record
from ruvllm_sona.loop import SonaLoop
from ruvllm_sona.plot import Curve, as_svg, as_text, curves
from ruvllm_sona.records import Example
from ruvllm_sona.sites import linear_sites
from ruvllm_sona.study import Study
from ruvllm_sona.tenant import Tenant

SITES = ("layers.0.attn.q", "layers.1.mlp.down")


Call = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("clean_environment")


def deltas(place: Place, seed: int, size: float = 0.02) -> dict[str, LowRank]:
    rng, shapes = np.random.default_rng(seed), linear_sites(place.model.spec)
    return {
        site: LowRank(
            rng.normal(size=(2, shapes[site][1])).astype(np.float32),
            (size * rng.normal(size=(shapes[site][0], 2))).astype(np.float32),
        )
        for site in SITES
    }


def publish(tenant: Tenant, found: dict[str, LowRank], covers: int, kl: float) -> None:
    """As the background loop does."""
    brain = tenant.brain(0)
    before, number = brain.number, brain.publish(found, {"passed": True}, covers, brain.life)
    brain.adopt(number, found, covers)
    brain.pending = type(brain.pending)(one for one in brain.pending if one[0].sequence > covers)
    tenant.log.append(Record("published", 0.0, version=number, covers=covers))
    tenant.audit.append(
        "publish",
        actor="background",
        before=str(before),
        after=str(number),
        predicted={"loss": -0.1},
        measured={"kl": kl, "mean_loss": 0.001, "relative_norm": 0.01},
    )


def rate(tenant: Tenant, count: int) -> None:
    rng = np.random.default_rng(1)
    for n in range(count):
        answer = rng.integers(0, 200, 8)
        if n % 2:
            answer[:] = 7 + 3 * (n % 4)
        prompt = tuple(rng.integers(0, 256, 6).tolist())
        example = Example(f"r{n}", prompt, tuple(answer.tolist()), float(n % 2), time=1000.0 + n)
        tenant.learn_later(tenant.remember(example, None))
        tenant.audit.append("feedback", actor="user", request_id=f"r{n}")


@pytest.fixture
def place(tiny: Path) -> Place:
    """The memory of a user: six rated answers; version 1 learned from two of them and version 2 from four."""
    place = open_place(App(), str(tiny), "ann", new=True)
    with place.tenant() as tenant:
        rate(tenant, 6)
        publish(tenant, deltas(place, 1), 2, 0.02)
        publish(tenant, deltas(place, 2), 4, 0.05)
    return place


def same(found: dict[str, LowRank], expected: dict[str, LowRank]) -> None:
    assert set(found) == set(expected)
    for site, delta in expected.items():
        np.testing.assert_allclose(found[site].scale * found[site].b @ found[site].a, delta.b @ delta.a, atol=1e-6)


def test_the_folder_is_that_of_the_engine(place: Place) -> None:
    decoder: Any = None
    state_dir = Path(os.environ["RUVLLM_CACHE_DIR"]) / "learning" / "sona"
    given = place.model.spec, decoder, place.name, state_dir, place.settings, place.model.weights, place.tokenizer
    loop = SonaLoop(LearningContext(*given))
    assert loop.tenant("ann").folder == place.folder
    assert [one.request_id for one in loop.tenant("ann").examples()] == [f"r{n}" for n in range(6)]
    loop.close()


def test_status_says_what_there_is(sona: Call, place: Place) -> None:
    found = sona("status", place.name, "--user", "ann", "--json").json
    assert found["feedback"] == {"count": 6, "mean_quality": 0.5, "pending": 2}
    (pattern,) = found["patterns"]
    assert (pattern["pattern"], pattern["current"], pattern["pending"]) == (0, 2, 2)
    assert [(one["number"], one["covers"]) for one in pattern["versions"]] == [(1, 2), (2, 4)]
    assert found["audit"] == {"ok": True, "entries": 9, "problem": "", "line": 0, "unfinished_bytes": 0}
    assert found["bytes"] == sum(path.stat().st_size for path in place.folder.rglob("*") if path.is_file())
    assert found["budget"]["feedback_left"] == place.settings.burst
    assert found["holding"] == {"ewc": place.settings.ewc, "consolidate_every": 200, "patterns": []}
    shown = sona("status", place.name, "--user", "ann")
    assert shown.code == 0
    for words in (
        "6, mean quality 0.50",
        "whole, 9 entries",
        "1, 2",
        str(place.folder),
        "nothing was consolidated yet",
    ):
        assert words in shown.out


def test_reading_goes_on_beside_an_engine_and_changing_does_not(sona: Call, place: Place, tmp_path: Path) -> None:
    who = (place.name, "--user", "ann")
    with place.tenant() as tenant:
        rate(tenant, 1)
        before = {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()}
        assert sona("status", *who, "--json").json["feedback"]["count"] == 7
        assert len(sona("history", *who, "--json").json) == 10
        assert sona("export", tmp_path / "peft", *who).code == 0
        assert sona("plot", *who).code == 0
        assert {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()} == before
        for command in (("rollback", 1), ("import", tmp_path / "peft"), ("deep",)):
            sona(*command, *who).failed(1, f"in use by process {os.getpid()}")
        sona("forget", *who, "--all", "--yes").failed(1, f"in use by process {os.getpid()}")
        assert {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", [("status",), ("history",), ("rollback", 1), ("forget", "--all"), ("deep",)])
def test_where_nothing_was_learned(sona: Call, tiny: Path, tmp_path: Path, command: tuple[object, ...]) -> None:
    sona(*command, tiny, "--user", "bob").failed(1, "nothing was ever learned", "bob", "--learn")
    assert not (tmp_path / "cache" / "learning").exists()


def test_drafts_alone_are_no_feedback(sona: Call, place: Place) -> None:
    (place.folder / "log.bin").rename(place.folder / "draft.safetensors")
    sona("status", place.name, "--user", "ann").failed(1, "nothing was ever learned", "ann")


def test_history_is_the_audit_log(sona: Call, place: Place) -> None:
    who = (place.name, "--user", "ann")
    entries = sona("history", *who, "--json").json
    assert [one["action"] for one in entries] == ["start", *["feedback"] * 6, "publish", "publish"]
    assert (entries[-1]["before"], entries[-1]["after"], entries[-1]["measured"]["kl"]) == ("1", "2", 0.05)
    assert sona("history", *who, "--json", "--last", 2).json == entries[-2:]
    shown = sona("history", *who)
    assert "1 → 2" in shown.out and "kl 0.05" in shown.out and "loss -0.1" in shown.out
    rated = sona("history", *who, "--feedback", "--json").json
    assert [(one["request"], one["quality"]) for one in rated] == [(f"r{n}", n % 2) for n in range(6)]
    assert "r5" in sona("history", *who, "--feedback").out
    sona("history", *who, "--feedback", "--verify").failed(2, "go apart")


def test_a_changed_history_shows(sona: Call, place: Place) -> None:
    who = (place.name, "--user", "ann")
    assert sona("history", *who, "--verify").out == "9 entries, and the chain is whole\n"
    path = place.folder / "audit.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"kl":0.02', b'"kl":0.01'))
    sona("history", *who, "--verify").failed(1, "broken at line 8", "hash differs")
    result = sona("history", *who, "--verify", "--json")
    assert (result.code, json.loads(result.out)["ok"], json.loads(result.out)["line"]) == (1, False, 8)
    assert "broken at line 8" in sona("history", *who).err
    assert sona("status", *who, "--json").json["audit"]["ok"] is False
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))  # what the saved state knows of is missing
    sona("history", *who, "--verify").failed(1, "are missing")


def test_rollback(sona: Call, place: Place) -> None:
    who = (place.name, "--user", "ann")
    assert sona("rollback", 1, *who).out == "version 2 → 1\n"
    found = sona("status", *who, "--json").json
    assert (found["patterns"][0]["current"], found["feedback"]["pending"]) == (1, 0)
    same(place.deltas(0, None)[1], deltas(place, 1))
    assert sona("history", *who, "--json").json[-1]["action"] == "rollback"
    assert sona("rollback", 0, *who).out == "version 1 → 0, the base model\n"
    sona("export", "x", *who).failed(1, "version 0 is the base model", "1, 2")
    sona("rollback", 7, *who).failed(1, "there is no version 7", "0, 1, 2")
    sona("rollback", 1, *who, "--pattern", 3).failed(1, "there is no pattern 3")
    sona("rollback", "-1", *who).failed(2)
    assert place.patterns() == [0]


def test_forgetting_one_answer(sona: Call, place: Place) -> None:
    who = (place.name, "--user", "ann")
    (place.folder / "deep.safetensors").write_bytes(b"learned from all of them")
    sona("forget", *who).failed(2, "--request")
    sona("forget", *who, "--request", "r1", "--all").failed(2, "--request")
    sona("forget", *who, "--request", "r99", "--yes").failed(1, "no feedback on request r99", "--feedback")
    refused = sona("forget", *who, "--request", "r1", stdin="n\n")
    assert refused.code == 130 and "feedback on 1 of 6 answers" in refused.err
    assert sona("status", *who, "--json").json["patterns"][0]["current"] == 2
    assert "the other 5 will be learned from anew" in sona("forget", *who, "--request", "r1", stdin="y\n").out
    found = sona("status", *who, "--json").json
    assert (found["feedback"]["count"], found["feedback"]["pending"]) == (5, 5)
    assert (found["patterns"][0]["current"], found["patterns"][0]["versions"]) == (0, [])
    assert found["audit"]["ok"]
    assert not (place.folder / "deep.safetensors").exists()
    rated = sona("history", *who, "--feedback", "--json").json
    assert [one["request"] for one in rated] == ["r0", "r2", "r3", "r4", "r5"]


def test_forgetting_all(sona: Call, place: Place) -> None:
    assert "forgotten: feedback on 6 of 6 answers" in sona("forget", place.name, "--user", "ann", "--all", "--yes").out
    found = sona("status", place.name, "--user", "ann", "--json").json
    assert (found["feedback"]["count"], found["patterns"][0]["versions"]) == (0, [])


def test_export_and_import(sona: Call, place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    assert "version 1, 2 sites" in sona("export", folder, place.name, "--user", "ann", "--version", 1).out
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == place.name
    result = sona("import", folder, place.name, "--user", "bob")
    assert "version 0 → 1: 2 sites; nobody has measured" in result.out
    bob = open_place(App(), place.name, "bob")
    same(bob.deltas(0, None)[1], deltas(place, 1))
    last = sona("history", place.name, "--user", "bob", "--json").json[-1]
    assert (last["action"], last["before"], last["after"], last["note"]) == ("import", "0", "1", "2 sites, not gated")
    # Feedback that waited goes on waiting, to be learned on top of it.
    sona("import", folder, place.name, "--user", "ann")
    found = sona("status", place.name, "--user", "ann", "--json").json
    assert (found["patterns"][0]["current"], found["feedback"]["pending"]) == (3, 2)
    with place.tenant() as tenant:
        adapter = tenant.brain(0).adapter()
        assert adapter is not None
        same(dict(adapter.sites), deltas(place, 1))
        assert len(tenant.brain(0).pending) == 2
        decoder: Any = None
        given = place.model.spec, decoder, place.name, place.state_dir, place.settings, place.model.weights
        with closing(Study(LearningContext(*given, place.tokenizer), place.settings)) as study:
            for _ in study.learn(tenant):
                pass
    found = sona("status", place.name, "--user", "ann", "--json").json
    last = sona("history", place.name, "--user", "ann", "--json").json[-1]
    assert (last["actor"], last["before"], found["feedback"]["pending"]) == ("background", "3", 0)
    assert last["after"] == str(found["patterns"][0]["current"])
    sona("import", tmp_path / "nothing", place.name).failed(1, "holds no adapter")


def test_what_changes_the_output_projection_is_not_imported(sona: Call, place: Place, tmp_path: Path) -> None:
    from ruvllm_sona.peft_export import export_peft

    rng, model = np.random.default_rng(0), place.model
    final = LowRank(rng.normal(size=(1, 64)).astype(np.float32), rng.normal(size=(64, 1)).astype(np.float32))
    export_peft({"final": final}, model.spec, model.sources, tmp_path, base_model="x", weights=model.weights)
    sona("import", tmp_path, place.name, "--user", "ann").failed(1, "lm_head")
    assert sona("status", place.name, "--user", "ann", "--json").json["patterns"][0]["current"] == 2


def test_merge(sona: Call, tiny: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "tiny.gguf", tmp_path / "merged.gguf"
    assert sona(tiny, source, "--scheme", "q4_0", group="quantize").code == 0
    place = open_place(App(), str(source), "ann", new=True)
    with place.tenant() as tenant:
        publish(tenant, deltas(place, 1, 0.002), 0, 0.01)
    who = (source, "--user", "ann")
    report = sona("merge", target, *who, "--json").json
    assert {one["after"] for one in report["tensors"]} == {"q8_0"}
    assert abs(report["lost"]) < 0.1
    merged, expected = open_place(App(), str(target), "", new=True).model, deltas(place, 1, 0.002)
    for site, delta in expected.items():
        old, new = place.model.weights[site].dequantize(), merged.weights[site].dequantize()
        grid = np.abs(new).max() / 127
        np.testing.assert_allclose(new, old + delta.b @ delta.a, atol=grid)
    sona("merge", target, *who).failed(2, "--force")
    own = sona("merge", target, *who, "--force", "--scheme", "keep", "--json").json
    assert {one["after"] for one in own["tensors"]} == {"q4_0"}
    assert own["lost"] > 0.3
    for key, value in GGUFFile.open(source).metadata.items():
        np.testing.assert_array_equal(GGUFFile.open(target).metadata[key], value)
    assert "version 1" in sona("merge", target, *who, "--force").out
    sona("merge", tmp_path / "no" / "x.gguf", *who).failed(2, "there is no folder")
    sona("merge", tmp_path / "x.gguf", *who, "--scheme", "q9").failed(1, "there is no scheme 'q9'")


def test_merging_needs_a_gguf_file(sona: Call, place: Place, tmp_path: Path) -> None:
    sona("merge", tmp_path / "x.gguf", place.name, "--user", "ann").failed(1, "is no GGUF file", "ruvllm quantize")


def test_deep_stops_goes_on_and_ends(sona: Call, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    who = (place.name, "--user", "ann")
    look = command_deep._Checkpoint.look

    def interrupted(self: command_deep._Checkpoint) -> None:
        look(self)
        if self.epoch == 1 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    stopped: list[bool] = []
    monkeypatch.setattr(command_deep._Checkpoint, "look", interrupted)
    result = sona("deep", *who)
    assert result.code == 130
    assert "round 1: good answers gained" in result.err
    assert "round 1 is done and kept" in result.err
    assert (place.folder / "deep.safetensors").exists()
    assert sona("status", *who, "--json").json["patterns"][0]["current"] == 2
    result = sona("deep", *who, "--json")
    assert "goes on" in result.err and "round 2: " in result.err and "round 1: " not in result.err
    last = sona("history", *who, "--json").json[-1]
    current = sona("status", *who, "--json").json["patterns"][0]["current"]
    assert last["actor"] == "deep"
    assert result.json["published"] == (last["action"] == "deep") == (current == 3)
    assert result.json["version"] == current
    assert result.json["reason"] == last["note"]
    assert not (place.folder / "deep.safetensors").exists()


def test_deep_says_what_it_lacks(sona: Call, tiny: Path) -> None:
    place = open_place(App(), str(tiny), "", new=True)
    with place.tenant() as tenant:
        rate(tenant, 1)
    sona("deep", tiny).failed(1, "needs good and bad answers", "rate more answers")


def test_curves_are_what_the_logs_say() -> None:
    qualities = np.random.default_rng(0).uniform(size=30).tolist()
    rated = [Example(str(n), (1,), (2,), quality, time=float(n)) for n, quality in enumerate(qualities)]
    entry = entry_after(None, 9.5, "background", "publish", measured={"kl": 0.25, "mean_loss": float("inf")})
    other = entry_after(None, 9.6, "background", "reject", measured={"kl": 9.0})
    quality, kl, loss, norm = curves(rated, [entry, other], {"kl": 0.2})
    np.testing.assert_allclose([at for at, _ in quality.points], np.arange(1, 31))
    np.testing.assert_allclose(
        [mean for _, mean in quality.points[:20]], np.cumsum(qualities[:20]) / np.arange(1, 21), rtol=1e-12
    )
    assert quality.points[20][1] == pytest.approx(0.95 * quality.points[19][1] + 0.05 * qualities[20])
    assert kl.points == ((10.0, 0.25),) and kl.limit == 0.2
    assert loss.points == norm.points == ()  # infinity is not drawn
    drafts = [Tally(4.5, 25, 40, 10), Tally(29.0, 25, 30, 21)]
    *others, right = curves(rated, [entry, other], {"kl": 0.2}, drafts)
    assert len(others) == 4 and right.points == ((5.0, 0.25), (30.0, 0.7)) and right.axis() == (0.0, 1.0)


def test_columns_are_as_high_as_values() -> None:
    title, *rows = as_text([Curve("t", ((1.0, 0.0), (2.0, 0.5), (4.0, 1.0)), bounds=(0.0, 1.0))], 18, 2).splitlines()
    assert title == "t, now 1"
    # Nothing before the first value at 1, 0 until 2, then half of both rows, and all where 4 is reached.
    assert rows[:2] == ["       1 │         █", "       0 │  ▁▁██████"]


def test_plot(sona: Call, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    who = (place.name, "--user", "ann")
    shown = sona("plot", *who)
    assert shown.code == 0
    for words in ("quality", "now 0.5\n", "KL to the base model", "now 0.05, at most 0.2", "█"):
        assert words in shown.out, shown.out
    assert "drafted" not in shown.out
    svg, page = tmp_path / "a.svg", tmp_path / "a.html"
    assert sona("plot", *who, "--out", svg).out == f"{svg}\n"
    image = ElementTree.parse(svg).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert image.tag == f"{space}svg"
    assert len(image.findall(f"{space}circle")) == 6 + 3 * 2
    assert len(image.findall(f"{space}polyline")) == 4
    (place.folder / "acceptance.jsonl").write_text(json.dumps(asdict(Tally(time.time(), 25, 40, 10))))
    assert "drafted tokens that were right, now 0.25\n" in sona("plot", *who).out
    sona("plot", *who, "--out", svg)
    assert len(ElementTree.parse(svg).getroot().findall(f"{space}polyline")) == 5
    sona("plot", *who, "--out", page)
    assert "<svg" in page.read_text() and "refresh" not in page.read_text()
    sona("plot", *who, "--out", tmp_path / "a.png").failed(2, ".svg nor in .html")
    sona("plot", *who, "--out", tmp_path / "no" / "a.svg").failed(2, "there is no folder")

    def interrupted(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt

    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", interrupted)
    live = sona("plot", *who, "--watch", 0.5)
    assert (live.code, waits) == (0, [0.5, 0.5])
    assert "KL to the base model" in live.out
    waits.clear()
    assert sona("plot", *who, "--watch", 0.5, "--out", page).out == f"{page}\n" * 2
    assert 'http-equiv="refresh" content="0.5"' in page.read_text()


def test_names_cannot_break_the_picture() -> None:
    image = as_svg([Curve("<a> & b", ())], 'user "<script>"')
    assert ElementTree.fromstring(image).findtext("{http://www.w3.org/2000/svg}title") == 'user "<script>"'
