"""A GGUF file of a known model's true shape with random weights: as large and as fast as the model, of no use else.

    python benchmarks/synth.py qwen2.5-1.5b q4_k_m qwen2.5-1.5b-q4_k_m.gguf
    python benchmarks/synth.py llama-3-8b q8_0 small.gguf --layers 2

Schemes and recipes are those of ``ruvllm quantize``, and each tensor gets the scheme that it would get there. Weights
have mean 0 and standard deviation 0.02. The vocabulary has the true size; its texts are arbitrary.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import numpy as np
from random_blocks import random_blocks

from ruvllm_candle_like.llama import LLAMA
from ruvllm_candle_like.phi3 import PHI3
from ruvllm_candle_like.qwen2 import QWEN2
from ruvllm_core.errors import ModelError, RuvLLMError, near
from ruvllm_core.model.codec import BYTE_OF_CHAR
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_core.model.sentencepiece import TokenType
from ruvllm_core.model.spec import ModelSpec
from ruvllm_quantizers.convert import plan
from ruvllm_quantizers.gguf_writer import PendingTensor, write_gguf
from ruvllm_quantizers.recipes import RECIPES
from ruvllm_quantizers.source import Source, SourceTensor

STD = 0.02
_PIECE_VALUES = 1 << 22
_FAMILIES: dict[str, Any] = {"llama": LLAMA, "qwen2": QWEN2, "phi3": PHI3}
_PRE_TOKENIZERS = {"llama": "llama-bpe", "qwen2": "qwen2", "phi3": "gpt-2"}


def _shape(
    architecture: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any
) -> ModelSpec:
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_layers": layers}
    attention = {"num_heads": heads, "num_kv_heads": kv, "head_dim": hidden // heads, "rope_dim": hidden // heads}
    return ModelSpec(architecture=architecture, **sizes, **attention, **more)  # type: ignore[arg-type]


_QWEN: dict[str, Any] = {"qkv_bias": True, "rope_theta": 1e6, "norm_eps": 1e-6, "max_context": 32768}
_LLAMA: dict[str, Any] = {"rope_interleaved": True, "norm_eps": 1e-5}
#: From the models' own ``config.json``. GGUF files call Mistral a Llama; this one is version 0.3.
SHAPES: dict[str, ModelSpec] = {
    "qwen2.5-0.5b": _shape("qwen2", 151936, 896, 4864, 24, 14, 2, tied_embeddings=True, **_QWEN),
    "qwen2.5-1.5b": _shape("qwen2", 151936, 1536, 8960, 28, 12, 2, tied_embeddings=True, **_QWEN),
    "qwen2.5-7b": _shape("qwen2", 152064, 3584, 18944, 28, 28, 4, **_QWEN),
    "llama-3-8b": _shape("llama", 128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, max_context=8192, **_LLAMA),
    "mistral-7b": _shape("llama", 32768, 4096, 14336, 32, 32, 8, rope_theta=1e6, max_context=32768, **_LLAMA),
    "phi-3-mini": _shape("phi3", 32064, 3072, 8192, 32, 32, 32, norm_eps=1e-5, max_context=4096, sliding_window=2047),
}


def synthesize(shape: str, scheme: str, path: Path, *, layers: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Write the file `path`.

    Args:
        shape: a key of `SHAPES`.
        scheme: what ``ruvllm quantize --scheme`` takes.
        layers: fewer or more than the model has.
        seed: of the weights; each tensor's are its own, whatever else is in the file.

    Returns:
        What was written: ``file_bytes``, and ``schemes`` with the number of tensors of each.

    Raises:
        ModelError: an unknown shape or scheme, no layers, or a file that cannot be written.
    """
    for what, name, known in (("shape", shape, SHAPES), ("scheme", scheme, vars(RECIPES))):
        if name not in known:
            raise ModelError(f"there is no {what} {name!r}", hint=near(name, known))
    if layers is not None and layers < 1:
        raise ModelError(f"a model of {layers} layers cannot run", hint="give --layers at least 1")
    spec = SHAPES[shape]
    return write_model(replace(spec, num_layers=layers or spec.num_layers), shape, scheme, path, seed)


def write_model(spec: ModelSpec, name: str, scheme: str, path: Path, seed: int = 0) -> dict[str, Any]:
    """Write a model of any `spec` of these families; see `synthesize`."""
    recipe = vars(RECIPES)[scheme]
    shapes: dict[str, tuple[int, ...]] = {}
    for source in _FAMILIES[spec.architecture].tensor_names(spec).values():
        if source.gguf_rows is None:
            shapes[source.gguf] = source.shape
        else:  # several of ours in one matrix
            rows = max(source.gguf_rows[1], shapes.get(source.gguf, (0,))[0])
            shapes[source.gguf] = (rows, *source.shape[1:])
    metadata = {**_model_metadata(spec, name), **_tokenizer_metadata(spec)}
    metadata |= {"general.file_type": recipe.file_type, "general.quantization_version": 2}
    planned = tuple(SourceTensor(name, shape, "f32", _never) for name, shape in shapes.items())
    schemes = plan(Source(path, metadata, planned), recipe)
    pending = [
        PendingTensor(name, shape, schemes[name], lambda n=name, s=shape: _pieces(n, s, schemes[n], seed))  # type: ignore[misc]
        for name, shape in shapes.items()
    ]
    return {"file_bytes": write_gguf(path, metadata, pending), "schemes": dict(Counter(schemes.values()))}


def _never() -> QuantTensor:
    raise AssertionError("planning loads nothing")


def _pieces(name: str, shape: tuple[int, ...], scheme: str, seed: int) -> Iterator[QuantTensor]:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if len(shape) == 1:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(STD)
        yield QuantTensor.from_float(values + 1 if "norm" in name else values)
        return
    rows, columns = shape
    row_bytes = SCHEMES[scheme].row_bytes(columns)
    step = max(_PIECE_VALUES // columns, 1)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        blocks = random_blocks(scheme, count * columns // SCHEMES[scheme].block_size, STD, rng)
        yield QuantTensor(scheme, (count, columns), blocks.reshape(count, row_bytes))


def _model_metadata(spec: ModelSpec, name: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "context_length": spec.max_context,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.dimension_count": spec.rope_dim,
        "rope.freq_base": spec.rope_theta,
    }
    if spec.sliding_window:
        fields["attention.sliding_window"] = spec.sliding_window
    general = {"general.architecture": spec.architecture, "general.type": "model"}
    return {**general, "general.name": f"{name} (random)", **{f"{spec.architecture}.{k}": v for k, v in fields.items()}}


def _tokenizer_metadata(spec: ModelSpec) -> dict[str, Any]:
    """Byte-level BPE with a merge for every token but bytes and special ones: pairs of bytes first, then triples."""
    letters = sorted(BYTE_OF_CHAR)
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]  # llama.cpp looks for these in a model called phi-3
    count = spec.vocab_size - len(letters) - len(special)
    pairs = product(letters, letters)
    triples = ((first + second, third) for first, second, third in product(letters, letters, letters))
    merges = list(islice(chain(pairs, triples), count))
    types = np.full(spec.vocab_size, TokenType.NORMAL, dtype=np.int32)
    types[-len(special) :] = TokenType.CONTROL
    fields = {
        "model": "gpt2",
        "pre": _PRE_TOKENIZERS[spec.architecture],
        "tokens": [*letters, *map("".join, merges), *special],
        "token_type": types,
        "merges": list(map(" ".join, merges)),
        "bos_token_id": spec.vocab_size - 3,
        "eos_token_id": spec.vocab_size - 2,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("scheme", metavar="SCHEME", help="a scheme or recipe: " + ", ".join(vars(RECIPES)))
    parser.add_argument("file", metavar="FILE", type=Path, help="the GGUF file to write")
    parser.add_argument("--layers", type=int, metavar="N", help="instead of as many as the model has")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        report = synthesize(args.shape, args.scheme, args.file, layers=args.layers, seed=args.seed)
    except RuvLLMError as error:
        parser.exit(1, f"error: {error}\n")
    seconds = time.perf_counter() - started
    counts = ", ".join(f"{count} {name}" for name, count in sorted(report["schemes"].items()))
    print(f"{args.file}: {report['file_bytes'] / 1e6:.1f} MB ({counts}), {seconds:.1f} s", file=sys.stderr)
    print(json.dumps({"file": str(args.file), "shape": args.shape, "scheme": args.scheme, **report}))


if __name__ == "__main__":
    main()
