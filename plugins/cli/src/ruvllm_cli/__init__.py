"""The everyday commands of ``ruvllm``."""
