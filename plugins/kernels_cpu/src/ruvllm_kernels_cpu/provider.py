"""The kernel provider named ``cpu``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ruvllm_core.errors import ConfigError
from ruvllm_core.machine import usable_cpus
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Decoder, DecoderOptions, Weights
from ruvllm_kernels_cpu import library
from ruvllm_kernels_cpu.settings import CpuSettings


class CpuKernels:
    """Whole steps of any `ModelSpec` on the CPU, or its operations. See `ruvllm_core.protocols.KernelProvider`.

    Args:
        options: `device` must be ``auto`` or ``cpu``; `dtype` decides in which type keys and values are kept first:
            ``float32`` in f32, ``bfloat16`` in bf16, all others in f16. Arithmetic is float32, with activations rounded
            for the products with quantized weights. `plugin` is our `CpuSettings`.
        isa, activation_bits: go before the settings of these names.

    Raises `ConfigError` for another device or an instruction set that is not there, `PluginError` without the library.
    """

    device = "cpu"

    def __init__(self, options: DecoderOptions, isa: str | None = None, activation_bits: int | None = None) -> None:
        if options.device not in ("auto", "cpu"):
            raise ConfigError(f"device {options.device}: kernels cpu run on the CPU only", hint="use device cpu")
        self.settings: CpuSettings = options.plugin or CpuSettings()
        self._activation_bits = activation_bits or self.settings.activation_bits
        self._threads = options.threads or usable_cpus()
        self._table = library.kernels(isa or self.settings.isa)
        self._ops: Mapping[str, Callable[..., Any]] | None = None
        self.isa = library.name(self._table)

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        """Every operation of an eager decoder over float32 tensors; nobody who does not call this imports PyTorch."""
        if self._ops is None:
            from ruvllm_kernels_cpu.ops import CpuOps

            self._ops = CpuOps(self._table, self._threads, self._activation_bits).table()
        return self._ops

    def decoder(self, spec: ModelSpec, weights: Weights, options: DecoderOptions) -> Decoder | None:
        if not self.settings.decoder:
            return None
        from ruvllm_kernels_cpu.decoder import CpuDecoder

        return CpuDecoder(spec, weights, options, self._table, self._activation_bits)
