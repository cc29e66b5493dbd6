"""stub"""
import torch
from torch import Tensor
def split_rows(rows: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Rows of bytes of `ruvllm_core.decode.coded` as codes and scales in the layout of `CodedKV`."""
    codes, scales = rows[..., : dim * bits // 8], rows[..., dim * bits // 8 :].contiguous().view(torch.float16)
    if bits == 4:
        values = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        codes = values[..., : dim // 2] | values[..., dim // 2 :] << 4
    return codes.contiguous(), scales
