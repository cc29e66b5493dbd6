"""``ruvllm tokenize``: a text as token ids. Reads no weights."""

from __future__ import annotations

import click

from ruvllm_cli.options import read_text
from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json, print_table


@click.command("tokenize")
@click.argument("model")
@click.argument("text", required=False)
@click.option("--no-special", is_flag=True, help="Do not add the tokens a text begins or ends with.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@pass_app
def command(app: App, model: str, text: str | None, no_special: bool, as_json: bool) -> None:
    """Print the token ids of TEXT (or stdin, as it is) for MODEL.

    Special tokens that TEXT spells out, as in <|im_end|>, are recognized.
    """
    settings = app.settings
    if text is None or text == "-":
        text = read_text(None)
    from ruvllm_core.model.hub import resolve_tokenizer_files
    from ruvllm_core.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(resolve_tokenizer_files(model, settings))
    ids = tokenizer.encode(text, add_special=not no_special)
    pieces = [tokenizer.token_bytes(token).decode("utf-8", "backslashreplace") for token in ids]
    if as_json:
        print_json({"model": model, "token_ids": ids, "tokens": pieces, "count": len(ids)})
    else:
        print_table(
            f"{len(ids)} tokens", ("id", "token"), [(i, repr(piece)) for i, piece in zip(ids, pieces, strict=True)]
        )
