"""Hold the code to its size limits: core, its conformance kit, each plugin's hooks.py, and every single file."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

CORE_LINES = 5_000  # lines of code in ruvllm_core, below this; blank lines, comments and docstrings are free
KIT_LINES = 600  # and in ruvllm_core.testing, the tests for plugins, which are counted by themselves
HOOKS_LINES = 60  # of one plugin's hooks.py, at most
FILE_LINES = 400  # of one file, at most

ROOT = Path(__file__).resolve().parent.parent


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def code_lines(path: Path) -> int:
    """Lines with code on them."""
    source = path.read_text(encoding="utf-8")
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            found.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(found)


def main() -> int:
    core = sorted((ROOT / "ruvllm_core").rglob("*.py"))
    plugins = sorted((ROOT / "plugins").glob("*/src/**/*.py"))
    kit = sum(code_lines(path) for path in core if path.parent.name == "testing")
    total = sum(map(code_lines, core)) - kit
    limits = ((total, CORE_LINES, "core"), (kit, KIT_LINES, "the conformance kit"))
    problems = [f"{n} lines of code in {what}, must stay under {limit}" for n, limit, what in limits if n >= limit]
    for path in (*core, *plugins):
        limit = HOOKS_LINES if path.name == "hooks.py" else FILE_LINES
        if (count := lines(path)) > limit:
            problems.append(f"{path.relative_to(ROOT)}: {count} lines, at most {limit}")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"core: {total} of {CORE_LINES} lines of code, its kit {kit} of {KIT_LINES}; {len(plugins)} files in plugins")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
