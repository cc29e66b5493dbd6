"""``ruvllm run``: one prompt, its flags, sources and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ruvllm_cli.options import _SAMPLING
from ruvllm_core import GenerateParams
from ruvllm_core.generate.engine import Engine

pytestmark = pytest.mark.usefixtures("candle")
GREEDY = ("--temperature", "0")


def test_smollm2_answers_with_one_json_object() -> None:
    command = ("run", "smollm2", "Why is the sky blue?", "--max-tokens", "20", *GREEDY, "--json", "--log-level", "info")
    result = subprocess.run([sys.executable, "-m", "ruvllm_core.cli.main", *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert {"text", "token_ids", "finish_reason", "usage", "timings", "model", "backend", "kernels", "cache"} <= set(
        answer
    )
    assert len(answer["token_ids"]) == answer["usage"]["completion_tokens"] == 20
    assert answer["finish_reason"] == "length"
    assert (answer["model"], answer["backend"], answer["cache"]) == ("smollm2", "candle", "contiguous")
    assert {"load_s", "ttft_s", "prefill_tok_s", "decode_tok_s"} <= set(answer["timings"])
    assert all(value > 0 for key, value in answer["timings"].items() if key != "queue_s")
    assert "sky" in answer["text"]
    assert "loaded" in result.stderr


def test_text_ids_and_prompt_sources_agree(ruvllm, tiny: Path, tmp_path: Path) -> None:
    flags = ("--max-tokens", "12", *GREEDY)
    answer = ruvllm("run", tiny, "What?", "--json", *flags).json
    file = tmp_path / "prompt.txt"
    file.write_text("What?\n")
    config = tmp_path / "run.toml"
    config.write_text(f'model = "{tiny}"\n[sampling]\nmax_tokens = 12\ntemperature = 0\n[run]\nprompts = ["What?"]')
    calls = {
        "argument": ruvllm("run", tiny, "What?", *flags),
        "stdin": ruvllm("run", tiny, *flags, stdin="What?\n"),
        "dash": ruvllm("run", tiny, "-", *flags, stdin="What?"),
        "file": ruvllm("run", tiny, "--prompt-file", file, *flags),
        "config": ruvllm("run", "--config", config),
    }
    from ruvllm_core import Tokenizer

    assert Tokenizer.load(tiny).decode(answer["token_ids"]) == answer["text"]
    for name, call in calls.items():
        assert call.code == 0, call.err
        assert call.out.removesuffix("\n") == answer["text"].removesuffix("\n"), name
    assert answer["model"] == str(tiny)


def test_template_system_and_raw_reach_the_prompt(ruvllm, tiny: Path) -> None:
    def prompt_tokens(*flags: str) -> int:
        return int(ruvllm("run", tiny, "Hi", "--json", "--max-tokens", "1", *flags).json["usage"]["prompt_tokens"])

    plain = len("suser\nHie\nsassistant\n")
    assert prompt_tokens("--raw") == 2
    assert prompt_tokens() == plain
    assert prompt_tokens("--system", "Be kind") == plain + len("ssystem\nBe kinde\n")


def test_every_sampling_field_has_a_flag() -> None:
    import click

    command = click.Command("x")
    for option in _SAMPLING:
        option(command)
    flags = {parameter.name for parameter in command.params}
    assert flags == set(GenerateParams.model_fields) - {"hidden_states", "cache_salt", "user"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max-tokens", "7"], {"max_tokens": 7}),
        (["--temperature", "0.5", "--top-k", "3", "--top-p", "0.8"], {"temperature": 0.5, "top_k": 3, "top_p": 0.8}),
        (["--min-p", "0.1", "--repetition-penalty", "1.2"], {"min_p": 0.1, "repetition_penalty": 1.2}),
        (["--frequency-penalty", "-1", "--presence-penalty", "2"], {"frequency_penalty": -1, "presence_penalty": 2}),
        (["--logit-bias", "5=-1.5", "--logit-bias", "6=-inf"], {"logit_bias": {5: -1.5, 6: float("-inf")}}),
        (["--seed", "9", "--stop", "a", "--stop", "b c"], {"seed": 9, "stop": ("a", "b c")}),
        (["--ignore-eos", "--logprobs", "2"], {"ignore_eos": True, "logprobs": 2}),
    ],
)
def test_flags_become_parameters(ruvllm, tiny: Path, monkeypatch: pytest.MonkeyPatch, flags, expected) -> None:
    seen: list[GenerateParams] = []
    stream = Engine.stream
    monkeypatch.setattr(
        Engine, "stream", lambda self, p, params, **kw: (seen.append(params), stream(self, p, params, **kw))[1]
    )
    ruvllm("run", tiny, "x", "--max-tokens", "1", "--json", *flags)
    assert {name: getattr(seen[0], name) for name in expected} == expected
    untouched = set(GenerateParams.model_fields) - set(expected) - {"max_tokens"}
    assert all(getattr(seen[0], name) == getattr(GenerateParams(), name) for name in untouched)


def test_flags_go_before_environment_before_file(ruvllm, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'model = "{tiny}"\n[sampling]\nmax_tokens = 3\ntemperature = 0.0\nignore_eos = true')
    call = ("run", "--config", config, "--json")
    assert ruvllm(*call, stdin="x").json["usage"]["completion_tokens"] == 3
    monkeypatch.setenv("RUVLLM_SAMPLING__MAX_TOKENS", "4")
    assert ruvllm(*call, stdin="x").json["usage"]["completion_tokens"] == 4
    assert ruvllm(*call, "--max-tokens", "5", stdin="x").json["usage"]["completion_tokens"] == 5


def test_logprobs_and_seed(ruvllm, tiny: Path) -> None:
    call = ("run", tiny, "x", "--json", "--max-tokens", "6", "--ignore-eos", "--temperature", "1", "--top-p", "1")
    one = ruvllm(*call, "--seed", "3", "--logprobs", "2").json
    assert len(one["logprobs"]) == len(one["top_logprobs"]) == 6
    assert all(len(top) == 2 for top in one["top_logprobs"])
    assert ruvllm(*call, "--seed", "3").json["token_ids"] == one["token_ids"]
    assert ruvllm(*call, "--seed", "4").json["token_ids"] != one["token_ids"]


@pytest.mark.usefixtures("forbid_loading")
@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["smollm2", "x", "--temperature", "-1"], 1, ["sampling.temperature", "greater than or equal to 0"]),
        (["smollm2", "x", "--temperature", "nan"], 1, ["sampling.temperature"]),
        (["smollm2", "x", "--top-p", "0"], 1, ["sampling.top_p"]),
        (["smollm2", "x", "--top-k", "-1"], 1, ["sampling.top_k"]),
        (["smollm2", "x", "--min-p", "1"], 1, ["sampling.min_p"]),
        (["smollm2", "x", "--max-tokens", "0"], 1, ["sampling.max_tokens"]),
        (["smollm2", "x", "--seed", "-1"], 1, ["sampling.seed"]),
        (["smollm2", "x", "--stop", ""], 1, ["sampling.stop", "at least 1 character"]),
        (["smollm2", "x", "--logit-bias", "1=nan"], 1, ["sampling.logit_bias"]),
        (["smollm2", "x", "--logit-bias", "word=1"], 2, ["ID=BIAS"]),
        (["smollm2", "x", "--max-tokens", "many"], 2, ["--max-tokens", "many"]),
        (["smollm2", "x", "--threads", "-1"], 1, ["threads"]),
        (["smollm2", "x", "--device", "gpu"], 1, ["device"]),
        (["smollm2", "x", "--raw", "--system", "s"], 2, ["--raw", "--system"]),
        (["smollm2", ""], 1, ["the prompt is empty"]),
        (["smollm2"], 1, ["the prompt is empty"]),
        (["smollm2", "x", "--prompt-file", "y"], 2, ["PROMPT and --prompt-file"]),
        (["smollm2", "--prompt-file", "no/such.txt"], 1, ["no/such.txt", "No such file"]),
        (["smollm2", "--prompt-file", "no/such.jsonl"], 1, ["no/such.jsonl", "No such file"]),
        (["smollm2", "x", "--output", "no/such/folder.jsonl"], 1, ["no/such/folder.jsonl", "--output"]),
        (["smollm2", "x", "--output", "/"], 1, ["cannot write answers to /"]),
    ],
)
def test_nonsense_is_refused_before_a_model_is_loaded(ruvllm, args: list[str], code: int, words: list[str]) -> None:
    ruvllm("run", *args).failed(code, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend", "candel"], ["no 'candel'", "did you mean candle"]),
        (["--kernels", "trch"], ["no 'trch'", "did you mean torch"]),
        (["--cache", "contigous"], ["no 'contigous'", "contiguous"]),
        (["--quantization", "q4_x"], ["no 'q4_x'"]),
        (["--max-context", "99999"], ["max_context 99999", "65536"]),
        (["--max-context", "4"], ["the prompt has", "tokens", "the context holds 4"]),
        (["--logit-bias", "258=1"], ["logit_bias", "258"]),
    ],
)
def test_what_the_engine_refuses(ruvllm, tiny: Path, flags: list[str], words: list[str]) -> None:
    ruvllm("run", tiny, "Hello there", "--log-level", "error", *flags).failed(1, *words)


def test_a_model_that_is_not_there(ruvllm, tmp_path: Path) -> None:
    ruvllm("run", tmp_path / "none.gguf", "x").failed(1, "none.gguf")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    ruvllm("run", empty, "x").failed(1, "empty.gguf")
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"not a model" * 99)
    ruvllm("run", wrong, "x").failed(1, "wrong.gguf")
    ruvllm("run", "no-such/model", "x").failed(1, "no-such/model")


def test_input_that_is_not_utf8(ruvllm, tmp_path: Path) -> None:
    ruvllm("run", "smollm2", stdin=b"ab\xff").failed(1, "stdin is not UTF-8", "byte 2")
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xfe")
    ruvllm("run", "smollm2", "--prompt-file", file).failed(1, str(file), "UTF-8")
