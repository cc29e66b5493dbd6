"""CPU kernels for RuvLLM: a whole step of a model in C++."""
