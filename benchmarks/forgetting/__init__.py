"""Parts of `forgetting_bench.py`."""
