"""The kernel provider named ``cuda``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ruvllm_core.errors import ConfigError
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Decoder, DecoderOptions, Weights
from ruvllm_kernels_cuda.settings import CudaSettings

_LEAST = (8, 0)  # bfloat16 in the matrix instructions


class CudaKernels:
    """Operations on an NVIDIA GPU. See `ruvllm_core.protocols.KernelProvider`.

    Args:
        options: `device` must be ``auto``, ``cuda`` or ``cuda:N``; `dtype` is that of activations between operations,
            bfloat16 for ``auto``. Weights stay in the bits they have, floats of 32 bits become bfloat16. `plugin` is
            our `CudaSettings`.

    Raises `ConfigError` for another device, one that is not there, or a GPU older than compute capability 8.0.
    """

    def __init__(self, options: DecoderOptions) -> None:
        import torch

        from ruvllm_core.decode.reference import pick_device

        self.settings: CudaSettings = options.plugin or CudaSettings()
        if self.settings.tensor_parallel:
            if options.device not in ("auto", "cuda"):
                raise ConfigError(
                    f"device {options.device}: with tensor_parallel every process takes a GPU of its own",
                    hint="use device cuda, and CUDA_VISIBLE_DEVICES to choose GPUs",
                )
            options = replace(options, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        self.device = pick_device(options)
        if not self.device.startswith("cuda"):
            raise ConfigError(
                f"device {options.device}: kernels cuda run on NVIDIA GPUs only",
                hint="use device cuda, or other kernels",
            )
        if (found := torch.cuda.get_device_capability(self.device)) < _LEAST:
            name = torch.cuda.get_device_name(self.device)
            raise ConfigError(
                f"kernels cuda need compute capability 8.0 or later, {name} has {found[0]}.{found[1]}",
                hint="use kernels torch",
            )
        self._dtype = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
        self._ops: Mapping[str, Callable[..., Any]] | None = None

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        """What there is of `ruvllm_core.decode.ops.Ops`."""
        if self._ops is None:
            from ruvllm_kernels_cuda.matmul import Thresholds
            from ruvllm_kernels_cuda.ops import CudaOps
            from ruvllm_kernels_cuda.scratch import Scratch

            scratch = Scratch.on(self.device, dense=self.settings.scratch_mib << 19)  # two bytes each
            self._ops = CudaOps(self.device, self._dtype, scratch, Thresholds(tiles=self.settings.tile_rows)).table()
        return self._ops

    def decoder(self, spec: ModelSpec, weights: Weights, options: DecoderOptions) -> Decoder | None:
        """A whole-model executor. With `tensor_parallel`, rank 0's; other ranks stay here and end with the process."""
        import torch

        from ruvllm_kernels_cuda.decoder import CudaDecoder
        from ruvllm_kernels_cuda.matmul import Thresholds
        from ruvllm_kernels_cuda.scratch import Scratch

        device = torch.device(self.device)
        scratch = Scratch.on(device, dense=self.settings.scratch_mib << 19)
        thresholds = Thresholds(tiles=self.settings.tile_rows)
        if not self.settings.tensor_parallel:
            return CudaDecoder(spec, weights, options, device, scratch=scratch, thresholds=thresholds)
        from ruvllm_kernels_cuda.lockstep import Leader, follow, join

        group, calls = join(device)
        decoder = CudaDecoder(spec, weights, options, device, scratch=scratch, thresholds=thresholds, group=group)
        if not group.rank():
            return Leader(decoder, calls)
        follow(decoder, calls)
        raise SystemExit(0)
