"""`Fingerprint`: which model an adapter was made for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

import numpy as np

from ruvllm_core.errors import LearningError
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Weights

_SAMPLED = 1 << 18  # bytes of each matrix that are hashed: from its start, middle and end


@dataclass(frozen=True)
class Fingerprint:
    """What is compared before an adapter is put on a model.

    Attributes:
        architecture: name of the family.
        shape: sizes, in words.
        norms: hash of the values of all norms. Files keep those in full, so every quantization of a model has the same.
        weights: hash of bytes of a few matrices; it tells quantizations of one model apart.
    """

    architecture: str
    shape: str
    norms: str
    weights: str

    @classmethod
    def of(cls, spec: ModelSpec, weights: Weights) -> Fingerprint:
        """The fingerprint of an open model; reads its norms and a few megabytes."""
        shape = (
            f"{spec.num_layers} layers, {spec.hidden_size} wide, {spec.intermediate_size} inside, "
            f"{spec.num_heads}/{spec.num_kv_heads} heads of {spec.head_dim}, {spec.vocab_size} tokens, "
            f"{'tied' if spec.tied_embeddings else 'separate'} output"
        )
        norms = hashlib.sha256()
        for name in sorted(name for name in weights if name.endswith("norm")):
            norms.update(name.encode() + weights[name].dequantize().tobytes())
        matrices = hashlib.sha256()
        # Query and key rows come in two orders, so the same model would have two hashes of them.
        layers = sorted({0, spec.num_layers // 2, spec.num_layers - 1})
        names = ["embed", "lm_head", *(f"layers.{n}.{site}" for n in layers for site in ("attn.o", "mlp.down"))]
        for name in names:
            if name in weights:
                matrices.update(f"{name} {weights[name].scheme}".encode() + _sample(weights[name]))
        return cls(spec.architecture, shape, norms.hexdigest()[:32], matrices.hexdigest()[:32])

    @classmethod
    def parse(cls, text: str, where: str) -> Fingerprint:
        """What `text` returned. Raises `LearningError` naming `where` if it is something else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names) or not all(map(_is_text, values.values())):
            raise LearningError(
                f"{where}: the fingerprint of its model cannot be read", hint="export the adapter again"
            )
        return cls(**values)

    def text(self) -> str:
        """One line, for a file."""
        return json.dumps(asdict(self), sort_keys=True)

    def check(self, other: Fingerprint, what: str) -> None:
        """Raise `LearningError` if `what`, made for the model of this fingerprint, is not for the `other` one."""
        if self == other:
            return
        if self.architecture != other.architecture or self.shape != other.shape:
            theirs, ours = f"{self.architecture}, {self.shape}", f"{other.architecture}, {other.shape}"
            raise LearningError(f"{what} was made for another model ({theirs}) than this one ({ours})")
        if self.norms != other.norms:
            raise LearningError(
                f"{what} was made for another model of the same shape: the norms differ",
                hint="use the model it was made for; forcing it onto this one will most likely spoil the answers",
            )
        raise LearningError(
            f"{what} was made for other weights of this model: another quantization, or a fine-tuned or merged copy",
            hint="force it if this is only another quantization; never onto a model that it has been merged into",
        )


def _sample(tensor: QuantTensor) -> bytes:
    rows = max(_SAMPLED // tensor.data.shape[1], 1)
    count = tensor.num_rows
    starts = sorted({0, max(count // 2 - rows // 2, 0), max(count - rows, 0)})
    return b"".join(np.ascontiguousarray(tensor.data[start : start + rows]).tobytes() for start in starts)


def _is_text(value: object) -> bool:
    return isinstance(value, str)
