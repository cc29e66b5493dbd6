"""Settings of this plugin, ``[plugins.kv_cache]``, and the part of them that a cache of one layer has."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ruvllm_core.settings import explain


class TierFields(BaseModel):
    """How tokens are divided between the tiers.

    Attributes:
        tail_length: so many newest tokens, the one that is asking included, are always read as floats.
        tail_precision: scheme of tail and sinks.
        store_precision: scheme of all other tokens.
        sink_tokens: so many first tokens stay floats, too: much attention goes there (arXiv 2309.17453).
        migration_batch: tokens go to the store in batches of so many; a multiple of 16. So many tokens can be taken
            back without a trace.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tail_length: int = Field(256, ge=1)
    tail_precision: Literal["f16", "f32", "bf16"] = "f16"
    store_precision: Literal["q4", "q8"] = "q4"
    sink_tokens: int = Field(4, ge=0)
    migration_batch: int = Field(64, ge=16, le=1024, multiple_of=16)


class KVCacheConfig(TierFields):
    """Of a `TwoTierKVCache`. `max_tokens` is what it can hold. Raises `ConfigError` for values that make no sense."""

    max_tokens: int = Field(4096, ge=1)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, type(self), "cache configuration") from None


class CacheSettings(TierFields):
    """All of the plugin's settings.

    Attributes:
        block_size: tokens of a block of the policy ``paged``.
        max_tokens: how many tokens there is room for, all sequences together; None is ``max_context`` for each of
            them. Tails of ``two_tier`` are not counted but for one.
    """

    block_size: int = Field(64, ge=1, le=4096)
    max_tokens: int | None = Field(None, ge=1)
