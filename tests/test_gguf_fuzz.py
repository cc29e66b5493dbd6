"""More than 20,000 damaged GGUF files: each is either refused with our own error, or read within its bounds."""

from __future__ import annotations

import functools
import struct
import time
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ruvllm_core.errors import FormatError
from ruvllm_core.model.dequant import count_non_finite
from ruvllm_core.model.gguf import GGUFFile
from ruvllm_core.model.gguf_parser import ValueType
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_quantizers.gguf_writer import PendingTensor, write_gguf

IN_MEMORY = 30_000
ON_DISK = 2_000
BY_HYPOTHESIS = 2_000
SLOWEST_S = 5.0
NUMBERS = [0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63, 2**64 - 1]


@functools.cache
def bases() -> tuple[bytes, ...]:
    """Small valid files that between them use every value type and every scheme."""
    import tempfile

    rng = np.random.default_rng(1)
    types = {"u8": (ValueType.U8,), "i16": (ValueType.I16,), "f64": (ValueType.F64,)}
    plain = {"general.architecture": "llama", "llama.block_count": 2, "u8": 3, "i16": -3, "f64": 0.1, "flag": True}
    arrays = {
        "general.alignment": 64,
        "tokenizer.ggml.tokens": ["<s>", "hello", "\u4e2d", ""],
        "tokenizer.ggml.scores": np.array([0.0, -1.5, 2.0], np.float32),
        "tokenizer.ggml.token_type": np.array([1, 2, 3], np.int32),
        "flags": np.array([True, False]),
        "nested": [np.array([1, 2], np.uint16), ["a", "b"], [np.array([1], np.int64)]],
    }
    tensors = []
    for index, scheme in enumerate(SCHEMES.values()):
        shape = [(256,), (2, 256), (2, 1, 256)][index % 3]
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        data = rng.integers(0, 256, (rows, scheme.row_bytes(256)), dtype=np.uint8)
        tensors.append(PendingTensor.of(f"blk.{index}.{scheme.name}.weight", QuantTensor(scheme.name, shape, data)))
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for metadata, some in ((plain, tensors[:3]), (arrays, tensors[3:6]), (plain | arrays, tensors), (arrays, [])):
            path = Path(folder) / "base.gguf"
            write_gguf(path, metadata, some, types=types)
            files.append(path.read_bytes())
    return tuple(files)


def check(file: GGUFFile, size: int) -> None:
    """Touch everything a reader may touch, and prove that it lies inside the mapping."""
    assert set(file.types) == set(file.metadata)
    for name in file.tensors:
        tensor = file.tensors[name]
        whole = tensor.data.base
        assert isinstance(whole, np.ndarray) and whole.nbytes == size
        start = tensor.data.ctypes.data - whole.ctypes.data
        assert start > 0 and start + tensor.data.nbytes <= size
        values = tensor.dequantize()
        assert values.shape == tensor.shape
        assert (count_non_finite(tensor) == 0) == np.isfinite(values).all()


def attempt(content: bytes, path: Path | None = None) -> bool:
    """Whether the file is read; it must be read or refused, and quickly."""
    started = time.perf_counter()
    try:
        file = GGUFFile.open(path) if path else GGUFFile(Path("x.gguf"), content)
    except FormatError as error:
        assert error.hint and len(error.message) < 2000 + 65535
        read = False
    else:
        check(file, len(content))
        read = True
    assert time.perf_counter() - started < SLOWEST_S
    return read


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four random injuries, most of them in the first part of the file, where its structure is."""
    raw = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        reach = len(raw) if rng.random() < 0.2 else min(len(raw), 900)
        if reach < 16:
            break
        at = int(rng.integers(0, reach - 8))
        kind = int(rng.integers(0, 8))
        if kind == 0:
            raw[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            raw[at] = int(rng.integers(0, 256))
        elif kind == 2:
            raw[at : at + 8] = struct.pack("<Q", NUMBERS[int(rng.integers(0, len(NUMBERS)))])
        elif kind == 3:
            raw[at : at + 4] = struct.pack("<I", NUMBERS[int(rng.integers(0, len(NUMBERS)))] & 0xFFFFFFFF)
        elif kind == 4:
            del raw[at : at + int(rng.integers(1, 40))]
        elif kind == 5:
            raw[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif kind == 6:
            source = int(rng.integers(0, reach - 8))
            raw[at : at + 32] = raw[source : source + 32]
        else:
            del raw[at + 8 :]
    return bytes(raw)


def test_the_bases_are_read() -> None:
    for content in bases():
        assert attempt(content)


def test_seeded_mutations_in_memory() -> None:
    rng = np.random.default_rng(20_000)
    read = sum(attempt(mutate(bases()[index % len(bases())], rng)) for index in range(IN_MEMORY))
    assert IN_MEMORY // 20 < read < IN_MEMORY * 9 // 10  # the injuries are neither all fatal nor all harmless


def test_seeded_mutations_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    for index in range(ON_DISK):
        content = mutate(bases()[index % len(bases())], rng) or b"x"
        path = tmp_path / f"{index % 8}.gguf"
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        attempt(content, path)


PATCH = st.tuples(
    st.integers(0, 1200),
    st.one_of(st.sampled_from(NUMBERS).map(lambda n: struct.pack("<Q", n)), st.binary(max_size=24)),
)


@settings(max_examples=BY_HYPOTHESIS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 3), st.lists(PATCH, min_size=1, max_size=4), st.booleans(), st.integers(0, 4000))
def test_hypothesis_mutations(which: int, patches: list[tuple[int, bytes]], insert: bool, keep: int) -> None:
    raw = bytearray(bases()[which])
    for at, patch in patches:
        at %= len(raw) + 1
        raw[at : at if insert else at + len(patch)] = patch
    attempt(bytes(raw[: max(keep, 1)] if keep < 2000 else raw))


def test_every_truncation_is_refused() -> None:
    for content in bases()[:2]:
        start = np.frombuffer(content, np.uint8).ctypes.data
        end = max(t.data.ctypes.data + t.nbytes for t in GGUFFile(Path("x"), content).tensors.values()) - start
        for length in range(1, len(content)):
            assert attempt(content[:length]) == (length >= end), length
