"""Settings of the plugin, under ``plugins.mistral``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class MistralSettings(BaseModel):
    """Backend ``mistral``.

    Attributes:
        max_sequences: most requests that run at a time.
    """

    model_config = ConfigDict(extra="forbid")

    max_sequences: int = Field(8, ge=1, le=1024)
