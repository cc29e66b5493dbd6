"""Attention alone, by head shape, prompt length and depth: ``ruvllm bench attention`` under another name.

python benchmarks/attention_bench.py --shape qwen2.5-1.5b --prompt 1 --depth 2048 --kernels torch --threads 2
"""

from __future__ import annotations

import sys

from ruvllm_core.cli.main import main

if __name__ == "__main__":
    main(["bench", "attention", *sys.argv[1:]])
