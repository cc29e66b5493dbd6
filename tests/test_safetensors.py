"""The safetensors reader against the safetensors library, and against damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from ruvllm_core.errors import FormatError, ModelError, ModelNotFound
from ruvllm_core.model.safetensors import INDEX_FILE, Safetensors, open_file, open_folder, read_json

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def container(header: Any, data: bytes = b"") -> bytes:
    """A file of a header (bytes, or something to be written as JSON) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def opened(path: Path, content: bytes) -> Safetensors:
    path.write_bytes(content)
    return open_file(path)


@pytest.mark.parametrize("scheme", DTYPES)
def test_equals_the_library(tmp_path: Path, scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(DTYPES[scheme])
        for name, shape in {"vector": (7,), "matrix": (5, 9), "cube": (2, 3, 4)}.items()
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    file = open_file(tmp_path / "m.safetensors")
    assert set(file) == set(tensors)
    for name, tensor in tensors.items():
        assert file[name].scheme == scheme
        assert file[name].shape == tuple(tensor.shape)
        assert np.array_equal(file[name].dequantize(), tensor.float().numpy())
        assert not file[name].data.flags.owndata
        assert not file[name].data.flags.writeable
    assert file.nbytes == (tmp_path / "m.safetensors").stat().st_size


def test_other_types_harm_only_those_who_ask(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(3), "w": torch.ones(2, 2), "d": torch.ones(2).double()}, tmp_path / "m.safetensors")
    file = open_file(tmp_path / "m.safetensors")
    assert file["w"].shape == (2, 2)
    for name, dtype in (("ids", "I64"), ("d", "F64")):
        with pytest.raises(FormatError, match=rf"m\.safetensors: tensor '{name}' has type {dtype}"):
            file[name]
    strange = opened(tmp_path / "n.safetensors", container({"a": entry(0, 4, [5], "f32")}, bytes(4)))
    with pytest.raises(FormatError, match="tensor 'a' has type f32, which cannot be read"):
        strange["a"]


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(1.0), "none": torch.ones(0, 4)}, tmp_path / "m.safetensors")
    file = open_file(tmp_path / "m.safetensors")
    for name in ("scalar", "none"):
        with pytest.raises(FormatError, match=f"tensor '{name}' of shape .* has no rows of values"):
            file[name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x10\x00", "announces a header of 16 bytes, but has 2 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", r"announces a header of 9223372036854775808 bytes"),
        ((50).to_bytes(8, "little") + b"{}", "announces a header of 50 bytes, but has 10"),
        (container(b"{nonsense"), "the header is not valid JSON"),
        (container(b"\xff\xfe"), "the header is not valid JSON"),
        (container(b"[" * 100_000), "the header is not valid JSON"),
        (container([1]), "should be a JSON object, found list"),
        (container(b'{"a": {}, "a": {}}'), "'a' occurs twice"),
        (container({"a": 3}), "tensor 'a' needs dtype, shape and data_offsets, found 3"),
        (container({"a": {"dtype": "F32", "shape": [1]}}), "tensor 'a' needs dtype, shape and data_offsets"),
        (container({"a": entry(0, 4, [True])}, bytes(4)), "tensor 'a' needs dtype"),
        (container({"a": entry(0, 4, [-1])}, bytes(4)), "tensor 'a' needs dtype"),
        (container({"a": entry(0, 4, [1.0])}, bytes(4)), "tensor 'a' needs dtype"),
        (container({"a": entry(0, 8, [3])}, bytes(8)), r"tensor 'a' \(F32 \(3,\)\) cannot have 8 bytes"),
        (container({"a": entry(4, 0, [1])}, bytes(4)), "cannot have -4 bytes"),
        (container({"a": entry(0, 2**62 * 4, [2**62])}, bytes(4)), "tensors end at byte"),
        (container({"a": entry(0, 8, [2])}, bytes(4)), "tensors end at byte"),
        (container({"a": entry(0, 4, [1])}, bytes(8)), "tensors end at byte"),
        (container({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, bytes(8)), "tensor 'b' overlaps 'a'"),
        (container({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "tensor 'b' leaves a gap after 'a'"),
        (container({"a": entry(4, 8, [1])}, bytes(8)), "tensor 'a' leaves a gap after the header"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        opened(tmp_path / "m.safetensors", content)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        open_file(tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="cannot read"):
        open_file(tmp_path)
    with pytest.raises(ModelNotFound, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_folder(tmp_path)


VALID = save({"a": torch.ones(3, 4), "b": torch.ones(5).half(), "c": torch.ones(2).to(torch.bfloat16)})


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_mutated_files_give_errors_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.unlink(missing_ok=True)
    try:
        file = opened(path, bytes(content))
        for name in file:
            assert file[name].dequantize().nbytes < 1000
    except ModelError as error:
        assert "fuzz.safetensors" in error.message


def shards(folder: Path, **weight_map: Any) -> Path:
    save_file({"a": torch.ones(2, 2), "b": torch.zeros(3)}, folder / "one.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, folder / "two.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards(tmp_path: Path) -> None:
    folder = open_folder(shards(tmp_path, a="one.safetensors", b="one.safetensors", c="two.safetensors"))
    assert set(folder) == {"a", "b", "c"}
    assert len(folder) == 3
    assert folder["c"].dequantize().tolist() == [2.0] * 4
    assert folder.nbytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no 'weight_map'"),
        ({"a": "../one.safetensors"}, r"tensor 'a' is placed in '\.\./one\.safetensors', which is no plain file name"),
        ({"a": "/etc/passwd"}, "no plain file name"),
        ({"a": ".."}, "no plain file name"),
        ({"a": 3}, "tensor 'a' is placed in 3"),
        ({"c": "one.safetensors"}, r"places tensor 'c' in one\.safetensors, which does not hold it"),
        ({"a": "three.safetensors"}, r"no such file: .*three\.safetensors"),
    ],
)
def test_wrong_index(tmp_path: Path, weight_map: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_folder(shards(tmp_path, **weight_map))


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ModelNotFound, match="no such file"):
        read_json(path)
    path.write_text('{"a": [1, 2]}')
    assert read_json(path) == {"a": [1, 2]}
    path.write_text("")
    with pytest.raises(FormatError, match=r"config\.json is empty"):
        read_json(path)
