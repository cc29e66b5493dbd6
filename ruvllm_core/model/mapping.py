"""Memory-maps files that nobody has checked yet."""

from __future__ import annotations

import mmap
from pathlib import Path

from ruvllm_core.errors import FormatError, ModelError, ModelNotFound

#: The hint for whatever breaks the rules of a file's format.
DAMAGED = "the file is damaged or incomplete: download it again, or convert the model again"


def map_file(path: Path) -> mmap.mmap:
    """The content of a file, read-only. Raises `ModelNotFound`, `FormatError` if it is empty, or `ModelError`."""
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise FormatError(f"{path} is empty", hint=DAMAGED)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelNotFound(f"no such file: {path}", hint="check the path for typing errors") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}", hint="check that it is a readable file") from error
