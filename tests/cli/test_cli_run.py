"""``ruvllm run``: one prompt and many, flags, files, mistakes, interrupts."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ruvllm_core import GenerateParams
from ruvllm_core.cli import batch
from ruvllm_core.cli.options import _SAMPLING
from ruvllm_core.errors import GenerationError
from ruvllm_core.generate.engine import Engine

pytestmark = pytest.mark.usefixtures("candle")
GREEDY = ("--temperature", "0")


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong must be found before a model is loaded."""
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("a model was loaded"))


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
    assert flags == set(GenerateParams.model_fields) - {"hidden_states"}


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
        (["smollm2", "x", "--stop", ""], 1, ["sampling.stop", "empty stop string"]),
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
        (["--cache", "pagd"], ["no 'pagd'", "contiguous"]),
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


ROWS = [
    {"prompt": "One", "id": "a"},
    {"messages": [{"role": "user", "content": "One"}], "id": 7},
    {"prompt": "Two", "params": {"max_tokens": 2, "ignore_eos": True}},
]


def test_a_batch_answers_in_order(ruvllm, tiny: Path, tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "in.jsonl", ROWS[0], "", *ROWS[1:]), tmp_path / "out.jsonl"
    target.write_text("old")
    call = ("run", tiny, "--prompt-file", source, "--max-tokens", "5", *GREEDY, "--log-level", "error")
    result = ruvllm(*call, "--output", target)
    assert (result.code, result.out) == (0, ""), result.err
    assert "3 of 3 answers" in result.err
    rows = read_lines(target)
    assert [(row["index"], row["id"]) for row in rows] == [(0, "a"), (1, 7), (2, None)]
    single = ruvllm("run", tiny, "One", "--json", "--max-tokens", "5", *GREEDY).json
    assert rows[0]["token_ids"] == rows[1]["token_ids"] == single["token_ids"]
    assert rows[2]["usage"]["completion_tokens"] == 2
    assert [path.name for path in sorted(tmp_path.glob("*.jsonl*"))] == ["in.jsonl", "out.jsonl"]
    printed = ruvllm(*call)
    assert [json.loads(line)["token_ids"] for line in printed.out.splitlines()] == [row["token_ids"] for row in rows]
    summary = ruvllm(*call, "--output", target, "--json").json
    assert (summary["prompts"], summary["failed"], summary["output"]) == (3, 0, str(target))
    assert [row["id"] for row in ruvllm(*call, "--json").json["answers"]] == ["a", 7, None]


def test_one_configuration_file_decides_it_all(ruvllm, tiny: Path, tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl"
    config = tmp_path / "run.toml"
    config.write_text(
        f'model = "{tiny}"\nbackend = "candle"\nkernels = ["torch"]\nlog_level = "error"\nmax_context = 100\n'
        f'[cache]\npolicy = "contiguous"\nprecision = "f32"\n[sampling]\nmax_tokens = 3\nignore_eos = true\n'
        f'[run]\nprompt_file = "{source}"\noutput = "{target}"\nsystem = "Be brief"'
    )
    assert ruvllm("run", "--config", config).code == 0
    rows = read_lines(target)
    assert [row["usage"]["completion_tokens"] for row in rows] == [3, 3, 2]
    assert rows[0]["usage"]["prompt_tokens"] == rows[1]["usage"]["prompt_tokens"] > len("ssystem\nBe brief")
    config.write_text(f'[run]\nprompts = ["a", "b"]\nprompt_file = "{source}"')
    ruvllm("run", "--config", config).failed(1, "run.prompts and run.prompt_file")
    config.write_text(f'model = "{tiny}"\nlog_level = "error"\n[sampling]\nmax_tokens = 1\n[run]\nprompts = ["a", "b"]')
    assert [json.loads(line)["index"] for line in ruvllm("run", "--config", config).out.splitlines()] == [0, 1]


@pytest.mark.usefixtures("forbid_loading")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["is not JSON"]),
        ("[1]", ["expected a JSON object, got list"]),
        ('{"promt": "x"}', ["no field 'promt'", "did you mean prompt"]),
        ('{"id": 1}', ["one of the fields prompt and messages"]),
        ('{"prompt": "x", "messages": []}', ["one of the fields prompt and messages"]),
        ('{"prompt": ""}', ["prompt: expected a text"]),
        ('{"prompt": 5}', ["prompt: expected a text"]),
        ('{"messages": []}', ["messages: expected a list"]),
        ('{"messages": [{"role": "user"}]}', ["messages: expected a list"]),
        ('{"prompt": "x", "params": 5}', ["params: expected an object"]),
        ('{"prompt": "x", "params": {"temprature": 1}}', ["temprature", "did you mean temperature?"]),
        ('{"prompt": "x", "params": {"temperature": -1}}', ["temperature", "greater than or equal to 0"]),
        ("[" * 100_000, ["is not JSON"]),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(ruvllm, tmp_path: Path, line: str, words: list[str]) -> None:
    source, target = write_lines(tmp_path / "in.jsonl", ROWS[0], line), tmp_path / "out.jsonl"
    ruvllm("run", "smollm2", "--prompt-file", source, "--output", target).failed(1, f"{source}:2", *words)
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.usefixtures("forbid_loading")
def test_batches_that_cannot_be(ruvllm, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", "")
    ruvllm("run", "smollm2", "--prompt-file", source).failed(1, f"{source} has no prompts")
    write_lines(source, ROWS[1])
    ruvllm("run", "smollm2", "--prompt-file", source, "--raw").failed(1, f"{source}:1", "chat template")
    ruvllm("run", "smollm2", "--prompt-file", source, "--output", source).failed(2, "would overwrite the prompts")
    assert read_lines(source) == [ROWS[1]]


def test_a_failing_prompt_fails_alone(ruvllm, tiny: Path, tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "in.jsonl", ROWS[0], {"prompt": "x" * 500}, ROWS[2]), tmp_path / "out.jsonl"
    result = ruvllm("run", tiny, "--prompt-file", source, "--output", target, "--max-context", "192")
    result.failed(1, "2 of 3 answers")
    good, bad, last = read_lines(target)
    assert (bad["index"], bad["error_type"]) == (1, "PromptTooLong")
    assert "context holds 192" in bad["error"]
    assert "error" not in good
    assert "error" not in last


def test_an_unexpected_failure_keeps_what_was_answered(ruvllm, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    source, target = write_lines(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl"
    stream, monkeypatched = Engine.stream, iter([None, None, RuntimeError("the machine is on fire")])

    def burning(self, *args, **kwargs):
        if error := next(monkeypatched):
            raise error
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "stream", burning)
    monkeypatch.setattr(batch, "_WINDOW", 1)
    ruvllm("run", tiny, "--prompt-file", source, "--output", target, "--max-tokens", "2").failed(
        1, "on fire", "--debug"
    )
    assert [row["index"] for row in read_lines(target)] == [0, 1]


def test_an_error_in_mid_stream_is_an_error(ruvllm, tiny: Path, monkeypatch) -> None:
    from ruvllm_core.decode.decoder import EagerDecoder

    forward, calls = EagerDecoder.forward, []

    def failing(self, batch):
        calls.append(batch)
        if len(calls) > 3:
            raise GenerationError("the device is gone")
        return forward(self, batch)

    monkeypatch.setattr(EagerDecoder, "forward", failing)
    result = ruvllm("run", tiny, "x", "--ignore-eos", "--json")
    assert (result.code, result.out) == (1, "")
    assert result.err.endswith("error: the device is gone\n")


def interrupt(command: list[str], when: Path | None = None) -> tuple[int, bytes, bytes]:
    """Start a command, interrupt it when it has begun to answer, and see how it ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ruvllm_core.cli.main", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    first = b""
    if when is None:
        first = process.stdout.read(1)
    else:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (when.exists() and when.stat().st_size):
            time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return process.returncode, first + out, err


ENDLESS = ["--max-tokens", "100000", "--ignore-eos", "--log-level", "error"]


def test_ctrl_c_ends_an_answer_with_130(tiny: Path) -> None:
    code, out, err = interrupt(["run", str(tiny), "Count to a million.", *ENDLESS])
    assert code == 130
    assert out.endswith(b"\n")
    assert b"Traceback" not in err


def test_ctrl_c_keeps_the_answers_that_are_finished(tiny: Path, tmp_path: Path) -> None:
    short = {"prompt": "Hi", "params": {"max_tokens": 2}}
    source, target = write_lines(tmp_path / "in.jsonl", short, {"prompt": "Count"}, short), tmp_path / "out.jsonl"
    command = ["run", str(tiny), "--prompt-file", str(source), "--output", str(target), *ENDLESS]
    code, out, err = interrupt(command, when=tmp_path / "out.jsonl.part")
    assert (code, out) == (130, b"")
    assert b"Traceback" not in err
    assert str(target).encode() in err
    assert [row["index"] for row in read_lines(target)] == [0]
    assert not (tmp_path / "out.jsonl.part").exists()


def test_a_terminal_gets_a_progress_bar(tiny: Path, tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl"
    command = ["run", str(tiny), "--prompt-file", str(source), "--output", str(target), "--max-tokens", "2"]
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "ruvllm_core.cli.main", *command], stderr=slave, stdout=slave)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait(timeout=30) == 0
    assert b"answering" in shown
    assert b"3/3" in shown
