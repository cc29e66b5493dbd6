"""Settings of the plugin, under ``plugins.candle_like``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CandleSettings(BaseModel):
    """Backend ``candle``.

    Attributes:
        max_sequences: requests that run at a time; each has its own part of the cache.
    """

    model_config = ConfigDict(extra="forbid")

    max_sequences: int = Field(1, ge=1, le=1024)
