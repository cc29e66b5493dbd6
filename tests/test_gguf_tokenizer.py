"""Tokenizers built from GGUF metadata equal the original ones, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import realdata
from hard_texts import HARD_TEXTS, RANDOM_TEXT
from hypothesis import HealthCheck, given, settings

from ruvllm_core.errors import TokenizerError
from ruvllm_core.model.tokenizer import Tokenizer

LLAMA_CPP = json.loads((Path(__file__).parent / "data" / "llama_cpp_tokens.json").read_text())
MISTRAL_MODELS = [
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
]
RANDOM = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False, parse_special=False)


@pytest.fixture(scope="module", params=[("qwen2", "qwen2_folder"), ("llama-bpe", "llama3_folder")], ids=lambda p: p[0])
def byte_level(request: pytest.FixtureRequest) -> tuple[Tokenizer, Any]:
    """A tokenizer built from GGUF metadata, and the `tokenizers` original."""
    import tokenizers

    pre, fixture = request.param
    folder = request.getfixturevalue(fixture)
    original = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Tokenizer.from_gguf(realdata.metadata_of_json(folder, pre), pre), original


def test_byte_level_bpe_equals_tokenizer_json(byte_level: tuple[Tokenizer, Any]) -> None:
    tokenizer, original = byte_level
    for text in HARD_TEXTS:
        ids = original.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special=False) == ids, repr(text)
        assert tokenizer.decode(ids, skip_special=False) == original.decode(ids, skip_special_tokens=False)


@given(text=RANDOM_TEXT)
@RANDOM
def test_byte_level_bpe_equals_tokenizer_json_on_random_text(byte_level: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, original = byte_level
    ids = original.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, add_special=False) == ids
    assert tokenizer.decode(ids, skip_special=False) == original.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def tekken(mistral_data: Path) -> tuple[Tokenizer, Any]:
    tekkenizer = pytest.importorskip("mistral_common.tokens.tokenizers.tekken").Tekkenizer
    path = mistral_data / "tekken_240911.json"
    return Tokenizer.from_gguf(realdata.metadata_of_tekken(path), "tekken"), tekkenizer.from_file(path)


def test_tekken_equals_mistral_common(tekken: tuple[Tokenizer, Any]) -> None:
    tokenizer, original = tekken
    for text in HARD_TEXTS:
        ids = original.encode(text, bos=True, eos=False)
        assert tokenizer.encode(text, parse_special=False) == ids, repr(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.add_bos and tokenizer.bos_id == 1


@given(text=RANDOM_TEXT)
@RANDOM
def test_tekken_equals_mistral_common_on_random_text(tekken: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, original = tekken
    assert plain(tokenizer, text) == original.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default"])
def test_smollm2_vocabulary_equals_llama_cpp(smollm2_metadata: dict[str, Any], pre: str) -> None:
    tokenizer = Tokenizer.from_gguf({**smollm2_metadata, "tokenizer.ggml.pre": pre}, pre)
    for text, ids in zip(LLAMA_CPP["texts"], LLAMA_CPP[pre], strict=True):
        assert plain(tokenizer, text) == ids, repr(text)


def test_a_missing_pre_tokenizer_is_llama_cpps_default(smollm2_metadata: dict[str, Any]) -> None:
    metadata = {key: value for key, value in smollm2_metadata.items() if key != "tokenizer.ggml.pre"}
    tokenizer = Tokenizer.from_gguf(metadata, "old")
    assert [plain(tokenizer, text) for text in LLAMA_CPP["texts"]] == LLAMA_CPP["default"]


@given(text=RANDOM_TEXT)
@RANDOM
def test_smollm_equals_digits_then_gpt2(smollm2_metadata: dict[str, Any], text: str) -> None:
    """SmolLM's own tokenizer.json cuts digits apart and then does what GPT-2 does."""
    assert plain(smollm(smollm2_metadata), text) == digits_then_gpt2(smollm2_metadata).encode(text).ids


_BUILT: dict[str, Any] = {}


def smollm(metadata: dict[str, Any]) -> Tokenizer:
    if "ours" not in _BUILT:
        _BUILT["ours"] = Tokenizer.from_gguf(metadata, "smollm2")
    return _BUILT["ours"]


def digits_then_gpt2(metadata: dict[str, Any]) -> Any:
    import tokenizers

    if "theirs" not in _BUILT:
        vocab = {piece: token for token, piece in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
        steps = tokenizers.pre_tokenizers
        fast.pre_tokenizer = steps.Sequence([steps.Digits(individual_digits=True), steps.ByteLevel(False)])
        _BUILT["theirs"] = fast
    return _BUILT["theirs"]


def test_smollm2_special_tokens(smollm2_metadata: dict[str, Any]) -> None:
    tokenizer = smollm(smollm2_metadata)
    chat = "<|im_start|>user\nHi<|im_end|>"
    assert tokenizer.encode(chat) == [1, 4093, 198, 26843, 2]
    assert not {1, 2} & set(tokenizer.encode(chat, parse_special=False))
    assert tokenizer.decode(tokenizer.encode(chat, parse_special=False)) == chat
    assert tokenizer.decode(tokenizer.encode(chat)) == "user\nHi"
    assert tokenizer.decode(tokenizer.encode(chat), skip_special=False) == chat
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert not tokenizer.add_bos and not tokenizer.add_eos
    assert tokenizer.eos_ids == {0, 2} and not tokenizer.decode([2]) and tokenizer.decode([198])
    assert tokenizer.vocab_size == 49152 and tokenizer.chat_template == smollm2_metadata["tokenizer.chat_template"]


@pytest.fixture(scope="module", params=MISTRAL_MODELS)
def sentencepiece_pair(request: pytest.FixtureRequest, mistral_data: Path) -> tuple[Tokenizer, Any]:
    """A tokenizer built from GGUF metadata, and `sentencepiece` itself."""
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor
    path = mistral_data / request.param
    metadata = realdata.metadata_of_sentencepiece(path)
    return Tokenizer.from_gguf(metadata, request.param), processor(model_file=str(path))


def test_sentencepiece_is_exact(sentencepiece_pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, original = sentencepiece_pair
    for text in HARD_TEXTS:
        ids = original.encode(text)
        assert plain(tokenizer, text) == ids, repr(text)
        assert tokenizer.decode(ids) == original.decode(ids)
    assert tokenizer.encode("a")[0] == 1 and tokenizer.add_bos


@given(text=RANDOM_TEXT)
@RANDOM
def test_sentencepiece_is_exact_on_random_text(sentencepiece_pair: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, original = sentencepiece_pair
    ids = original.encode(text)
    assert plain(tokenizer, text) == ids
    assert tokenizer.decode(ids) == original.decode(ids)


def test_sentencepiece_equals_llama_cpp(mistral_data: Path) -> None:
    metadata = realdata.metadata_of_sentencepiece(mistral_data / MISTRAL_MODELS[2])
    tokenizer = Tokenizer.from_gguf(metadata, "v3")
    for text, ids in zip(LLAMA_CPP["texts"], LLAMA_CPP[MISTRAL_MODELS[2]], strict=True):
        assert plain(tokenizer, text) == ids, repr(text)
    for text, ids in zip(LLAMA_CPP["special_texts"], LLAMA_CPP["special"], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)


@pytest.fixture(scope="module")
def mistral7b(mistral7b_folder: Path, mistral_data: Path) -> tuple[Tokenizer, Any]:
    """Mistral 7B's vocabulary as GGUF has it, and the tokenizer.json that was made from it."""
    import tokenizers

    metadata = realdata.metadata_of_sentencepiece(mistral_data / MISTRAL_MODELS[0])
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], dtype=np.int32)
    metadata["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"], dtype=np.float32)
    original = tokenizers.Tokenizer.from_file(str(mistral7b_folder / "tokenizer.json"))
    return Tokenizer.from_gguf(metadata, "mistral"), original


def test_sentencepiece_equals_tokenizer_json_special_tokens_included(mistral7b: tuple[Tokenizer, Any]) -> None:
    tokenizer, original = mistral7b
    for text in [*HARD_TEXTS, "<s>a</s> b<s>  c", "</s></s>", "x<unk>y", " <s> ", "<s>\n"]:
        ids = original.encode(text).ids
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == original.decode(ids)
        assert tokenizer.decode(ids, skip_special=False) == original.decode(ids, skip_special_tokens=False)


@given(text=RANDOM_TEXT)
@RANDOM
def test_sentencepiece_equals_tokenizer_json_on_random_text(mistral7b: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, original = mistral7b
    assert tokenizer.encode(text) == original.encode(text).ids


def small_sentencepiece(**more: Any) -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "<mark>"]
    types = [2, 3, 3] + [6] * 256 + [1, 1, 1, 1, 4]
    scores = [0.0] * 259 + [-2.0, -3.0, -4.0, -1.0, 0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        **more,
    }


def test_leftmost_pair_joins_first_where_scores_are_equal() -> None:
    """Also where different pairs make the same piece, which merges ranked by pair cannot express."""
    spm = pytest.importorskip("sentencepiece")
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = model_pb2.ModelProto()
    scores = {"▁": -9.0, "a": -9.0, "b": -9.0, "aa": -2.0, "aaa": -3.0, "ba": -1.0, "baa": -1.5}
    for piece, score, kind in [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        *((p, s, 1) for p, s in scores.items()),
    ]:
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = 2
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    original = spm.SentencePieceProcessor(model_proto=proto.SerializeToString())
    tokenizer = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
            "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
            "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
            "tokenizer.ggml.add_space_prefix": False,
        },
        "small",
    )
    for length in range(1, 12):
        for text in ("a" * length, "b" + "a" * length, "a" * length + "b" + "a" * length, "é" * length + "aéééa"):
            assert plain(tokenizer, text) == original.encode(text), text


def test_user_defined_tokens_are_text() -> None:
    tokenizer = Tokenizer.from_gguf(small_sentencepiece(), "small")
    ids = tokenizer.encode("a<mark>b", parse_special=False)
    assert 263 in ids and tokenizer.decode(ids) == "a<mark> b"
    assert 1 not in plain(tokenizer, "<s>") and tokenizer.encode("<s>", add_special=False) == [1]


def test_no_space_prefix_where_the_file_says_so() -> None:
    tokenizer = Tokenizer.from_gguf(small_sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}), "small")
    assert plain(tokenizer, "ab ab") == [262, 259, 262]
    assert tokenizer.decode([259, 262]) == " ab"


def test_phi3_tokens_swallow_white_space(mistral_data: Path, tmp_path: Path) -> None:
    """As Phi-3's tokenizer.json marks them (rstrip), checked against `tokenizers` on a vocabulary with such tokens."""
    import tokenizers
    from transformers import LlamaTokenizer

    metadata = realdata.metadata_of_sentencepiece(mistral_data / MISTRAL_MODELS[0])
    added = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    pieces = metadata["tokenizer.ggml.tokens"]
    (tmp_path / "tokenizer.model").write_bytes((mistral_data / MISTRAL_MODELS[0]).read_bytes())
    theirs = LlamaTokenizer.from_pretrained(tmp_path, legacy=True, add_bos_token=False)
    theirs.add_tokens(
        [tokenizers.AddedToken(t, rstrip=t != "<|endoftext|>", normalized=False, special=True) for t in added],
        special_tokens=True,
    )
    metadata |= {
        "general.architecture": "phi3",
        "tokenizer.ggml.tokens": pieces + added,
        "tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"] + [3] * len(added),
        "tokenizer.ggml.scores": metadata["tokenizer.ggml.scores"] + [0.0] * len(added),
    }
    tokenizer = Tokenizer.from_gguf(metadata, "phi3")
    for text in [
        "<|user|>\nHi there<|end|>\n<|assistant|>\n",
        "<|system|> \u3000\t\n x<|end|>\x1cy<|endoftext|>\n\nz",
        "a <|user|>  <|end|> b",
    ]:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids, repr(text)
    assert {32000, 32003} <= tokenizer.eos_ids


def test_ends_of_turn_are_collected() -> None:
    metadata = small_sentencepiece(**{"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 263})
    assert Tokenizer.from_gguf(metadata, "small").eos_ids == {2, 263}


def test_add_bos_and_add_eos_follow_the_file() -> None:
    flags = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer.from_gguf(small_sentencepiece(**flags), "small")
    assert tokenizer.encode("ab") == [259, 262, 2] and tokenizer.add_eos and not tokenizer.add_bos


def without(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != f"tokenizer.ggml.{key}"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.model": "t5"}, "unsupported tokenizer model 't5'"),
        ({"tokenizer.ggml.pre": "klingon"}, "unknown pre-tokenizer 'klingon'"),
        ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens is missing or empty"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 entries for 4 tokens"),
        ({"tokenizer.ggml.merges": ["a b", "a x"]}, r"merges\[1\] is 'a x', but 'x' is not in the vocabulary"),
        ({"tokenizer.ggml.merges": ["b a"]}, r"'ba' is not in the vocabulary"),
        ({"tokenizer.ggml.merges": ["ab"]}, r"merges\[0\] is 'ab', not a pair"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.tokens": [1, 2, 3, 4]}, "tokenizer.ggml.tokens holds int values"),
        ({"tokenizer.ggml.tokens": ["a", "b", "c", "d"]}, "'ab' is not in the vocabulary"),
        ({"tokenizer.ggml.pre": ["gpt-2"]}, "unknown pre-tokenizer"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "tokenizer.ggml.eos_token_id is 'x'"),
        ({"tokenizer.ggml.bos_token_id": 9}, "tokenizer.ggml.bos_token_id is 9, but there are 4 tokens"),
    ],
)
def test_broken_byte_level_metadata_is_named(change: dict[str, Any], says: str) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<end>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
    }
    assert Tokenizer.from_gguf(metadata, "m.gguf").encode("ab<end>") == [2, 3]
    with pytest.raises(TokenizerError, match=says) as caught:
        Tokenizer.from_gguf({**metadata, **change}, "m.gguf")
    assert "m.gguf" in caught.value.message and caught.value.hint


def test_broken_sentencepiece_metadata_is_named() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.scores is missing"):
        Tokenizer.from_gguf(without(small_sentencepiece(), "scores"), "m.gguf")
    with pytest.raises(TokenizerError, match="scores has 1 entries for 264 tokens"):
        Tokenizer.from_gguf(small_sentencepiece(**{"tokenizer.ggml.scores": [0.0]}), "m.gguf")
    pieces = small_sentencepiece()["tokenizer.ggml.tokens"]
    with pytest.raises(TokenizerError, match="token 258, 'two', is no byte token"):
        Tokenizer.from_gguf(
            small_sentencepiece(**{"tokenizer.ggml.tokens": [*pieces[:258], "two", *pieces[259:]]}), "m.gguf"
        )
    types = [1] * 264
    with pytest.raises(TokenizerError, match="neither an unknown token nor a byte token"):
        Tokenizer.from_gguf(small_sentencepiece(**{"tokenizer.ggml.token_type": types}), "m.gguf")
