"""Options that several commands take, each one a setting; and the text they read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ruvllm_core.cli.app import setting
from ruvllm_core.errors import RequestError

if TYPE_CHECKING:
    from ruvllm_core.generate.request import GenerateParams
    from ruvllm_core.settings import Settings

_F = TypeVar("_F", bound=Callable[..., Any])


def _biases(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> None:
    for value in values:
        token, equals, bias = value.partition("=")
        if not equals or not token.isdecimal():
            raise click.BadParameter(f"{value!r} is not ID=BIAS, as in 42=-1.5", ctx, param)
        ctx.find_root().obj.set(f"sampling.logit_bias.{token}", bias)


_MODEL = (
    setting("backend", "--backend", metavar="NAME", help="How requests are executed."),
    setting("kernels", "--kernels", metavar="NAMES", help="Kernel providers in order of preference, or auto."),
    setting("quantization", "--quantization", metavar="SCHEME", help="Quantize unquantized weights while loading."),
    setting("max_context", "--max-context", type=int, help="Most tokens of a sequence."),
    setting("threads", "--threads", type=int, help="CPU threads; 0 follows the machine."),
    setting("device", "--device", help="auto, cpu, cuda, cuda:N or mps."),
    setting("dtype", "--dtype", help="auto, float32, bfloat16 or float16."),
    setting("cache.policy", "--cache", metavar="POLICY", help="Where keys and values live."),
)
_SPECULATION = (
    setting("speculative", "--speculative", metavar="KIND", help="Who drafts: ngram, draft:MODEL, learned or off."),
    setting("draft_tokens", "--draft-tokens", type=int, metavar="N", help="Most tokens drafted at a time."),
)
_SAMPLING = (
    setting("sampling.max_tokens", "--max-tokens", "-n", type=int, help="Most tokens to generate."),
    setting("sampling.temperature", "--temperature", "-t", type=float, help="Randomness; 0 is greedy."),
    setting("sampling.top_k", "--top-k", type=int, help="Sample among the k most likely tokens; 0 is all."),
    setting("sampling.top_p", "--top-p", type=float, help="Sample among the likeliest tokens of this total."),
    setting("sampling.min_p", "--min-p", type=float, help="Least likelihood, relative to the likeliest token."),
    setting("sampling.repetition_penalty", "--repetition-penalty", type=float, help="Against tokens seen; 1 is off."),
    setting("sampling.frequency_penalty", "--frequency-penalty", type=float, help="Per occurrence in the answer."),
    setting("sampling.presence_penalty", "--presence-penalty", type=float, help="Once for tokens of the answer."),
    click.option(
        "--logit-bias", multiple=True, metavar="ID=BIAS", expose_value=False, callback=_biases, help="Added to a logit."
    ),
    setting("sampling.seed", "--seed", type=int, help="Makes sampling repeatable."),
    setting("sampling.stop", "--stop", multiple=True, metavar="TEXT", help="Ends the answer; may be repeated."),
    setting("sampling.ignore_eos", "--ignore-eos", is_flag=True, help="Go on whatever the model says."),
    setting("sampling.logprobs", "--logprobs", type=int, metavar="N", help="Report the N best log-probabilities."),
)


def model_options(function: _F) -> _F:
    """How a model is loaded."""
    for option in reversed(_MODEL):
        function = option(function)
    return function


def speculation_options(function: _F) -> _F:
    """Speculative decoding."""
    for option in reversed(_SPECULATION):
        function = option(function)
    return function


def sampling_options(function: _F) -> _F:
    """One option for each of `SamplingFields` that a user can make use of."""
    for option in reversed(_SAMPLING):
        function = option(function)
    return function


def sampling_params(settings: Settings, **changes: Any) -> GenerateParams:
    """The settings' sampling values with some changed. Raises `RequestError`."""
    from ruvllm_core.generate.request import GenerateParams

    return GenerateParams(**{**settings.sampling.model_dump(), **changes})


def read_text(file: Path | None) -> str:
    """The UTF-8 text of `file`, or of stdin for None. Raises `RequestError`."""
    name = "stdin" if file is None else str(file)
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"cannot read {name}: {error.strerror}", hint="check the path") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 text: byte {error.start} is wrong", hint="convert it first") from None


def write_place(file: Path) -> tuple[Path, Path]:
    """Where to write what is to be in `file`, and what that takes the place of when it is whole.

    Both are `file` itself if it is a pipe or a device, which must stay one; a link stays a link, to a new file.
    """
    if file.exists() and not file.is_file():
        return file, file
    target = Path(os.path.realpath(file))
    return target.with_name(target.name + ".part"), target
