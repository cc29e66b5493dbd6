"""``ruvllm chat``: history, slash commands, several lines, overflow; and Ctrl-C and Ctrl-D at a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ruvllm_cli.chat import HELP
from ruvllm_core.generate.engine import Engine

pytestmark = pytest.mark.usefixtures("candle")
SHORT = ("--max-tokens", "6", "--temperature", "0", "--ignore-eos", "--log-level", "error")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[dict[str, str]], Any]]:
    """The prompts, and their parameters, that reach the engine."""
    seen: list[Any] = []
    stream = Engine.stream

    def spy(self: Engine, prompt: Any, params: Any, **options: Any) -> Any:
        seen.append((prompt if isinstance(prompt, str) else [dict(message) for message in prompt], params))
        return stream(self, prompt, params, **options)

    monkeypatch.setattr(Engine, "stream", spy)
    return seen


def roles(messages: list[dict[str, str]]) -> str:
    return "".join(message["role"][0] for message in messages)


def test_a_conversation_has_a_history(ruvllm, tiny: Path, asked) -> None:
    result = ruvllm("chat", tiny, *SHORT, stdin="Hello\nAnd now?\n")
    assert result.code == 0
    assert result.err.count("[stopped") == 2
    assert [roles(messages) for messages, _ in asked] == ["u", "uau"]
    first, answer, second = asked[1][0]
    assert (first["content"], second["content"]) == ("Hello", "And now?")
    assert result.out.startswith(answer["content"])
    single = ruvllm("run", tiny, "Hello", *SHORT, "--json").json
    assert answer["content"] == single["text"]


def test_system_regenerate_and_clear(ruvllm, tiny: Path, asked) -> None:
    ruvllm(
        "chat",
        tiny,
        *SHORT,
        "--system",
        "Old",
        stdin="A\n/system New one\n/regenerate\nB\n/clear\nC\n/system\n/regenerate\n",
    )
    assert [roles(messages) for messages, _ in asked] == ["su", "su", "suau", "su", "u"]
    assert [messages[0]["content"] for messages, _ in asked] == ["Old", "New one", "New one", "New one", "C"]
    assert asked[1][0][1:] == asked[0][0][1:]


def test_set_changes_what_follows(ruvllm, tiny: Path, asked) -> None:
    lines = ["A", "/set temperature 1.5", '/set stop ["x", "y"]', "/set stop z", "B", "/set", "/set seed"]
    result = ruvllm("chat", tiny, *SHORT, stdin="\n".join(lines))
    assert (asked[0][1].temperature, asked[0][1].stop) == (0, ())
    assert (asked[1][1].temperature, asked[1][1].stop, asked[1][1].max_tokens) == (1.5, ("z",), 6)
    assert "temperature = 1.5" in result.err
    assert "/set seed needs a value" in result.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set temperature -1", ["temperature", "greater than or equal to 0"]),
        ("/set temprature 1", ["temprature", "did you mean temperature"]),
        ("/regenrate", ["no command /regenrate", "did you mean regenerate"]),
        ("/regenerate", ["there is no answer yet"]),
        ("/load /no/such/file", ["/no/such/file", "No such file"]),
        ("/load", ["/load needs a file"]),
        ("/save /no/such/file", ["cannot write /no/such/file"]),
        ("/save", ["/save needs a file"]),
    ],
)
def test_mistakes_are_explained_and_forgiven(ruvllm, tiny: Path, asked, line: str, words: list[str]) -> None:
    result = ruvllm("chat", tiny, *SHORT, stdin=f"{line}\nStill there?")
    assert result.code == 0
    assert "Traceback" not in result.err
    assert all(word in " ".join(result.err.split()) for word in words), result.err
    assert [roles(messages) for messages, _ in asked] == ["u"]
    assert asked[0][1].temperature == 0


def test_help_lists_every_command(ruvllm, tiny: Path) -> None:
    result = ruvllm("chat", tiny, stdin="/help")
    assert result.out == ""
    assert all(line in result.err for line in HELP.values())


def test_several_lines_make_one_message(ruvllm, tiny: Path, asked) -> None:
    text = 'one\\\ntwo\n"""\nthree\n\nfour\n"""\n"""five"""\n//slash\n   \n/quit\nnever said'
    ruvllm("chat", tiny, *SHORT, stdin=text)
    assert [messages[-1]["content"] for messages, _ in asked] == ["one\ntwo", "three\n\nfour", "five", "/slash"]


def test_a_block_that_is_never_closed_is_said(ruvllm, tiny: Path, asked) -> None:
    ruvllm("chat", tiny, *SHORT, stdin='"""one\ntwo')
    assert asked[0][0][0]["content"] == "one\ntwo"


def test_save_and_load(ruvllm, tiny: Path, tmp_path: Path, asked) -> None:
    file = tmp_path / "chat.json"
    ruvllm("chat", tiny, *SHORT, "--system", "Sys é", stdin=f"Hi\n/save {file}")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert (saved["model"], saved["system"], roles(saved["messages"])) == (str(tiny), "Sys é", "ua")
    ruvllm("chat", tiny, *SHORT, stdin=f"/load {file}\nMore")
    assert asked[1][0][:-1] == [{"role": "system", "content": "Sys é"}, *saved["messages"]]
    assert sorted(path.name for path in tmp_path.glob("chat*")) == ["chat.json"]


def test_save_leaves_a_pipe_a_pipe(ruvllm, tiny: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    ruvllm("chat", tiny, *SHORT, stdin=f"/system S\n/save {pipe}")
    assert json.loads(reader.communicate(timeout=30)[0])["system"] == "S"
    assert pipe.is_fifo()
    assert list(tmp_path.glob("*.part")) == []


def test_an_interrupt_before_the_answer_begins(ruvllm, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", interrupted)
    result = ruvllm("chat", tiny, *SHORT, stdin="Hello")
    assert (result.code, "unexpected" in result.err) == (130, False), result.err


@pytest.mark.parametrize("content", ["", "[]", "{}", "5", '{"system": 1, "messages": []}', "[" * 100_000])
def test_what_is_no_saved_conversation(ruvllm, tiny: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "chat.json"
    file.write_text(content)
    result = ruvllm("chat", tiny, stdin=f"/load {file}")
    assert (result.code, result.out) == (0, "")
    assert f"{file} is no saved conversation" in result.err


def test_a_full_context_is_explained_and_the_history_kept(ruvllm, tiny: Path, asked, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    lines = ["Hi", "x" * 300, f"/save {file}", "Yes?"]
    result = ruvllm("chat", tiny, *SHORT, "--max-context", "120", stdin="\n".join(lines))
    assert result.code == 0
    assert "context holds 120" in result.err
    assert "/clear" in result.err
    assert roles(json.loads(file.read_text())["messages"]) == "ua"
    assert [roles(messages) for messages, _ in asked] == ["u", "uau", "uau"]
    assert asked[2][0][-1]["content"] == "Yes?"


def test_it_says_when_an_answer_was_cut(ruvllm, tiny: Path) -> None:
    assert "[stopped at max_tokens" in ruvllm("chat", tiny, *SHORT, stdin="Hi").err
    first = ruvllm("run", tiny, "Hi", *SHORT, "--json").json["text"][0]
    result = ruvllm("chat", tiny, *SHORT, "--stop", first, stdin="Hi")
    assert (result.out, result.err) == ("\n", "")


LOOP = """
from ruvllm_core.protocols import FeedbackResult

class Mimic:
    wants_hidden = False
    def __init__(self, context):
        self.seen, self.folder = {}, context.state_dir
    def adapter(self, request):
        return None
    def observe(self, trajectory):
        self.seen[trajectory.request_id] = trajectory.params.user
    def feedback(self, request_id, quality):
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "seen").open("a") as file:
            file.write(f"{self.seen[request_id]} {quality}\\n")
        if quality == 0.5:
            return FeedbackResult("refused", "", "it says nothing")
        return FeedbackResult("applied", "v7") if quality else FeedbackResult("deferred", "", "later")
    def tick(self, budget_s):
        return False
    def proposer(self):
        return None
    def close(self):
        pass

@hookimpl
def learning_loops():
    return [Offer("mimic", "ruvllm_mimic_hooks:Mimic", "")]
"""


def test_answers_are_rated(ruvllm, install, tiny: Path, asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("ruvllm-mimic", "mimic", LOOP)
    monkeypatch.setenv("RUVLLM_LEARNING", "mimic")
    lines = ["/good", "A", "/rate x", "/rate 2", "/good thing", "/rate 0.5", "/rate 0.7", "/bad", "/regenerate", "/bad"]
    result = ruvllm("chat", tiny, *SHORT, "--learn", "--user", "ann", stdin="\n".join([*lines, "/clear", "/good"]))
    assert result.code == 0
    assert (tmp_path / "cache" / "learning" / "mimic" / "seen").read_text() == "ann 0.5\nann 0.7\nann 0.0\n"
    said = [line for line in result.err.splitlines() if line.startswith(("error: ", "[mimic"))]
    begins = [
        "error: there is no answer here to rate yet",
        "error: /rate needs a number from 0 to 1, not 'x'",
        "error: /rate needs a number from 0 to 1, not '2'",
        "error: /good takes nothing after it",
        "[mimic: refused, base model, request ",
        "[mimic: applied, adapter v7, request ",
        "error: this answer is rated already",
        "[mimic: deferred, base model, request ",
        "error: there is no answer here to rate yet",
    ]
    assert [line.startswith(begin) for line, begin in zip(said, begins, strict=True)] == [True] * len(begins), said
    assert "] (it says nothing)" in result.err and "] (later)" in result.err
    assert [params.user for _, params in asked] == ["ann", "ann"]


def test_nothing_learns_unless_asked_for(ruvllm, install, tiny: Path, asked, tmp_path: Path) -> None:
    install("ruvllm-mimic", "mimic", LOOP)
    result = ruvllm("chat", tiny, *SHORT, stdin="A\n/good")
    assert "nothing learns in this chat\n  start it with --learn" in result.err
    assert not (tmp_path / "cache" / "learning").exists()
    assert asked[0][1].user == ""


@pytest.mark.usefixtures("forbid_loading")
def test_learning_needs_a_loop(ruvllm, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUVLLM_PLUGIN_ALLOW", "cli,candle_like,kernels_cpu")
    ruvllm("chat", tiny, "--learn").failed(1, "nothing that learns is installed", "pip install ruvllm-sona")
    monkeypatch.setenv("RUVLLM_LEARNING", "")
    ruvllm("chat", tiny, "--learn").failed(1, "the setting learning is an empty list")


def test_feedback_reaches_what_is_installed(ruvllm, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ruvllm_sona")
    monkeypatch.setenv("RUVLLM_LEARNING", "sona")
    monkeypatch.setenv("RUVLLM_PLUGINS__SONA__BACKGROUND", "false")
    options = ("--max-tokens", "6", "--temperature", "1", "--ignore-eos", "--log-level", "error")
    result = ruvllm("chat", tiny, *options, "--learn", "--user", "ann", stdin="Hi\n/good")
    assert "[sona: applied, adapter " in result.err
    found = ruvllm("sona", "history", tiny, "--user", "ann", "--feedback", "--json").json
    assert [(one["quality"], one["tokens"]) for one in found] == [(1.0, 6)]
    assert f"request {found[0]['request']}]" in result.err


class Terminal:
    """A command with a terminal of its own."""

    CONTROL = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, *args: str, stdout: int | None = None) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-c", self.CONTROL, sys.executable, "-m", "ruvllm_core.cli.main", *args]
        environment = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=stdout or slave, stderr=slave, start_new_session=True, env=environment
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, timeout: float = 60.0) -> str:
        """What is shown up to `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.shown:
            self.read_more(max(0.0, deadline - time.monotonic()))
        before, _, self.shown = self.shown.partition(text)
        return before

    def read_more(self, timeout: float = 60.0) -> None:
        ready, _, _ = select.select([self.master], [], [], timeout)
        assert ready, f"nothing comes after {self.shown!r}"
        self.shown += os.read(self.master, 4096).decode("utf-8", "replace").replace("\r\n", "\n")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()

    def end(self) -> int:
        try:
            while os.read(self.master, 4096):
                pass
        except OSError:  # the other end is closed
            pass
        os.close(self.master)
        return self.process.wait(timeout=30)


def test_ctrl_c_stops_the_answer_and_ctrl_d_ends(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    terminal = Terminal("chat", str(tiny), "--max-tokens", "60000", "--ignore-eos", "--temperature", "0")
    try:
        terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("Hello\n")
        terminal.read_more()
        terminal.type("\x03")
        terminal.wait_for("[stopped by you]")
        terminal.wait_for("> ")
        terminal.type("half a thought")
        terminal.wait_for("half a thought")
        time.sleep(0.2)  # Python forgets a signal that comes just before it waits for a key
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.type(f"/save {file}\n")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        terminal.kill()
    messages = json.loads(file.read_text())["messages"]
    assert roles(messages) == "ua"
    assert messages[0]["content"] == "Hello"
    assert 0 < len(messages[1]["content"]) < 60_000


def test_redirected_answers_are_nothing_but_answers(tiny: Path) -> None:
    terminal = Terminal("chat", str(tiny), *SHORT, stdout=subprocess.PIPE)
    try:
        terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
        assert terminal.process.stdout is not None
        assert terminal.process.stdout.read().decode() == single_answer(tiny)
    finally:
        terminal.kill()


def single_answer(tiny: Path) -> str:
    command = [sys.executable, "-m", "ruvllm_core.cli.main", "run", str(tiny), "Hello", *SHORT, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return str(json.loads(result.stdout)["text"]) + "\n"
