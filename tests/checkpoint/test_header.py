"""Safetensors headers: what the format's own writer makes is read; what is damaged is refused in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from unmerge.checkpoint.header import MAX_HEADER_BYTES, read_header
from unmerge.checkpoint.tensor import values
from unmerge.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "b": np.float64([1.5]),
        "n": np.array([1, 2]),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    found, unread = read_header(tmp_path / "x.safetensors")
    assert sorted(found) == ["a", "b"]
    assert [(item.name, item.dtype, item.shape) for item in unread] == [("n", "I64", (2,))]
    np.testing.assert_array_equal(values(found["a"]), tensors["a"])
    np.testing.assert_array_equal(values(found["a"], 1, 2), tensors["a"][1:])


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "not valid JSON"),
        (b"[1]", b"", "not a JSON object"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', b"", "occurs twice"),
        (b"[" * 100_000, b"", "not valid JSON"),
        ({"a": entry()}, b"1234", "cut short: tensor 'a' ends at byte"),
        ({"a": entry(shape=(3,))}, b"12345678", r"shape \[3\] cannot take 8 bytes"),
        ({"a": entry(shape=(-1,))}, b"12345678", "no valid dtype, shape and offsets"),
        ({"a": entry(shape=(2.0,))}, b"12345678", "no valid dtype, shape and offsets"),
        ({"a": entry(offsets=(8, 0))}, b"12345678", "cannot take -8 bytes"),
        ({"a": entry(offsets=(0,))}, b"12345678", "no valid dtype, shape and offsets"),
        ({"a": {"dtype": "F32"}}, b"", "no valid dtype, shape and offsets"),
        ({"a": 3}, b"", "no valid dtype, shape and offsets"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(write(tmp_path / "x.safetensors", header, data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**63, MAX_HEADER_BYTES + 1, 100])
def test_absurd_header_lengths_are_refused_before_reading(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"claims {length:,} bytes"):
        read_header(write(tmp_path / "x.safetensors", b"{}", length=length))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_files_without_a_length_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="cut short"):
        read_header(tmp_path / "x.safetensors")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "x.safetensors")


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(min_value=0), flip=st.integers(min_value=0), value=st.integers(0, 255))
def test_any_damage_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, value: int
) -> None:
    """Whatever bytes are cut or changed, the reader raises its own error or returns tensors inside the file."""
    path = tmp_path_factory.mktemp("damage") / "x.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, path)
    content = bytearray(path.read_bytes())
    content[flip % len(content)] = value
    path.write_bytes(content[: len(content) - cut % len(content)])
    try:
        found, _ = read_header(path)
    except CheckpointError:
        return
    for tensor in found.values():
        assert values(tensor).size >= 0
