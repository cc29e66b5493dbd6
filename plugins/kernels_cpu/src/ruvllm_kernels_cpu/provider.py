"""The kernel provider named ``cpu``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ruvllm_core.errors import ConfigError
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Decoder, DecoderOptions, Weights
from ruvllm_kernels_cpu.library import pick_isa
from ruvllm_kernels_cpu.settings import CpuSettings


class CpuKernels:
    """Whole steps of any `ModelSpec` on the CPU. See `ruvllm_core.protocols.KernelProvider`.

    Args:
        options: `device` must be ``auto`` or ``cpu``; `dtype` decides in which type keys and values are kept first:
            ``float32`` in f32, all others in f16. Arithmetic is float32, with activations rounded to 8 bits for the
            products with quantized weights. `plugin` is our `CpuSettings`.
        isa: goes before the setting ``isa``.

    Raises `ConfigError` for another device or an instruction set that is not there, `PluginError` without the library.
    """

    device = "cpu"

    def __init__(self, options: DecoderOptions, isa: str | None = None) -> None:
        if options.device not in ("auto", "cpu"):
            raise ConfigError(f"device {options.device}: kernels cpu run on the CPU only", hint="use device cpu")
        self.settings: CpuSettings = options.plugin or CpuSettings()
        self.isa = pick_isa(isa or self.settings.isa)

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        return {}

    def decoder(self, spec: ModelSpec, weights: Weights, options: DecoderOptions) -> Decoder:
        from ruvllm_kernels_cpu.decoder import CpuDecoder

        return CpuDecoder(spec, weights, options, self.isa)
