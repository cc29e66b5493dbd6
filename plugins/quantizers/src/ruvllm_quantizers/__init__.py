"""Quantizers for every GGUF scheme, the mixed recipes, and `ruvllm quantize`."""
