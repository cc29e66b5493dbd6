"""``ruvllm tokenize``, ``perplexity`` and ``bench e2e``."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm_cli.bench import Workload, measure, peak_rss_mb
from ruvllm_core.cli.main import cli
from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.decoder import EagerDecoder
from ruvllm_core.errors import RequestError
from ruvllm_core.generate.load import load_parts
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings

pytestmark = pytest.mark.usefixtures("candle")
TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. " * 3
)


@pytest.fixture(autouse=True)
def exact(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracles compute in float32: so do PyTorch's kernels, while others may round."""
    monkeypatch.setenv("RUVLLM_KERNELS", "torch")


def test_tokenize_prints_ids_without_weights(ruvllm, tiny: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # and no weights
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    oracle = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for text in ("Hello é 世界 </s>", " two  spaces\n", ""):
        expected = oracle.encode(text).ids
        result = ruvllm("tokenize", tmp_path, text, "--json").json
        assert (result["token_ids"], result["count"]) == (expected, len(expected))
        assert ruvllm("tokenize", tmp_path, "--json", stdin=text).json["token_ids"] == expected
    table = ruvllm("tokenize", tmp_path, "A\n").out
    assert str(oracle.token_to_id("A")) in table
    assert "'\\n'" in table


def test_tokenize_special_tokens(ruvllm, tiny: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    oracle = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    oracle.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    oracle.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    for flags, special in (([], True), (["--no-special"], False)):
        expected = oracle.encode("Hi", add_special_tokens=special).ids
        assert ruvllm("tokenize", tmp_path, "Hi", "--json", *flags).json["token_ids"] == expected


def test_tokenize_imports_no_torch() -> None:
    command = ("tokenize", "smollm2", "Hello world", "--json")
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ruvllm_core.cli.main", *command], capture_output=True, text=True
    )
    assert json.loads(result.stdout)["token_ids"] == [19556, 905]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "ruvllm_core" in imported
    assert "torch" not in imported


def test_tokenize_mistakes(ruvllm, tmp_path: Path) -> None:
    ruvllm("tokenize").failed(2, "MODEL")
    ruvllm("tokenize", tmp_path, "x").failed(1, str(tmp_path))
    ruvllm("tokenize", tmp_path / "no.gguf", "x").failed(1, "no.gguf")
    ruvllm("tokenize", "smollm2", stdin=b"\xff").failed(1, "stdin is not UTF-8")


def oracle_nll(folder: Path, ids: list[int], context: int, bos: int | None = None) -> list[float]:
    """What llama.cpp's perplexity tool adds up: second halves of windows that do not overlap."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: list[float] = []
    for start in range(0, len(ids) - context + 1, context):
        window = torch.tensor([ids[start : start + context]])
        if bos is not None:
            window[0, 0] = bos
        with torch.inference_mode():
            losses = torch.nn.functional.cross_entropy(model(window).logits[0, :-1], window[0, 1:], reduction="none")
        found += losses[context // 2 :].tolist()
    return found


@pytest.mark.parametrize("bos", [None, 256])
def test_perplexity_equals_transformers(ruvllm, tiny: Path, tmp_path: Path, bos: int | None) -> None:
    from tokenizers import Tokenizer, processors

    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.iterdir():
        (model / file.name).symlink_to(file)
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
        (model / "tokenizer.json").unlink()
        tokenizer.save(str(model / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    expected = oracle_nll(model, tokenizer.encode(TEXT).ids, 40, bos)
    result = ruvllm("perplexity", model, text, "--context", "40", "--json").json
    assert result["tokens"] == len(expected) == (len(TEXT) + (bos is not None)) // 40 * 19
    assert result["nll"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    error = np.std(expected) / math.sqrt(len(expected) - 1) * result["perplexity"]
    assert result["standard_error"] == pytest.approx(error, rel=1e-4)
    part = ruvllm("perplexity", model, text, "--context", "40", "--windows", "2", "--json").json
    assert part["nll"] == pytest.approx(np.mean(expected[: 2 * 19]), abs=1e-5)
    assert "perplexity" in ruvllm("perplexity", model, text, "--context", "40", "--windows", "1").out


def test_perplexity_mistakes(ruvllm, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    call = ("perplexity", tiny, file, "--log-level", "error")
    ruvllm(*call).failed(1, str(file), "No such file")
    file.write_text(" \n")
    ruvllm(*call).failed(1, f"{file} is empty")
    file.write_bytes(b"ab\xffcd")
    ruvllm(*call).failed(1, str(file), "not UTF-8", "byte 2")
    file.write_text("too short")
    ruvllm(*call).failed(1, f"{file} has 9 tokens, a window takes 512", "--context")
    ruvllm(*call, "--context", "1").failed(2, "--context")
    ruvllm(*call, "--context", "70000").failed(1, "max_context 70000")


def test_bench_prints_a_table_and_one_json_line(ruvllm, tiny: Path) -> None:
    flags = ("--prefill", "20", "--decode", "4", "--depth", "30", "--sequences", "2", "--threads", "1")
    result = ruvllm("bench", "e2e", tiny, *flags, "--json", "--log-level", "error").json
    assert result["benchmark"] == "e2e"
    assert (result["model"], result["backend"], result["kernels"], result["cache"]) == (
        *(str(tiny), "candle", "torch", "contiguous"),
    )
    assert [result[key] for key in ("prefill", "decode", "depth", "sequences", "repeats", "threads")] == [
        20,
        4,
        30,
        2,
        3,
        1,
    ]
    for key in ("prefill_tok_s", "decode_tok_s"):
        assert result[key] == sorted(result[f"{key}_runs"])[1] > 0
    assert result["load_s"] > 0
    assert result["max_context"] == 54
    table = ruvllm("bench", "e2e", tiny, "--prefill", "4", "--decode", "2", "--repeats", "1").out
    assert "decode_tok_s" in table
    assert json.loads(table.splitlines()[-1])["prefill"] == 4


def test_bench_computes_what_it_says(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every position of every sequence once, in chunks, then one token a step; and tokens as transformers continues."""
    import torch
    import transformers

    settings = Settings(kernels=["torch"], model=str(tiny), max_context=40)
    registry = Registry.discover(settings)
    parts = load_parts(settings, registry)
    batches = []
    forward = EagerDecoder.forward
    monkeypatch.setattr(EagerDecoder, "forward", lambda self, batch: (batches.append(batch), forward(self, batch))[1])
    measure(parts, Workload(prefill=10, decode=4, depth=5, sequences=2, repeats=1), chunk=4)
    shapes = [(batch.positions.tolist(), batch.num_sequences) for batch in batches]
    depth = [([0, 1, 2, 3], 1), ([4], 1)]
    prefill = [([5, 6, 7, 8], 1), ([9, 10, 11, 12], 1), ([13, 14], 1)]
    decode = [([position] * 2, 2) for position in (15, 16, 17, 18)]
    assert shapes == depth * 2 + prefill * 2 + decode[:2] + prefill * 2 + decode
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    first = [token for batch in (*batches[:2], *batches[4:7]) for token in batch.tokens.tolist()]
    with torch.inference_mode():
        longer = oracle.generate(torch.tensor([first]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [int(batch.tokens[0]) for batch in batches[-4:]] == longer[0, 15:].tolist()
    with pytest.raises(RequestError, match="the context holds 40"):
        measure(parts, Workload(prefill=30, decode=11), chunk=4)


def test_what_an_adapter_costs_is_measured_in_turn(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(kernels=["torch"], model=str(tiny), max_context=40)
    parts = load_parts(settings, Registry.discover(settings))
    ranks: list[int] = []
    forward = EagerDecoder.forward

    def watched(self: EagerDecoder, batch: Batch) -> Any:
        ranks.append(len(batch.adapters[0].sites["layers.0.mlp.down"].a) if batch.adapters else 0)
        return forward(self, batch)

    monkeypatch.setattr(EagerDecoder, "forward", watched)
    result = measure(parts, Workload(prefill=4, decode=2, repeats=2, adapter_rank=3), chunk=4)
    assert ranks[-12:] == [0, 0, 0, 3, 3, 3] * 2  # a prompt and two tokens without it, then with it
    assert all(result[key] > -1 for key in ("adapter_prefill_cost", "adapter_decode_cost"))
    assert "adapter_decode_cost" not in measure(parts, Workload(prefill=4, decode=2, repeats=1), chunk=4)


def test_peak_memory_is_that_of_the_process() -> None:
    import psutil

    before = peak_rss_mb()
    ballast = np.ones(2**26, dtype=np.uint8)
    assert peak_rss_mb() >= psutil.Process().memory_info().rss / 2**20 * 0.99
    assert peak_rss_mb() >= before
    del ballast


def test_bench_mistakes(ruvllm, tiny: Path) -> None:
    ruvllm("bench", "e2e", tiny, "--decode", "0").failed(2, "--decode")
    ruvllm("bench", "e2e", tiny, "--max-context", "8", "--log-level", "error").failed(1, "the context holds 8")
    ruvllm("bench", "e3e").failed(2, "e3e")
    ruvllm("bench", "e2e", "/no/such.gguf").failed(1, "/no/such.gguf")


def test_the_bench_group_can_be_extended() -> None:
    import click

    from ruvllm_cli.bench_command import command

    assert isinstance(command, click.Group)
    nested = cli.get_command(click.Context(cli), "bench")
    assert isinstance(nested, click.Group)
    options = {name for parameter in nested.commands["e2e"].params for name in parameter.opts}
    assert {"--config", "--debug", "--log-level"} <= options
