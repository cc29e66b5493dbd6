"""The whole of a model, alone or beside llama.cpp: prompt and decoding speed, load time, memory, first token.

    python benchmarks/e2e_bench.py smollm2 --prefill 512 --decode 64
    python benchmarks/e2e_bench.py model.gguf --peer llama-cpp --peer-python ~/llama/bin/python
    python benchmarks/e2e_bench.py smollm2 --first-token
    python benchmarks/e2e_bench.py --table FOLDER --peer-python ~/llama/bin/python

Both sides load the same file, in processes of their own that stay alive; they are measured in turn, and medians are
compared. See docs/guides/benchmarks.md. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2e_compare import PHASES, compare
from e2e_table import FIRST_TOKEN, FIRST_TOKEN_S, ROWS, Goal, judge, pick, verdict

from ruvllm_cli.bench_start import first_token
from ruvllm_core.cli.output import print_json, print_table
from ruvllm_core.errors import RuvLLMError

PEER_PYTHON = "LLAMA_CPP_PYTHON"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of one model."""
    if args.first_token:
        return _first_token(args.model, args)
    job = {name: getattr(args, name) for name in ("prefill", "decode", "depth")}
    return _compare(args.model, job, args)


def table(args: argparse.Namespace) -> dict[str, Any]:
    """Every row of the table, and which goals are reached."""
    results: dict[str, Any] = {}
    verdicts: list[tuple[str, str, float, Goal, str]] = []
    for name in pick(args.rows):
        if name == FIRST_TOKEN:
            results[name] = found = _first_token("smollm2", args)
            seconds = found["first_token_s"]
            mark = verdict(seconds, FIRST_TOKEN_S, at_most=True)
            verdicts.append((name, "start to first token, s", seconds, FIRST_TOKEN_S, mark))
            continue
        row = ROWS[name]
        job = {"prefill": row.prefill, "decode": row.decode, "depth": row.depth}
        results[name] = _compare(row.file(args.table), job, args)
        verdicts += [(name, *judged) for judged in judge(row, results[name])]
    rows = [(name, what, f"{x:.2f}", f"{must:g}", f"{aim:g}", mark) for name, what, x, (must, aim), mark in verdicts]
    print_table("goals", ("row", "what", "value", "must", "aim", "reached"), rows)
    keys = ("row", "what", "value", "goal", "reached")
    return {"benchmark": "e2e-table", "rows": results, "verdicts": [dict(zip(keys, v, strict=True)) for v in verdicts]}


def _first_token(model: str, args: argparse.Namespace) -> dict[str, Any]:
    found = first_token(model, ["--threads", str(args.threads), "--kernels", args.kernels], repeats=args.repeats)
    rows = [(name, f"{found[name]:.3f}") for name in ("first_token_s", "exit_s")]
    print_table(f"{model}: start to first token", ("what", "seconds"), rows)
    return {"benchmark": "first-token", "model": model, "threads": args.threads, "kernels": args.kernels, **found}


def _compare(model: str, job: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    flash = ("off", "on") if args.flash_attention == "auto" else (args.flash_attention,)
    whole = {**job, "threads": args.threads, "kernels": args.kernels}
    result = compare(model, whole, args.repeats, args.peer_python if args.peer else None, flash)
    show("{model}: prefill {prefill}, decode {decode} at depth {depth}, {threads} threads".format(**result), result)
    return {"benchmark": "e2e", **result}


def show(title: str, result: dict[str, Any]) -> None:
    names = [name for name in ("ruvllm", "llama-cpp") if name in result]
    speeds = [f"{phase}_tok_s" for phase in PHASES]
    rows = []
    for key in (*speeds, "load_s", "peak_mb", "overhead_mb"):
        values = [result[name].get(key) for name in names]
        row = [key, *("" if value is None else f"{value:.2f}" for value in values)]
        if "ratios" in result:
            phase = key.removesuffix("_tok_s")
            row += [f"{value:.3f}" for value in result["ratios"][phase].values()] if key in speeds else ["", ""]
            row.append(result["llama-cpp"].get(f"{phase}_flash_attention", ""))
        rows.append(row)
    ratios = ("ratio of medians", "ratio of pairs", "flash attention of llama.cpp") if "ratios" in result else ()
    print_table(title, ("what", *names, *ratios), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="what `ruvllm run` takes")
    add("--threads", type=_positive, default=2, help="of both sides (default 2)")
    add("--kernels", default="auto", metavar="NAME", help="kernel provider of ours (default auto)")
    add("--prefill", type=_positive, default=256, metavar="N", help="prompt tokens (default 256)")
    add("--decode", type=_positive, default=64, metavar="N", help="generated tokens (default 64)")
    add("--depth", type=_natural, default=0, metavar="N", help="tokens in the cache before (default 0)")
    add("--repeats", type=_positive, default=3, metavar="N", help="medians of as many runs (default 3)")
    add("--first-token", action="store_true", help="time `ruvllm run` from its start to its first token instead")
    add("--peer", choices=["llama-cpp"], help="whom to compare with; --table always does")
    add(
        "--peer-python",
        metavar="FILE",
        default=os.environ.get(PEER_PYTHON),
        help=f"an interpreter that has llama-cpp-python (default: the variable {PEER_PYTHON}, else this one)",
    )
    add(
        "--flash-attention",
        choices=["auto", "on", "off"],
        default="auto",
        help="of llama.cpp; auto measures both and takes the better for each figure (default)",
    )
    add("--table", type=Path, metavar="FOLDER", help="all rows with goals, with the files of synth.py in FOLDER")
    add("--rows", metavar="NAMES", help=f"of --table, with commas between: {', '.join((*ROWS, FIRST_TOKEN))}")
    args = parser.parse_args(arguments)
    if (args.model is None) == (args.table is None):
        parser.error("name either a model or --table FOLDER")
    if args.rows and not args.table:
        parser.error("--rows picks from --table FOLDER")
    if args.peer and args.first_token:
        parser.error("--first-token is a figure of ours alone")
    args.peer = args.peer or args.table
    args.peer_python = args.peer_python or sys.executable
    try:
        result = table(args) if args.table else measure(args)
    except RuvLLMError as error:
        parser.exit(1, f"error: {error}\n")
    print_json(result)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


if __name__ == "__main__":
    main()
