"""Parts of `benchmarks/sona_bench.py`: what is learned, from which prompts, by which rules, and what it harms."""
