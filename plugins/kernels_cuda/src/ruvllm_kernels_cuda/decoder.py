"""A whole model on the device: few kernels a layer, and one CUDA graph where every sequence has one new token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.kv import STORE_BITS, KVStorage
from ruvllm_core.errors import ConfigError, GenerationError
from ruvllm_core.generate.request import Request
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import DecoderOptions, FloatArray, Weights
from ruvllm_kernels_cuda.adapters import NOBODY, AdapterPools, Deltas
from ruvllm_kernels_cuda.advance import advance
from ruvllm_kernels_cuda.draws import Drawing, Draws, changes_logits, sampling_fields, sampling_rows
from ruvllm_kernels_cuda.graphs import Graphs, bucket_of
from ruvllm_kernels_cuda.inputs import StepBuffers, StepShape, shape_of
from ruvllm_kernels_cuda.layers import Layers
from ruvllm_kernels_cuda.matmul import Thresholds
from ruvllm_kernels_cuda.parallel import TensorParallel
from ruvllm_kernels_cuda.rotary import rotary_tables
from ruvllm_kernels_cuda.sampling import SamplingWorkspace, sample
from ruvllm_kernels_cuda.scratch import Scratch
from ruvllm_kernels_cuda.steps import StepKind, has_final, is_decode, owners, rounded_shape
from ruvllm_kernels_cuda.storage import allocate
from ruvllm_kernels_cuda.weights import ModelWeights, load_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CudaDecoder:
    """Executes a model with Triton kernels. See `ruvllm_core.protocols.FusedDecoder`.

    Weights keep their bits (`packing`). Keys and values can be kept in f16, bf16, f32, q8 and q4, and in ``fp8``, which
    no cache policy asks for. Without CUDA all but the capturing of graphs works the same, in Triton's interpreter.

    With a `group` it is one rank of several GPUs (`parallel.py`): it takes the whole model's spec and weights, keeps
    its part, and `spec` is that part's. All ranks have to make the same calls, with requests that have seeds.

    Raises `ModelError` for weights that do not fit the spec, `OutOfMemoryError`, and `ConfigError` if the model cannot
    be split over so many ranks, or if its weights are packed already.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights | ModelWeights,
        options: DecoderOptions,
        device: torch.device,
        *,
        scratch: Scratch | None = None,
        thresholds: Thresholds | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self._parallel: TensorParallel | None = None
        if group is not None:
            if isinstance(weights, ModelWeights):
                raise ConfigError("packed weights cannot be split", hint="pass those of the file")
            self._parallel = TensorParallel(spec, weights, group)
            spec, weights = self._parallel.spec, self._parallel.weights
        self.spec, self.device = spec, device
        first = {"float32": "f32", "bfloat16": "bf16"}.get(options.dtype, "f16")
        self.kv_schemes: tuple[str, ...] = (*sorted(("f16", "bf16", "f32"), key=lambda s: s != first), *STORE_BITS)
        loaded = weights if isinstance(weights, ModelWeights) else load_weights(spec, weights, device)
        self._max_context = options.max_context
        tables = rotary_tables(spec, options.max_context, device)
        self._several_tables = len(tables.cos) > 1
        scratch, thresholds = scratch or Scratch.on(device), thresholds or Thresholds()
        self._layers: Layers | None = Layers(
            spec, loaded, tables, scratch, options.max_context, thresholds, self._parallel
        )
        self._adapters = AdapterPools(spec, device)
        self._draws = Draws(spec.vocab_size)
        self._workspaces: dict[int, SamplingWorkspace] = {}
        self.graphs = Graphs(device)

    def allocate_kv(self, num_blocks: int, block_size: int, scheme: str) -> KVStorage:
        layers = self._open()
        self.graphs.clear()  # those that exist read storages which may be done with, and their memory is needed now
        if scheme in STORE_BITS:
            layers.center_keys()
        return allocate(self.spec, num_blocks, block_size, scheme, self.device)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> FloatArray:
        self._open()
        hidden, _, _ = self._run(batch, (), None)
        return _to_host(hidden[: len(batch.rows)])

    @torch.inference_mode()
    def logits(self, hidden: FloatArray, batch: Batch | None = None) -> FloatArray:
        layers = self._open()
        if hidden.ndim != 2 or hidden.shape[1] != self.spec.hidden_size:
            raise ValueError(f"hidden states must be [rows, {self.spec.hidden_size}], got {hidden.shape}")
        if batch is not None and len(batch.rows) != len(hidden):
            raise ValueError(f"{len(hidden)} hidden states for the {len(batch.rows)} rows of a batch")
        if not len(hidden):
            return np.empty((0, self.spec.vocab_size), dtype=np.float32)
        states = torch.tensor(hidden, dtype=torch.float32).to(self.device)
        if batch is not None and has_final(batch):
            slots = np.array(self._slots_of(batch), dtype=np.int32)[owners(batch)]
            states = self._adapters.add_final(states, torch.from_numpy(slots).to(self.device))
        return _to_host(layers.head(states))

    @torch.inference_mode()
    def step(self, batch: Batch, requests: Sequence[Request]) -> npt.NDArray[np.int64]:
        """One token for each wanted row, int64 ``[R]``; `requests` has each row's request.

        Each request keeps its own random state here, and draws what `ruvllm_core.generate.sampler.Sampler` would.
        Raises `GenerationError` if a row's logits leave no token to choose.
        """
        self._open()
        if len(requests) != len(batch.rows):
            raise ValueError(f"{len(requests)} requests for the {len(batch.rows)} rows of a batch")
        if not len(requests):
            self._run(batch, (), None)
            return np.empty(0, dtype=np.int64)
        _, logits, drawn = self._run(batch, requests, self._draws.of(requests))
        assert logits is not None and drawn is not None
        changed = [row for row, request in enumerate(requests) if changes_logits(request.params)]
        tokens: npt.NDArray[np.int64] = drawn[: len(requests)].cpu().numpy().copy()  # a copy, without CUDA too
        for row in changed:
            tokens[row] = self._draws.on_host(requests[row], _to_host(logits[row]))
        return _checked(tokens)

    @torch.inference_mode()
    def decode(self, batch: Batch, steps: int, requests: Sequence[Request] = ()) -> npt.NDArray[np.int64]:
        """Tokens int64 ``[steps, B]`` that follow one after the other, read once at the end.

        Each step's tokens are the next one's inputs without leaving the device. That there are places for the keys and
        values of all of them in the newest segment's block tables is up to the caller.

        Args:
            batch: one token for each sequence, all wanted, and no moves.
            requests: each sequence's, without penalties or bias; none is greedy for all.

        Raises `ValueError` for another batch, `GenerationError` if logits leave no token to choose.
        """
        self._open()
        count, newest = batch.num_sequences, batch.kv.segments[-1]
        room = newest.block_table.shape[1] * newest.storage.block_size
        if not is_decode(batch) or batch.kv.moves or bucket_of(count) is None or steps < 1:
            raise ValueError("decode takes one token for each of at most 256 sequences, all wanted, and no moves")
        if requests and (len(requests) != count or any(changes_logits(request.params) for request in requests)):
            raise ValueError(f"decode takes {count} requests without penalties or bias, or none")
        if int(newest.lengths.max()) + steps - 1 > room or int(batch.positions.max()) + steps > self._max_context:
            raise ValueError(f"{steps} steps go beyond the {room} tokens of a block table, or max_context")
        drawing = self._draws.of(requests)
        _, _, log = self._run(batch, requests, drawing, steps)
        assert log is not None
        return _checked(log[:, :count].cpu().numpy().copy())

    def close(self) -> None:
        self.graphs.clear()
        self._workspaces.clear()
        self._layers = None

    def _open(self) -> Layers:
        if self._layers is None:
            raise GenerationError("this decoder is closed")
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # Triton launches on the thread's current one
        return self._layers

    def _run(
        self, batch: Batch, requests: Sequence[Request], drawing: Drawing | None, steps: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states, and if tokens are drawn, logits and tokens; they may have more rows than are wanted."""
        slots = self._slots_of(batch)
        kind = StepKind(
            layered=any(adapter is not None and adapter.changes_cache for adapter in batch.adapters),
            final=drawing is not None and has_final(batch),
            drawing=drawing,
            steps=steps,
            generation=self._adapters.generation,
        )
        shape = shape_of(batch, self._several_tables)
        if not shape.tokens:
            return torch.empty(0, self.spec.hidden_size, device=self.device), None, None

        def write(buffers: StepBuffers) -> None:
            buffers.write(batch)
            host = buffers.packet.host
            if kind.layered or kind.final:
                owned = np.array(slots, dtype=np.int32)
                host["adapters"][:] = host["finals"][:] = NOBODY
                host["adapters"][: shape.tokens] = np.repeat(owned, np.diff(batch.cu_q))
                host["finals"][: shape.rows] = owned[owners(batch)]
            if drawing is not None:
                self._draws.write(requests, host)
            if steps:
                host["counter"][:] = 0
                _write_uniforms(self._draws, requests, host["uniform"], host["uniforms"])
            buffers.packet.send()

        rounded = rounded_shape(shape) if is_decode(batch) else None
        if rounded is None:
            buffers = self._buffers(shape, kind)
            write(buffers)
            return self._body(buffers, kind)
        outputs, _ = self.graphs.play(
            (kind, rounded), lambda: self._buffers(rounded, kind), write, lambda b: self._body(b, kind), max(steps, 1)
        )
        return outputs

    def _slots_of(self, batch: Batch) -> list[int]:
        own = batch.adapters if self._parallel is None else self._parallel.adapters(batch.adapters)
        return self._adapters.slots_of(own) if own else []

    def _buffers(self, shape: StepShape, kind: StepKind) -> StepBuffers:
        extra: dict[str, tuple[str, tuple[int, ...]]] = {}
        if kind.layered or kind.final:
            extra |= {"adapters": ("int32", (shape.tokens,)), "finals": ("int32", (shape.rows,))}
        if kind.drawing is not None:
            extra |= sampling_fields(shape.rows)
        if kind.steps:
            extra |= {"counter": ("int32", (1,)), "uniforms": ("float64", (kind.steps, shape.rows))}
        return StepBuffers(shape, self.device, extra)

    def _body(self, buffers: StepBuffers, kind: StepKind) -> tuple[Tensor, Tensor | None, Tensor | None]:
        layers, there = self._open(), buffers.packet.device
        deltas = Deltas(self._adapters, there["adapters"]) if kind.layered else None
        hidden = layers.run(buffers.inputs, deltas)
        if kind.drawing is None:
            return hidden, None, None
        states = self._adapters.add_final(hidden, there["finals"]) if kind.final else hidden
        logits = layers.head(states)
        rows = sampling_rows(there) if kind.drawing.sampled else None
        workspace = self._workspace(len(states))
        drawn, _ = sample(logits, rows, workspace, top_k=kind.drawing.top_k, top_p=kind.drawing.top_p)
        if not kind.steps:
            return hidden, logits, drawn
        if buffers.log is None:
            buffers.log = torch.empty(kind.steps, len(states), dtype=torch.int64, device=self.device)
        advance(drawn, buffers.inputs, there["counter"], there["uniforms"], there["uniform"], buffers.log)
        return hidden, logits, buffers.log

    def _workspace(self, rows: int) -> SamplingWorkspace:
        size = bucket_of(rows) or rows
        if size not in self._workspaces:
            self._workspaces[size] = SamplingWorkspace(size, self.spec.vocab_size, self.device)
        return self._workspaces[size]


def _write_uniforms(
    draws: Draws, requests: Sequence[Request], first: npt.NDArray[np.float64], all_steps: npt.NDArray[np.float64]
) -> None:
    """Uniforms ``[steps, B]``, of which `first` has the first row already."""
    all_steps[:] = 0.0
    all_steps[0] = first
    for row, request in enumerate(requests):
        if request.params.temperature > 0.0:
            all_steps[1:, row] = [draws.uniform(request) for _ in range(len(all_steps) - 1)]


def _checked(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if (tokens < 0).any():
        raise GenerationError("the model's logits are NaN, infinite, or leave no token to choose")
    return tokens


def _to_host(x: Tensor) -> FloatArray:
    values: FloatArray = x.float().cpu().numpy()
    return values
