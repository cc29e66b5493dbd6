"""NVIDIA kernels for RuvLLM, in Triton."""
