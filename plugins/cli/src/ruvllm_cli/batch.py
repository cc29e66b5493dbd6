"""Many prompts from a JSONL file, their answers to another one."""

from __future__ import annotations

import errno
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvllm_cli.options import read_text, sampling_params, write_place
from ruvllm_core.errors import ConfigError, RequestError, RuvLLMError, near

if TYPE_CHECKING:
    from ruvllm_core.generate.engine import Engine
    from ruvllm_core.generate.request import GenerateParams, Generation
    from ruvllm_core.settings import Settings

_KEYS = ("prompt", "messages", "id", "params")
# Requests under way at once. The backend decides how many of them it runs together.
_WINDOW = 64


@dataclass(frozen=True)
class Job:
    """One prompt: a text, or chat messages."""

    index: int
    prompt: str | list[dict[str, str]]
    params: GenerateParams
    id: Any = None


def with_system(prompt: str, settings: Settings) -> str | list[dict[str, str]]:
    """`prompt` below the system message of the settings, if there is one."""
    if not settings.run.system:
        return prompt
    return [{"role": "system", "content": settings.run.system}, {"role": "user", "content": prompt}]


def read_jobs(file: Path, settings: Settings) -> list[Job]:
    """The prompts of a JSONL `file`: objects with ``prompt`` or ``messages``, perhaps ``id`` and ``params``.

    Blank lines are passed over. Raises `RequestError` naming the file and line of the first mistake.
    """
    jobs: list[Job] = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                jobs.append(_job(len(jobs), json.loads(line, parse_constant=_no_number), settings))
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{file}:{number} is not JSON: {error}", hint="one JSON object a line") from None
            except RequestError as error:
                raise RequestError(f"{file}:{number}: {error.message}", hint=error.hint) from None
    if not jobs:
        raise RequestError(f"{file} has no prompts", hint='write one JSON object a line, as in {"prompt": "Hello"}')
    return jobs


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is a number of Python's alone")


def _job(index: int, row: Any, settings: Settings) -> Job:
    if not isinstance(row, dict):
        raise RequestError(f"expected a JSON object, got {type(row).__name__}", hint='as in {"prompt": "Hello"}')
    for key in row:
        if key not in _KEYS:
            raise RequestError(f"there is no field {key!r}", hint=near(key, _KEYS))
    prompt, messages, params = row.get("prompt"), row.get("messages"), row.get("params", {})
    if (prompt is None) == (messages is None):
        raise RequestError("expected one of the fields prompt and messages")
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise RequestError("prompt: expected a text that is not empty")
    if messages is not None and not (isinstance(messages, list) and messages and all(map(is_message, messages))):
        raise RequestError('messages: expected a list like [{"role": "user", "content": "Hello"}]')
    if messages is not None and settings.run.raw:
        raise RequestError("messages need the chat template, which raw leaves out")
    if not isinstance(params, dict):
        raise RequestError(f"params: expected an object, got {type(params).__name__}", hint='as in {"temperature": 0}')
    if messages is not None and settings.run.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": settings.run.system}, *messages]
    return Job(
        index, messages or with_system(prompt or "", settings), sampling_params(settings, **params), row.get("id")
    )


def is_message(value: Any) -> bool:
    """Whether `value` is a chat message: an object with the texts ``role`` and ``content``."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


@contextmanager
def answers_file(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives a function that adds a row to the JSONL file at `path`.

    Rows collect in ``PATH.part``, which takes the place of `path` when all is done, or when it ends early with some
    rows written; a pipe or a device gets them at once. Raises `ConfigError` at once if the file cannot be written.
    """
    rows = 0
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        part, target = write_place(path)
        file = part.open("w", encoding="utf-8", errors="backslashreplace")  # as JSON spells half a surrogate pair
    except OSError as error:
        raise ConfigError(f"cannot write answers to {path}: {error.strerror}", hint="name another --output") from None

    def write(row: Mapping[str, Any]) -> None:
        nonlocal rows
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        rows += 1

    try:
        with file:
            yield write
    finally:
        if part != target:
            if rows:
                part.replace(target)
            else:
                part.unlink()


def run_jobs(engine: Engine, jobs: Sequence[Job], write: Callable[[Mapping[str, Any]], None], *, template: bool) -> int:
    """Answer `jobs`, and write a row for each in their order; one that fails gets a row with ``error``.

    Returns how many failed. When interrupted, answers that are finished are still written.
    """
    waiting: deque[tuple[Job, Any]] = deque()
    failed, written = 0, 0

    def finish() -> None:
        nonlocal failed, written
        job, stream = waiting[0]
        row: dict[str, Any] = {"index": job.index, "id": job.id}
        try:
            if isinstance(stream, RuvLLMError):
                raise stream
            row.update(generation_row(stream.result()))
        except RuvLLMError as error:
            failed += 1
            row.update(error=str(error), error_type=type(error).__name__)
        if row.get("finish_reason") != "cancelled":
            write(row)
            written = job.index + 1
        waiting.popleft()

    try:
        for job in jobs:
            try:
                waiting.append((job, engine.stream(job.prompt, job.params, template=template)))
            except RuvLLMError as error:
                waiting.append((job, error))
            if len(waiting) >= _WINDOW:
                finish()
        while waiting:
            finish()
    except KeyboardInterrupt:
        for _, stream in waiting:
            if not isinstance(stream, RuvLLMError):
                stream.cancel()
        while waiting:
            if waiting[0][0].index < written:
                waiting.popleft()
            else:
                finish()
        raise
    return failed


def generation_row(answer: Generation) -> dict[str, Any]:
    """A finished answer as JSON; log-probabilities if they were asked for."""
    row: dict[str, Any] = {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "usage": asdict(answer.usage),
        "timings": asdict(answer.timings),
        "request_id": answer.request_id,
    }
    if answer.logprobs is not None:
        row["logprobs"] = list(answer.logprobs)
    if answer.top_logprobs is not None:
        row["top_logprobs"] = [dict(top) for top in answer.top_logprobs]
    if answer.speculation is not None:
        row["speculation"] = asdict(answer.speculation)
    return row
