"""The layers of a model over a step's inputs.

A step of a few tokens is, per layer: the first norm inside the product for queries, keys and values; their rotation
and writing; attention and its sum over splits; the output product, which adds to the residual stream; the second norm
inside the product for gates, which are applied there, too; the last product, which adds again. That is 7 launches, 10
with more tokens than norms and gates are fused for. Where cuBLAS multiplies, sums are left to the norm that follows.

On several GPUs (`parallel.py`) the two products that add to the stream are summed over all of them first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ruvllm_core.model.spec import ModelSpec
from ruvllm_kernels_cuda.adapters import Deltas
from ruvllm_kernels_cuda.attention_kernel import Attention
from ruvllm_kernels_cuda.decode_attention import MOST_ROWS, decode_attention, decode_workspace, plan_splits
from ruvllm_kernels_cuda.embed import embed
from ruvllm_kernels_cuda.gated import gated
from ruvllm_kernels_cuda.inputs import StepInputs
from ruvllm_kernels_cuda.kv_move import move
from ruvllm_kernels_cuda.kv_write import rotate_and_write
from ruvllm_kernels_cuda.matmul import Thresholds, matmul
from ruvllm_kernels_cuda.norm import add_rms_norm, rms_norm
from ruvllm_kernels_cuda.packing import PackedMatrix
from ruvllm_kernels_cuda.parallel import TensorParallel
from ruvllm_kernels_cuda.prefill_attention import prefill_attention
from ruvllm_kernels_cuda.rotary import RotaryTables
from ruvllm_kernels_cuda.scratch import Scratch
from ruvllm_kernels_cuda.segments import DeviceSegment, FloatKV, KeyBias, key_bias_table
from ruvllm_kernels_cuda.weights import LayerWeights, ModelWeights, Product

_FEW = 4  # tokens whose products are left in float32: it costs nothing


@dataclass(eq=False)
class _Stream:
    """The residual stream, float32 ``[T, C]``, and what has still to be added to it, if anything."""

    residual: Tensor
    pending: Tensor | None = None


class Layers:
    """Executes the layers of a model.

    Args:
        tables: rotary tables for every position there may be.
        scratch: working memory; steps do not overlap.
        parallel: if the model is one rank's part; None is a whole model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        tables: RotaryTables,
        scratch: Scratch,
        max_context: int,
        thresholds: Thresholds,
        parallel: TensorParallel | None = None,
    ) -> None:
        self.spec, self.weights, self._thresholds, self._parallel = spec, weights, thresholds, parallel
        self._tables, self._scratch, self._max_context = tables, scratch, max_context
        self._key_biases: list[KeyBias | None] = [None] * spec.num_layers

    def center_keys(self) -> None:
        """Make the tables that quantized keys are coded and read with, if the model has a bias for keys."""
        spec, start = self.spec, self.spec.num_heads * self.spec.head_dim
        # Which of two tables turned a key is not known where it is stored; no model with both has a key bias.
        if not spec.qkv_bias or spec.rope_scaling.kind == "longrope" or self._key_biases[0] is not None:
            return
        cos, sin = self._tables.cos[0], self._tables.sin[0]
        for n, layer in enumerate(self.weights.layers):
            assert layer.qkv.bias is not None
            bias = layer.qkv.bias[start : start + spec.num_kv_heads * spec.head_dim].view(-1, spec.head_dim)
            self._key_biases[n] = key_bias_table(bias, cos, sin, self._tables.interleaved)

    def run(self, step: StepInputs, deltas: Deltas | None) -> Tensor:
        """Hidden states after the last norm, float32 ``[R, C]``; keys and values are in their places."""
        spec, count = self.spec, step.shape.tokens
        device = step.tokens.device
        stream = _Stream(torch.empty(count, spec.hidden_size, dtype=torch.float32, device=device))
        embed(self.weights.embed, step.tokens, stream.residual)
        inner = torch.float32 if count <= _FEW else torch.bfloat16
        attention = _Attention(self, step)
        for n, layer in enumerate(self.weights.layers):
            qkv = self._from_stream(stream, layer.qkv, layer.attn_norm, inner, deltas, n, "qkv", biased=False)
            attended = attention(n, layer, qkv)
            self._to_stream(stream, attended, layer.o, deltas, n, "o")
            if deltas is None:
                width = self._from_stream(
                    stream, layer.gate_up, layer.mlp_norm, torch.bfloat16, None, n, "gate_up", gate=spec.activation
                )
            else:
                both = self._from_stream(stream, layer.gate_up, layer.mlp_norm, inner, deltas, n, "gate_up")
                width = gated(both, spec.activation)
            self._to_stream(stream, width, layer.down, deltas, n, "down")
        residual, pending = stream.residual, stream.pending
        if step.rows is not None:
            residual = residual.index_select(0, step.rows)
            pending = None if pending is None else pending.index_select(0, step.rows)
        norm, eps = self.weights.final_norm, spec.norm_eps
        if not len(residual):
            return residual
        if pending is None:
            return rms_norm(residual, norm, eps, dtype=torch.float32)
        return add_rms_norm(pending, residual, norm, eps, dtype=torch.float32)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 ``[R, V]`` of states ``[R, C]``."""
        out = matmul(hidden, self.weights.head, self._scratch, dtype=torch.float32, thresholds=self._thresholds)
        if self._parallel is not None:
            out = self._parallel.gather_logits(out)
        if (cap := self.spec.logit_softcap) is not None:
            out.div_(cap).tanh_().mul_(cap)
        return out

    def _from_stream(
        self, stream: _Stream, product: Product, norm: Tensor, dtype: torch.dtype,
        deltas: Deltas | None, n: int, site: str, biased: bool = True, gate: str | None = None,
    ) -> Tensor:  # fmt: skip
        """A product with the norm of the stream; gated, if there are no deltas, which come before gates."""
        eps, limits = self.spec.norm_eps, self._thresholds
        how = {"dtype": dtype, "bias": product.bias if biased else None, "gate": gate, "thresholds": limits}
        plain = deltas is None and stream.pending is None
        if plain and _rows_of_vector(product.matrix, limits) >= len(stream.residual):
            return matmul(stream.residual, product.matrix, self._scratch, norm=norm, eps=eps, **how)  # type: ignore[arg-type]
        if stream.pending is None:
            x = rms_norm(stream.residual, norm, eps)
        else:
            x, stream.pending = add_rms_norm(stream.pending, stream.residual, norm, eps), None
        y = matmul(x, product.matrix, self._scratch, **how)  # type: ignore[arg-type]
        if deltas is not None:
            deltas.add(n, site, x, y)
        return y

    def _to_stream(
        self, stream: _Stream, x: Tensor, product: Product, deltas: Deltas | None, n: int, site: str
    ) -> None:
        """A product that is added to the stream, at once or with the next norm."""
        limits = self._thresholds
        ours = len(x) <= _rows_of_kernels(product.matrix, limits)
        if ours and self._parallel is None:
            residual = stream.residual
            matmul(
                x, product.matrix, self._scratch, out=residual, bias=product.bias, residual=residual, thresholds=limits
            )
            target = residual
        else:
            padded = pad(x, product.padding) if any(product.padding) else x
            dtype = torch.float32 if ours else torch.bfloat16
            target = stream.pending = matmul(
                padded, product.matrix, self._scratch, dtype=dtype, bias=product.bias, thresholds=limits
            )
        if deltas is not None:
            deltas.add(n, site, x, target)
        if self._parallel is not None:
            self._parallel.all_reduce(target)


class _Attention:
    """Attention of one step, layer by layer."""

    def __init__(self, layers: Layers, step: StepInputs) -> None:
        spec, shape = layers.spec, step.shape
        self._layers, self._step, self._spec = layers, step, spec
        self._call = Attention(
            step.cu_q, step.positions, spec.scale, softcap=spec.attention_softcap, boundary=step.boundary
        )
        self._decoding = shape.most * (spec.num_heads // spec.num_kv_heads) <= MOST_ROWS
        self._workspace: tuple[Tensor, Tensor] | None = None
        if self._decoding:
            context = min(shape.context, layers._max_context)
            processors = layers._scratch.processors
            self._splits = plan_splits(max(shape.sequences, 1), spec.num_kv_heads, context, processors)
            if self._splits > 1:
                device = step.tokens.device
                self._workspace = decode_workspace(shape.tokens, spec.num_heads, spec.head_dim, self._splits, device)

    def __call__(self, n: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
        """Write keys and values of layer `n`, carry out moves, and attend: bfloat16 ``[T, H · D]``."""
        step, spec = self._step, self._spec
        key_bias = self._layers._key_biases[n]
        kv = step.runs[-1].storage.layers[n]
        assert isinstance(kv, FloatKV)
        query = rotate_and_write(
            qkv, layer.qkv.bias, kv, step.slots, step.positions, self._layers._tables, step.variants
        )
        for one in step.moves:
            move(one.source.layers[n], one.target.layers[n], one.from_slots, one.to_slots, one.positions, key_bias)
        segments = [DeviceSegment(run.storage.layers[n], run.block_table, run.lengths, run.starts) for run in step.runs]
        call = replace(self._call, window=spec.window_of(n), key_bias=key_bias)
        out = torch.empty(query.shape, dtype=torch.bfloat16, device=query.device)
        most = step.shape.most
        if self._decoding:
            decode_attention(query, segments, call, most, self._splits, self._workspace, out)
        else:
            prefill_attention(query, segments, call, most, out)
        return out.view(len(out), -1)


def _rows_of_vector(matrix: PackedMatrix, limits: Thresholds) -> int:
    """Up to how many rows all parts are multiplied by kernels that can normalize."""
    return min(limits.vector_floats if part.layout is None else limits.vector for part in matrix.parts)


def _rows_of_kernels(matrix: PackedMatrix, limits: Thresholds) -> int:
    """Up to how many rows all parts are multiplied by our own kernels, which can add."""
    return min(limits.vector_floats if part.layout is None else limits.tiles for part in matrix.parts)
