"""Incremental decoding gives the same text as decoding all at once, in whole characters."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import realdata
from hard_texts import HARD_TEXTS, RANDOM_TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ruvllm_core.model.tokenizer import Tokenizer

QUICK = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module", params=["smollm2", "mistral"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "smollm2":
        metadata: dict[str, Any] = request.getfixturevalue("smollm2_metadata")
    else:
        data: Path = request.getfixturevalue("mistral_data")
        metadata = realdata.metadata_of_sentencepiece(data / "tokenizer.model.v1")
    return Tokenizer.from_gguf(metadata, request.param)


def stream(
    tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, skip_special: bool = True
) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt or [], skip_special)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def test_streaming_equals_decoding(tokenizer: Tokenizer) -> None:
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            assert "".join(stream(tokenizer, ids, skip_special=skip)) == tokenizer.decode(ids, skip_special=skip)


@given(ids=st.lists(st.integers(0, 31_999), max_size=30))
@QUICK
def test_streaming_equals_decoding_of_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=RANDOM_TEXT)
@QUICK
def test_characters_come_out_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    pieces = stream(tokenizer, ids)
    whole = tokenizer.decode(ids)
    assert "".join(pieces) == whole
    assert sum(piece.count("\ufffd") for piece in pieces) == whole.count("\ufffd")


def test_an_emoji_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f9ff", add_special=False)
    detokenizer = tokenizer.detokenizer(tokenizer.encode("x"))
    pieces = [detokenizer.push(token) for token in ids]
    assert len(ids) >= 3 and pieces[-1] == "\U0001f9ff" and not "".join(pieces[:-1]).strip()
    assert detokenizer.flush() == ""


def test_an_unfinished_character_is_flushed_as_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f9ff", add_special=False)[:-1]
    pieces = stream(tokenizer, ids)
    assert pieces[-1].strip("\ufffd") == "" and pieces[-1] and "".join(pieces) == tokenizer.decode(ids)


def test_any_cut_between_prompt_and_answer(tokenizer: Tokenizer) -> None:
    draw = random.Random(7)
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        if len(ids) < 2:
            continue
        cut = draw.randrange(1, len(ids))
        before = b"".join(map(tokenizer.token_bytes, ids[:cut]))
        try:
            prompt = before.decode()
        except UnicodeDecodeError:
            continue  # the cut is inside a character; the next test is about that
        answer = "".join(stream(tokenizer, ids[cut:], prompt=ids[:cut]))
        assert prompt + answer == b"".join(map(tokenizer.token_bytes, ids)).decode()


def test_a_character_begun_in_the_prompt_is_finished_in_the_answer(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab\U0001f9ff!", add_special=False)
    cut = next(n for n in range(len(ids)) if b"\xf0" in b"".join(map(tokenizer.token_bytes, ids[:n])))
    assert "".join(stream(tokenizer, ids[cut:], prompt=ids[:cut])) == "\U0001f9ff!"


def test_sentencepiece_space_after_text_and_after_special_tokens(mistral_data: Path) -> None:
    metadata = realdata.metadata_of_sentencepiece(mistral_data / "mistral_instruct_tokenizer_240323.model.v3")
    tokenizer = Tokenizer.from_gguf(metadata, "v3")
    answer = tokenizer.encode("Hello there", add_special=False)
    assert "".join(stream(tokenizer, answer)) == "Hello there"
    assert "".join(stream(tokenizer, answer, prompt=tokenizer.encode("He said"))) == " Hello there"
    assert "".join(stream(tokenizer, answer, prompt=tokenizer.encode("[INST] Hi[/INST]"))) == "Hello there"
    assert "".join(stream(tokenizer, [1, *answer, 2])) == "Hello there"
    assert "".join(stream(tokenizer, [1, *answer, 2], skip_special=False)) == "<s> Hello there</s>"
