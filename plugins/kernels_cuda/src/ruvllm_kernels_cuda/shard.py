"""One rank's part of a model under tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3).

Queries, keys, values, gates and their values are split by rows, so that a rank has whole heads; the two products that
follow, `attn.o` and `mlp.down`, by the same columns, so that each rank has a summand of the result and a layer needs
two sums over all ranks. The output matrix is split by rows of the vocabulary: with 128,256 tokens it is more than a
layer's weights, read for every token. Embeddings are only looked up, and whole on every rank, as norms are.

Weights keep their bits. Where a split falls inside a quantized block, both neighbours have the block, and each puts
zeros in the place of the inputs that are not its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ruvllm_core.errors import ConfigError, ModelError
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_core.model.spec import ModelSpec, llama_tensor_names
from ruvllm_core.protocols import Adapter, LowRank, Weights

Range = tuple[int, int]
_UNIT = 32  # columns of `mlp.down` that stay together: rows of floats then begin at multiples of 64 bytes


@dataclass(frozen=True, eq=False)
class Shard(QuantTensor):
    """A matrix whose product is not this rank's alone.

    Attributes:
        before, after: first and last columns, which are in blocks of this rank but not its own: their inputs are zero.
        vocabulary: rows whose products are this rank's part of the logits; of a tied embedding they are some of it.
    """

    before: int = 0
    after: int = 0
    vocabulary: Range | None = None


@dataclass(frozen=True)
class Split:
    """Which part of a model is whose; ranges are ``[start, stop)``.

    Attributes:
        whole: the model.
        rank, world: this rank, and how many there are.
        heads, kv_heads: this rank's. With more ranks than key/value heads, several have the same one.
        inner: its part of the intermediate size.
        vocabulary: every rank's tokens.
    """

    whole: ModelSpec
    rank: int
    world: int
    heads: Range
    kv_heads: Range
    inner: Range
    vocabulary: tuple[Range, ...]

    @classmethod
    def of(cls, spec: ModelSpec, weights: Weights, rank: int, world: int) -> Split:
        """The split over `world` ranks, as even as whole heads and whole blocks of `mlp.down` allow.

        Raises `ConfigError` if there are more ranks than query heads.
        """
        most = min(spec.num_heads, spec.intermediate_size, spec.vocab_size)
        if not 0 <= rank < world:
            raise ConfigError(f"tensor parallelism: rank {rank} is not one of {world}")
        if world > most:
            raise ConfigError(
                f"tensor parallelism: {spec.num_heads} query heads, {spec.intermediate_size} inner columns and "
                f"{spec.vocab_size} tokens cannot be split over {world} GPUs",
                hint=f"use at most {most}; divisors of {spec.num_kv_heads} give every GPU the same work",
            )
        kv_heads, group = spec.num_kv_heads, spec.num_heads // spec.num_kv_heads
        if world <= kv_heads:
            own = _share(kv_heads, rank, world)
            heads = own[0] * group, own[1] * group
        else:  # ranks are shared out to key/value heads, and a head's queries to its ranks
            head = next(k for k in range(kv_heads) if rank < _share(world, k, kv_heads)[1])
            first, stop = _share(world, head, kv_heads)
            queries = _share(group, rank - first, stop - first)
            own, heads = (head, head + 1), (head * group + queries[0], head * group + queries[1])
        downs = [weights[name] for n in range(spec.num_layers) if (name := f"layers.{n}.mlp.down") in weights]
        unit = max([_UNIT, *(SCHEMES[tensor.scheme].block_size for tensor in downs)])
        if spec.intermediate_size % unit or spec.intermediate_size // unit < world:
            unit = 1
        inner = _share(spec.intermediate_size // unit, rank, world)
        tokens = tuple(_share(spec.vocab_size, one, world) for one in range(world))
        return cls(spec, rank, world, heads, own, (inner[0] * unit, inner[1] * unit), tokens)

    @property
    def spec(self) -> ModelSpec:
        """What this rank computes, as a model of its own; its vocabulary is the whole one."""
        heads, kv_heads, inner = (stop - start for start, stop in (self.heads, self.kv_heads, self.inner))
        return replace(self.whole, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=inner)

    def rows(self, site: str) -> Range | None:
        """This rank's rows of a weight of a layer, as in ``attn.q``; None if that is not split by rows."""
        if site in ("mlp.gate", "mlp.up"):
            return self.inner
        heads = {"attn.q": self.heads, "attn.k": self.kv_heads, "attn.v": self.kv_heads}.get(site)
        return None if heads is None else self._of_heads(heads)

    def columns(self, site: str) -> Range | None:
        """This rank's columns; None if the weight is not split by columns."""
        return {"attn.o": self._of_heads(self.heads), "mlp.down": self.inner}.get(site)

    def adapter(self, adapter: Adapter) -> Adapter:
        """What of low-rank deltas goes with this rank's weights; summed over ranks they are the whole ones.

        B is split like a weight's rows and A like its columns (LoRA, arXiv 2106.09685). Raises `ValueError` for factors
        that do not fit the model.
        """
        shapes = {name: source.shape for name, source in llama_tensor_names(self.whole).items()}
        sites: dict[str, LowRank] = {}
        for name, delta in adapter.sites.items():
            if name in shapes and (delta.b.shape[0], delta.a.shape[1]) != shapes[name]:
                raise ValueError(
                    f"adapter {adapter.version}, {name}: a {delta.a.shape} and b {delta.b.shape} are not of a weight "
                    f"of {shapes[name]}"
                )
            rows, columns = self.rows(_site(name)), self.columns(_site(name))
            a = delta.a if columns is None else np.ascontiguousarray(delta.a[:, slice(*columns)])
            b = delta.b if rows is None else delta.b[slice(*rows)]
            sites[name] = LowRank(a, b, delta.scale)
        return Adapter(adapter.version, sites)

    def _of_heads(self, heads: Range) -> Range:
        return heads[0] * self.whole.head_dim, heads[1] * self.whole.head_dim


class ShardedWeights(Mapping[str, QuantTensor]):
    """A rank's part of `weights`, sharing their memory. Tensors that need something done are `Shard`s.

    A bias goes with its weight's rows. That of a product that is split by columns is in rank 0's summand: other ranks
    find zeros. Raises `ModelError` for a tensor that does not fit the model.
    """

    def __init__(self, weights: Weights, split: Split) -> None:
        self._weights, self.split = weights, split
        self._shapes = {name: source.shape for name, source in llama_tensor_names(split.whole).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __getitem__(self, name: str) -> QuantTensor:
        tensor, split = self._weights[name], self.split
        if name in self._shapes and tensor.shape != self._shapes[name]:
            raise ModelError(f"weight {name} has shape {tensor.shape}, the model needs {self._shapes[name]}")
        own = split.vocabulary[split.rank]
        if name == "lm_head":
            part = tensor.rows(*own)
            return Shard(part.scheme, part.shape, part.data, vocabulary=(0, part.num_rows))
        if name == "embed" and split.whole.tied_embeddings:
            return Shard(tensor.scheme, tensor.shape, tensor.data, vocabulary=own)
        site = _site(name)
        weight = site.removesuffix(".bias")
        if (rows := split.rows(weight)) is not None:
            return tensor.rows(*rows) if site == weight else _columns(tensor, *rows)
        if (columns := split.columns(weight)) is None:
            return tensor
        if site == weight:
            return _columns(tensor, *columns)
        return tensor if split.rank == 0 else QuantTensor.from_float(np.zeros(tensor.shape, dtype=np.float32))


def _share(count: int, rank: int, world: int) -> Range:
    """The part of ``range(count)`` that is a rank's; sizes differ by one at most."""
    return count * rank // world, count * (rank + 1) // world


def _site(name: str) -> str:
    """``layers.3.attn.q`` as ``attn.q``; other names as they are."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _columns(tensor: QuantTensor, start: int, stop: int) -> QuantTensor:
    """Columns ``[start, stop)`` with all of the blocks that they are in."""
    scheme = SCHEMES[tensor.scheme]
    first, last = start // scheme.block_size, -(-stop // scheme.block_size)
    data = tensor.data[:, first * scheme.block_bytes : last * scheme.block_bytes]
    shape = (*tensor.shape[:-1], (last - first) * scheme.block_size)
    if shape[-1] == stop - start:
        return QuantTensor(tensor.scheme, shape, data)
    before, after = start - first * scheme.block_size, last * scheme.block_size - stop
    return Shard(tensor.scheme, shape, data, before=before, after=after)
