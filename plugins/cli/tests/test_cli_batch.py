"""``ruvllm run`` with many prompts; and how runs end that are interrupted or fail half-way."""

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

from ruvllm_cli import batch
from ruvllm_core.errors import GenerationError
from ruvllm_core.generate.engine import Engine

pytestmark = pytest.mark.usefixtures("candle")
GREEDY = ("--temperature", "0")


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
        ('{"prompt": "x", "id": NaN}', ["is not JSON", "NaN"]),
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
    result = ruvllm("run", tiny, "x", "--ignore-eos", "--json", "--kernels", "torch")
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


@pytest.mark.parametrize("to_file", [True, False])
def test_a_terminal_gets_a_progress_bar_and_stdout_the_answers(tiny: Path, tmp_path: Path, to_file: bool) -> None:
    source, target = write_lines(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl"
    command = ["run", str(tiny), "--prompt-file", str(source), "--max-tokens", "2"]
    command += ["--output", str(target)] if to_file else []
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ruvllm_core.cli.main", *command], stderr=slave, stdout=subprocess.PIPE, text=True
    )
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(master)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"answering" in shown
    assert b"3/3" in shown
    rows = read_lines(target) if to_file else [json.loads(line) for line in out.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert bool(out) != to_file


def test_a_reader_that_leaves_ends_the_answer_quietly(tiny: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ruvllm_core.cli.main", "run", str(tiny), "Count", *ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 1


def test_half_a_surrogate_pair_fails_alone(ruvllm, tiny: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a \\ud800", "id": "\\udc00"}\n{"prompt": "b"}\n')
    ruvllm("run", tiny, "--prompt-file", source, "--output", target, "--max-tokens", "2").failed(1, "1 of 2 answers")
    bad, good = read_lines(target)
    assert (bad["id"], bad["error_type"]) == ("\udc00", "TokenizerError")
    assert "error" not in good


def test_answers_go_through_pipes_and_links_and_leave_them_there(ruvllm, tiny: Path, tmp_path: Path) -> None:
    source, pipe = write_lines(tmp_path / "in.jsonl", *ROWS), tmp_path / "pipe"
    os.mkfifo(pipe)
    call = ("run", tiny, "--prompt-file", source, "--max-tokens", "2", *GREEDY, "--log-level", "error", "--output")
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    assert ruvllm(*call, pipe).code == 0
    read = reader.communicate(timeout=30)[0]
    assert pipe.is_fifo()
    target, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(target)
    assert ruvllm(*call, link).code == 0
    assert link.is_symlink()
    for rows in (read_lines(target), [json.loads(line) for line in read.splitlines()]):
        assert [row["id"] for row in rows] == ["a", 7, None]
    assert list(tmp_path.glob("*.part")) == []
