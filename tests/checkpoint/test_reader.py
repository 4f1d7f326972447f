"""Folders in the Hugging Face layouts, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from unmerge.checkpoint.reader import INDEX, open_checkpoint
from unmerge.checkpoint.tensor import borrowed, in_memory, matrix_shape, read_together, values
from unmerge.errors import CheckpointError
from unmerge.testing import quantise, tiny_model, write_checkpoint, write_safetensors

MODEL = tiny_model(np.random.default_rng(0), layers=2, hidden=16, vocabulary=24)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("shards", [1, 3])
def test_values_are_exact_in_every_layout(tmp_path: Path, dtype: str, shards: int) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", MODEL, dtype, shards=shards))
    assert list(checkpoint.tensors) == sorted(MODEL)
    assert checkpoint.notices == ()
    assert checkpoint.parameters == sum(value.size for value in MODEL.values())
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(values(tensor).reshape(tensor.shape), quantise(MODEL[name], dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_rows_that_are_borrowed_are_those_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", MODEL, dtype))
    for least, is_mapped in ((1, True), (1 << 22, False)):
        monkeypatch.setattr("unmerge.checkpoint.tensor.LEAST_MAPPED", least)
        for tensor in checkpoint.tensors.values():
            rows = matrix_shape(tensor.shape)[0]
            for start, stop in ((0, rows), (rows // 3, rows), (rows // 2, rows // 2)):
                found = borrowed(tensor, start, stop)
                np.testing.assert_array_equal(found, tensor.read(start, stop))
                assert found.flags.writeable == (not is_mapped or start == stop)


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_that_are_read_together_are_those_that_are_read(tmp_path: Path, shards: int) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", MODEL, shards=shards))
    for step in (1, 2):  # side by side, and with gaps
        tensors = list(checkpoint.tensors.values())[::step]
        found = read_together([*tensors, in_memory(tensors[0])])
        assert len(found) == len(tensors) + 1
        for tensor in tensors:
            held = found[id(tensor)]
            assert (held.name, held.shape, held.origin) == (tensor.name, tensor.shape, tensor.origin)
            np.testing.assert_array_equal(values(held), values(tensor))


def test_a_file_that_was_cut_is_told_where_tensors_are_read_together(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", MODEL)
    tensors = list(open_checkpoint(folder).tensors.values())
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read tensor .*: the file ended too early"):
        read_together(tensors)


def test_one_file_is_a_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", MODEL)
    assert list(open_checkpoint(folder / "model.safetensors").tensors) == sorted(MODEL)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", MODEL, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 shards named by .* are missing \(model-00002-of-00003"):
        open_checkpoint(folder)


def test_stale_index_is_refused_if_a_tensor_is_elsewhere(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", MODEL, shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"stale: it puts 'model\.extra\.weight' in model-00001-of-00002"):
        open_checkpoint(folder)


def test_stale_index_beside_a_single_file_is_told(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", MODEL)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.tensors) == sorted(MODEL)
    assert "is stale" in checkpoint.notices[0]


def test_unindexed_tensors_are_ignored_and_told(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", MODEL, shards=2)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    assert "lm_head.weight" not in checkpoint.tensors
    assert "1 tensors are in the shards but not in" in checkpoint.notices[0]
    assert "lm_head.weight" in checkpoint.notices[0]


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "..\\x", ""]
)
def test_shards_outside_the_folder_are_refused(tmp_path: Path, shard: str) -> None:
    folder = write_checkpoint(tmp_path / "m", MODEL, shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(CheckpointError, match="leaves the folder"):
        open_checkpoint(folder)


def test_shards_without_an_index_must_be_complete(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", MODEL, shards=3)
    (folder / INDEX).unlink()
    assert "no model.safetensors.index.json" in open_checkpoint(folder).notices[0]
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2 of 3 shards"):
        open_checkpoint(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"x": np.ones((2, 2))})
    write_safetensors(tmp_path / "b.safetensors", {"x": np.ones((2, 2))})
    with pytest.raises(CheckpointError, match="tensor 'x' is in two files"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "not a model: no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda folder: (folder / INDEX).write_text("{}"), "no weight_map"),
        (lambda folder: write_safetensors(folder / "model.safetensors", {}), "holds no tensors"),
    ],
)
def test_folders_that_are_no_models(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"expected a folder or a \.safetensors file"):
        open_checkpoint(tmp_path / "model.gguf")


def test_quantised_weights_are_refused_by_method(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", MODEL, config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(CheckpointError, match=r"quantised weights \(gptq\)"):
        open_checkpoint(folder)


class TestPickle:
    def folder(self, path: Path) -> Path:
        state = {name: torch.from_numpy(value).to(torch.bfloat16) for name, value in MODEL.items()}
        torch.save(state, path / "pytorch_model.bin")
        return path

    def test_refused_without_opt_in(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"only pickle weights .* pass --allow-pickle"):
            open_checkpoint(self.folder(tmp_path))

    def test_read_with_opt_in(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(self.folder(tmp_path), allow_pickle=True)
        for name, tensor in checkpoint.tensors.items():
            np.testing.assert_array_equal(values(tensor).reshape(tensor.shape), quantise(MODEL[name], "BF16"))

    def test_code_is_never_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return (Path.touch, (tmp_path / "owned",))  # type: ignore[return-value]

        torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="not a file of plain tensors"):
            open_checkpoint(tmp_path, allow_pickle=True)
        assert not (tmp_path / "owned").exists()

    def test_garbage_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"garbage")
        with pytest.raises(CheckpointError, match="not a file of plain tensors"):
            open_checkpoint(tmp_path, allow_pickle=True)
