"""What both policies ask of a model and of the machine before they allocate."""

from __future__ import annotations

from ruvllm_core.errors import ConfigError
from ruvllm_core.machine import available_memory, require_memory
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import CacheContext


def float_scheme(context: CacheContext, wanted: str | None) -> str:
    """The scheme of unquantized tokens: as `wanted` by the policy or set for all, else what the decoder prefers."""
    precision, schemes = context.config.precision, context.decoder.kv_schemes
    if wanted and precision not in ("auto", wanted):
        raise ConfigError(
            f"cache.precision is {precision}, but plugins.kv_cache.tail_precision {wanted}",
            hint="set both to the same, or leave cache.precision out",
        )
    scheme = wanted or (schemes[0] if precision == "auto" else precision)
    if scheme not in schemes:
        setting = "plugins.kv_cache.tail_precision" if wanted else "cache.precision"
        raise ConfigError(f"{setting} {scheme}: this decoder has {', '.join(schemes)}")
    return scheme


def require_room(needed: int, fixed: int, block_bytes: int, block_size: int, purpose: str) -> None:
    """Raise `OutOfMemoryError` if `needed` bytes are more than there are; it says how many tokens would fit.

    `fixed` bytes of them are needed whatever the number of tokens; these come in blocks.
    """
    fits = max((available_memory() - fixed) // block_bytes, 0) * block_size
    remedy = "set plugins.kv_cache.max_tokens or max_context lower, or run fewer sequences at a time"
    require_memory(needed, purpose, f"{fits} tokens would fit: {remedy}")


def common_window(spec: ModelSpec) -> int | None:
    """How far back any layer sees; None if one sees everything."""
    windows = [spec.window_of(layer) for layer in range(spec.num_layers)]
    return None if None in windows else max(window for window in windows if window is not None)
