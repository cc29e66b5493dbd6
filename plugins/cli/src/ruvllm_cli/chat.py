"""A conversation: its history, and the slash commands that change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ruvllm_cli.batch import is_message
from ruvllm_cli.options import read_text, sampling_params, write_place
from ruvllm_core.errors import PromptTooLong, RequestError, near

if TYPE_CHECKING:
    from ruvllm_core.generate.engine import Engine
    from ruvllm_core.settings import Settings

HELP = {
    "help": "/help                this list",
    "system": "/system [TEXT]       set the system message; without TEXT, leave it out",
    "set": "/set [KEY VALUE]     change how answers are generated; without KEY, show it",
    "save": "/save FILE           write the conversation to a JSON file",
    "load": "/load FILE           take up a saved conversation",
    "regenerate": "/regenerate          another answer to the last message",
    "good": "/good                the last answer was good (with --learn)",
    "bad": "/bad                 it was bad",
    "rate": "/rate 0.7            how good it was, from 0 to 1",
    "clear": "/clear               forget the conversation, not the system message",
    "quit": "/quit                end, as Ctrl-D does",
}
MULTI_LINE = 'End a line with \\ to go on, or put several between """ and """. // begins a text that starts with /.'


class Chat:
    """Talks with a model. A turn that fails leaves the history as it was.

    Attributes:
        messages: what was said, without the system message; user and assistant take turns.
        open: False once the user wants to end.

    Args:
        user: whom loops that learn take the ratings from; empty is whoever has no name.
    """

    def __init__(self, engine: Engine, settings: Settings, user: str = "") -> None:
        self.messages: list[dict[str, str]] = []
        self.system = settings.run.system or ""
        self.open = True
        self._engine = engine
        self._settings = settings
        self._changes: dict[str, Any] = {"user": user} if user else {}
        self._last, self._rated = "", False  # the request of the last answer, and whether that has its verdict

    def enter(self, text: str) -> None:
        """Take what the user typed: a message, or a slash command. Raises `RuvLLMError`."""
        name, _, rest = text[1:].partition(" ")
        if text.startswith("//") or not text.startswith("/"):
            message = text[1:] if text.startswith("//") else text
            if message.strip():
                self._answer([*self.messages, {"role": "user", "content": message}])
        elif name not in HELP:
            raise RequestError(f"there is no command /{name}", hint=near(name, HELP))
        else:
            getattr(self, f"_do_{name}")(rest.strip())

    def _answer(self, messages: list[dict[str, str]]) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        params = sampling_params(self._settings, **self._changes)
        text, stream = "", None
        try:
            stream = self._engine.stream(system + messages, params)
            for event in stream:
                text += event.text
                click.echo(event.text, nl=False)
        except KeyboardInterrupt:
            if stream is None:
                raise
            stream.cancel()
        except PromptTooLong as error:
            raise PromptTooLong(error.message, hint="/clear forgets what was said; --max-context makes room") from None
        answer = stream.result()
        click.echo(answer.text[len(text) :])
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._last, self._rated = stream.request_id, False
        if answer.finish_reason in ("length", "cancelled"):
            why = {"length": "at max_tokens or the end of the context", "cancelled": "by you"}[answer.finish_reason]
            click.echo(f"[stopped {why}]", err=True)

    def _do_help(self, _: str) -> None:
        click.echo("\n".join([*HELP.values(), MULTI_LINE]), err=True)

    def _do_system(self, text: str) -> None:
        self.system = text

    def _do_set(self, text: str) -> None:
        key, _, value = text.partition(" ")
        if not key:
            values = sampling_params(self._settings, **self._changes).model_dump()
            click.echo("\n".join(f"{name} = {value}" for name, value in values.items()), err=True)
            return
        if not value.strip():
            raise RequestError(f"/set {key} needs a value", hint="as in /set temperature 0.2")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value.strip()
        changes = {**self._changes, key: parsed}
        sampling_params(self._settings, **changes)
        self._changes = changes

    def _do_save(self, text: str) -> None:
        file = _file("save", text)
        saved = {"model": self._engine.info.model, "system": self.system, "messages": self.messages}
        part, target = write_place(file)
        try:
            part.write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", "utf-8", "backslashreplace")
            if part != target:
                part.replace(target)
        except OSError as error:
            if part != target:
                part.unlink(missing_ok=True)
            raise RequestError(f"cannot write {file}: {error.strerror}", hint="name another file") from None

    def _do_load(self, text: str) -> None:
        file = _file("load", text)
        try:
            saved = json.loads(read_text(file))
            system, messages = saved["system"], saved["messages"]
            whole = isinstance(system, str) and isinstance(messages, list) and all(map(is_message, messages))
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if not whole:
            raise RequestError(f"{file} is no saved conversation", hint="it must be a file that /save wrote")
        self.system, self.messages, self._last = system, messages, ""

    def _do_regenerate(self, _: str) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise RequestError("there is no answer yet", hint="say something first")
        self._answer(self.messages[:-1])

    def _do_good(self, text: str) -> None:
        self._rate("good", text, 1.0)

    def _do_bad(self, text: str) -> None:
        self._rate("bad", text, 0.0)

    def _do_rate(self, text: str) -> None:
        try:
            quality = float(text)
        except ValueError:
            quality = -1.0
        if not 0.0 <= quality <= 1.0:
            raise RequestError(f"/rate needs a number from 0 to 1, not {text!r}", hint="as in /rate 0.7")
        self._rate("rate", "", quality)

    def _rate(self, command: str, text: str, quality: float) -> None:
        """Tell the learning loops what the last answer was worth, and the user what became of that."""
        if text:
            raise RequestError(f"/{command} takes nothing after it", hint="/rate 0.7 is for what is between")
        if not self._engine.info.learning:
            raise RequestError("nothing learns in this chat", hint="start it with --learn")
        if not self._last:
            raise RequestError("there is no answer here to rate yet", hint="say something first")
        if self._rated:
            raise RequestError("this answer is rated already", hint="/regenerate asks for another one")
        results = self._engine.feedback(self._last, quality)
        self._rated = any(result.status != "refused" for result in results.values())
        for name, result in results.items():
            version = f", adapter {result.version}" if result.version else ", base model"
            reason = f" ({result.reason})" if result.reason else ""
            click.echo(f"[{name}: {result.status}{version}, request {self._last}]{reason}", err=True)

    def _do_clear(self, _: str) -> None:
        self.messages, self._last = [], ""

    def _do_quit(self, _: str) -> None:
        self.open = False


def _file(command: str, text: str) -> Path:
    if not text:
        raise RequestError(f"/{command} needs a file", hint=f"as in /{command} chat.json")
    return Path(text).expanduser()
