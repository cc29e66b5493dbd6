"""Speculative decoding from the command line: flags, statistics, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("candle")
FLAGS = ("--max-tokens", "24", "--temperature", "0", "--ignore-eos")
FIELDS = {"proposed", "accepted", "tokens_per_step", "speedup_estimate"}


def test_statistics_are_in_the_object_and_the_answer_is_the_same(ruvllm, tiny: Path) -> None:
    plain = ruvllm("run", tiny, "one two one two", "--json", *FLAGS).json
    assert "speculation" not in plain
    for kind in ("ngram", f"draft:{tiny}"):
        answer = ruvllm("run", tiny, "one two one two", "--json", "--speculative", kind, *FLAGS).json
        assert answer["token_ids"] == plain["token_ids"]
        assert set(answer["speculation"]) == FIELDS
        assert answer["speculation"]["accepted"] <= answer["speculation"]["proposed"]


def test_statistics_are_in_the_rows_of_a_batch(ruvllm, tiny: Path, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "a b a b", "params": {"cache_salt": "mine"}}\n{"prompt": "c"}\n')
    flags = ("--prompt-file", prompts, "--output", answers, "--speculative", "ngram", "--draft-tokens", "3")
    result = ruvllm("run", tiny, *flags, *FLAGS)
    assert result.code == 0, result.err
    assert [set(json.loads(line)["speculation"]) for line in answers.read_text().splitlines()] == [FIELDS] * 2


def test_chat_takes_the_flags(ruvllm, tiny: Path) -> None:
    result = ruvllm("chat", tiny, "--speculative", "ngram", *FLAGS, stdin="Hello\n")
    assert result.code == 0, result.err


def test_mistakes_are_named(ruvllm, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ruvllm("run", tiny, "a", "--speculative", "ngrm").failed(1, "speculative", "did you mean ngram?")
    ruvllm("run", tiny, "a", "--speculative", "ngram", "--draft-tokens", "0").failed(1, "draft_tokens")
    monkeypatch.setenv("RUVLLM_PLUGIN_BLOCK", "sona")
    ruvllm("run", tiny, "a", "--speculative", "learned").failed(1, "no learning loop offers drafts")
    ruvllm("run", tiny, "a", "--speculative", "draft:/no/such/model").failed(1, "/no/such/model")
    ruvllm("run", "smollm2", "a", "--speculative", f"draft:{tiny}").failed(1, "another vocabulary", "instead of 49152")
