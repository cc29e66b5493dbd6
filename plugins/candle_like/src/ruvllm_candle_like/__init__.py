"""Llama, Qwen2 and Phi-3, and the backend that answers one request at a time."""
