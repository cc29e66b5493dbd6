"""`DraftHead`: what a small network of one user knows of what their model says next. Inference is NumPy alone.

From the state ``h`` that the last token x was drawn from, from x, and from the token w before it:

    a = W h + X[x] + Y[w] + c            s = a₁ + B (a₂ · silu(a₃))            logits = U s + d

over the tokens that the user's answers are made of (a reduced vocabulary, as in FR-Spec, arXiv 2502.14856). For the
next token of the same draft the head's own s takes the place of h (as in EAGLE, arXiv 2401.15077), with weights of its
own. Beside the network there are n-grams of the user's answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.protocols import FloatArray, Weights
from ruvllm_sona.draft_ngrams import NGrams

FORMAT = "ruvllm-sona-draft-1"
IntArray = npt.NDArray[np.int64]
HalfArray = npt.NDArray[np.float16]


class Embeddings:
    """Rows of the model's embedding and of its output projection, decoded when asked for.

    Raises `LearningError` for a model without these weights.
    """

    def __init__(self, weights: Weights) -> None:
        if "embed" not in weights:
            raise LearningError("a draft head needs the model's embedding, and this model was loaded without weights")
        self._embed, self._output = weights["embed"], weights.get("lm_head", weights["embed"])
        self.vocab_size, self.hidden_size = self._embed.shape

    def embed(self, token_ids: npt.ArrayLike) -> FloatArray:
        """What the model reads for tokens ``[n]``: float32 ``[n, C]``."""
        return _rows(self._embed, token_ids)

    def output(self, token_ids: npt.ArrayLike) -> FloatArray:
        """What a state is multiplied with for the logits of tokens ``[n]``: float32 ``[n, C]``."""
        return _rows(self._output, token_ids)


def _rows(tensor: QuantTensor, token_ids: npt.ArrayLike) -> FloatArray:
    data = tensor.data[np.asarray(token_ids, dtype=np.int64)]
    return QuantTensor(tensor.scheme, (len(data), tensor.columns), data).dequantize()


@dataclass(frozen=True, eq=False)
class DraftHead:
    """Parameters, float32 but where noted. C is the model's width, r that of s, m that of the gates, and F = r + 2m.

    Attributes:
        vocabulary: int64 ``[R]``, the tokens that it can draft, ascending.
        state, bias: ``[F, C]`` and ``[F]``, W and c.
        newest, previous: float16 ``[R + 1, F]``, X and Y; the last row is for all other tokens.
        again, again_bias: ``[F, r]`` and ``[F]``, which take the place of `state` and `bias` after the first token.
        mix: ``[r, m]``, B.
        output, output_bias: ``[R, r]`` and ``[R]``, U and d.
        sharpness: what logits are multiplied with where drafts are drawn.
        ngrams: of the answers.
    """

    vocabulary: IntArray
    state: FloatArray
    bias: FloatArray
    newest: HalfArray
    previous: HalfArray
    again: FloatArray
    again_bias: FloatArray
    mix: FloatArray
    output: FloatArray
    output_bias: FloatArray
    sharpness: float = 1.0
    ngrams: NGrams = field(default_factory=NGrams)

    def __post_init__(self) -> None:
        """Raises `LearningError` for numbers that do not fit together or are none."""
        (wide, hidden), (width, gates), size = self.state.shape, self.mix.shape, len(self.vocabulary)
        expected = {
            "state": (wide, hidden),
            "bias": (wide,),
            "newest": (size + 1, wide),
            "previous": (size + 1, wide),
            "again": (wide, width),
            "again_bias": (wide,),
            "mix": (width, gates),
            "output": (size, width),
            "output_bias": (size,),
        }
        for name, shape in expected.items():
            values, dtype = getattr(self, name), np.float16 if name in ("newest", "previous") else np.float32
            if values.shape != shape or values.dtype != dtype:
                what = f"{name} is {values.dtype} {values.shape}, expected {dtype.__name__} {shape}"
                raise LearningError(f"draft head: {what}")
            if not np.isfinite(values).all():
                raise LearningError(f"draft head: {name} has values that are infinite or no numbers")
        if wide != width + 2 * gates or not size or (np.diff(self.vocabulary) <= 0).any() or self.vocabulary[0] < 0:
            raise LearningError("draft head: its sizes or its vocabulary make no sense")
        if not 0.01 <= self.sharpness <= 100.0:
            raise LearningError(f"draft head: sharpness {self.sharpness} makes no sense")

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for name in _ARRAYS if isinstance(value := getattr(self, name), np.ndarray))

    def save(self, path: Path) -> None:
        """Write a safetensors file; whoever reads it sees all of it or what was there before. Raises `OSError`."""
        from safetensors.numpy import save_file

        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        arrays |= {f"ngrams.{name}": value for name, value in self.ngrams.arrays().items()}
        written = path.with_name(f"{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, written, {"format": FORMAT, "sharpness": json.dumps(self.sharpness)})
        with written.open("rb") as file:
            os.fsync(file.fileno())
        written.replace(path)

    @classmethod
    def load(cls, path: Path) -> DraftHead:
        """Read what `save` wrote. Raises `LearningError`."""
        from safetensors import SafetensorError, safe_open

        hint = "delete it: a new head is trained from the answers to come"
        try:
            with safe_open(path, framework="numpy") as file:
                about: Mapping[str, str] = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            if about.get("format") != FORMAT:
                raise LearningError(f"{path} is not a draft head of this version", hint=hint)
            own = {name: arrays.pop(name) for name in _ARRAYS}
            grams = NGrams.from_arrays({name.removeprefix("ngrams."): value for name, value in arrays.items()})
            return cls(**own, sharpness=float(json.loads(about["sharpness"])), ngrams=grams)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
            what = f"the draft head {path} cannot be read: {type(error).__name__}: {error}"
            raise LearningError(what, hint=hint) from error

    def check(self, hidden_size: int, vocab_size: int) -> None:
        """Raise `LearningError` unless it was made for a model of this shape."""
        if self.state.shape[1] != hidden_size or self.vocabulary[-1] >= vocab_size:
            what = f"of width {self.state.shape[1]} or more than {self.vocabulary[-1]} tokens"
            raise LearningError(f"this draft head is of another model, {what}", hint="train one for this model")


_ARRAYS = tuple(f.name for f in fields(DraftHead) if f.name not in ("sharpness", "ngrams"))


class DraftNetwork:
    """Runs a head."""

    def __init__(self, head: DraftHead) -> None:
        self.head = head
        self._width, self._gates = head.mix.shape
        self._places = {token: place for place, token in enumerate(head.vocabulary.tolist())}

    def first(self, hidden: FloatArray, newest: int, previous: int) -> FloatArray:
        """s ``[r]`` for the token after `newest`, which was drawn from `hidden` ``[C]``."""
        return self._combine(self.head.state.dot(hidden), self.head.bias, newest, previous)

    def next(self, s: FloatArray, newest: int, previous: int) -> FloatArray:
        """s ``[r]`` for the token after `newest`, which was drafted from `s`."""
        return self._combine(self.head.again.dot(s), self.head.again_bias, newest, previous)

    def logits(self, s: FloatArray) -> FloatArray:
        """Of the head's vocabulary ``[R]``."""
        logits: FloatArray = self.head.output.dot(s)  # NumPy's shortest way: after a step no code of it is near
        logits += self.head.output_bias
        return logits

    def place(self, token: int) -> int:
        """Of a token in the head's vocabulary; -1 if it is not there."""
        return self._places.get(token, -1)

    def _combine(self, a: FloatArray, bias: FloatArray, newest: int, previous: int) -> FloatArray:
        a += bias
        a += self.head.newest[self.place(newest)]
        a += self.head.previous[self.place(previous)]
        r, m = self._width, self._gates
        gate = a[r + m :]
        gated: FloatArray = a[r : r + m] * gate / (np.float32(1) + np.exp(-gate))
        s: FloatArray = self.head.mix.dot(gated)
        s += a[:r]
        return s
