"""Tokenizers from Hugging Face folders, and what every `Tokenizer` does."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hard_texts import HARD_TEXTS, RANDOM_TEXT
from hypothesis import HealthCheck, given, settings

from ruvllm_core.errors import FormatError, ModelNotFound, TokenizerError
from ruvllm_core.model.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["qwen2_folder", "llama3_folder", "mistral7b_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Tokenizer, Any]:
    """Our tokenizer of a folder, and that of `transformers`."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folder, clean_up_tokenization_spaces=False)
    return Tokenizer.load(folder), theirs


def test_folder_equals_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for text in HARD_TEXTS:
        assert ours.encode(text) == theirs.encode(text), repr(text)
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special=False) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs) and ours.chat_template == theirs.chat_template
    for token in theirs.all_special_ids:
        assert not ours.decode([token]) and ours.token_bytes(token).decode() == theirs.convert_ids_to_tokens(token)


@given(text=RANDOM_TEXT)
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_folder_equals_transformers_on_random_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_ends_are_found(qwen2_folder: Path, llama3_folder: Path, mistral7b_folder: Path) -> None:
    assert Tokenizer.load(qwen2_folder).eos_ids == {151643, 151645}
    assert Tokenizer.load(llama3_folder).eos_ids == {128001, 128009}
    assert Tokenizer.load(mistral7b_folder).eos_ids == {2}


def test_bytes_of_all_tokens_make_the_text(pair: tuple[Tokenizer, Any]) -> None:
    """Up to what the tokenizers themselves do to text: NFC (Qwen), a space in front, and ▁ for space (Mistral)."""
    ours, _ = pair
    for text in HARD_TEXTS:
        joined = b"".join(map(ours.token_bytes, ours.encode(text, add_special=False, parse_special=False)))
        expected = {text, unicodedata.normalize("NFC", text), " " + text.replace("▁", " ")}
        assert joined.decode() in expected


def test_the_way_from_tokenizer_model_to_tokenizer_json(mistral_data: Path, tmp_path: Path) -> None:
    """The remedy that the error names, followed to the letter."""
    from transformers import AutoTokenizer

    shutil.copy(mistral_data / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    remedy = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    assert remedy in str(caught.value.hint)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for text in HARD_TEXTS:
        assert ours.encode(text) == theirs.encode(text), repr(text)
    assert (ours.bos_id, ours.eos_id) == (1, 2)


def small_folder(path: Path, **config: Any) -> Path:
    """A folder with a byte-level tokenizer.json of a few tokens, written by `tokenizers`."""
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    fast.enable_truncation(2)
    fast.enable_padding(length=9)
    fast.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_post_processor_decides_what_is_added(tmp_path: Path) -> None:
    ours = Tokenizer.load(small_folder(tmp_path, bos_token="<s>", eos_token="</s>"))
    assert ours.add_bos and ours.add_eos
    assert len(ours.encode("abcdefghijkl")) == 14  # neither truncated nor padded, whatever the file says
    assert ours.encode("")[:1] == [256] and ours.encode("")[1:] == [257]
    assert ours.eos_ids == {257, 258}


@pytest.mark.parametrize("add", [True, False])
def test_the_config_does_not_override_the_post_processor(tmp_path: Path, add: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    small_folder(tmp_path, bos_token="<s>", eos_token="</s>", add_bos_token=add, add_eos_token=add)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.backend_tokenizer.no_padding()
    assert Tokenizer.load(tmp_path).encode("a") == theirs.encode("a") == [256, theirs.convert_tokens_to_ids("a"), 257]


def test_generation_config_adds_ends(tmp_path: Path) -> None:
    small_folder(tmp_path, bos_token="<s>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 65]}))
    ours = Tokenizer.load(tmp_path)
    assert ours.eos_id == 257 and ours.eos_ids == {257, 65, 258}


def test_chat_template_file_wins_over_the_config(tmp_path: Path) -> None:
    small_folder(tmp_path, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert Tokenizer.load(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("from the file\n")
    assert Tokenizer.load(tmp_path).chat_template == "from the file\n"


def test_ids_beyond_the_vocabulary_are_no_text(tmp_path: Path) -> None:
    ours = Tokenizer.load(small_folder(tmp_path))
    a = ours.encode("a", add_special=False)
    assert ours.decode([*a, 259, 10**6, -1, *a]) == "aa" and ours.token_bytes(259) == b""


def test_check_vocab(tmp_path: Path) -> None:
    ours = Tokenizer.load(small_folder(tmp_path))
    ours.check_vocab(259)
    ours.check_vocab(320)
    with pytest.raises(TokenizerError, match="has 259 tokens, the model embeds only 258"):
        ours.check_vocab(258)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    ours = Tokenizer.load(small_folder(tmp_path))
    with pytest.raises(TokenizerError, match=r"lone surrogate, U\+D83D, at character 2"):
        ours.encode("ab\ud83d")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    small_folder(tmp_path)
    for broken in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(FormatError, match=r"tokenizer_config\.json"):
            Tokenizer.load(tmp_path)


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    import tokenizers

    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    fast.decoder = tokenizers.decoders.WordPiece()
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="cannot decode tokens that need WordPiece"):
        Tokenizer.load(tmp_path)


def test_special_ids_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    small_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5000}))
    with pytest.raises(TokenizerError, match="special token 5000 is outside the vocabulary of 259"):
        Tokenizer.load(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(TokenizerError, match="'</s>' is no token id"):
        Tokenizer.load(tmp_path)
