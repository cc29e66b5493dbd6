"""``benchmarks/sides.py`` and ``e2e_side.py``: processes that are measured in turn, and what each of them runs."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import e2e_side
from sides import Side, interleave, start

from ruvllm_core.errors import ConfigError, RuvLLMError

# A peer that measures nothing: it writes down when it was asked, and answers with seconds it was given.
FAKE = """
    import json, sys, threading, time
    name, log, variants, spin = sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4] == "spin"
    job = json.loads(sys.stdin.readline())
    if "fail" in job:
        print(json.dumps({"error": job["fail"]})), sys.exit(1)
    print(json.dumps({"variants": variants, "threads": job["threads"]}), flush=True)
    def compute():
        while True:
            pass
    if spin:
        threading.Thread(target=compute, daemon=True).start()
    for count, line in enumerate(sys.stdin):
        variant = json.loads(line)["variant"]
        open(log, "a").write(f"{name}/{variant} ")
        time.sleep(job.get("takes", 0))
        if job.get("die") == count:
            sys.exit(7)
        print(json.dumps({"prefill_s": 0.5 + count, "decode_s": 0.25, "peak_bytes": 1000 + count}), flush=True)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Any:
    """Starts a peer that answers at once; all of them write into one log."""
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE))

    def make(name: str, variants: str = "", *, spin: bool = False, **job: Any) -> Side:
        log = str(tmp_path / "log")
        command = [sys.executable, str(script), name, log, variants, "spin" if spin else "wait"]
        return Side(name, command, {"threads": 3, **job})

    return make


def test_sides_take_turns_and_their_answers_are_kept(fake: Any, tmp_path: Path) -> None:
    with fake("ours") as ours, fake("peer", "off,on") as peer:
        interleave([ours, peer], 2)
    assert (tmp_path / "log").read_text().split() == ["ours/", "peer/off", "peer/on"] * 2
    assert ours.about == {"variants": [""], "threads": 3}
    assert ours.runs[""].prefill_s == [0.5, 1.5]
    assert (peer.runs["off"].prefill_s, peer.runs["on"].prefill_s) == ([0.5, 2.5], [1.5, 3.5])
    assert peer.runs["on"].decode_s == [0.25, 0.25]
    assert (ours.peak_bytes, peer.peak_bytes) == (1001, 1003)


def test_who_computes_while_waiting_is_told(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with fake("ours", takes=0.3) as ours, fake("peer", spin=True, takes=0.3) as peer:
        interleave([ours, peer], 5)
    assert ours.waiting_s > 1.5
    assert peer.waiting_s > 1.5
    assert peer.disturbing_s > 0.2 * peer.waiting_s  # more, on a machine with nothing else to do
    assert ours.disturbing_s < 0.05 * ours.waiting_s
    warning = capsys.readouterr().err
    assert "warning: peer used" in warning
    assert "ours used" not in warning


def test_a_side_that_fails_says_why(fake: Any) -> None:
    with pytest.raises(RuvLLMError, match="peer: no such model"):
        fake("peer", fail="no such model")
    with fake("peer", die=0) as peer, pytest.raises(RuvLLMError, match="peer ended with exit code 7"):
        peer.run("")
    with pytest.raises(ConfigError, match="llama-cpp: cannot start /nowhere/python: No such file"):
        start("llama-cpp", {"threads": 1}, "/nowhere/python")


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError(name='llama_cpp')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(RuvLLMError, match=r"has no module llama_cpp: name another --peer-python"):
        start(
            "llama-cpp", {"threads": 1, "model": "x", "prefill": 1, "decode": 1, "depth": 0, "flash_attention": ["on"]}
        )


class FakeLlamaCpp:
    """Of `llama_cpp_peer`: the likeliest token is always the one after the last."""

    made: list[FakeLlamaCpp] = []
    vocab_size = 50

    def __init__(self, path: Path, context: int, threads: int, flash_attention: bool, weights_of: Any) -> None:
        self.made.append(self)
        self.settings = (str(path), context, threads, flash_attention, weights_of)
        self.fed: list[list[int]] = []

    def decode(self, tokens: list[int]) -> np.ndarray:
        self.fed.append(list(tokens))
        return np.eye(self.vocab_size)[(tokens[-1] + 1) % self.vocab_size]

    def truncate(self, length: int) -> None:
        self.fed.append([-length])


def test_llama_cpp_is_fed_what_we_are_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("llama_cpp_peer")
    module.__dict__.update(LlamaCpp=FakeLlamaCpp, version=lambda: "1.0")
    monkeypatch.setitem(sys.modules, "llama_cpp_peer", module)
    monkeypatch.setattr(FakeLlamaCpp, "made", [])
    job = {"model": "m.gguf", "threads": 2, "prefill": 5, "decode": 3, "depth": 4, "flash_attention": ["off", "on"]}
    about, run = e2e_side.llama_cpp_side(job)
    off, on = FakeLlamaCpp.made
    assert about["variants"] == ["off", "on"]
    assert off.settings == ("m.gguf", 12, 2, False, None)
    assert on.settings == ("m.gguf", 12, 2, True, off)
    # Exactly the tokens of `ruvllm_cli.bench.Runner`.
    tokens = np.random.default_rng(0).integers(0, 50, (1, 9))[0].tolist()
    following = [[(tokens[-1] + step) % 50] for step in (1, 2, 3)]
    whole = [tokens[4:], *following, [-4]]
    assert on.fed == [tokens[:4], tokens[4:], *following[:2], [-4]]
    seconds = run("on")
    assert on.fed[5:] == whole
    assert all(second > 0 for second in seconds)
    assert len(off.fed) == 5


def test_a_side_speaks_on_its_standard_output_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a library prints must not be taken for an answer."""
    peer = tmp_path / "llama_cpp_peer.py"
    peer.write_text(
        textwrap.dedent("""
        import os
        import numpy as np
        print("loading"), os.write(1, b"from C\\n")
        def version(): return "1.0"
        class LlamaCpp:
            vocab_size = 8
            def __init__(self, path, context, threads, flash_attention, weights_of): print("a context")
            def decode(self, tokens): os.write(1, b"decoding"); return np.zeros(8)
            def truncate(self, length): pass
        """)
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    script = tmp_path / "e2e_side.py"  # beside its peer: a script's own folder goes first
    script.write_text(Path(e2e_side.__file__).read_text())
    job = {"model": "x", "threads": 1, "prefill": 2, "decode": 2, "depth": 0, "flash_attention": ["off"]}
    with Side("llama-cpp", [sys.executable, str(script), "llama-cpp"], job) as side:
        assert side.about["version"] == "1.0"
        side.run("off")
    assert len(side.runs["off"].prefill_s) == 1
    if sys.platform == "linux":
        assert side.peak_bytes is not None and side.peak_bytes > 2**20
