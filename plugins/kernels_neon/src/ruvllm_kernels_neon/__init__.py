"""ARM64 kernels for RuvLLM, and their attention as functions over NumPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ruvllm_kernels_neon.attention import AttentionConfig, flash_attention_neon, grouped_query_attention_neon

__all__ = ["AttentionConfig", "flash_attention_neon", "grouped_query_attention_neon"]


def __getattr__(name: str) -> Any:  # discovery imports this package and needs no NumPy
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ruvllm_kernels_neon import attention

    return getattr(attention, name)
