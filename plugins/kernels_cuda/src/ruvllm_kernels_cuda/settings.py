"""Settings of this plugin, ``[plugins.kernels_cuda]``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CudaSettings(BaseModel):
    """What can be set.

    Attributes:
        tile_rows: up to how many tokens at once are multiplied with packed weights; for more a matrix is unpacked to
            bfloat16 first and cuBLAS multiplies.
        scratch_mib: memory for unpacked weights, in MiB; what does not fit is unpacked and multiplied piece by piece.
        tensor_parallel: be one of the processes that ``torchrun`` has started, each with a GPU and a part of the model.
    """

    model_config = ConfigDict(extra="forbid")

    tile_rows: int = Field(256, ge=0)
    scratch_mib: int = Field(256, ge=16)
    tensor_parallel: bool = False
