"""Print the extras of ruvllm-core, separated by commas."""

from __future__ import annotations

import re
from pathlib import Path


def extras() -> list[str]:
    """Names of the extras in the root pyproject.toml; read without a TOML library, which Python 3.10 lacks."""
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return re.findall(r"^([a-z][a-z0-9-]*) = \[", section, flags=re.MULTILINE)


if __name__ == "__main__":
    print(",".join(extras()))
