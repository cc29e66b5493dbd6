"""Hold the code to its size limits: core, each plugin's hooks.py, and every single file."""

from __future__ import annotations

import sys
from pathlib import Path

CORE_LINES = 5_000  # all of ruvllm_core, below this
HOOKS_LINES = 60  # of one plugin's hooks.py, at most
FILE_LINES = 400  # of one file, at most

ROOT = Path(__file__).resolve().parent.parent


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def main() -> int:
    core = sorted((ROOT / "ruvllm_core").rglob("*.py"))
    plugins = sorted((ROOT / "plugins").glob("*/src/**/*.py"))
    total = sum(map(lines, core))
    problems = [f"{total} lines of core, must stay under {CORE_LINES}"] if total >= CORE_LINES else []
    for path in (*core, *plugins):
        limit = HOOKS_LINES if path.name == "hooks.py" else FILE_LINES
        if (count := lines(path)) > limit:
            problems.append(f"{path.relative_to(ROOT)}: {count} lines, at most {limit}")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"core: {total} of {CORE_LINES} lines in {len(core)} files; {len(plugins)} files in plugins")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
