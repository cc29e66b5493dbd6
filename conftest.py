"""What holds for every test, of core and of plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ruvllm_core.settings import Settings


@pytest.fixture(autouse=True, scope="module")
def nothing_is_learned_yet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What somebody has taught the models of this machine must not change what tests see, nor the other way round."""
    field = Settings.model_fields["cache_dir"]
    usual = field.default
    if not request.module.__name__.endswith(("test_docs", "test_settings")):  # which are about the default
        field.default = tmp_path_factory.mktemp("cache")
        Settings.model_rebuild(force=True)
    yield
    if field.default != usual:
        field.default = usual
        Settings.model_rebuild(force=True)


@pytest.fixture(scope="session")
def byte_llama() -> Callable[..., None]:
    """Writes a tiny random Llama into a folder; a token is a byte, or one of `pairs` of letters; then ``<s>, </s>``."""

    def write(folder: Path, *, context: int, pairs: Sequence[tuple[str, str]] = ()) -> None:
        import torch
        import transformers
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        torch.manual_seed(5)
        words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
        config = transformers.LlamaConfig(
            vocab_size=len(words) + 2,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            bos_token_id=len(words),
            eos_token_id=len(words) + 1,
            initializer_range=0.2,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, list(pairs)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
        tokenizer.save(str(folder / "tokenizer.json"))

    return write
