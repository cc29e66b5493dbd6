"""These tests need the package installed, which builds the library; without it none is collected."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("ruvllm_kernels_cpu") else ["test_*.py"]
