"""``ruvllm perplexity``: how well a model predicts a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ruvllm_cli.options import model_options, read_text
from ruvllm_cli.progress import progress
from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json, print_table
from ruvllm_core.errors import RequestError

if TYPE_CHECKING:
    from ruvllm_core.generate.engine import Engine


@click.command("perplexity")
@click.argument("model")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--context", type=click.IntRange(8), default=512, show_default=True, help="Tokens of a window.")
@click.option("--windows", type=click.IntRange(1), help="Stop after this many windows.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@pass_app
def command(app: App, model: str, file: Path, context: int, windows: int | None, as_json: bool) -> None:
    """Perplexity of MODEL on the UTF-8 text FILE, counted as llama.cpp's perplexity tool does.

    The text is cut into windows of --context tokens that do not overlap, what is left at the end is dropped. Only
    predictions in a window's second half count, so that each has half a window before it. Where the model wants its
    texts to begin with BOS, that takes the place of each window's first token.
    """
    app.set("model", model)
    if app.settings.max_context is None:
        app.set("max_context", context)
    text = read_text(file)
    if not text.strip():
        raise RequestError(f"{file} is empty", hint="name a text file")
    from ruvllm_core.generate.engine import Engine

    with Engine.load(settings=app.settings, registry=app.registry) as engine:
        ids = engine.tokenizer.encode(text)
        total = min(len(ids) // context, windows or len(ids))
        if not total:
            raise RequestError(
                f"{file} has {len(ids)} tokens, a window takes {context}",
                hint="use a longer text or a smaller --context",
            )
        nll, nll_squares, count = _score(engine, ids, context, total)
        mean = nll / count
        # Standard error of the mean, carried over to its exponential.
        error = math.sqrt(max(nll_squares / count - mean * mean, 0.0) / max(count - 1, 1)) * math.exp(mean)
        info = engine.info
        result = {
            "perplexity": math.exp(mean),
            "standard_error": error,
            "nll": mean,
            "tokens": count,
            "windows": total,
            "context": context,
            "file": str(file),
            "model": info.model,
            "backend": info.backend,
            "kernels": info.kernels,
            "cache": info.cache,
        }
    if as_json:
        print_json(result)
    else:
        print_table("Perplexity", ("what", "value"), list(result.items()))


def _score(engine: Engine, ids: list[int], context: int, windows: int) -> tuple[float, float, int]:
    """Sum, sum of squares and number of the counted negative log-probabilities."""
    bos = engine.tokenizer.bos_id if engine.tokenizer.add_bos else None
    nll = squares = 0.0
    count = 0
    with progress("scoring", windows) as advance:
        for start in range(0, windows * context, context):
            window = ids[start : start + context]
            if bos is not None:
                window[0] = bos
            counted = -engine.score(window)[context // 2 :].astype("float64")
            nll, squares, count = nll + counted.sum(), squares + (counted**2).sum(), count + len(counted)
            advance()
    return float(nll), float(squares), count
