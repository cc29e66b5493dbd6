"""A whole model behind one C call a step."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.kv import STORE_BITS, KVStorage
from ruvllm_core.decode.rope import rope_tables
from ruvllm_core.errors import ConfigError, GenerationError, OutOfMemoryError
from ruvllm_core.machine import require_memory, usable_cpus
from ruvllm_core.model.quant import FLOAT_SCHEMES
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import DecoderOptions, FloatArray, Weights
from ruvllm_kernels_cpu import arguments, storage
from ruvllm_kernels_cpu.adapters import AdapterTables
from ruvllm_kernels_cpu.library import load
from ruvllm_kernels_cpu.model import describe


class CpuDecoder:
    """Executes a model in C++. See `ruvllm_core.protocols.Decoder`.

    Quantized matrices are packed anew for the processor, and the pages of a mapped file that they came from leave
    memory; float matrices are used where they are. `table` is a table of kernels (`library.kernels`). Raises
    `ModelError` for weights that do not fit the spec and `OutOfMemoryError`.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, options: DecoderOptions, table: ctypes.c_void_p, activation_bits: int
    ) -> None:
        self.spec = spec
        first = {"float32": "f32", "bfloat16": "bf16"}.get(options.dtype, "f16")
        floats = sorted(storage.FLOATS, key=lambda scheme: scheme != first)
        self.kv_schemes: tuple[str, ...] = (*floats, *STORE_BITS)
        self.threads = options.threads or usable_cpus()
        self._max_context = options.max_context
        self._rope: dict[int, tuple[FloatArray, FloatArray]] = {}
        self._adapters = AdapterTables(spec)
        self._handle = ctypes.c_void_p()
        self._library = load()
        model, self._owners = describe(spec, weights, activation_bits)
        packed = [one for one in weights.values() if len(one.shape) == 2 and one.scheme not in FLOAT_SCHEMES]
        require_memory(sum(one.data.nbytes for one in packed), "packed weights")
        self._check(self._library.rv_open(model, table, self.threads, ctypes.byref(self._handle)))

    def allocate_kv(self, num_blocks: int, block_size: int, scheme: str) -> KVStorage:
        if scheme not in self.kv_schemes:
            raise ConfigError(f"cache.precision {scheme}: kernels cpu have {', '.join(self.kv_schemes)}")
        return storage.allocate(self.spec, num_blocks, block_size, scheme)

    def forward(self, batch: Batch) -> FloatArray:
        handle = self._open()
        tables = [self._rope_table(int(variant)) for variant in batch.rope_variants]
        args, keep = arguments.convert(batch, self.spec, tables, self._adapters, self._max_context)
        hidden = np.empty((len(batch.rows), self.spec.hidden_size), dtype=np.float32)
        self._check(self._library.rv_forward(handle, ctypes.byref(args), hidden.ctypes.data))
        del keep  # what `args` points to had to live until here
        return hidden

    def logits(self, hidden: FloatArray, batch: Batch | None = None) -> FloatArray:
        handle, width = self._open(), self.spec.hidden_size
        if hidden.ndim != 2 or hidden.shape[1] != width:
            raise ValueError(f"hidden states must be [rows, {width}], got {hidden.shape}")
        rows = np.ascontiguousarray(hidden, dtype=np.float32)
        out = np.empty((len(rows), self.spec.vocab_size), dtype=np.float32)
        if len(rows):
            keep: list[Any] = []
            adapters = self._adapters.of_rows(batch, len(rows), keep) if batch is not None and batch.adapters else None
            self._check(self._library.rv_logits(handle, rows.ctypes.data, len(rows), adapters, out.ctypes.data))
        return out

    def close(self) -> None:
        if self._handle:
            self._library.rv_close(self._handle)
            self._handle = ctypes.c_void_p()
        self._owners = []
        self._rope.clear()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise GenerationError("this decoder is closed")
        return self._handle

    def _check(self, status: int) -> None:
        if status == 1:
            raise OutOfMemoryError("kernels cpu: no memory for a step", hint="use a smaller prefill_chunk")
        if status == 2:
            raise OutOfMemoryError(f"kernels cpu: cannot start {self.threads} threads", hint="set threads lower")
        if status:
            raise GenerationError(f"kernels cpu: the native step failed ({status})")

    def _rope_table(self, variant: int) -> tuple[FloatArray, FloatArray]:
        if variant not in self._rope:
            cos, sin = rope_tables(self.spec, variant, self._max_context)
            self._rope[variant] = (np.ascontiguousarray(cos, np.float32), np.ascontiguousarray(sin, np.float32))
        return self._rope[variant]
