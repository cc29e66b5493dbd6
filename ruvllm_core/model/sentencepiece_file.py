"""Reading ``tokenizer.model``, the protocol buffer in which SentencePiece keeps a vocabulary.

Only the few fields that matter are read, so neither `sentencepiece` nor `protobuf` is needed.
Source: ``sentencepiece_model.proto`` for field numbers and the protocol buffers encoding guide for the wire format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ruvllm_core.errors import TokenizerError

_BPE = 2
_Value = int | bytes


@dataclass
class SentencePieceFile:
    """A SentencePiece BPE vocabulary.

    Attributes:
        pieces, scores, types: one entry per id; `types` are `TokenType` numbers.
        add_space_prefix: whether text gets a ``▁`` in front.
        bos, eos, pad: ids, or -1 where the model has none.
    """

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    add_space_prefix: bool = True
    bos: int = 1
    eos: int = 2
    pad: int = -1

    @classmethod
    def read(cls, path: Path) -> SentencePieceFile:
        """Read `path`; raises `TokenizerError` if it is damaged, not BPE, or normalizes text."""
        model = cls()
        kind, normalizes, strips_blanks = 1, False, True
        try:
            for number, value in _fields(path.read_bytes()):
                if number == 1:
                    model._add_piece(_bytes(value))
                elif number == 2:  # trainer_spec
                    trainer = dict(_fields(_bytes(value)))
                    kind = _int(trainer.get(3, 1))
                    model.bos, model.eos, model.pad = (
                        _int(trainer.get(key, default)) for key, default in ((41, 1), (42, 2), (43, -1))
                    )
                elif number == 3:  # normalizer_spec
                    normalizer = dict(_fields(_bytes(value)))
                    normalizes = bool(normalizer.get(2))
                    model.add_space_prefix, strips_blanks = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
        except (ValueError, struct.error) as error:
            raise TokenizerError(
                f"{path}: not a SentencePiece model: {error}", hint="download the model again"
            ) from error
        if not model.pieces or kind != _BPE or normalizes or strips_blanks:
            raise TokenizerError(
                f"{path}: only SentencePiece BPE models without text normalization can be read",
                hint="a tokenizer.json in the same folder is used instead, if the model has one",
            )
        return model

    def _add_piece(self, data: bytes) -> None:
        values = dict(_fields(data))
        self.pieces.append(_bytes(values.get(1, b"")).decode())
        self.scores.append(float(struct.unpack("<f", _bytes(values.get(2, bytes(4))))[0]))
        self.types.append(_int(values.get(3, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """Field numbers and values of one message. Raises ValueError where the bytes are no message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + length > len(data):
            raise ValueError(f"it ends inside field {tag >> 3}")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 number and the position after it; 64-bit two's complement where it is negative."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value - (1 << 64) if value >> 63 else value, at
    raise ValueError(f"a number of more than ten bytes before byte {at}")


def _int(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value


def _bytes(value: _Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes belong")
    return value
